"""prototype_cam, forward and backward, against copies of the features.

The floor is a copy of so many bytes: features read twice forward (prototypes, cosines) and twice backward (prototypes'
gradients, features'), and their gradient written; of levels the same for the resized map, and the rows of each level
that it reads, forward and backward, beside the level's gradient. P1 and P2 are SFC's four levels with 21 and 81
classes; P3 is one tensor. Each image has three classes in blobs, background among them.

`bmm` is the fastest form in plain PyTorch that we know: one-hot seeds and prototypes as two batched products over
flattened maps, cosines divided afterwards. `broadcast` is the authors' form, which makes tensors [N, C, D, H, W].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

import wsss_ops
from wsss_ops import reference

from ..measure import Function
from .case import Case

Features = Tensor | list[Tensor]
LEVELS = ((128, 128), (128, 64), (256, 32), (256, 32))  # channels, side
SIDE = 32
BROADCAST_BYTES = {"cpu": 2**28, "cuda": 2**32}  # of one of its tensors, at most: it holds several at once


def prototype_case(
    name: str, device: str, images: int, classes: int, levels: Sequence[tuple[int, int]], channels_last: bool
) -> Case:
    channels = sum(d for d, _ in levels)
    layout = "channels_last" if channels_last else "NCHW"
    numbers = images * channels * SIDE**2
    moved = 5 * numbers
    if len(levels) > 1:  # each pixel of the map reads two rows
        moved += images * sum(d * side * (2 * min(side, 2 * SIDE) + side) for d, side in levels)

    def build(on: torch.device, compiled: bool) -> Mapping[str, Function]:
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        maps = [
            torch.randn(images, d, side, side, device=on).to(memory_format=memory_format).requires_grad_()
            for d, side in levels
        ]
        cam, tags = blobs(images, classes, on)
        gradient = torch.randn(images, classes, SIDE, SIDE, device=on)
        features: Features = maps[0] if len(maps) == 1 else maps

        def step(function: Callable[[Features, Tensor, Tensor], Tensor]) -> Function:
            return lambda: torch.autograd.grad(function(features, cam, tags), maps, gradient)

        functions: dict[str, Function] = {
            "floor: copy": copy_of(moved // 2, on),
            "wsss_ops": step(wsss_ops.prototype_cam),
            "bmm": step(by_products),
        }
        if 4 * numbers * classes <= BROADCAST_BYTES[device]:
            functions["broadcast"] = step(by_broadcast)
        if compiled:
            functions["bmm compiled"] = step(torch.compile(by_products))
        return functions

    sizes = ", ".join(f"D{d} {side}x{side}" for d, side in levels)
    return Case(
        name=f"{name} C{classes} {layout}",
        op="prototype",
        work=f"N{images} C{classes} {sizes} -> {SIDE}x{SIDE} fp32, forward and backward",
        device=device,
        moved_bytes=4 * moved,
        build=build,
    )


def copy_of(numbers: int, device: torch.device) -> Function:
    """On a CPU in pieces of 16 MB, for which no allocator asks the system for new memory each time."""
    whole = torch.ones(numbers, device=device)
    pieces = whole.split(2**22 if device.type == "cpu" else numbers)

    def copy() -> None:
        for piece in pieces:
            piece.clone()

    return copy


def blobs(images: int, classes: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """A CAM masked by its tags, which are background and two other classes, and these."""
    tags = torch.zeros(images, classes, dtype=torch.bool, device=device)
    tags[:, 0] = True
    tags.scatter_(1, 1 + torch.rand(images, classes - 1, device=device).argsort(1)[:, :2], True)
    coarse = torch.rand(images, classes, 6, 6, device=device)
    cam = F.interpolate(coarse, (SIDE, SIDE), mode="bilinear") * tags[:, :, None, None]
    cam[:, 0] = 1 - cam[:, 1:].amax(1)
    return cam, tags


def concatenated(features: Features, size: torch.Size) -> Tensor:
    if isinstance(features, Tensor):
        return features
    normalised = [level / (level.norm(dim=1, keepdim=True) + 1e-5) for level in features]
    return torch.cat([F.interpolate(level, size, mode="bilinear") for level in normalised], 1)


def one_hot_seeds(cam: Tensor, tags: Tensor) -> Tensor:
    """[N, H * W, C]"""
    winner = torch.cat([0.3 * cam[:, :1], cam[:, 1:]], 1).argmax(1).flatten(1)
    return F.one_hot(winner, cam.shape[1]) * tags.gather(1, winner)[..., None]


def by_products(features: Features, cam: Tensor, tags: Tensor) -> Tensor:
    pixels = concatenated(features, cam.shape[2:]).flatten(2)
    seeds = one_hot_seeds(cam, tags).to(pixels.dtype)
    prototypes = torch.bmm(pixels, seeds) / seeds.sum(1, keepdim=True).clamp_min(1)  # [N, D, C]
    dots = torch.bmm(prototypes.transpose(1, 2), pixels)  # [N, C, H * W]
    lengths = prototypes.norm(dim=1).clamp_min(1e-8)[:, :, None] * pixels.norm(dim=1).clamp_min(1e-8)[:, None]
    return (dots / lengths).relu().view_as(cam)


def by_broadcast(features: Features, cam: Tensor, tags: Tensor) -> Tensor:
    pixels = concatenated(features, cam.shape[2:])
    seeds = one_hot_seeds(cam, tags).to(pixels.dtype).transpose(1, 2).unflatten(2, cam.shape[2:])
    prototypes = (pixels[:, None] * seeds[:, :, None]).sum((3, 4)) / seeds[0, 0].numel()  # [N, C, D]
    return F.cosine_similarity(pixels[:, None], prototypes[..., None, None], dim=2).relu()


def overhead(device: torch.device) -> dict[str, Function]:
    features, cam = torch.randn(1, 4, 2, 2, device=device), torch.rand(1, 2, 2, 2, device=device)
    tags = torch.ones(1, 2, dtype=torch.bool, device=device)
    return {
        "wsss_ops": lambda: wsss_ops.prototype_cam(features, cam, tags),
        "reference": lambda: reference.prototype_cam(features, cam, tags),
    }


CASES = [
    prototype_case(f"{name}{suffix}", device, images, classes, levels, channels_last)
    for device, suffix, few, many in (("cpu", "c", 2, 4), ("cuda", "", 20, 16))
    for name, images, classes, levels in (
        ("P1", few, 21, LEVELS),
        ("P2", few, 81, LEVELS),
        ("P3", many, 21, ((768, SIDE),)),
    )
    for channels_last in (False, True)
]
