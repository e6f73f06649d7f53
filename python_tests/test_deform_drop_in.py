"""An example: torchvision's DeformConv2d replaced in a network that exists, which then computes and learns the same."""

from __future__ import annotations

import copy

import pytest
import torch
from harness import relative_error
from torch import Tensor, nn

from wsss_ops import DeformConv2d, reference


class Twin(nn.Module):
    """What torchvision's layer is, by the reference: for where torchvision is not installed."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, padding: int = 0, groups: int = 1
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size, self.stride, self.dilation = (kernel_size, kernel_size), (1, 1), (1, 1)
        self.padding = (padding, padding)
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels // groups, *self.kernel_size) / 5)
        self.bias = nn.Parameter(torch.randn(out_channels))

    def forward(self, input: Tensor, offset: Tensor, mask: Tensor | None = None) -> Tensor:
        return reference.deform_conv2d(input, offset, self.weight, self.bias, padding=self.padding, mask=mask)


class Network(nn.Module):
    """A classifier with one sampler, whose offsets and mask are predicted from its input."""

    def __init__(self, sampler: type[nn.Module]) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.moves = nn.Conv2d(8, 2 * 27, 3, padding=1)
        self.sampler = sampler(8, 12, 3, padding=1, groups=2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.last = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        offset, mask = self.moves(x).split([36, 18], dim=1)
        x = self.sampler(x, 2 * offset, mask.sigmoid()).relu()
        return self.last(self.pool(x).flatten(1))


def swap(model: nn.Module, theirs: type[nn.Module]) -> None:
    """Puts wsss_ops.DeformConv2d, with the weights learned, wherever the other one is."""
    for name, child in model.named_children():
        if isinstance(child, theirs):
            ours = DeformConv2d(
                child.in_channels,
                child.out_channels,
                child.kernel_size,
                child.stride,
                child.padding,
                child.dilation,
                child.groups,
                child.bias is not None,
            )
            ours.load_state_dict(child.state_dict())
            setattr(model, name, ours.to(child.weight))
        else:
            swap(child, theirs)


@pytest.mark.parametrize("original", ["torchvision", "reference"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_swapped_layer_learns_the_same(device: torch.device, channels_last: bool, original: str) -> None:
    theirs = Twin
    if original == "torchvision":
        theirs = pytest.importorskip(
            "torchvision.ops", reason="torchvision is missing; the twin is tested"
        ).DeformConv2d
    before = Network(theirs).to(device)
    after = copy.deepcopy(before)
    swap(after, theirs)
    assert type(after.sampler) is DeformConv2d
    assert list(after.state_dict()) == list(before.state_dict())

    x, target = torch.randn(4, 3, 10, 9, device=device), torch.randint(5, (4,), device=device)
    if channels_last:
        x, after = x.contiguous(memory_format=torch.channels_last), after.to(memory_format=torch.channels_last)
    for _ in range(3):
        losses = []
        for model in (before, after):
            loss = nn.functional.cross_entropy(model(x), target)
            model.zero_grad()
            loss.backward()
            losses.append(loss.detach())
        assert relative_error(losses[1], losses[0]) < 1e-5
        for (name, one), other in zip(before.named_parameters(), after.parameters(), strict=True):
            assert relative_error(other.grad, one.grad) < 1e-4, name
        for model in (before, after):
            torch.optim.SGD(model.parameters(), lr=0.1).step()
