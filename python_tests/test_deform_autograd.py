"""deform_conv2d as an operator of PyTorch: gradients checked, registered, compiled, under autocast, on streams."""

from __future__ import annotations

import pytest
import torch
from deform_cases import BOUNDS, Case, as_double, assert_near, off_integers, run, tensors
from harness import LAYOUTS, another_stream, relative_error, values
from torch import Tensor

from wsss_ops import deform_conv2d, reference

SMALL = Case((2, 4, 3, 4), 2, (2, 2), padding=1, groups=2, offset_groups=2, masked=True)


def leaves(case: Case, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    given = tensors(case, device, dtype)
    del given["output"]
    return {name: tensor.requires_grad_() for name, tensor in given.items()}


@pytest.mark.parametrize("channels_last", [False, True])
def test_gradcheck(device: torch.device, channels_last: bool) -> None:
    case = Case((1, 2, 3, 2), 2, (2, 2), padding=(1, 0), offset_groups=2, masked=True)
    given = leaves(case, device, torch.float64)
    if channels_last:
        given["input"] = given["input"].detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    for function in (deform_conv2d, reference.deform_conv2d):
        assert torch.autograd.gradcheck(
            lambda *inputs, f=function: f(**dict(zip(given, inputs, strict=True)), **case.options),
            tuple(given.values()),
            fast_mode=True,
        )


def test_second_derivative_is_refused(device: torch.device) -> None:
    given = leaves(SMALL, device, torch.float32)
    result = deform_conv2d(**given, **SMALL.options)
    (gradient,) = torch.autograd.grad(result.square().sum(), given["offset"], create_graph=True)
    with pytest.raises(RuntimeError, match="deform_conv2d"):
        torch.autograd.grad(gradient.sum(), given["input"])


def test_tensors_changed_before_the_backward_pass(device: torch.device) -> None:
    given = leaves(SMALL, device, torch.float32)
    changed = given["offset"].detach().clone()
    result = deform_conv2d(**{**given, "offset": changed}, **SMALL.options)
    changed.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.sum().backward()


@pytest.mark.parametrize("layout", ["nchw", "channels_last", "transposed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(device: torch.device, dtype: torch.dtype, layout: str) -> None:
    given = leaves(SMALL, device, dtype)
    wide = {name: given[name].detach().float().requires_grad_() for name in ("offset", "mask")}
    x = LAYOUTS[layout](given["input"].detach()).requires_grad_()
    settings = [1, 1, 1, 1, 1, 1, 2, 2]
    arguments = (x, wide["offset"], given["weight"], given["bias"], wide["mask"], settings)
    torch.library.opcheck(torch.ops.wsss_ops.deform_conv2d.default, arguments, rtol=2e-2, atol=2e-2)
    torch.library.opcheck(
        torch.ops.wsss_ops.deform_conv2d.default, (x.detach(), wide["offset"], given["weight"], None, None, settings)
    )


class Layer(torch.nn.Module):
    """Samples of what a convolution, in bfloat16 under autocast, has computed."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Conv2d(3, 4, 1)
        self.weight = torch.nn.Parameter(torch.randn(5, 4, 3, 3))
        self.bias = torch.nn.Parameter(torch.randn(5))

    def forward(self, x: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
        return deform_conv2d(self.first(x), offset, self.weight, self.bias, padding=1, mask=mask)


COMPILERS = [
    ("aot_eager", "nchw", False),
    ("aot_eager", "channels_last", True),
    ("inductor", "channels_last", True),  # slow to compile
]


@pytest.mark.parametrize(("compiler", "layout", "autocast"), COMPILERS)
def test_compile(device: torch.device, compiler: str, layout: str, autocast: bool) -> None:
    torch.compiler.reset()
    layer = Layer().to(device)
    compiled = torch.compile(layer, fullgraph=True, backend=compiler)
    for shape in [(2, 3, 9, 7), (1, 3, 12, 5)]:  # the second makes sizes dynamic
        x = LAYOUTS[layout](values(shape, torch.float32, device)).requires_grad_()
        offset = off_integers((shape[0], 18, *shape[2:]), -2, 2).to(device, torch.float32).requires_grad_()
        mask = values((shape[0], 9, *shape[2:]), torch.float32, device).requires_grad_()
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            got, expected = compiled(x, offset, mask), layer(x, offset, mask)
        assert got.dtype == expected.dtype == (torch.bfloat16 if autocast else torch.float32)
        assert got.stride() == expected.stride()
        sources = [x, offset, mask, *layer.parameters()]
        grad = values(expected.shape, expected.dtype, device)
        compared = zip(
            [got, *torch.autograd.grad(got, sources, grad)],
            [expected, *torch.autograd.grad(expected, sources, grad)],
            strict=True,
        )
        for ours, theirs in compared:
            assert ours.dtype == theirs.dtype
            assert relative_error(ours, theirs) < (2e-2 if autocast else 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(device: torch.device, dtype: torch.dtype) -> None:
    """Input, weight and bias are cast; offsets and gradients keep the precision that they came with."""
    case = Case((2, 8, 12, 12), 4, (3, 3), padding=1, masked=True)
    given = tensors(case, device, torch.float32)
    given["output"] = given["output"].to(dtype)

    def under_autocast(**arguments: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype):
            return deform_conv2d(**arguments)

    got = run(under_autocast, case.options, given)
    assert got.pop("output").dtype == dtype
    assert all(tensor.dtype == torch.float32 for tensor in got.values())
    rounded = {
        name: tensor.to(dtype) if name in ("input", "weight", "bias") else tensor for name, tensor in given.items()
    }
    expected = run(reference.deform_conv2d, case.options, as_double(rounded))
    del expected["output"]
    assert_near(got, expected, BOUNDS[dtype])

    double = {name: tensor.double() for name, tensor in given.items()}
    assert run(under_autocast, case.options, double)["output"].dtype == torch.float64


def test_current_stream_and_graphs() -> None:
    """Launches go to PyTorch's current stream, and can be captured."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU: streams and graphs exist nowhere else")
    given = leaves(Case((4, 32, 32, 32), 16, (3, 3), padding=1, masked=True), torch.device("cuda"), torch.float32)
    still = {name: tensor.detach() for name, tensor in given.items()}
    expected = deform_conv2d(**still, padding=1)
    late = {name: torch.zeros_like(tensor) for name, tensor in still.items()}
    with another_stream():
        torch.cuda._sleep(50_000_000)
        for name, tensor in late.items():
            tensor.copy_(still[name])
        result = deform_conv2d(**late, padding=1)
    assert relative_error(result, expected) < 1e-6

    torch.use_deterministic_algorithms(False)
    gradient = torch.randn_like(expected)
    sources = list(given.values())
    expected_gradients = torch.autograd.grad(deform_conv2d(**given, padding=1), sources, gradient)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = torch.autograd.grad(deform_conv2d(**given, padding=1), sources, gradient)
    for tensor in captured:
        tensor.zero_()
    graph.replay()
    for got, wanted in zip(captured, expected_gradients, strict=True):
        assert relative_error(got, wanted) < 1e-5


def test_second_gpu() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    given = tensors(SMALL, torch.device("cuda:1"), torch.float32)
    got = run(deform_conv2d, SMALL.options, given)
    assert_near(got, run(reference.deform_conv2d, SMALL.options, as_double(given)), BOUNDS[torch.float32])
    assert torch.cuda.current_device() == 0
