"""PatchLearning: where merged cells lie, where gradients go, fused against reference. test_patch has the operators."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from harness import relative_error, values
from torch import Tensor, nn

import wsss_ops
from wsss_ops import PatchLearning, reference


class Residual(nn.Module):
    """Two paths of the same stride, whose strides must not be multiplied."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.main = nn.Conv2d(channels, channels, 3, stride, 1)
        self.side = nn.Conv2d(channels, channels, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return (self.main(x) + self.side(x)).relu_()


def chain(*strides: int, channels: int = 4) -> nn.Sequential:
    """Blocks of these strides, each of which sees one more cell of its input on every side."""
    return nn.Sequential(*(Residual(channels, stride) for stride in strides))


def halves(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    whole, merged = module(x).chunk(2, 1)
    return whole, merged


def inside(length: int, count: int, patch: int, reach: int) -> Tensor:
    """Which cells of a side are farther than reach from a border of patches and of the map."""
    cells = torch.arange(length)
    within = cells % patch
    return (within >= reach) & (within < patch - reach) & (cells < length - reach)


# strides of the blocks, position, grid, (H, W)
GEOMETRIES = [
    ((1, 1, 1), 1, (2, 2), (24, 24)),
    ((1, 1, 1), 2, (2, 3), (23, 25)),
    ((1, 2, 1), 1, (2, 2), (64, 64)),
    ((1, 2, 1), 1, (2, 3), (65, 63)),  # uneven, and odd as maps of stride * k + 1 pixels are
    ((2, 2, 1), 0, (2, 2), (97, 81)),
    ((2, 2, 1), 1, (3, 2), (97, 81)),
    ((2, 2, 1), 2, (4, 1), (97, 81)),
    ((2, 1, 1), 0, (2, 2), (65, 41)),
]


@pytest.mark.parametrize(("strides", "position", "grid", "size"), GEOMETRIES)
@pytest.mark.parametrize("kind", [wsss_ops.PatchLearning, reference.PatchLearning], ids=["fused", "reference"])
def test_merged_cells_lie_where_those_of_the_whole_map_do(
    device: torch.device,
    kind: type[PatchLearning],
    strides: tuple[int, ...],
    position: int,
    grid: tuple[int, int],
    size: tuple[int, int],
) -> None:
    blocks = chain(*strides).to(device, torch.float64)
    x = values((2, 4, *size), torch.float64, device)
    whole, merged = halves(kind(blocks, position, grid), x)
    assert torch.equal(whole, blocks(x))
    split = blocks[:position](x)
    stride = 1
    for step in strides[position:]:
        stride *= step
    reach = len(strides) - position  # in cells of the result; less where the stride comes later
    masks = [
        inside(whole.shape[axis], count, -(-split.shape[axis] // (count * stride)), reach)
        for axis, count in zip((2, 3), grid, strict=True)
    ]
    far = masks[0][:, None] & masks[1][None, :]
    assert far.sum() >= 4
    assert whole[:, :, far].any()
    assert torch.allclose(merged[:, :, far], whole[:, :, far], rtol=1e-10, atol=1e-12)
    assert not torch.allclose(merged, whole, rtol=1e-3)  # at the borders patches see zeros


@pytest.mark.parametrize("position", [0, 1, 3])
def test_a_grid_of_one_is_the_whole_map(device: torch.device, position: int) -> None:
    x = values((2, 4, 32, 24), torch.float32, device)
    whole, merged = halves(PatchLearning(chain(1, 2, 1), position, (1, 1)).to(device), x)
    assert whole.shape == (2, 4, 16, 12)
    assert relative_error(merged, whole) <= 1e-6


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 4, 3, (2, 1), 1),
        nn.Conv2d(4, 4, 7, 4, 3),
        nn.Conv2d(4, 4, 3, 3, 1),
        nn.Conv2d(4, 4, 3, 1, 2, dilation=2),
        nn.MaxPool2d(3, 2, 1),
        nn.AvgPool2d(2),
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [(7, 5), (17, 20), (33, 31)])
def test_strides_are_found_whatever_the_layer(layer: nn.Module, size: tuple[int, int]) -> None:
    """A patch of 1 by 1 cells, the smallest, included: the middle tap of each is that of the whole map."""
    layer = copy.deepcopy(layer)
    if isinstance(layer, nn.Conv2d):  # a middle tap alone sees no border
        middle = torch.zeros_like(layer.weight)
        middle[:, :, layer.kernel_size[0] // 2, layer.kernel_size[1] // 2] = torch.randn(4, 4)
        layer.weight = nn.Parameter(middle)
    x = torch.rand(2, 4, *size)  # positive: a pool's zero padding is never the largest
    whole, merged = halves(PatchLearning(nn.Sequential(layer), 0, (2, 3)), x)
    if isinstance(layer, nn.MaxPool2d):
        assert merged.shape == whole.shape
    else:
        assert relative_error(merged, whole) <= 1e-6


@pytest.mark.parametrize("detach", [False, True])
def test_detaching_cuts_the_input_of_the_patches(device: torch.device, detach: bool) -> None:
    """Gradients of a loss on the patches alone, and of the whole map alone."""
    learning = PatchLearning(chain(1, 1, 1), 1, (2, 2), detach=detach).to(device)
    for chosen in (0, 1):
        x = values((2, 4, 9, 8), torch.float32, device).requires_grad_()
        learning.zero_grad(set_to_none=True)
        halves(learning, x)[chosen].sum().backward()
        cut = detach and chosen == 1
        assert x.grad is not None
        assert bool(x.grad.any()) != cut
        for index, block in enumerate(learning.blocks):
            for parameter in block.parameters():
                assert parameter.grad is not None
                assert bool(parameter.grad.any()) != (cut and index == 0)


@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_matches_reference(device: torch.device, layout: torch.memory_format, detach: bool) -> None:
    x = values((2, 4, 23, 18), torch.float64, device).contiguous(memory_format=layout)
    results = []
    blocks = chain(1, 2, 1).to(device, torch.float64)
    for kind in (PatchLearning, reference.PatchLearning):
        learning = kind(copy.deepcopy(blocks), 1, (2, 3), detach=detach)
        source = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        output = learning(source)
        torch.manual_seed(1)
        gradients = torch.autograd.grad(output, [source, *learning.parameters()], torch.randn(output.shape).to(output))
        results.append([output, *gradients])
    for fused, plain in zip(*results, strict=True):
        assert relative_error(fused, plain) <= 1e-12


def test_blocks_may_work_in_place(device: torch.device) -> None:
    """The block behind the split changes its input: the patches must not see that."""
    blocks = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ELU(inplace=True), nn.ELU(inplace=True)).to(device)
    x = values((2, 4, 8, 8), torch.float32, device)
    for kind in (PatchLearning, reference.PatchLearning):
        for grid in ((1, 1), (2, 2)):
            whole, merged = halves(kind(blocks, 1, grid), x - 3)
            assert torch.equal(whole, merged)
            assert torch.equal(whole, blocks(x - 3))


def test_batch_norm_counts_two_batches() -> None:
    """Finding the stride leaves no trace in statistics."""
    blocks = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))
    learning = PatchLearning(blocks, 0, (2, 2))
    learning(torch.randn(2, 4, 9, 9))
    assert blocks[1].num_batches_tracked == 2
    learning.eval()(torch.randn(2, 4, 9, 9))
    assert blocks[1].num_batches_tracked == 2


