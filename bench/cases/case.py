"""What a benchmark case is.

A case builds functions of no arguments. The first is the floor, the least that the work can cost on the machine at hand
(a copy, a matrix product); the others do the work itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

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
