"""The table of cases, a file per operator or system: what is measured, and what it competes with."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..measure import Function
from . import ceilings, deform, esol, graphs, ocr, patch, ppl, prototype, sfc
from .case import Case

CASES: list[Case] = [
    *ceilings.CASES, *deform.CASES, *esol.CASES, *graphs.CASES, *ocr.CASES, *patch.CASES, *ppl.CASES, *prototype.CASES,
    *sfc.CASES,
]  # fmt: skip
# Per operator, one of its functions and calls on inputs too small to matter.
OVERHEADS: dict[str, tuple[str, Callable[[torch.device], dict[str, Function]]]] = {
    "deform": ("deform_conv2d", deform.overhead),
    "ocr": ("ocr_loss", ocr.overhead),
    "patch": ("patch_split", patch.overhead),
    "prototype": ("prototype_cam", prototype.overhead),
}
OPERATORS = sorted({case.op for case in CASES})