def test_the_stride_is_found_where_batch_norm_waits_for_other_processes() -> None:
    """In training mode it takes no meta tensors; the modes stay what they are."""
    norm = nn.SyncBatchNorm(4)
    blocks = nn.Sequential(nn.Conv2d(4, 4, 3, 2, 1), norm, nn.Dropout(0.0).eval())
    learning = PatchLearning(blocks, 0, (2, 2))

    def refuse(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert not module.training

    norm.register_forward_pre_hook(refuse)
    assert learning._find_stride(4) == (2, 2)
    assert [block.training for block in blocks] == [True, True, False]


def test_blocks_that_read_values_are_named() -> None:
    class Reads(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * float(x.mean())

    blocks = nn.Sequential(nn.Conv2d(4, 4, 1), Reads())
    with pytest.raises(ValueError, match=r"blocks behind position must run on meta tensors, .* got RuntimeError: "):
        PatchLearning(blocks, 0, (2, 2))(torch.ones(1, 4, 8, 8))
    assert blocks[0].training


def test_saves_like_its_blocks() -> None:
    blocks = chain(1, 2)
    learning = PatchLearning(blocks, 1, (2, 2))
    learning(torch.randn(1, 4, 8, 8))
    state = learning.state_dict()
    assert list(state) == [f"blocks.{name}" for name in blocks.state_dict()]
    assert repr(learning).startswith("PatchLearning(\n  position=1, grid=(2, 2)\n")
    other = PatchLearning(chain(1, 2), 1, (2, 2))
    other.load_state_dict(state)
    x = torch.randn(1, 4, 8, 8)
    assert torch.equal(learning(x), other(x))


def test_autocast_and_empty_batches(device: torch.device) -> None:
    learning = PatchLearning(chain(1, 2), 1, (2, 2)).to(device)
    with torch.autocast(device.type, dtype=torch.bfloat16):  # the first call: the stride is found under autocast
        result = learning(values((2, 4, 8, 9), torch.float32, device))
    assert result.dtype == torch.bfloat16
    assert learning(torch.ones(0, 4, 8, 9, device=device)).shape == (0, 8, 4, 5)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"blocks": [nn.Identity()]}, TypeError, "blocks must be a torch.nn.Sequential, got list"),
        ({"position": 1.0}, TypeError, r"position must be an int, got 1\.0"),
        ({"position": -1}, ValueError, "position must be at least 0, got -1"),
        ({"position": 3}, ValueError, "position must be at most 2, the number of blocks, got 3"),
        ({"grid": 2}, TypeError, "grid must be a pair of ints, got 2"),
        ({"grid": (2, 0)}, ValueError, r"grid\[1\] must be at least 1, got 0"),
        ({"detach": 1}, TypeError, "detach must be a bool, got 1"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    given = {"blocks": chain(1, 2), "position": 1, "grid": (2, 2)} | arguments
    with pytest.raises(error, match=message):
        PatchLearning(**given)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.Conv2d(4, 4, 3), r"blocks must map patches of \(4, 5\) pixels at stride \(1, 1\) to \(4, 5\) cells"),
        (nn.Upsample(scale_factor=2), r"blocks must map maps to maps, .*got shape \[1, 4, 2048, 2048\]"),
        (nn.AdaptiveAvgPool2d(1), r"blocks must map maps to maps, .*got shape \[1, 4, 1, 1\]"),
        (nn.Flatten(), "blocks must map maps to maps"),
    ],
    ids=["no padding", "upsampling", "global pool", "flat"],
)  # fmt: skip
def test_blocks_without_a_geometry_are_refused(layer: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PatchLearning(nn.Sequential(layer), 0, (2, 2))(torch.ones(1, 4, 8, 10))


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"x must have the 4 dimensions \[N, D, H, W\], got shape \[4, 8, 8\]"):
        PatchLearning(chain(1), 0, (2, 2))(torch.ones(4, 8, 8))
