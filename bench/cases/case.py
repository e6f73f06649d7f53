"""What a benchmark case is.

A case builds functions of no arguments. The first is the floor, the least that the work can cost on the machine at hand
(a copy, a matrix product); the others do the work itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ..measure import Function


@dataclass(frozen=True)
class Case:
    name: str
    op: str
    work: str
    device: str
    build: Callable[[torch.device, bool], Mapping[str, Function]]  # (device, with torch.compile)
    moved_bytes: int = 0  # by the floor, read and written
    flops: int = 0  # of the floor


# How matrices are multiplied: tensors of float32 or bfloat16; float32 ones in TF32; float32 ones under autocast.
Precision = Literal["fp32", "bf16", "tf32", "autocast"]


def arithmetic(precision: Precision, function: Function) -> Function:
    """The function with GPUs' matrix units set so; what was set before is set again after each call."""
    if precision == "autocast":

        def under_autocast() -> object:
            with torch.autocast("cuda", torch.bfloat16):
                return function()

        return under_autocast

    def run() -> object:
        backends: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
        before = [backend.allow_tf32 for backend in backends]
        for backend in backends:
            backend.allow_tf32 = precision == "tf32"
        try:
            return function()
        finally:
            for backend, allowed in zip(backends, before, strict=True):
                backend.allow_tf32 = allowed

    return run
