"""DeformConv2d and DeformSampler: names, start, where gradients go, bounds. test_deform has the sampling itself."""

from __future__ import annotations

import copy
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from deform_cases import BOUNDS, off_integers
from harness import relative_error, values
from torch import nn

import wsss_ops
from wsss_ops import DeformConv2d, DeformSampler, reference

GEOMETRIES: dict[str, dict[str, Any]] = {
    "3x3": {"kernel_size": 3, "padding": 1},
    "pairs": {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)},
    "groups": {"kernel_size": 2, "groups": 2, "bias": False},
    "1x1": {"kernel_size": 1, "stride": 2},
}
# DeformSampler's, with the same convolution's.
SAME: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "defaults": ({}, {"kernel_size": 3, "padding": 1}),
    "same, dilated": ({"kernel_size": (3, 5), "dilation": (2, 1)}, {"kernel_size": (3, 5), "padding": (2, 2)}),
    "same, stride": ({"stride": 2}, {"kernel_size": 3, "padding": 1}),
    "grouped": ({"groups": 2, "offset_groups": 3, "bias": False}, {"kernel_size": 3, "padding": 1}),
    "explicit": ({"kernel_size": 2, "padding": (0, 1)}, {"kernel_size": 2, "padding": (0, 1)}),
}


def draw_offsets(sampler: DeformSampler, scale: float = 0.3) -> DeformSampler:
    """The branch as it might be after training."""
    for parameter in sampler.offset_branch.parameters():
        nn.init.normal_(parameter, std=scale)
    return sampler


@pytest.mark.parametrize("name", GEOMETRIES)
def test_starts_and_saves_like_a_convolution(device: torch.device, name: str) -> None:
    options = GEOMETRIES[name]
    torch.manual_seed(1)
    layer = DeformConv2d(6, 4, **options).to(device)
    torch.manual_seed(1)
    convolution = nn.Conv2d(6, 4, **options).to(device)
    state, expected = layer.state_dict(), convolution.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[key], expected[key]) for key in state)
    layer.load_state_dict(convolution.state_dict())

    x = values((2, 6, 7, 8), torch.float32, device)
    plain = convolution(x)
    taps = layer.kernel_size[0] * layer.kernel_size[1]
    zero = torch.zeros(2, 2 * taps, *plain.shape[2:], device=device)
    assert relative_error(layer(x, zero), plain) <= BOUNDS[torch.float32]


@pytest.mark.parametrize("name", GEOMETRIES)
def test_forward_is_the_function(device: torch.device, name: str) -> None:
    layer = DeformConv2d(6, 4, **GEOMETRIES[name]).to(device, torch.float64)
    x = values((2, 6, 7, 8), torch.float64, device)
    size = F.conv2d(x, layer.weight, None, layer.stride, layer.padding, layer.dilation, layer.groups).shape[2:]
    taps = layer.kernel_size[0] * layer.kernel_size[1]
    offset = off_integers((2, 2 * taps, *size), -2, 2).to(device)
    mask = values((2, taps, *size), torch.float64, device)
    geometry = (layer.stride, layer.padding, layer.dilation)
    for given in (None, mask):
        expected = reference.deform_conv2d(x, offset, layer.weight, layer.bias, *geometry, given)
        assert relative_error(layer(x, offset, given), expected) <= BOUNDS[torch.float64]


@pytest.mark.parametrize("name", GEOMETRIES)
def test_torchvision_state_dict(name: str) -> None:
    """The names and shapes are also nn.Conv2d's, above; here they go both ways between the two classes."""
    operators = pytest.importorskip("torchvision.ops", reason="needs torchvision")
    torch.manual_seed(2)
    ours = DeformConv2d(6, 4, **GEOMETRIES[name])
    torch.manual_seed(2)
    theirs = operators.DeformConv2d(6, 4, **GEOMETRIES[name])
    assert all(torch.equal(parameter, theirs.state_dict()[key]) for key, parameter in ours.state_dict().items())
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())


@pytest.mark.parametrize("name", SAME)
def test_sampler_starts_as_a_convolution(device: torch.device, name: str) -> None:
    options, geometry = SAME[name]
    sampler = DeformSampler(6, 4, **options).to(device)
    x = values((2, 6, 9, 8), torch.float32, device)
    geometry = {key: value for key, value in geometry.items() if key != "kernel_size"}
    geometry |= {key: options[key] for key in ("stride", "dilation", "groups") if key in options}
    expected = F.conv2d(x, sampler.weight, sampler.bias, **geometry)
    got = sampler(x)
    assert relative_error(got, expected) <= BOUNDS[torch.float32]
    taps = sampler.kernel_size[0] * sampler.kernel_size[1]
    assert sampler.offsets(x).shape == (2, 2 * options.get("offset_groups", 1) * taps, *got.shape[2:])
    assert not sampler.offsets(x).any()
    keys = ["weight", *(["bias"] if options.get("bias", True) else []), "offset_branch.weight", "offset_branch.bias"]
    assert list(sampler.state_dict()) == keys


