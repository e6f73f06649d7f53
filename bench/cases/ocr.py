"""ocr_loss, forward and backward, against a copy of three times the logits' bytes.

Read once forward, read and written once backward: no loss of logits that lie in memory costs less. O1 and O2 are
full-size logits of 21 and 81 classes, O3 small ones that are resized to that size; its floor is that of the resized
logits, what a loss would move that gets them from a separate resize. Nearly all pixels are out-of-candidate: noise of
which three classes are tagged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

import wsss_ops
from wsss_ops import reference

from ..measure import Function
from .case import Case


def ocr_case(
    name: str,
    device: str,
    shape: tuple[int, int, int, int],
    *,
    size: tuple[int, int] | None = None,
    channels_last: bool = False,
    prior: bool = False,
) -> Case:
    n, classes, height, width = shape
    layout = "channels_last" if channels_last else "NCHW"
    to = "" if size is None else f" -> {size[0]}x{size[1]}"
    numbers = n * classes * (height * width if size is None else size[0] * size[1])

    def build(on: torch.device, compiled: bool) -> Mapping[str, Function]:
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        logits = torch.randn(shape, device=on).to(memory_format=memory_format).requires_grad_()
        tags = torch.zeros(n, classes, dtype=torch.bool, device=on)
        tags[:, 0] = True
        tags.scatter_(1, 1 + torch.rand(n, classes - 1, device=on).argsort(1)[:, :2], True)
        table = torch.rand(classes, classes, device=on) if prior else None

        def train(loss: Callable[..., Any]) -> Tensor:
            value = loss(logits, tags, prior=table, threshold=0.3 if prior else 0.0, size=size)
            gradient: Tensor = torch.autograd.grad(value, logits)[0]
            return gradient

        floor = torch.empty(numbers * 3 // 2, device=on)
        functions: dict[str, Function] = {
            "floor: 3/2 clones": floor.clone,
            "wsss_ops": lambda: train(wsss_ops.ocr_loss),
            "reference": lambda: train(reference.ocr_loss),
        }
        if compiled:
            faster = torch.compile(reference.ocr_loss)
            functions["reference compiled"] = lambda: train(faster)
        return functions

    return Case(
        name=f"{name} C{classes} {layout}{' with prior' if prior else ''}",
        op="ocr",
        work=f"N{n} C{classes} {height}x{width}{to} fp32, forward and backward",
        device=device,
        moved_bytes=3 * 4 * numbers,
        build=build,
    )


def overhead(device: torch.device) -> dict[str, Function]:
    logits, tags = torch.randn(1, 2, 2, 2, device=device), torch.ones(1, 2, device=device)
    return {
        "wsss_ops": lambda: wsss_ops.ocr_loss(logits, tags),
        "reference": lambda: reference.ocr_loss(logits, tags),
    }


CASES = [
    case
    for device, suffix, n, side, small in [("cpu", "c", 2, 256, 32), ("cuda", "", 16, 512, 64)]
    for case in [
        ocr_case(f"O1{suffix}", device, (n, 21, side, side)),
        ocr_case(f"O1{suffix}", device, (n, 21, side, side), channels_last=True),
        ocr_case(f"O1{suffix}", device, (n, 21, side, side), prior=True),
        ocr_case(f"O2{suffix}", device, (n, 81, side, side)),
        ocr_case(f"O2{suffix}", device, (n, 81, side, side), channels_last=True),
        ocr_case(f"O3{suffix}", device, (n, 21, small, small), size=(side, side)),
        ocr_case(f"O3{suffix}", device, (n, 81, small, small), size=(side, side)),
    ]
]
