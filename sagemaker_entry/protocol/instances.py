"""GPUs, memory, network and price of the instance types worth training DINO on."""

from __future__ import annotations

from dataclasses import dataclass

PRICES_DATE = "2026-09"
PRICES_SOURCE = "AWS list prices for SageMaker training, read between 2026-07 and 2026-09; us-east-1 unless marked"
SPOT_DISCOUNT = (0.4, 0.7)  # the usual range according to AWS; it varies by hour and region


@dataclass(frozen=True)
class Instance:
    """One instance type.

    Attributes:
        gpus: how many GPUs one instance has.
        gpu: the GPU model.
        gpu_memory: GB of each GPU.
        memory: GiB of main memory.
        network: baseline bandwidth in Gb/s, or the full bandwidth of a type that does not burst.
        price: dollars an hour for on-demand training; None where no price was read, which an account can ask AWS for.
        region: the region of the price.
    """

    gpus: int
    gpu: str
    gpu_memory: int
    memory: int
    network: float
    price: float | None
    region: str = "us-east-1"


def _g5(gpus: int, memory: int, network: float, price: float, region: str = "us-east-1") -> Instance:
    return Instance(gpus, "A10G", 24, memory, network, price, region)


def _g6(gpus: int, memory: int, network: float, price: float) -> Instance:
    return Instance(gpus, "L4", 24, memory, network, price, "us-west-2")


def _g4dn(gpus: int, memory: int, network: float, price: float | None = None) -> Instance:
    return Instance(gpus, "T4", 16, memory, network, price)


def _g6e(gpus: int, memory: int, network: float) -> Instance:
    return Instance(gpus, "L40S", 48, memory, network, None)


INSTANCES = {
    "ml.g5.xlarge": _g5(1, 16, 2.5, 1.408),
    "ml.g5.2xlarge": _g5(1, 32, 5, 1.515),
    "ml.g5.4xlarge": _g5(1, 64, 10, 2.03),
    "ml.g5.8xlarge": _g5(1, 128, 25, 3.06),
    "ml.g5.16xlarge": _g5(1, 256, 25, 5.12, "us-west-2"),
    "ml.g5.12xlarge": _g5(4, 192, 40, 7.09),
    "ml.g5.24xlarge": _g5(4, 384, 50, 10.18, "us-west-2"),
    "ml.g5.48xlarge": _g5(8, 768, 100, 20.36, "us-west-2"),
    "ml.g6.xlarge": _g6(1, 16, 2.5, 1.127),
    "ml.g6.2xlarge": _g6(1, 32, 5, 1.222),
    "ml.g6.4xlarge": _g6(1, 64, 10, 1.654),
    "ml.g6.8xlarge": _g6(1, 128, 25, 2.518),
    "ml.g6.12xlarge": _g6(4, 192, 40, 5.752),
    "ml.g6.24xlarge": _g6(4, 384, 50, 8.344),
    "ml.g6.48xlarge": _g6(8, 768, 100, 16.688),
    "ml.g4dn.xlarge": _g4dn(1, 16, 5, 0.736),
    "ml.g4dn.2xlarge": _g4dn(1, 32, 10),
    "ml.g4dn.4xlarge": _g4dn(1, 64, 20),
    "ml.g4dn.8xlarge": _g4dn(1, 128, 50),
    "ml.g4dn.16xlarge": _g4dn(1, 256, 50),
    "ml.g4dn.12xlarge": _g4dn(4, 192, 50),
    "ml.g6e.xlarge": _g6e(1, 32, 2.5),
    "ml.g6e.2xlarge": _g6e(1, 64, 5),
    "ml.g6e.4xlarge": _g6e(1, 128, 20),
    "ml.g6e.8xlarge": _g6e(1, 256, 25),
    "ml.g6e.16xlarge": _g6e(1, 512, 35),
    "ml.g6e.12xlarge": _g6e(4, 384, 100),
    "ml.g6e.24xlarge": _g6e(4, 768, 200),
    "ml.g6e.48xlarge": _g6e(8, 1536, 400),
    "ml.p4d.24xlarge": Instance(8, "A100", 40, 1152, 400, None),
    "ml.p4de.24xlarge": Instance(8, "A100", 80, 1152, 400, None),
    "ml.p5.4xlarge": Instance(1, "H100", 80, 256, 100, None),
    "ml.p5.48xlarge": Instance(8, "H100", 80, 2048, 3200, None),
}
DEFAULT_TYPE = "ml.g5.2xlarge"


def full_type_name(name: str) -> str:
    """The name that SageMaker uses for an instance type: "ml.g5.2xlarge" for "g5.2xlarge"."""
    return name if name.startswith("ml.") else f"ml.{name}"
