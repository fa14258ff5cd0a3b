"""Single parts of the detector against the published numbers."""

import pytest
import torch

from dino_lightning.boxes import cxcywh_to_xyxy, inverse_sigmoid, paired_generalized_iou
from dino_lightning.model import postprocess
from dino_lightning.model.deformable_attention import MultiScaleDeformableAttention, deformable_attention
from dino_lightning.model.denoising import (
    Noise,
    denoising_attention_mask,
    denoising_queries,
    noised_targets,
    num_denoising_groups,
)
from dino_lightning.model.position_encoding import query_position_embedding, sine_divisors
from dino_lightning.model.query_selection import encoder_proposals
from dino_lightning.model.token_geometry import token_geometry
from dino_lightning.structures import ModelOutput, pad_targets
from tests.golden_recipe import golden_arrays, golden_json


def close(actual, expected, atol=1e-5):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=1e-5)


def test_generalized_iou():
    golden = golden_arrays("box_ops.npz")
    boxes1, boxes2 = cxcywh_to_xyxy(golden["b1"]), cxcywh_to_xyxy(golden["b2"])
    close(paired_generalized_iou(boxes1[:, None], boxes2[None]), golden["giou"])
    empty = cxcywh_to_xyxy(golden["zero_area"])
    close(paired_generalized_iou(empty[:, None], empty[None]), golden["giou_zero"])


def test_inverse_sigmoid():
    golden = golden_arrays("position_embeddings.npz")
    close(inverse_sigmoid(golden["invsig_in"]), golden["invsig_out"])


def test_image_position_embedding():
    golden = golden_arrays("position_embeddings.npz")
    valid = ~golden["mask"]
    cells = torch.stack((valid.sum(1).amax(1), valid.sum(2).amax(1)), dim=-1).float()[:, None]
    height, width = valid.shape[1:]
    geometry = token_geometry(
        [(height, width)], cells, cells.flip(-1) / cells.new_tensor([width, height]), padded=True, dim=256
    )
    assert torch.equal(geometry.padding_mask.view_as(valid), golden["mask"])
    close(geometry.position.transpose(1, 2).reshape(golden["pe_temperature20"].shape), golden["pe_temperature20"])


@pytest.mark.parametrize(("coordinates", "name"), [(4, "query_sine4"), (2, "query_sine2")])
def test_query_position_embedding(coordinates, name):
    golden = golden_arrays("position_embeddings.npz")
    close(query_position_embedding(golden["query_pos4"][..., :coordinates], sine_divisors(128)), golden[name])


def test_encoder_proposals_and_reference_points():
    golden = golden_arrays("encoder_proposals.npz")
    shapes = tuple((h, w) for h, w in golden["spatial_shapes"].tolist())
    ratios = golden["valid_ratios"]
    cells = (ratios.flip(-1) * ratios.new_tensor(shapes)).round()
    geometry = token_geometry(shapes, cells, ratios, padded=True)
    assert torch.equal(geometry.padding_mask, golden["mask_flatten"])
    logits, usable = encoder_proposals(geometry)
    assert torch.equal(logits.isinf(), golden["output_proposals_logit"].isinf())
    close(logits[usable], golden["output_proposals_logit"][usable])
    close(golden["memory"].masked_fill(~usable[..., None], 0.0), golden["output_memory"])
    close(geometry.reference_points(), golden["reference_points"])


def test_deformable_attention_core_with_gradients():
    golden = golden_arrays("msda.npz")
    shapes = tuple((h, w) for h, w in golden["spatial_shapes"].tolist())
    names = ("value", "sampling_locations", "attention_weights")
    inputs = {name: golden[f"core_{name}"].requires_grad_() for name in names}
    out = deformable_attention(inputs["value"], shapes, inputs["sampling_locations"], inputs["attention_weights"])
    close(out, golden["core_output"])
    out.backward(golden["core_grad_output"])
    for name in names:
        close(inputs[name].grad, golden[f"core_grad_{name}"], atol=2e-5)


@pytest.mark.parametrize("case", ["ref2", "ref4"])
def test_deformable_attention_module_with_gradients(case):
    golden = golden_arrays("msda.npz")
    shapes = tuple((h, w) for h, w in golden["spatial_shapes"].tolist())
    module = MultiScaleDeformableAttention(hidden_dim=32, num_levels=3, num_heads=4, num_points=2)
    close(module.sampling_offsets.bias.detach(), golden["init_sampling_offsets_bias"])
    module.load_state_dict({name: golden[f"module_{name}"] for name in module.state_dict()})
    query, reference, source = (
        golden[name].requires_grad_() for name in ("module_query", f"module_{case}_ref", "module_src")
    )
    out = module(query, reference, source, shapes, golden["module_padding_mask"])
    close(out, golden[f"module_{case}_output"])
    out.backward(golden["core_grad_output"])
    for name, tensor in (("query", query), ("ref", reference), ("src", source)):
        close(tensor.grad, golden[f"module_{case}_grad_{name}"], atol=2e-5)
    for name, parameter in module.named_parameters():
        close(parameter.grad, golden[f"module_{case}_gradparam_{name}"], atol=2e-5)


