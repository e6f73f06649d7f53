"""clip_features on every backend: bit for bit its reference, in every memory order and dtype, with NaN anywhere."""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations

import pytest
import torch
from harness import (
    FLOATS,
    LAYOUTS,
    gradient,
    instruction_set,
    relative_error,
    short_name,
    threads,
    untouched,
    values,
)
from torch import Tensor

from wsss_ops import _backend, clip_features, reference

SHAPES = [
    (2, 3, 8, 8),
    (3, 8, 16, 16),
    (1, 5, 7, 9),  # an odd number of elements: no whole vectors
    (3, 1, 1, 1),
    (2, 65, 6, 1),
    (2, 3, 50, 47),  # two chunks of an image, the second short and without whole vectors
    (2, 8, 40, 40),  # four chunks
]
EMPTY = [(0, 3, 8, 8), (2, 0, 8, 8), (2, 3, 0, 8), (2, 3, 8, 0)]
BETA = 0.7


def with_gradient(
    function: Callable[[Tensor, float], Tensor], x: Tensor, beta: float, grad: Tensor
) -> tuple[Tensor, Tensor]:
    source = x.detach().requires_grad_()
    clipped = function(source, beta)
    return clipped.detach(), torch.autograd.grad(clipped, source, grad)[0]


def check(x: Tensor, beta: float = BETA, grad: Tensor | None = None) -> Tensor:
    """Results and gradients are those of the reference, bit for bit; returns the result."""
    before = x.clone()
    grad = values(x.shape, x.dtype, x.device) if grad is None else grad
    got = with_gradient(clip_features, x, beta, grad)
    expected = with_gradient(reference.clip_features, x, beta, grad)
    for ours, twin in zip(got, expected, strict=True):
        assert_equal(ours, twin)
    assert_equal(x, before)
    return got[0]


def assert_equal(got: Tensor, expected: Tensor) -> None:
    """Bit for bit; NaN is where NaN is expected."""
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=short_name)
def test_matches_reference(device: torch.device, shape: tuple[int, ...], layout: str) -> None:
    x = LAYOUTS[layout](values(shape, torch.float32, device))
    clipped = check(x, grad=LAYOUTS[layout](values(shape, torch.float32, device)))
    assert clipped.amax((1, 2, 3)).allclose(BETA * x.amax((1, 2, 3)))


@pytest.mark.parametrize("layout", ["nchw", "channels_last", "sliced"])
@pytest.mark.parametrize("dtype", FLOATS, ids=short_name)
def test_dtypes(device: torch.device, dtype: torch.dtype, layout: str) -> None:
    for shape in [(2, 6, 9, 11), (2, 8, 40, 56)]:
        check(LAYOUTS[layout](values(shape, dtype, device)))


@pytest.mark.parametrize("beta", [1e-60, 0.1, 1, 1.5, 1e300])
@pytest.mark.parametrize("dtype", FLOATS, ids=short_name)
def test_betas_and_signs(device: torch.device, dtype: torch.dtype, beta: float) -> None:
    x = values((5, 2, 4, 4), dtype, device)
    x[1] = -x[1].abs()  # a negative limit: above the maximum for beta < 1
    x[2] = 0
    x[3] = 5
    x[4, 0, 0, 0] = torch.inf
    check(x, beta)


