"""Out-of-candidate rectification: pixels predicted as a class that their image does not have are pushed back.

Cheng et al., Out-of-Candidate Rectification for Weakly Supervised Semantic Segmentation, CVPR 2023 (arXiv 2211.12268),
section 3. The split of the classes into two groups and the ranking loss between them are the paper's; how correlation
and threshold choose the group inside, what ties, ignored pixels and untagged images mean, and scale and margin are our
reading.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch import Tensor

from . import _ocr
from ._checks import (
    FLOATS,
    INTEGERS,
    check_bool,
    check_classes,
    check_device,
    check_number,
    check_pair,
    check_positive,
    check_shape,
    check_tensor,
)
from ._layout import tagged


@overload
def ocr_loss(
    logits: Tensor,
    tags: Tensor,
    *,
    prior: Tensor | None = None,
    threshold: float = 0.0,
    margin: float = 0.0,
    scale: float = 1.0,
    ignore: Tensor | None = None,
    size: Sequence[int] | None = None,
    align_corners: bool = False,
    reduction: str = "mean",
    return_count: Literal[False] = False,
) -> Tensor: ...


@overload
def ocr_loss(
    logits: Tensor,
    tags: Tensor,
    *,
    prior: Tensor | None = None,
    threshold: float = 0.0,
    margin: float = 0.0,
    scale: float = 1.0,
    ignore: Tensor | None = None,
    size: Sequence[int] | None = None,
    align_corners: bool = False,
    reduction: str = "mean",
    return_count: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def ocr_loss(
    logits: Tensor,
    tags: Tensor,
    *,
    prior: Tensor | None = None,
    threshold: float = 0.0,
    margin: float = 0.0,
    scale: float = 1.0,
    ignore: Tensor | None = None,
    size: Sequence[int] | None = None,
    align_corners: bool = False,
    reduction: str = "mean",
    return_count: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Group-ranking loss on out-of-candidate (OC) pixels: those whose predicted class is not among the image's tags.

    With s the scores of an OC pixel, o its predicted class, O the classes that are not tagged and I the tagged classes
    that correlate with the prediction, its loss is log(1 + sum over i in O, j in I of exp(scale * (s_i - s_j +
    margin))).
    I holds the tagged classes c with prior[o, c] > 0 whose prior[o, c] * softmax(s)_c is at least `threshold` times the
    largest; all tagged classes where none has a prior above 0. Groups carry no gradient.

    Args:
        logits: [N, C, h, w], background first where there is one; float64, float32, float16 or bfloat16; NCHW,
            channels_last or any other strides, never copied. At most 16384 classes. The first of equal scores is the
            predicted class.
        tags: [N, C], the classes of each image, background included: any number but 0 (so NaN too) means present. An
            image without any contributes nothing.
        prior: [C, C] numbers, prior[o, c] the correlation of candidate c with prediction o (`annotation_correlation` of
            the training tags), or None for 1. What is not above 0, NaN included, counts as 0.
        threshold: share of the largest correlation that a class in I needs, 0 to 1.
        margin: how far the scores of I shall be above those of O.
        scale: of scores and margin, above 0.
        ignore: bool [N, H, W] at the size of the loss: pixels that contribute nothing; None for none.
        size: (H, W): the loss is that of the logits resized bilinearly to it, as torch.nn.functional.interpolate does,
            without these ever being stored. None for (h, w).
        align_corners: as for torch.nn.functional.interpolate.
        reduction: "mean" over OC pixels (0 where there are none), "sum" or "none".
        return_count: return the number of OC pixels too. With "sum" and a count summed over processes, several
            processes compute exactly the mean that one would.

    Returns:
        The loss, float64 for float64 logits and else float32: one number, or [N, H, W] for "none". With return_count
        (loss, int64 tensor on the device of the logits); nothing is copied to the host.

        The gradient has dtype and memory format of the logits. It is that of the formula also where scores are far
        apart: up to 1e30 in magnitude nothing overflows (infinite ones may give NaN). It is the same in every run, and
        can be taken once, not twice. A pixel with a NaN score (not ignored, image tagged) counts as OC; its loss and
        gradient are NaN, so sum and mean are too, and the gradients of other pixels are what they were.

    Memory: 6 bytes a pixel of the loss between forward and backward (10 for float64), and in a resized backward
    scratch of a few times the logits at their own size.

    Raises:
        TypeError: if a tensor is of another dtype, or an option of another type.
        ValueError: if shapes or devices do not fit the logits', or an option is out of its range.
        RuntimeError: if the logits are on a GPU and the CUDA backend was not built; in a second derivative.
    """
    height, width = _check(logits, tags, ignore, size, align_corners)
    if prior is not None:
        check_tensor("prior", prior, "C, C", FLOATS + INTEGERS)
        check_shape("prior", prior, (logits.shape[1], logits.shape[1]))
        check_device("prior", prior, "logits", logits)
    if not 0 <= check_number("threshold", threshold) <= 1:
        raise ValueError(f"threshold must be from 0 to 1, got {threshold}")
    check_number("margin", margin)
    check_positive("scale", scale)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction must be "mean", "sum" or "none", got {reduction!r}')
    check_bool("return_count", return_count)
    prior = None if prior is None else prior.detach()
    loss, count, _, _ = _ocr.ocr_loss(
        logits, tags.detach(), prior, ignore, threshold, margin, scale, height, width, align_corners, reduction
    )
    # The backward needs the count, too, which callers sum over processes in place.
    return (loss, count.clone()) if return_count else loss