def test_sampler_samples_at_its_offsets(device: torch.device) -> None:
    sampler = draw_offsets(DeformSampler(6, 4, (3, 1), stride=(1, 2), groups=2, offset_groups=3)).to(device)
    x = values((2, 6, 5, 7), torch.float32, device)
    offset = sampler.offsets(x)
    assert offset.abs().max() > 0.5
    expected = reference.deform_conv2d(x, offset, sampler.weight, sampler.bias, (1, 2), (1, 0))
    assert relative_error(sampler(x), expected) <= BOUNDS[torch.float32]


def test_convolution_becomes_a_sampler(device: torch.device) -> None:
    convolution = nn.Conv2d(6, 4, 3, padding=1).to(device)
    sampler = DeformSampler(6, 4).to(device)
    keys = sampler.load_state_dict(convolution.state_dict(), strict=False)
    assert keys.unexpected_keys == []
    assert keys.missing_keys == ["offset_branch.weight", "offset_branch.bias"]
    x = values((2, 6, 5, 7), torch.float32, device)
    assert relative_error(sampler(x), convolution(x)) <= BOUNDS[torch.float32]


@pytest.mark.parametrize(("freeze_weight", "detach_input"), [*product([False, True], repeat=2)])
def test_gradient_reaches_what_it_should(device: torch.device, freeze_weight: bool, detach_input: bool) -> None:
    """Exactly those parts, and with the values of the reference."""
    sampler = DeformSampler(6, 4, freeze_weight=freeze_weight, detach_input=detach_input)
    draw_offsets(sampler).to(device, torch.float64)
    x = values((2, 6, 5, 4), torch.float64, device).requires_grad_()
    grad = values((2, 4, 5, 4), torch.float64, device)
    sampler(x).backward(grad)
    parts = {"x": x, **dict(sampler.named_parameters())}
    got = {name: part.grad for name, part in parts.items() if part.grad is not None}
    wanted = {"offset_branch.weight", "offset_branch.bias"}
    wanted |= set() if freeze_weight else {"weight", "bias"}
    wanted |= set() if detach_input else {"x"}
    assert set(got) == wanted
    assert {name for name, parameter in sampler.named_parameters() if parameter.requires_grad} == wanted - {"x"}

    branch = sampler.offset_branch
    offset = 2 * torch.tanh(F.conv2d(x, branch.weight, branch.bias, padding=1) / 2)
    output = reference.deform_conv2d(x, offset, sampler.weight, sampler.bias, padding=1)
    expected = torch.autograd.grad(output, [parts[name] for name in got], grad)
    for name, gradient in zip(got, expected, strict=True):
        assert relative_error(got[name], gradient) <= 1e-12, name


@pytest.mark.parametrize("max_offset", [None, 0.5, 2])
def test_offsets_are_bounded(device: torch.device, max_offset: float | None) -> None:
    sampler = draw_offsets(DeformSampler(6, 4, max_offset=max_offset), scale=3).to(device)
    x = values((2, 6, 5, 7), torch.float32, device)
    raw, offset = sampler.offset_branch(x), sampler.offsets(x)
    assert raw.abs().max() > 20
    if max_offset is None:
        assert torch.equal(offset, raw)
    else:
        assert offset.abs().max() <= max_offset
        assert torch.equal(offset.sign(), raw.sign())
        assert relative_error(offset, (raw.double() / max_offset).tanh() * max_offset) < 1e-6
    assert sampler(x).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision(device: torch.device, dtype: torch.dtype, autocast: bool) -> None:
    """Offsets, and so sampling points, stay float32; both ways to half precision have gradients for every part."""
    sampler = draw_offsets(DeformSampler(6, 4), scale=0.1).to(device, torch.float32 if autocast else dtype)
    x = values((2, 6, 5, 7), torch.float32 if autocast else dtype, device).requires_grad_()
    with torch.autocast(device.type, dtype, enabled=autocast):
        raw, offset, output = sampler.offset_branch(x), sampler.offsets(x), sampler(x)
    assert raw.dtype == output.dtype == dtype
    assert offset.dtype == torch.float32
    assert torch.equal(offset, 2 * torch.tanh(raw.float() / 2))
    weight, bias = sampler.weight.to(dtype).double(), sampler.bias.to(dtype).double()
    expected = reference.deform_conv2d(x.to(dtype).double(), offset.double(), weight, bias, padding=1)
    assert relative_error(output, expected) <= BOUNDS[dtype]
    output.sum().backward()
    assert all(part.grad is not None and part.grad.isfinite().all() for part in (x, *sampler.parameters()))