@pytest.mark.parametrize("order", [*permutations((1, 2, 3))], ids=str)
def test_any_order_is_flat(device: torch.device, order: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """No memory order of an image's dimensions is copied, and results keep it; images may lie apart."""
    inverse = [0, *(1 + order.index(dim) for dim in (1, 2, 3))]
    x = values((4, *(3 + dim for dim in order)), torch.float32, device)[::2].permute(inverse)
    monkeypatch.setattr(Tensor, "copy_", None)
    source = x.requires_grad_()
    clipped = clip_features(source, BETA)
    (grad,) = torch.autograd.grad(clipped, source, torch.ones_like(clipped))
    assert clipped.stride()[1:] == grad.stride()[1:] == x.stride()[1:]
    assert torch.equal(clipped, reference.clip_features(x, BETA))


@pytest.mark.parametrize("dtype", FLOATS, ids=short_name)
def test_nan_stays_where_it_is(device: torch.device, dtype: torch.dtype) -> None:
    x = values((4, 3, 57, 56), dtype, device)  # several chunks
    for sign in (1, -1):
        nan = torch.full((), torch.nan, dtype=dtype, device=device).copysign(torch.tensor(sign, device=device))
        assert nan.signbit() == (sign < 0)
        x[0, 0, 0, 0] = x[0, 2, -1, -1] = x[1] = x[2, 1] = nan
        clipped = check(x)
        assert torch.equal(clipped.isnan(), x.isnan())
        known = x[0].nan_to_num(nan=-torch.inf).max()
        assert clipped[0].nan_to_num(nan=-torch.inf).max() == (known * BETA).to(dtype)
        assert_equal(clipped[3:], reference.clip_features(x[3:], BETA))


@pytest.mark.parametrize("dtype", FLOATS, ids=short_name)
def test_infinities(device: torch.device, dtype: torch.dtype) -> None:
    x = values((3, 2, 5, 5), dtype, device)
    x[0] = -torch.inf
    x[1, 0, 0, 0] = torch.inf
    x[2, 1, 1, 1] = -torch.inf
    assert torch.equal(check(x)[:2], x[:2])


@pytest.mark.parametrize("dtype", FLOATS, ids=short_name)
def test_zeros_of_either_sign_are_equal(device: torch.device, dtype: torch.dtype) -> None:
    """A maximum of -0 in one chunk does not stop the gradient at the +0 of another."""
    x = torch.full((1, 4, 57, 56), -0.0, dtype=dtype, device=device)
    x[0, 3, -1, -1] = 0.0
    check(x)
    check(-x)


def test_images_an_odd_number_apart(device: torch.device) -> None:
    """Whole vectors within an image, but not from one image to the next."""

    def apart(numbers: int) -> Tensor:
        storage = values((3 * 160,), torch.float32, device)
        return storage.as_strided((3, 8, 4, 4), (numbers, 16, 4, 1))

    for x, grad in [(129, 128), (128, 129), (131, 130)]:
        check(apart(x), grad=apart(grad))


def test_half_precision_subnormals_and_largest(device: torch.device) -> None:
    for factor in (2.0**-20, 2.0**13):
        check(values((2, 4, 5, 5), torch.float64, device).mul(factor).half())


@pytest.mark.parametrize("shape", EMPTY, ids=short_name)
def test_empty(device: torch.device, shape: tuple[int, ...]) -> None:
    x = torch.ones(shape, device=device)
    assert check(x).shape == x.shape


def test_gradient_stops_above_the_limit(device: torch.device) -> None:
    x = torch.tensor([1.0, 2.0, 4.0, torch.nan], device=device).reshape(1, 4, 1, 1).requires_grad_()
    clip_features(x, 0.5).sum().backward()
    assert x.grad.flatten().tolist() == [1, 1, 0, 1]  # at the limit itself it passes
    x.grad = None
    clip_features(x, 1.0).sum().backward()
    assert x.grad.flatten().tolist() == [1, 1, 1, 1]


def test_expanded_gradient(device: torch.device) -> None:
    """The gradient of a sum is one number, expanded; that of a layer may be in another memory order than x."""
    x = values((2, 3, 5, 6), torch.float32, device)
    check(x, grad=torch.ones((), device=device).expand(x.shape))
    check(x, grad=LAYOUTS["channels_last"](values(x.shape, torch.float32, device)))
    check(LAYOUTS["channels_last"](x), grad=values(x.shape, torch.float32, device))


@pytest.mark.parametrize("channels_last", [False, True])
def test_gradcheck(device: torch.device, channels_last: bool) -> None:
    """Where the maximum itself does not move: its own derivative is left out on purpose."""
    x = values((2, 3, 5, 4), torch.float64, device)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    strongest = torch.zeros_like(x)
    strongest[:, 0, 0, 0] = 9

    def function(weaker: Tensor) -> Tensor:
        return clip_features(torch.where(strongest > 0, strongest, weaker), 0.4)

    assert function(x).eq(0.4 * 9).sum() > 20
    assert torch.autograd.gradcheck(function, x.requires_grad_())
    assert torch.autograd.gradgradcheck(function, x)


@pytest.mark.parametrize("layout", ["nchw", "channels_last", "sliced", "stepped", "transposed"])
def test_opcheck(device: torch.device, layout: str) -> None:
    x = LAYOUTS[layout](values((2, 3, 5, 4), torch.float32, device))
    torch.library.opcheck(torch.ops.wsss_ops.clip_features.default, (x.requires_grad_(), BETA))
    grad = LAYOUTS[layout](values(x.shape, torch.float32, device)).requires_grad_()
    limits = torch.full((2,), 3.0, device=device)
    torch.library.opcheck(torch.ops.wsss_ops.clip_features_backward.default, (grad, x.detach(), limits))


@pytest.mark.parametrize(("layout", "autocast"), [("nchw", False), ("channels_last", False), ("channels_last", True)])
def test_compile(device: torch.device, layout: str, autocast: bool) -> None:
    """A layer, then the clip; under autocast the layer's bfloat16 is what is clipped."""
    layer = torch.nn.Conv2d(3, 4, 3).to(device)

    def function(x: Tensor, beta: float) -> Tensor:
        return clip_features(layer(x), beta)

    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True)
    for shape, beta in [((2, 3, 9, 7), 0.5), ((1, 3, 12, 5), 0.5), ((1, 3, 12, 5), 0.25)]:  # all become dynamic
        x = LAYOUTS[layout](values(shape, torch.float32, device)).requires_grad_()
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            got, expected = compiled(x, beta), function(x, beta)
        assert got.dtype == expected.dtype == (torch.bfloat16 if autocast else torch.float32)
        assert got.stride() == expected.stride()
        tolerance = 1e-2 if autocast else 1e-6
        assert relative_error(got, expected) < tolerance
        grad = values(expected.shape, expected.dtype, device)
        assert relative_error(gradient(got, x, grad), gradient(expected, x, grad)) < tolerance


