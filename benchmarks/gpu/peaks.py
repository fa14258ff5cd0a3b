"""What devices can do by their data sheets: dense matrix products in TFLOP/s, and memory in GB/s.

Sources: NVIDIA's data sheets of each product (https://www.nvidia.com/en-us/data-center/PRODUCT/). Those of H200, H100,
L40S and L4 give tensor cores with sparsity: halved here. H200: its data sheet of 2024. H100: the columns SXM, PCIe and
NVL of its data sheet. A100: the data sheet of the 80 GB versions, and of the 40 GB ones for their memory. L4, L40S, T4
and V100 (SXM2 and PCIe): their data sheets, for the last two with float16 on tensor cores. A10G: AWS's own part, after
the comparison in https://www.baseten.co/blog/nvidia-a10-vs-a10g-for-ml-model-inference/ (70 TFLOP/s in half precision
where an A10 has 125). Plain float32 is that of CUDA cores.
"""

from __future__ import annotations

import re

# (bf16, fp16, TF32, fp32, GB/s); None: the device does not have it.
_COLUMNS = ("bf16", "fp16", "tf32", "fp32", "gb_per_second")
_PEAKS: dict[str, tuple[float | None, ...]] = {
    "H200": (989.4, 989.4, 494.7, 66.9, 4800),
    "H100 NVL": (835.5, 835.5, 417.7, 60.0, 3900),
    "H100 PCIE": (756.0, 756.0, 378.0, 51.0, 2000),
    "H100": (989.4, 989.4, 494.7, 66.9, 3350),
    "A100 PCIE 80GB": (312.0, 312.0, 156.0, 19.5, 1935),
    "A100 80GB": (312.0, 312.0, 156.0, 19.5, 2039),
    "A100": (312.0, 312.0, 156.0, 19.5, 1555),
    "A10G": (70.0, 70.0, 35.0, 35.0, 600),
    "L40S": (362.0, 362.0, 183.0, 91.6, 864),
    "L4": (121.0, 121.0, 60.0, 30.3, 300),
    "T4": (None, 65.0, None, 8.1, 320),
    "V100 PCIE": (None, 112.0, None, 14.0, 900),
    "V100": (None, 125.0, None, 15.7, 900),
}
PROJECTED = "A10G"  # the device that figures are projected to


def peaks_of(device: str) -> dict[str, float]:
    """The peaks of a device by what `torch.cuda.get_device_name` calls it; empty if there is no entry.

    Returns:
        TFLOP/s as `bf16`, `fp16`, `tf32` and `fp32`, without those that it does not have, and `gb_per_second`.
    """
    words = set(re.split(r"[^A-Z0-9]+", device.upper()))
    for name, values in _PEAKS.items():  # the more particular come first
        if set(name.split()) <= words:
            return {column: value for column, value in zip(_COLUMNS, values, strict=True) if value is not None}
    return {}


def projected_seconds(
    products: float, others: float, *, tflops: float, gb_per_second: float, precision: str = "bf16"
) -> float:
    """Seconds on an A10G: a projection, no measurement.

    Products are assumed to reach the same share of the device's ceiling there, everything else the same share of its
    memory bandwidth; what an older device does in more instructions (atomics, asynchronous copies), its smaller cache
    and the host are not in it.

    Args:
        products: seconds here in matrix products and convolutions.
        others: seconds here in other kernels.
        tflops: ceiling of products here, in this precision.
        gb_per_second: ceiling of memory here.
        precision: `bf16`, `fp16`, `tf32` or `fp32`.
    """
    there = peaks_of(PROJECTED)
    return products * tflops / there[precision] + others * gb_per_second / there["gb_per_second"]
