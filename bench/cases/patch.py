"""patch_split and patch_merge against copies: T1 has the size of a PPL feature map, T1c a size for CPUs."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

import wsss_ops
from wsss_ops import _backend, reference

from ..measure import Function
from .case import Case


def patch_case(
    name: str, device: str, shape: tuple[int, int, int, int], grid: tuple[int, int], direction: str, channels_last: bool
) -> Case:
    n, d, height, width = shape
    numbers = n * d * height * width
    layout = "channels_last" if channels_last else "NCHW"

    def build(on: torch.device, compiled: bool) -> Mapping[str, Function]:
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        x = torch.randn(shape, device=on).to(memory_format=memory_format)
        patches = wsss_ops.patch_split(x, grid)

        operation = f"patch_{direction}"
        fused, twin = getattr(wsss_ops, operation), getattr(reference, operation)
        source, ready = (x, torch.empty_like(patches)) if direction == "split" else (patches, torch.empty_like(x))
        arguments = (grid,) if direction == "split" else (grid, (height, width))

        def plain(source: Tensor) -> Tensor:
            result: Tensor = twin(source, *arguments)
            return result.contiguous()  # a crop is a view

        functions: dict[str, Function] = {
            "floor: clone": source.clone,
            "wsss_ops": lambda: fused(source, *arguments),
            # Into memory that is there.
            "its kernel alone": lambda: _backend.call(operation, on, source, ready, *grid, channels_last),
            "reference": lambda: plain(source),
        }
        if compiled:
            faster = torch.compile(plain)
            functions["reference compiled"] = lambda: faster(source)
        return functions

    return Case(
        name=f"{name} {direction} {layout}",
        op="patch",
        work=f"N{n} D{d} {height}x{width} fp32, grid {grid[0]}x{grid[1]}",
        device=device,
        moved_bytes=2 * 4 * numbers,
        build=build,
    )


def overhead(device: torch.device) -> dict[str, Function]:
    x = torch.randn(1, 1, 4, 4, device=device)
    return {
        "wsss_ops": lambda: wsss_ops.patch_split(x, (2, 2)),
        "reference": lambda: reference.patch_split(x, (2, 2)),
    }


CASES = [
    patch_case(name, device, shape, (4, 4), direction, channels_last)
    for name, device, shape in [
        ("T1c", "cpu", (8, 512, 32, 32)),
        ("T1", "cuda", (16, 1024, 32, 32)),
        ("T1 uneven", "cuda", (16, 512, 63, 65)),
    ]
    for direction in ("split", "merge")
    for channels_last in (False, True)
]