def test_repeats_exactly(device: torch.device) -> None:
    x = values((3, 7, 33, 65), torch.float32, device)
    first = clip_features(x, BETA)
    assert all(torch.equal(clip_features(x, BETA), first) for _ in range(3))


@pytest.mark.parametrize("level", _backend.cpu_module().levels())
def test_instruction_sets_and_threads(level: str) -> None:
    """On every instruction set, with images that several threads share and images that one has for itself."""
    for count in (2, 3):
        with instruction_set(level), threads(count):
            for shape in [(1, 7, 63, 65), (3, 7, 63, 65), (7, 2, 50, 50)]:
                for dtype in FLOATS:
                    check(values(shape, dtype, torch.device("cpu")))


def test_images_more_than_2_31_elements_apart(device: torch.device) -> None:
    """Offsets that do not fit 32 bits, in memory that is reserved but hardly touched."""
    storage = untouched(2**31 + 2**10, torch.float16, device)
    for apart in (2**31 + 5, 2**31 + 16):
        x = storage.as_strided((2, 3, 8, 8), (apart, 64, 8, 1))
        x.copy_(values(x.shape, torch.float16, device))
        check(x)


def test_negated_views(device: torch.device) -> None:
    """DLPack does not carry PyTorch's lazy negation: it must be resolved before."""
    x = torch.randn(2, 3, 4, 4, dtype=torch.complex64, device=device).conj().imag
    assert x.is_neg()
    assert torch.equal(clip_features(x, BETA), reference.clip_features(x.resolve_neg(), BETA))


def test_graph_capture() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU: graphs exist nowhere else")
    x = values((2, 8, 40, 40), torch.float32, torch.device("cuda"))
    clip_features(x, BETA)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = clip_features(x, BETA)
    x.copy_(values(x.shape, torch.float32, x.device))
    graph.replay()
    assert torch.equal(captured, reference.clip_features(x, BETA))


BAD = {
    "x not a tensor": (lambda x: clip_features([1.0], 0.5), TypeError, r"x must be a torch.Tensor, got list"),
    "x rank": (lambda x: clip_features(x[0], 0.5), ValueError, r"x must have the 4 dimensions .*\[3, 8, 8\]"),
    "x int": (lambda x: clip_features(x.int(), 0.5), TypeError, r"x must be one of .*got int32"),
    "x sparse": (lambda x: clip_features(x.to_sparse(), 0.5), TypeError, r"x must be a dense tensor"),
    "beta zero": (lambda x: clip_features(x, 0), ValueError, r"beta must be above 0, got 0"),
    "beta negative": (lambda x: clip_features(x, -0.5), ValueError, r"beta must be above 0, got -0.5"),
    "beta infinite": (lambda x: clip_features(x, torch.inf), ValueError, r"beta must be finite .*got inf"),
    "beta beyond floats": (lambda x: clip_features(x, 10**400), ValueError, r"beta must be finite .*got 1000"),
    "beta NaN": (lambda x: clip_features(x, torch.nan), ValueError, r"beta must be finite .*got nan"),
    "beta text": (lambda x: clip_features(x, "0.5"), TypeError, r"beta must be a number, got '0.5'"),
    "beta bool": (lambda x: clip_features(x, True), TypeError, r"beta must be a number, got True"),
    "beta tensor": (lambda x: clip_features(x, x.mean()), TypeError, r"beta must be a number, got tensor"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(device: torch.device, case: str) -> None:
    function, error, message = BAD[case]
    with pytest.raises(error, match=message):
        function(torch.ones(2, 3, 8, 8, device=device))