def test_copies_are_independent(device: torch.device) -> None:
    sampler = draw_offsets(DeformSampler(6, 4, freeze_weight=True, max_offset=1.5)).to(device)
    twin = copy.deepcopy(sampler)
    x = values((1, 6, 5, 7), torch.float32, device)
    before = sampler(x)
    assert torch.equal(twin(x), before)
    assert repr(twin) == repr(sampler)
    twin.reset_parameters()
    assert not twin.offsets(x).any()
    assert torch.equal(sampler(x), before)


def test_compile(device: torch.device) -> None:
    """Traces in one graph, forward and backward."""
    torch.compiler.reset()
    sampler = draw_offsets(DeformSampler(6, 4, detach_input=True)).to(device)
    compiled = torch.compile(sampler, fullgraph=True, backend="aot_eager")
    x = values((2, 6, 5, 7), torch.float32, device)
    assert relative_error(compiled(x), sampler(x)) <= BOUNDS[torch.float32]
    compiled(x).sum().backward()
    assert all(parameter.grad is not None for parameter in sampler.parameters())


def test_empty_batch(device: torch.device) -> None:
    sampler = DeformSampler(6, 4).to(device)
    assert sampler(torch.ones(0, 6, 5, 7, device=device)).shape == (0, 4, 5, 7)


def test_learns_offsets(device: torch.device) -> None:
    """A task that only offsets can do: the identity tap finds the image that was moved by a pixel."""
    sampler = DeformSampler(1, 1, 1, bias=False, freeze_weight=True, detach_input=True).to(device)
    nn.init.dirac_(sampler.weight)
    ramp = torch.arange(12.0, device=device).expand(1, 1, 10, 12)
    optimizer = torch.optim.Adam(sampler.parameters(), 0.05)
    for _ in range(100):
        optimizer.zero_grad()
        loss = (sampler(ramp) - (ramp + 1))[..., 2:-2].square().mean()
        loss.backward()
        optimizer.step()
    assert loss < 1e-2
    offset_y, offset_x = sampler.offsets(ramp)[0, :, 2:-2, 2:-2]
    assert (offset_x - 1).abs().max() < 0.2
    assert offset_y.abs().max() < 0.2


def test_repr() -> None:
    layer = DeformConv2d(8, 4, (3, 5), stride=2, padding=(1, 2), dilation=2, groups=2, bias=False)
    assert repr(layer) == (
        "DeformConv2d(8, 4, kernel_size=(3, 5), stride=(2, 2), padding=(1, 2), dilation=(2, 2), groups=2, bias=False)"
    )
    assert repr(DeformConv2d(8, 4, 1)) == "DeformConv2d(8, 4, kernel_size=(1, 1), stride=(1, 1))"
    sampler = repr(DeformSampler(8, 4, offset_groups=2, max_offset=None, freeze_weight=True, detach_input=True))
    assert sampler == (
        "DeformSampler(\n"
        "  8, 4, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), offset_groups=2, max_offset=None, "
        "freeze_weight=True, detach_input=True\n"
        "  (offset_branch): Conv2d(8, 36, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))\n"
        ")"
    )


