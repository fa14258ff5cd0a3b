"""ONNX graphs made simple for their readers: what only constants decide is computed, and older operator sets."""

from __future__ import annotations

from typing import Any

from dino_lightning.export.onnx_model import onnxruntime_session

QUANTIZED = ("DequantizeLinear", "QuantizeLinear")  # left as they are: the weights stay as small as they are
REDUCTIONS = ("ReduceMax", "ReduceMean", "ReduceMin")  # their axes are an input since operator set 18


def fold_constants(model: Any) -> None:
    """Replace nodes of an `onnx.ModelProto` whose inputs are all constant by what onnxruntime computes for them.

    Nodes that no output needs are left out. Names of inputs and outputs, and numbers, stay as they are.
    """
    import numpy as np
    import onnx

    graph = model.graph
    constant = {value.name for value in graph.initializer}
    fixed, others = [], []
    for node in graph.node:
        if node.op_type not in QUANTIZED and all(not name or name in constant for name in node.input):
            fixed.append(node)
            constant.update(node.output)
        else:
            others.append(node)
    read = {name for node in others for name in node.input} | {value.name for value in graph.output}
    results = sorted({name for node in fixed for name in node.output if name} & read)
    if results:
        needed = {name for node in fixed for name in node.input}
        part = onnx.helper.make_graph(
            fixed,
            "constants",
            [],
            [onnx.ValueInfoProto(name=name) for name in results],
            initializer=[value for value in graph.initializer if value.name in needed],
        )
        alone = onnx.helper.make_model(part, opset_imports=model.opset_import, ir_version=model.ir_version)
        values = onnxruntime_session(alone.SerializeToString(), ["CPUExecutionProvider"]).run(results, {})
        graph.initializer.extend(
            onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in zip(results, values, strict=True)
        )
    needed, kept = {value.name for value in graph.output}, []
    for node in reversed(others):
        if needed.intersection(node.output):
            needed.update(node.input)
            kept.append(node)
    stored = [value for value in graph.initializer if value.name in needed]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(reversed(kept))
    graph.initializer.extend(stored)


def fold_shapes(model: Any) -> None:
    """Replace `Shape` of tensors whose sizes are known by the sizes, and fold what depends on them, until none is left.

    Constants of the model are folded.
    """
    import numpy as np
    import onnx

    graph = model.graph
    while True:
        fold_constants(model)
        known = {}
        inferred = onnx.shape_inference.infer_shapes(model).graph
        for value in (*graph.input, *inferred.value_info):
            dims = value.type.tensor_type.shape.dim
            if value.type.tensor_type.HasField("shape") and all(dim.HasField("dim_value") for dim in dims):
                known[value.name] = [dim.dim_value for dim in dims]
        found = [node for node in graph.node if node.op_type == "Shape" and node.input[0] in known]
        if not found:
            return
        for node in found:
            limits = {entry.name: entry.i for entry in node.attribute}
            sizes = np.array(known[node.input[0]][limits.get("start", 0) : limits.get("end")], dtype=np.int64)
            graph.initializer.append(onnx.numpy_helper.from_array(sizes, node.output[0]))
            graph.node.remove(node)


def name_types(model: Any) -> None:
    """Replace `CastLike`, which few runtimes know, by `Cast` to the type that the other tensor has."""
    import onnx

    graph = model.graph
    inferred = onnx.shape_inference.infer_shapes(model).graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *inferred.value_info)}
    types |= {value.name: value.data_type for value in graph.initializer}
    for node in graph.node:
        if node.op_type == "CastLike" and types.get(node.input[1]):
            kind = types[node.input.pop()]
            del node.attribute[:]
            node.op_type = "Cast"
            node.attribute.append(onnx.helper.make_attribute("to", kind))


def lower_opset(model: Any, opset: int) -> None:
    """Rewrite a folded `onnx.ModelProto` of operator set 18 for set 16 or 17.

    Of the operators in our graphs, reductions got their axes as an input with 18, and layer normalisation came with 17.
    """
    import onnx

    graph = model.graph
    stored = {value.name: onnx.numpy_helper.to_array(value) for value in graph.initializer if value.data_type == 7}
    nodes = []
    for node in graph.node:
        if node.op_type in REDUCTIONS and len(node.input) > 1:
            axes = stored[node.input.pop()]
            kept = [entry for entry in node.attribute if entry.name != "noop_with_empty_axes"]
            del node.attribute[:]
            node.attribute.extend(kept)
            node.attribute.append(onnx.helper.make_attribute("axes", axes.flatten().tolist()))
        nodes += _layer_norm(node) if node.op_type == "LayerNormalization" and opset < 17 else [node]
    del graph.node[:]
    graph.node.extend(nodes)
    for entry in model.opset_import:
        if entry.domain == "":
            entry.version = opset
    read = {name for node in nodes for name in node.input}
    needed = [value for value in graph.initializer if value.name in read] + _numbers(nodes)
    del graph.initializer[:]
    graph.initializer.extend(needed)


def _layer_norm(node: Any) -> list[Any]:
    """A layer normalisation over the last axis in simpler operators."""
    import onnx

    settings = {entry.name: onnx.helper.get_attribute_value(entry) for entry in node.attribute}
    assert settings.get("axis", -1) == -1, settings
    name, epsilon = node.output[0], settings.get("epsilon", 1e-5)

    def made(kind: str, inputs: list[str], output: str, **more: Any) -> Any:
        return onnx.helper.make_node(kind, inputs, [output], name=f"{output}/{kind}", **more)

    parts = [
        f"{name}/{part}" for part in ("mean", "centred", "square", "variance", "shifted", "root", "unit", "scaled")
    ]
    mean, centred, square, variance, shifted, root, unit, scaled = parts
    scale, shift = node.input[1], node.input[2]
    return [
        made("ReduceMean", [node.input[0]], mean, axes=[-1], keepdims=1),
        made("Sub", [node.input[0], mean], centred),
        made("Mul", [centred, centred], square),
        made("ReduceMean", [square], variance, axes=[-1], keepdims=1),
        made("Add", [variance, f"{EPSILON}{epsilon!r}"], shifted),
        made("Sqrt", [shifted], root),
        made("Div", [centred, root], unit),
        made("Mul", [unit, scale], scaled),
        made("Add", [scaled, shift], name),
    ]


EPSILON = "layer_norm_epsilon_"


def _numbers(nodes: list[Any]) -> list[Any]:
    """The stored numbers that `_layer_norm` refers to."""
    import numpy as np
    import onnx

    names = sorted({name for node in nodes for name in node.input if name.startswith(EPSILON)})
    return [onnx.numpy_helper.from_array(np.float32(float(name[len(EPSILON) :])), name) for name in names]