def test_published_offset_start():
    module = MultiScaleDeformableAttention(hidden_dim=256, num_levels=4, num_heads=8, num_points=4)
    close(
        module.sampling_offsets.bias.detach(),
        golden_arrays("msda.npz")["init_sampling_offsets_bias_256_4_8_4"],
    )


def flat_draws_to_noise(draws, counts, groups, label_noise_ratio):
    """The published draws run over the boxes that exist, repetition by repetition; ours over padded slots."""
    repetitions, batch, most = 2 * groups, len(counts), max(counts)
    noise = Noise(
        flip=torch.ones(repetitions, batch, most),
        label=torch.zeros(repetitions, batch, most, dtype=torch.int64),
        sign=torch.ones(repetitions, batch, most, 4),
        magnitude=torch.zeros(repetitions, batch, most, 4),
    )
    new_labels = iter(draws["draw_new_label"].tolist() if "draw_new_label" in draws else [])
    entry = 0
    for repetition in range(repetitions):
        for image, count in enumerate(counts):
            for box in range(count):
                slot = (repetition, image, box)
                if "draw_p_label" in draws:
                    noise.flip[slot] = draws["draw_p_label"][entry]
                    if draws["draw_p_label"][entry] < label_noise_ratio * 0.5:
                        noise.label[slot] = next(new_labels)
                if "draw_rand_part" in draws:
                    noise.sign[slot] = draws["draw_rand_sign01"][entry] * 2 - 1
                    noise.magnitude[slot] = draws["draw_rand_part"][entry]
                entry += 1
    assert next(new_labels, None) is None
    return noise


CDN_META = golden_json("cdn_meta.json")


@pytest.mark.parametrize("case", [case for case in CDN_META if case != "all_empty"])
def test_denoising_queries(case):
    golden, meta = golden_arrays("cdn.npz"), CDN_META[case]
    part = {key.removeprefix(f"{case}/"): value for key, value in golden.items() if key.startswith(f"{case}/")}
    counts = meta["box_counts"]
    groups = num_denoising_groups(meta["dn_number_config"], max(counts), "published")
    assert groups == meta["dn_meta"]["num_dn_group"]
    targets = pad_targets([(part[f"target{i}/boxes"], part[f"target{i}/labels"]) for i in range(len(counts))])
    noise = flat_draws_to_noise(part, counts, groups, meta["label_noise_ratio"])
    scales = {"label_noise_ratio": meta["label_noise_ratio"], "box_noise_scale": meta["box_noise_scale"]}

    labels, boxes = noised_targets(targets, noise, **scales)
    real = targets.valid.expand(2 * groups, -1, -1)
    assert torch.equal(labels[real], part["noised_labels_flat"])
    close(boxes[real], part["noised_boxes_flat_cxcywh"])

    embedding = torch.nn.Embedding.from_pretrained(part["label_embedding"])
    queries = denoising_queries(targets, noise, embedding, **scales)
    assert 2 * queries.num_groups * queries.max_boxes == meta["dn_meta"]["pad_size"]
    close(queries.content, part["query_label"])
    close(queries.reference_logits, part["query_bbox_unsigmoid"], atol=1e-4)
    mask = denoising_attention_mask(
        num_groups=groups, max_boxes=max(counts), num_queries=meta["num_queries"], device="cpu"
    )
    assert torch.equal(mask, part["attn_mask"].bool())


def test_denoising_of_empty_images():
    meta = CDN_META["all_empty"]
    assert meta["dn_meta"] == {
        "pad_size": 0,
        "num_dn_group": num_denoising_groups(meta["dn_number_config"], 0, "published"),
    }
    mask = denoising_attention_mask(num_groups=1, max_boxes=0, num_queries=5, device="cpu")
    assert mask.shape == (5, 5)
    assert not mask.any()


def test_postprocess():
    golden = golden_arrays("postprocess.npz")
    output = ModelOutput(
        pred_logits=golden["pred_logits"][None],
        pred_boxes=golden["pred_boxes"][None],
        encoder_logits=golden["pred_logits"],
        encoder_boxes=golden["pred_boxes"],
    )
    sizes = [(h, w) for h, w in golden["target_sizes_hw"].tolist()]
    for index, found in enumerate(postprocess(output, sizes)):
        close(found.scores, golden[f"img{index}/scores"])
        assert torch.equal(found.labels, golden[f"img{index}/labels"])
        close(found.boxes_xyxy, golden[f"img{index}/boxes"], atol=1e-3)
        xywh = torch.tensor([entry["bbox"] for entry in found.to_coco(7)])
        close(xywh, golden[f"img{index}/boxes_xywh"], atol=2e-3)
    for index, found in enumerate(postprocess(output, sizes, max_detections=50, nms_iou_threshold=0.5)):
        prefix = f"img{index}/nms_select50_iou0.5"
        close(found.scores, golden[f"{prefix}/scores"])
        assert torch.equal(found.labels, golden[f"{prefix}/labels"])
        close(found.boxes_xyxy, golden[f"{prefix}/boxes"], atol=1e-3)