BAD: dict[str, tuple[type[nn.Module], dict[str, Any], type[Exception], str]] = {
    "in_channels": (DeformConv2d, {"in_channels": 0}, ValueError, "in_channels must be at least 1, got 0"),
    "out_channels": (DeformConv2d, {"out_channels": 4.0}, TypeError, "out_channels must be an int, got 4.0"),
    "kernel_size": (DeformConv2d, {"kernel_size": (3, 0)}, ValueError, r"kernel_size\[1\] must be at least 1, got 0"),
    "kernel text": (
        DeformConv2d,
        {"kernel_size": "33"},
        TypeError,
        "kernel_size must be an int or a pair of ints, got '33'",
    ),
    "stride": (DeformConv2d, {"stride": 0}, ValueError, "stride must be at least 1, got 0"),
    "padding": (DeformConv2d, {"padding": -1}, ValueError, "padding must be at least 0, got -1"),
    "padding text": (
        DeformConv2d,
        {"padding": "same"},
        TypeError,
        "padding must be an int or a pair of ints, got 'same'",
    ),
    "dilation": (DeformConv2d, {"dilation": (1, 2, 3)}, TypeError, "dilation must be a pair of ints"),
    "groups": (DeformConv2d, {"groups": 4}, ValueError, "in_channels must be a multiple of groups, 4, got 6"),
    "groups out": (DeformConv2d, {"groups": 3}, ValueError, "out_channels must be a multiple of groups, 3, got 4"),
    "groups zero": (DeformConv2d, {"groups": 0}, ValueError, "groups must be at least 1, got 0"),
    "bias": (DeformConv2d, {"bias": 1}, TypeError, "bias must be a bool, got 1"),
    "freeze_weight": (DeformSampler, {"freeze_weight": "no"}, TypeError, "freeze_weight must be a bool, got 'no'"),
    "detach_input": (DeformSampler, {"detach_input": None}, TypeError, "detach_input must be a bool, got None"),
    "even": (DeformSampler, {"kernel_size": (3, 4)}, ValueError, r'odd for padding="same", got \(3, 4\)'),
    "valid": (DeformSampler, {"padding": "valid"}, ValueError, "padding must be an int, a pair .*got 'valid'"),
    "offset_groups": (DeformSampler, {"offset_groups": 4}, ValueError, "multiple of offset_groups, 4, got 6"),
    "offset_groups zero": (DeformSampler, {"offset_groups": 0}, ValueError, "offset_groups must be at least 1, got 0"),
    "max_offset zero": (DeformSampler, {"max_offset": 0}, ValueError, "max_offset must be above 0, got 0"),
    "max_offset NaN": (DeformSampler, {"max_offset": float("nan")}, ValueError, "max_offset must be finite.*got nan"),
    "max_offset text": (DeformSampler, {"max_offset": "2"}, TypeError, "max_offset must be a number, got '2'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case: str) -> None:
    module, options, error, message = BAD[case]
    with pytest.raises(error, match=message):
        module(**{"in_channels": 6, "out_channels": 4, "kernel_size": 3, **options})


def test_bad_input(device: torch.device) -> None:
    with pytest.raises(ValueError, match=r"offset must have shape \[1, 18, 5, 7\], got \[2, 18, 5, 7\]"):
        DeformConv2d(6, 4, 3, padding=1).to(device)(
            torch.ones(1, 6, 5, 7, device=device), torch.ones(2, 18, 5, 7, device=device)
        )


BAD_MAPS: dict[str, tuple[Any, type[Exception], str]] = {
    "rank": (torch.ones(6, 5, 7), ValueError, r"x must have the 4 dimensions .* got shape \[6, 5, 7\]"),
    "channels": (torch.ones(2, 5, 5, 7), ValueError, r"x must have 6 channels, got shape \[2, 5, 5, 7\]"),
    "dtype": (torch.ones(2, 6, 5, 7, dtype=torch.float64), TypeError, r"the layer's dtype float32, got float64"),
    "device": (torch.ones(2, 6, 5, 7, device="meta"), ValueError, r"x must be on the layer's device .*got meta"),
    "none": (None, TypeError, "x must be a torch.Tensor, got NoneType"),
    "small": (torch.ones(2, 6, 1, 7), ValueError, r"x must be as large as the kernel, got \(1, 7\) pixels"),
}


@pytest.mark.parametrize("case", BAD_MAPS)
def test_bad_maps(case: str) -> None:
    x, error, message = BAD_MAPS[case]
    sampler = DeformSampler(6, 4, padding=0)
    for function in (sampler, sampler.offsets):
        with pytest.raises(error, match=message):
            function(x)


def test_shapes_without_data() -> None:
    """On meta tensors, as when a network is planned before it is built."""
    sampler = DeformSampler(6, 4, stride=2).to("meta")
    assert sampler(torch.ones(2, 6, 9, 7, device="meta")).shape == (2, 4, 5, 4)


def test_reference_twins(device: torch.device) -> None:
    """The same layers on the reference operator: the same state, results and gradients."""
    x = values((2, 6, 7, 8), torch.float32, device)
    layer, twin = (draw_offsets(module.DeformSampler(6, 4)).to(device) for module in (wsss_ops, reference))
    twin.load_state_dict(layer.state_dict())
    plain, plain_twin = (module.DeformConv2d(6, 4, 3, padding=1).to(device) for module in (wsss_ops, reference))
    plain_twin.load_state_dict(plain.state_dict())
    offset = layer.offsets(x).detach()
    for fused, expected, parameters in [
        (layer(x), twin(x), (layer.offset_branch.weight, twin.offset_branch.weight)),
        (plain(x, offset), plain_twin(x, offset), (plain.weight, plain_twin.weight)),
    ]:
        assert relative_error(fused, expected) <= BOUNDS[torch.float32]
        assert expected.grad_fn.name() != fused.grad_fn.name()
        grads = [
            torch.autograd.grad(y.square().sum(), p)[0] for y, p in zip((fused, expected), parameters, strict=True)
        ]
        assert relative_error(*grads) <= 10 * BOUNDS[torch.float32]
