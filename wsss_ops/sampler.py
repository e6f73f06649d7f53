"""Modules on deform_conv2d: torchvision's DeformConv2d, and the sampler of ESOL that learns its own offsets.

Li et al., Expansion and Shrinkage of Localization for Weakly-Supervised Semantic Segmentation, NeurIPS 2022 (arXiv
2209.07761), section 3. The smooth bound on offsets is our reading.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ._checks import (
    FLOATS,
    check_bool,
    check_device,
    check_dtype,
    check_int,
    check_positive,
    check_tensor,
    check_two,
)
from ._layout import wide_dtype
from ._library import is_autocast_on
from .deform import deform_conv2d, output_size


class _Sampling(nn.Module):
    """Weight, bias and geometry of a deformable convolution, named as in torch.nn.Conv2d."""

    bias: nn.Parameter | None
    _convolve = staticmethod(deform_conv2d)  # that of the references is another

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int],
        padding: int | Sequence[int],
        dilation: int | Sequence[int],
        groups: int,
        bias: bool,
    ) -> None:
        super().__init__()
        self.in_channels = check_int("in_channels", in_channels, 1)
        self.out_channels = check_int("out_channels", out_channels, 1)
        self.kernel_size = check_two("kernel_size", kernel_size, 1)
        self.stride = check_two("stride", stride, 1)
        self.padding = check_two("padding", padding, 0)
        self.dilation = check_two("dilation", dilation, 1)
        self.groups = check_int("groups", groups, 1)
        check_bool("bias", bias)
        for name, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
            if channels % groups != 0:
                raise ValueError(f"{name} must be a multiple of groups, {groups}, got {channels}")
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels // groups, *self.kernel_size))
        self.register_parameter("bias", nn.Parameter(torch.empty(out_channels)) if bias else None)

    def reset_parameters(self) -> None:
        """Draws weight and bias anew, as torch.nn.Conv2d does."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.weight[0].numel())
            nn.init.uniform_(self.bias, -bound, bound)

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        text += f", padding={self.padding}" if self.padding != (0, 0) else ""
        text += f", dilation={self.dilation}" if self.dilation != (1, 1) else ""
        text += f", groups={self.groups}" if self.groups != 1 else ""
        return text + (", bias=False" if self.bias is None else "")


class DeformConv2d(_Sampling):
    """torchvision.ops.DeformConv2d on our `deform_conv2d`: the same arguments, initialisation and state_dict.

    Args:
        in_channels, out_channels: multiples of groups.
        kernel_size, stride, padding, dilation: an int or (y, x).
        bias: whether there is one.

    Parameters: `weight` [out_channels, in_channels / groups, kH, kW] and `bias` [out_channels].

    Raises:
        TypeError: if an argument is of another type.
        ValueError: if channels are no multiples of groups, padding is negative, or another size below 1.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias)
        self.reset_parameters()

    def forward(self, input: Tensor, offset: Tensor, mask: Tensor | None = None) -> Tensor:
        """`deform_conv2d` of input [N, in_channels, H, W] with this layer's weight and bias; raises as that does."""
        return self._convolve(input, offset, self.weight, self.bias, self.stride, self.padding, self.dilation, mask)


