"""The losses of SFC and what they need: consistency between classifier and prototype CAM, weighted by class.

Zhao et al., SFC: Shared Feature Calibration in Weakly Supervised Semantic Segmentation, AAAI 2024 (arXiv 2401.11719),
the method's Multi-Scaled Distribution-Weighted (MSDW) consistency loss, whose equations `msdw_loss` and
`distribution_coefficients` state. The loss and its coefficients are the paper's; weights, the eps and where gradient
passes are its published code's. What empty batches and equal counts mean is our reading.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._backend import call
from ._checks import FLOATS, INTEGERS, check_device, check_number, check_shape, check_tensor
from ._layout import empty_like_format, is_channels_last, tagged, wide_dtype
from ._library import no_second_derivative, register


def normalize_cam(cam: Tensor) -> Tensor:
    """relu, then each map divided by (its maximum + 1e-5). Gradient passes through the maximum too.

    Args:
        cam: [N, C, H, W]; float64, float32, float16 or bfloat16; any strides.

    Returns:
        [N, C, H, W] in the dtype of cam, computed in float32 or wider. Equal maxima share the gradient evenly.

    Raises:
        TypeError: if cam is no tensor of these dtypes.
        ValueError: if cam is not 4-d.
    """
    check_tensor("cam", cam, "N, C, H, W", FLOATS)
    if cam.numel() == 0:
        return cam.clone()
    positive = cam.to(wide_dtype(cam.dtype)).relu()
    return (positive / (positive.amax((2, 3), keepdim=True) + 1e-5)).to(cam.dtype)


def msdw_loss(
    cam_w: Tensor,
    cam_p: Tensor,
    cam_w_small: Tensor,
    tags: Tensor,
    coefficients: Tensor,
    *,
    prototype_weight: float = 1.6,
    scale_weight: float = 0.8,
) -> Tensor:
    """Multi-scaled distribution-weighted consistency loss: classifier CAM against prototype CAM and against half scale.

    With k_c the coefficient of class c, 1 for the background, and means over images, classes and pixels,

        prototype_weight * mean(k_c * |cam_w - cam_p / (maximum of cam_p's map + 1e-5)|)
        + scale_weight * mean over foreground of k_c * |cam_w resized to cam_w_small's size - cam_w_small|, if tagged.

    Args:
        cam_w: [N, C, H, W], the classifier's CAM, background first; float64, float32, float16 or bfloat16; any strides,
            never copied. The cams are promoted to one dtype where they have several.
        cam_p: [N, C, H, W], the prototype CAM.
        cam_w_small: [N, C, h, w], the classifier's CAM of the image at half size. The resize is bilinear with
            align_corners=True.
        tags: [N, C], the classes of each image: any number but 0 means present. Column 0 is not used.
        coefficients: [C - 1] numbers, of the foreground classes (`distribution_coefficients`). No gradient.
        prototype_weight, scale_weight: of the two terms.

    Returns:
        One number, float64 for float64 cams and else float32; 0 where there are no images or pixels. Gradient goes to
        the three cams, through the maxima of cam_p too (shared evenly among equal ones), and can be taken once, not
        twice. The same in every run.

    Raises:
        TypeError: if a tensor is of another dtype, or a weight no number.
        ValueError: if shapes or devices do not fit cam_w's, cam_w_small has no pixels, or a weight is not finite.
        RuntimeError: if the cams are on a GPU and the CUDA backend was not built; in a second derivative.
    """
    check_tensor("cam_w", cam_w, "N, C, H, W", FLOATS)
    check_tensor("cam_p", cam_p, "N, C, H, W", FLOATS)
    check_tensor("cam_w_small", cam_w_small, "N, C, H, W", FLOATS)
    n, classes = cam_w.shape[:2]
    if classes < 1:
        raise ValueError(f"cam_w must have at least 1 class, got shape {list(cam_w.shape)}")
    check_shape("cam_p", cam_p, cam_w.shape)
    check_shape("cam_w_small", cam_w_small, (n, classes, *cam_w_small.shape[2:]))
    if cam_w.numel() > 0 and cam_w_small.numel() == 0:
        raise ValueError(f"cam_w_small must have pixels, got shape {list(cam_w_small.shape)}")
    check_tensor("tags", tags, "N, C", FLOATS + INTEGERS)
    check_shape("tags", tags, (n, classes))
    check_tensor("coefficients", coefficients, "C - 1", FLOATS + INTEGERS)
    check_shape("coefficients", coefficients, (classes - 1,))
    for name, tensor in (
        ("cam_p", cam_p),
        ("cam_w_small", cam_w_small),
        ("tags", tags),
        ("coefficients", coefficients),
    ):
        check_device(name, tensor, "cam_w", cam_w)
    check_number("prototype_weight", prototype_weight)
    check_number("scale_weight", scale_weight)
    dtype = torch.promote_types(torch.promote_types(cam_w.dtype, cam_p.dtype), cam_w_small.dtype)
    cams = (cam.to(dtype) for cam in (cam_w, cam_p, cam_w_small))
    loss: Tensor = _msdw_loss(*cams, tags.detach(), coefficients.detach(), prototype_weight, scale_weight)[0]
    return loss


def distribution_coefficients(class_counts: Tensor | Sequence[float], resampled_per_class: float) -> Tensor:
    """How far each class's frequency lies from the others': the coefficients of `msdw_loss`.

    DC_i = sum over j of |n_i - n_j| / (n_i + resampled_per_class), divided by the mean of all DC.

    Args:
        class_counts: [C - 1] numbers of training images that have each foreground class, at least 0. (Values are not
            checked on a GPU, nor while compiling.)
        resampled_per_class: how many images of each class the image bank adds in an epoch, at least 0.

    Returns:
        float32 [C - 1] on the device of the counts, of mean 1; all 1 where all counts are equal.

    Raises:
        TypeError: if the counts or resampled_per_class are no numbers.
        ValueError: if there is no count, one is not finite, negative, or 0 where resampled_per_class is 0, or
            resampled_per_class is negative.
    """
    if not isinstance(class_counts, (Tensor, Sequence)):
        raise TypeError(f"class_counts must be a torch.Tensor or a sequence, got {type(class_counts).__name__}")
    if isinstance(class_counts, Sequence) and not isinstance(class_counts, str):
        class_counts = torch.tensor([check_number("class_counts", n) for n in class_counts], dtype=torch.float64)
    check_tensor("class_counts", class_counts, "C - 1", FLOATS + INTEGERS)
    if check_number("resampled_per_class", resampled_per_class) < 0:
        raise ValueError(f"resampled_per_class must be at least 0, got {resampled_per_class}")
    counts = class_counts.double()
    seen = counts + resampled_per_class
    readable = counts.device.type == "cpu" and not torch.compiler.is_compiling()  # elsewhere the host would wait
    if counts.numel() == 0 or (readable and not bool(((counts >= 0) & counts.isfinite()).all())):
        raise ValueError(
            f"class_counts must be at least one number, all finite and at least 0, got {class_counts.tolist()}"
        )
    if readable and not bool((seen > 0).all()):
        raise ValueError("class_counts must be above 0 where nothing is resampled, got 0")
    apart = (counts[:, None] - counts).abs().sum(1) / seen
    mean = apart.mean()
    return torch.where(mean == 0, 1.0, apart / mean).float()


def _settings(cam_w: Tensor, cam_w_small: Tensor, prototype_weight: float, scale_weight: float) -> tuple[float, float]:
    """The weights divided by how many pixels each mean is over."""
    n, classes, height, width = cam_w_small.shape
    foreground = n * (classes - 1) * height * width
    return prototype_weight / cam_w.numel(), scale_weight / max(foreground, 1)


def _factors(coefficients: Tensor, dtype: torch.dtype) -> Tensor:
    return F.pad(coefficients.to(wide_dtype(dtype)), (1, 0), value=1)


def _empty_outputs(cam_w: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    """The loss, and for the backward the maximum of each of cam_p's maps."""
    wide = wide_dtype(cam_w.dtype)
    return cam_w.new_empty((), dtype=wide), cam_w.new_empty(cam_w.shape[:2], dtype=wide)


def _forward(
    cam_w: Tensor,
    cam_p: Tensor,
    cam_w_small: Tensor,
    tags: Tensor,
    coefficients: Tensor,
    prototype_weight: float,
    scale_weight: float,
) -> tuple[Tensor, Tensor]:
    loss, maxima = _empty_outputs(cam_w)
    if cam_w.numel() == 0:
        return loss.zero_(), maxima.zero_()
    parts = maxima.new_empty(maxima.shape, dtype=torch.float64)
    call(
        "msdw_forward",
        cam_w.device,
        (cam_w, cam_p, cam_w_small),
        tagged(tags),
        _factors(coefficients, cam_w.dtype),
        _settings(cam_w, cam_w_small, prototype_weight, scale_weight),
        maxima,
        parts,
    )
    return parts.sum().to(loss.dtype), maxima


def _empty_gradients(grad: Tensor, cam_w: Tensor, cam_p: Tensor, cam_w_small: Tensor, *_: Any) -> list[Tensor]:
    return [empty_like_format(cam.shape, cam, is_channels_last(cam)) for cam in (cam_w, cam_p, cam_w_small)]


def _backward(
    grad: Tensor,
    cam_w: Tensor,
    cam_p: Tensor,
    cam_w_small: Tensor,
    tags: Tensor,
    coefficients: Tensor,
    maxima: Tensor,
    prototype_weight: float,
    scale_weight: float,
) -> list[Tensor]:
    gradients = _empty_gradients(grad, cam_w, cam_p, cam_w_small)
    if cam_w.numel() == 0:
        return [gradient.zero_() for gradient in gradients]
    call(
        "msdw_backward",
        cam_w.device,
        grad,
        (cam_w, cam_p, cam_w_small),
        tagged(tags),
        _factors(coefficients, cam_w.dtype),
        _settings(cam_w, cam_w_small, prototype_weight, scale_weight),
        maxima,
        gradients,
    )
    return gradients


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.prototype_weight, ctx.scale_weight = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, output[1])


def _loss_backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
    gradients = _msdw_loss_backward(grad, *ctx.saved_tensors, ctx.prototype_weight, ctx.scale_weight)
    return (*gradients, None, None, None, None)


_msdw_loss_backward = register(
    "msdw_loss_backward(Tensor grad, Tensor cam_w, Tensor cam_p, Tensor cam_w_small, Tensor tags, Tensor coefficients, "
    "Tensor maxima, float prototype_weight, float scale_weight) -> Tensor[]",
    _backward,
    _empty_gradients,
    no_second_derivative("msdw_loss"),
)
_msdw_loss = register(
    "msdw_loss(Tensor cam_w, Tensor cam_p, Tensor cam_w_small, Tensor tags, Tensor coefficients, "
    "float prototype_weight, float scale_weight) -> (Tensor, Tensor)",
    _forward,
    _empty_outputs,
    _loss_backward,
    _keep,
)