def annotation_correlation(tags: Tensor) -> Tensor:
    """How often classes occur together in a training set: the prior of `ocr_loss` (the paper's annotation correlation).

    Args:
        tags: [M, C], the classes of M images: any number but 0 means present.

    Returns:
        float32 [C, C]: at [o, c] the share of the images with class o that have class c; 0 where no image has o.

    Raises:
        TypeError: if tags is no tensor of numbers.
        ValueError: if tags is not 2-d.
    """
    check_tensor("tags", tags, "M, C", FLOATS + INTEGERS)
    present = tagged(tags).double()  # float32 products may be rounded to fewer bits, under autocast or as TF32
    together = present.T @ present
    return (together / together.diagonal().clamp_min(1)[:, None]).float()


def out_of_candidate_rate(
    logits: Tensor,
    tags: Tensor,
    *,
    ignore: Tensor | None = None,
    size: Sequence[int] | None = None,
    align_corners: bool = False,
) -> Tensor:
    """Share of the pixels that are out-of-candidate: the figure that `ocr_loss` is meant to bring down.

    Args:
        logits, tags, ignore, size, align_corners: as for `ocr_loss`.

    Returns:
        One float32 number on the device of the logits, without gradient: OC pixels divided by all that are not
        ignored, images without tags included; 0 where there are none.

    Raises:
        TypeError: if a tensor is of another dtype, or an option of another type.
        ValueError: if shapes or devices do not fit the logits', or size is below 1.
        RuntimeError: if the logits are on a GPU and the CUDA backend was not built.
    """
    height, width = _check(logits, tags, ignore, size, align_corners)
    count: Tensor = _ocr.ocr_count(logits.detach(), tags, ignore, height, width, align_corners)
    if ignore is None:
        return (count / max(logits.shape[0] * height * width, 1)).float()
    return (count / (~ignore).sum().clamp_min(1)).float()


def _check(
    logits: Tensor, tags: Tensor, ignore: Tensor | None, size: Sequence[int] | None, align_corners: bool
) -> tuple[int, int]:
    """The size of the loss."""
    check_tensor("logits", logits, "N, C, H, W", FLOATS)
    n, classes, height, width = logits.shape
    check_classes("logits' number of classes", classes)
    check_tensor("tags", tags, "N, C", FLOATS + INTEGERS)
    check_shape("tags", tags, (n, classes))
    check_device("tags", tags, "logits", logits)
    check_bool("align_corners", align_corners)
    if size is not None:
        wanted = check_pair("size", size, 1)
        if height == 0 or width == 0:
            raise ValueError(f"logits must have pixels to be resized, got shape {list(logits.shape)}")
        height, width = wanted
    if ignore is not None:
        check_tensor("ignore", ignore, "N, H, W", (torch.bool,))
        check_shape("ignore", ignore, (n, height, width))
        check_device("ignore", ignore, "logits", logits)
    return height, width