class DeformSampler(_Sampling):
    """The layer of ESOL: a convolution whose sampling points move by offsets that a branch of it learns.

    The branch, `offset_branch`, is a convolution of the same input with the same kernel, stride, padding and dilation.
    It starts as zero, so that the layer starts as the plain convolution with its weight and bias, whose parameters
    have the same names (`load_state_dict(convolution.state_dict(), strict=False)` takes them over;
    `nn.init.dirac_(sampler.weight)` makes it the identity).

    Args:
        in_channels, out_channels: multiples of groups; in_channels also of offset_groups.
        kernel_size, stride, dilation: an int or (y, x).
        padding: an int, (y, x), or "same": dilation * (kernel_size - 1) / 2 pixels on each side, for odd kernels; with
            stride 1 the map keeps its size.
        offset_groups: each has offsets of its own for its in_channels / offset_groups channels.
        bias: whether the sampling has one; the branch always does.
        max_offset: bound in pixels of the feature map: max_offset * tanh(offset / max_offset). None for no bound.
        freeze_weight: no gradient reaches weight and bias, which do not require one either.
        detach_input: no gradient reaches the input, neither through the sampling nor through the branch.

    Raises:
        TypeError: if an argument is of another type.
        ValueError: if channels are no multiples of their groups, padding is negative, "same" for an even kernel or
            another text, max_offset is not finite or not above 0, or another size is below 1.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int] = 3,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] | str = "same",
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        offset_groups: int = 1,
        bias: bool = True,
        max_offset: float | None = 2.0,
        freeze_weight: bool = False,
        detach_input: bool = False,
    ) -> None:
        if isinstance(padding, str):
            padding = _same_padding(padding, kernel_size, dilation)
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias)
        self.offset_groups = check_int("offset_groups", offset_groups, 1)
        if in_channels % offset_groups != 0:
            raise ValueError(f"in_channels must be a multiple of offset_groups, {offset_groups}, got {in_channels}")
        self.max_offset = None if max_offset is None else check_positive("max_offset", max_offset)
        self.freeze_weight = check_bool("freeze_weight", freeze_weight)
        self.detach_input = check_bool("detach_input", detach_input)
        self.offset_branch = nn.Conv2d(
            in_channels,
            2 * offset_groups * self.kernel_size[0] * self.kernel_size[1],
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
        )
        self.reset_parameters()
        if freeze_weight:  # what waits for every parameter's gradient, or counts parameters, then leaves these out
            self.weight.requires_grad_(False)
            if self.bias is not None:
                self.bias.requires_grad_(False)

    def reset_parameters(self) -> None:
        """Draws weight and bias anew, as torch.nn.Conv2d does; the branch becomes zero again."""
        super().reset_parameters()
        for parameter in self.offset_branch.parameters():
            nn.init.zeros_(parameter)

    def offsets(self, x: Tensor) -> Tensor:
        """Where the taps go, for x [N, in_channels, H, W]: the bounded offsets in pixels, float32 or wider.

        [N, 2 * offset_groups * K, Ho, Wo], channel 2 * (g * K + k) the y, the next one the x displacement of tap k.

        Raises:
            TypeError: if x is no tensor of the layer's dtype (under autocast of float64, float32, float16 or bfloat16).
            ValueError: if x is not 4-d with in_channels channels, on another device, or smaller than the kernel.
        """
        self._check(x)
        raw = self.offset_branch(x.detach() if self.detach_input else x)
        offset: Tensor = raw.to(wide_dtype(raw.dtype))
        return offset if self.max_offset is None else self.max_offset * torch.tanh(offset / self.max_offset)

    def forward(self, x: Tensor) -> Tensor:
        """x [N, in_channels, H, W] -> [N, out_channels, Ho, Wo], sampled at `offsets(x)`.

        Raises:
            TypeError, ValueError: as `offsets`.
            RuntimeError: if x is on a GPU and the CUDA backend was not built; in a second derivative.
        """
        weight: Tensor = self.weight
        bias: Tensor | None = self.bias
        if self.freeze_weight:
            weight, bias = weight.detach(), None if bias is None else bias.detach()
        source = x.detach() if self.detach_input else x
        return self._convolve(source, self.offsets(x), weight, bias, self.stride, self.padding, self.dilation)

    def _check(self, x: Tensor) -> None:
        """Before the branch, a plain convolution, fails in words of its own."""
        check_tensor("x", x, "N, in_channels, H, W", FLOATS)
        if x.shape[1] != self.in_channels:
            raise ValueError(f"x must have {self.in_channels} channels, got shape {list(x.shape)}")
        check_device("x", x, "the layer", self.weight)
        if not is_autocast_on(x.device):
            check_dtype("x", x, "the layer", self.weight)
        size = output_size(x.shape[2:], self.kernel_size, self.stride, self.padding, self.dilation)
        if min(size) < 1:
            raise ValueError(f"x must be as large as the kernel, got {tuple(x.shape[2:])} pixels")

    def extra_repr(self) -> str:
        text = super().extra_repr()
        text += f", offset_groups={self.offset_groups}" if self.offset_groups != 1 else ""
        text += f", max_offset={self.max_offset}"
        text += ", freeze_weight=True" if self.freeze_weight else ""
        return text + (", detach_input=True" if self.detach_input else "")


def _same_padding(padding: str, kernel_size: int | Sequence[int], dilation: int | Sequence[int]) -> tuple[int, int]:
    if padding != "same":
        raise ValueError(f'padding must be an int, a pair of ints or "same", got {padding!r}')
    kernel, steps = check_two("kernel_size", kernel_size, 1), check_two("dilation", dilation, 1)
    if kernel[0] % 2 == 0 or kernel[1] % 2 == 0:
        raise ValueError(f'kernel_size must be odd for padding="same", got {kernel_size}')
    return steps[0] * (kernel[0] // 2), steps[1] * (kernel[1] // 2)
