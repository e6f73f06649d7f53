"""Prototype CAM: how much each pixel's feature looks like the mean feature of each class's own pixels.

Zhao et al., SFC: Shared Feature Calibration in Weakly Supervised Semantic Segmentation, AAAI 2024 (arXiv 2401.11719),
the method's prototype CAM: relu(cos(F_p, P_c)), of pixel p's feature F_p and the prototype P_c, the mean feature of the
pixels that seed class c. Seeds, prototypes, cosine and the levels side by side are the paper's, as its published code
has them; that the prototype is a mean (the code divides by all pixels, which the cosine does not see), nearest resizing
of seeds, and what classes without pixels, ties and NaN mean, are our reading.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._backend import call
from ._checks import (
    FLOATS,
    INTEGERS,
    check_bool,
    check_classes,
    check_device,
    check_dtype,
    check_int,
    check_number,
    check_pair,
    check_shape,
    check_tensor,
)
from ._layout import empty_like_format, is_channels_last, memory_format, tagged, wide_dtype
from ._levels import resize_levels
from ._library import no_second_derivative, register


def prototype_cam(
    features: Tensor | Sequence[Tensor],
    cam: Tensor,
    tags: Tensor,
    *,
    valid: Tensor | None = None,
    size: Sequence[int] | None = None,
    background_scale: float = 0.3,
    detach_prototypes: bool = False,
) -> Tensor:
    """relu(cosine) of each pixel's feature and each class's prototype, the mean feature of the pixels that `cam` seeds.

    A pixel's seed is the class with the largest cam, background scaled; if that class is not tagged, or the pixel not
    valid, it belongs to no class. [N, C, D, H, W] never exists, neither forward nor backward: the cost is a few passes
    over the features, whatever the number of classes.

    Args:
        features: [N, D, h, w], or a list of levels [N, D_l, h_l, w_l]; float64, float32, float16 or bfloat16; NCHW or
            channels_last (other strides are copied; those of levels never). Levels are divided, pixel by pixel, by
            (their L2 norm over channels + 1e-5), resized bilinearly (align_corners=False) and laid side by side along
            channels: one copy. A single tensor is only resized, and only if its size is another.
        cam: [N, C, H', W'], background first; the dtypes above, any strides, at most 16384 classes (14000 on GPUs whose
            blocks have 99 KiB of shared memory). No gradient.
        tags: [N, C], the classes of each image, background included: any number but 0 means present.
        valid: bool [N, H', W'], false where the cam means nothing, as on the padding of a crop; None for all.
        size: (H, W) of the result; None for the cam's (H', W'). Seeds of another size are those of the nearest pixel,
            (y * H' // H, x * W' // W).
        background_scale: what channel 0 of the cam is multiplied by before classes are compared.
        detach_prototypes: gradient through the pixels' own features alone, not through the prototypes.

    Returns:
        [N, C, H, W] in the dtype of the features, contiguous; exactly zero for classes without seeds. Sums and cosines
        are float32 or wider; resized features are stored in their dtype, so that in 16 bits a cosine near 0 may change
        its sign, and relu its gradient. Cosines as in torch.nn.functional.cosine_similarity with eps=1e-8, of features
        whose squares a float32 can sum (to 1e18 in magnitude); relu has the gradient 0 at 0. Results and gradients are
        the same in every run; the gradient can be taken once, not twice. A NaN feature gives NaN at its own pixel (for
        the classes that have seeds) and, through its prototype, to its seed's class; NaN in the cam counts as larger
        than any number.

    Memory for the backward pass: the features (or their resized copy), and C + 1 wide numbers a pixel.

    Raises:
        TypeError: if a tensor is of another dtype, levels are of several, or an option is of another type.
        ValueError: if shapes or devices do not fit the cam's, there is no level, or what is to be resized is empty.
        RuntimeError: if the cam is on a GPU and the CUDA backend was not built; in a second derivative.
    """
    check_tensor("cam", cam, "N, C, H, W", FLOATS)
    if isinstance(features, Tensor) or not isinstance(features, Sequence):
        levels, names = [features], ["features"]
    else:
        levels, names = list(features), [f"features[{i}]" for i in range(len(features))]
    if not levels:
        raise ValueError("features must be a tensor or at least one level, got an empty sequence")
    n, classes = cam.shape[:2]
    for name, level in zip(names, levels, strict=True):
        check_tensor(name, level, "N, D, H, W", FLOATS)
        if level.shape[0] != n:
            raise ValueError(f"{name} must hold as many images as cam, {n}, got {level.shape[0]}")
        check_dtype(name, level, names[0], levels[0])
        check_device(name, level, "cam", cam)
    check_classes("cam's number of classes", classes)
    check_tensor("tags", tags, "N, C", FLOATS + INTEGERS)
    check_shape("tags", tags, (n, classes))
    check_device("tags", tags, "cam", cam)
    if valid is not None:
        check_tensor("valid", valid, "N, H, W", (torch.bool,))
        check_shape("valid", valid, (n, *cam.shape[2:]))
        check_device("valid", valid, "cam", cam)
    height, width = cam.shape[2:] if size is None else check_pair("size", size, 1)
    for name, map in (("cam", cam), *zip(names, levels, strict=True)):
        if map.shape[2:] != (height, width) and map.shape[2] * map.shape[3] == 0:
            raise ValueError(f"{name} must have pixels to be resized, got shape {list(map.shape)}")
    check_number("background_scale", background_scale)
    check_bool("detach_prototypes", detach_prototypes)

    seeds = _prototype_seeds(cam.detach(), tags, valid, background_scale, height, width)
    pixels = levels[0]
    if not isinstance(features, Tensor) or pixels.shape[2:] != (height, width):
        pixels = resize_levels(levels, height, width, normalise=not isinstance(features, Tensor))
    cosines: Tensor = _prototype_cam(pixels, seeds, classes, detach_prototypes)[0]
    return cosines.to(pixels.dtype)


def class_prototypes(features: Tensor, assignment: Tensor, num_classes: int) -> Tensor:
    """The mean feature of each class's pixels: the first half of `prototype_cam`.

    Args:
        features: [N, D, h, w]; float64, float32, float16 or bfloat16; NCHW or channels_last (other strides are copied).
        assignment: int64 [N, h, w], the class of each pixel; what is outside [0, num_classes) is of none.
        num_classes: C, 1 to 16384.

    Returns:
        [N, C, D] in the dtype of the features, summed in float32 or wider; zero for classes without pixels. The
        gradient has the features' memory format and can be taken once, not twice. The same in every run.

    Raises:
        TypeError: if a tensor is of another dtype, or num_classes no int.
        ValueError: if shapes do not fit each other, devices differ, or num_classes is out of its range.
        RuntimeError: if features is on a GPU and the CUDA backend was not built; in a second derivative.
    """
    check_tensor("features", features, "N, D, H, W", FLOATS)
    check_tensor("assignment", assignment, "N, H, W", (torch.int64,))
    n, _, height, width = features.shape
    check_shape("assignment", assignment, (n, height, width))
    check_device("assignment", assignment, "features", features)
    classes = check_int("num_classes", num_classes, 1)
    check_classes("num_classes", classes)
    seeds = torch.where((assignment >= 0) & (assignment < classes), assignment, -1).to(torch.int16).contiguous()
    prototypes: Tensor = _class_prototypes(features, seeds, classes)[0]
    return prototypes.to(features.dtype)


def _dense(features: Tensor) -> tuple[Tensor, bool]:
    """The features as kernels take them, each image dense, and whether they are channels_last."""
    channels_last = is_channels_last(features)
    image = features[:1]
    if features.shape[0] == 0 or image.is_contiguous(memory_format=memory_format(channels_last)):
        return features, channels_last
    return features.contiguous(memory_format=memory_format(channels_last)), channels_last


def _empty_seeds(
    cam: Tensor, tags: Tensor, valid: Tensor | None, background_scale: float, height: int, width: int
) -> Tensor:
    return cam.new_empty((cam.shape[0], height, width), dtype=torch.int16)


def _find_seeds(
    cam: Tensor, tags: Tensor, valid: Tensor | None, background_scale: float, height: int, width: int
) -> Tensor:
    seeds = _empty_seeds(cam, tags, valid, background_scale, height, width)
    if seeds.numel() > 0:
        mask = None if valid is None else valid.contiguous()
        call("prototype_seeds", cam.device, cam, tagged(tags), mask, background_scale, seeds)
    return seeds


def _empty_prototypes(features: Tensor, seeds: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """And their counts."""
    n, d = features.shape[:2]
    prototypes = features.new_empty((n, classes, d), dtype=wide_dtype(features.dtype))
    return prototypes, features.new_empty((n, classes), dtype=torch.int32)


def _average(features: Tensor, seeds: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    prototypes, counts = _empty_prototypes(features, seeds, classes)
    if features.numel() > 0:
        call("prototype_forward", features.device, *_dense(features), seeds, counts, prototypes, None, None, None)
        return prototypes, counts
    return prototypes.zero_(), counts.zero_()


def _empty_spread(grad: Tensor, seeds: Tensor, counts: Tensor, dtype: torch.dtype, channels_last: bool) -> Tensor:
    n, height, width = seeds.shape
    format = memory_format(channels_last)
    shape = (n, grad.shape[2], height, width)
    return torch.empty(shape, dtype=dtype, device=grad.device, memory_format=format)


def _spread(grad: Tensor, seeds: Tensor, counts: Tensor, dtype: torch.dtype, channels_last: bool) -> Tensor:
    gradient = _empty_spread(grad, seeds, counts, dtype, channels_last)
    if gradient.numel() > 0:
        shares = grad / counts.clamp_min(1)[..., None]
        call("prototype_spread", grad.device, shares.contiguous(), channels_last, seeds, counts, gradient)
    return gradient


def _keep_seeds(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    features, seeds, _ = inputs
    ctx.dtype, ctx.channels_last = features.dtype, is_channels_last(features)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(seeds, output[1])


def _average_backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor, None, None]:
    return _class_prototypes_backward(grad, *ctx.saved_tensors, ctx.dtype, ctx.channels_last), None, None


Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _empty_outputs(features: Tensor, seeds: Tensor, classes: int, *_: Any) -> Outputs:
    """Cosines, and for the backward what csrc/prototype/op.h calls counts, prototypes, prototype_lengths, lengths."""
    n, height, width = seeds.shape
    wide = wide_dtype(features.dtype)
    cosines = features.new_empty((n, classes, height, width), dtype=wide)
    prototypes, counts = _empty_prototypes(features, seeds, classes)
    prototype_lengths = features.new_empty((n, classes), dtype=wide)
    return cosines, counts, prototypes, prototype_lengths, features.new_empty((n, height, width), dtype=wide)


def _compare(features: Tensor, seeds: Tensor, classes: int, detach_prototypes: bool) -> Outputs:
    outputs = _empty_outputs(features, seeds, classes)
    if features.numel() > 0:
        call("prototype_forward", features.device, *_dense(features), seeds, *outputs[1:], outputs[0])
        return outputs
    for output in outputs:
        output.zero_()
    return outputs


def _empty_gradient(grad: Tensor, features: Tensor, *_: Any) -> Tensor:
    return empty_like_format(features.shape, features, is_channels_last(features))


def _differentiate(
    grad: Tensor,
    features: Tensor,
    seeds: Tensor,
    cosines: Tensor,
    counts: Tensor,
    prototypes: Tensor,
    prototype_lengths: Tensor,
    lengths: Tensor,
    detach_prototypes: bool,
) -> Tensor:
    gradient = _empty_gradient(grad, features)
    if gradient.numel() == 0:
        return gradient
    scratch = [torch.empty_like(like) for like in (cosines, lengths, prototype_lengths)]
    shares = None if detach_prototypes else torch.empty_like(prototypes)
    saved = (seeds, counts, prototypes, prototype_lengths, lengths, cosines)
    call(
        "prototype_backward", features.device, grad.contiguous(), *_dense(features), *saved, *scratch, shares, gradient
    )
    return gradient


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    features, seeds, _, ctx.detach_prototypes = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(features, seeds, *output)


def _compare_backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, None, None, None]:
    gradient = None
    if grad is not None:
        gradient = _prototype_cam_backward(grad, *ctx.saved_tensors, ctx.detach_prototypes)
    return gradient, None, None, None


_prototype_seeds = register(
    "prototype_seeds(Tensor cam, Tensor tags, Tensor? valid, float background_scale, SymInt height, SymInt width) "
    "-> Tensor",
    _find_seeds,
    _empty_seeds,
)
_class_prototypes_backward = register(
    "class_prototypes_backward(Tensor grad, Tensor seeds, Tensor counts, ScalarType dtype, bool channels_last) "
    "-> Tensor",
    _spread,
    _empty_spread,
    no_second_derivative("class_prototypes"),
)
_class_prototypes = register(
    "class_prototypes(Tensor features, Tensor seeds, SymInt classes) -> (Tensor, Tensor)",
    _average,
    _empty_prototypes,
    _average_backward,
    _keep_seeds,
)
_prototype_cam_backward = register(
    "prototype_cam_backward(Tensor grad, Tensor features, Tensor seeds, Tensor cosines, Tensor counts, "
    "Tensor prototypes, Tensor prototype_lengths, Tensor lengths, bool detach_prototypes) -> Tensor",
    _differentiate,
    _empty_gradient,
    no_second_derivative("prototype_cam"),
)
_prototype_cam = register(
    "prototype_cam(Tensor features, Tensor seeds, SymInt classes, bool detach_prototypes) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _compare,
    _empty_outputs,
    _compare_backward,
    _keep,
)
