"""The two ceilings of a machine: how fast it copies memory, and how fast it multiplies matrices.

Every other case has its own floor at its own size; these say what the machine reaches at sizes that fill it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..measure import Function
from .case import Case, Precision, arithmetic


def copy_case(device: str, numbers: int) -> Case:
    def build(on: torch.device, compiled: bool) -> Mapping[str, Function]:
        source = torch.randn(numbers, device=on)
        target = torch.empty_like(source)
        return {"floor: copy": lambda: target.copy_(source)}

    return Case(
        name="copy",
        op="ceilings",
        work=f"{4 * numbers / 2**20:.0f} MiB into memory that is there",
        device=device,
        moved_bytes=8 * numbers,
        build=build,
    )


def product_case(device: str, side: int, precision: Precision) -> Case:
    def build(on: torch.device, compiled: bool) -> Mapping[str, Function]:
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        a, b = (torch.randn(side, side, device=on).to(dtype) for _ in range(2))
        return {"floor: mm": arithmetic(precision, lambda: a @ b)}

    return Case(
        name=f"matrix product {precision}",
        op="ceilings",
        work=f"{side} x {side} x {side}",
        device=device,
        flops=2 * side**3,
        build=build,
    )


CASES = [
    copy_case("cpu", 2**25),
    product_case("cpu", 2048, "fp32"),
    copy_case("cuda", 2**28),
    *(product_case("cuda", 8192, precision) for precision in ("fp32", "tf32", "bf16")),
]
