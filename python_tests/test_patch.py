"""patch_split and patch_merge on every backend: exact, in every layout and dtype, as eager and compiled operators."""

from __future__ import annotations

import pytest
import torch
from harness import FLOATS, LAYOUTS, another_stream, gradient, in_threads, relative_error, short_name, untouched, values
from torch import Tensor

from wsss_ops import patch_merge, patch_split, reference

# (N, D, H, W), grid, multiple
CASES = [
    ((2, 3, 8, 8), (2, 2), 1),
    ((2, 8, 32, 32), (4, 4), 1),  # 16-byte rows
    ((1, 5, 31, 33), (4, 4), 1),  # rows of odd length, rows and columns beyond the image
    ((3, 2, 7, 5), (2, 3), 2),
    ((1, 3, 9, 4), (4, 1), 4),
    ((1, 1, 1, 1), (3, 3), 1),  # patches that lie wholly beyond the image
    ((2, 1, 5, 6), (5, 6), 1),
    ((1, 7, 1, 17), (1, 2), 3),
    ((1, 65, 6, 1), (1, 1), 1),  # as channels_last: one pixel of 65 channels in a row
    ((1, 16, 40, 40), (1, 1), 8),  # many vectors in a patch: more than one block and thread
    ((1, 300, 5, 6), (2, 2), 1),
]
EMPTY = [((0, 3, 8, 8), (2, 2)), ((2, 0, 8, 8), (2, 2)), ((2, 3, 0, 8), (2, 2)), ((2, 3, 8, 0), (2, 2))]
DTYPES = [*FLOATS, torch.bool, torch.uint8, torch.int16, torch.int64]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("shape", "grid", "multiple"), CASES, ids=short_name)
def test_matches_reference(
    device: torch.device, shape: tuple[int, ...], grid: tuple[int, int], multiple: int, layout: str
) -> None:
    x = LAYOUTS[layout](values(shape, torch.float32, device)).requires_grad_()
    twin = x.detach().clone().requires_grad_()
    before = x.detach().clone()
    patches, expected = patch_split(x, grid, multiple), reference.patch_split(twin, grid, multiple)
    assert torch.equal(patches, expected)
    grad = LAYOUTS[layout](values(patches.shape, torch.float32, device))
    assert torch.equal(gradient(patches, x, grad), gradient(expected, twin, grad))
    assert torch.equal(x, before)

    patches = LAYOUTS[layout](patches.detach()).requires_grad_()
    merged, expected = patch_merge(patches, grid, shape[2:]), reference.patch_merge(patches, grid, shape[2:])
    assert torch.equal(merged, expected)
    grad = LAYOUTS[layout](values(shape, torch.float32, device))
    assert torch.equal(gradient(merged, patches, grad), gradient(expected, patches, grad))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=short_name)
def test_dtypes(device: torch.device, dtype: torch.dtype, channels_last: bool) -> None:
    x = values((2, 6, 9, 11), dtype, device)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    patches = patch_split(x, (2, 3), 2)
    assert patches.dtype == dtype
    assert torch.equal(patches, reference.patch_split(x, (2, 3), 2))
    assert torch.equal(patch_merge(patches, (2, 3), (9, 11)), x)


@pytest.mark.parametrize("vector", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("count", [1, 31, 32, 33, 127, 128, 129, 1023, 1024, 1025, 4097])
def test_rows_around_warps_and_blocks(device: torch.device, count: int, vector: int) -> None:
    """Rows of so many vectors of so many bytes, at an address that allows no wider ones."""
    larger = values((2, 1, 1, vector + count * vector), torch.uint8, device)
    x = larger[:, :, :, vector:]
    patches = patch_split(x, (1, 2), vector)
    assert torch.equal(patches, reference.patch_split(x, (1, 2), vector))
    assert torch.equal(patch_merge(patches, (1, 2), (1, count * vector)), x)


@pytest.mark.parametrize("layout", ["nchw", "channels_last", "sliced_channels_last"])
def test_keeps_memory_format(device: torch.device, layout: str) -> None:
    kept = torch.contiguous_format if layout == "nchw" else torch.channels_last
    patches = patch_split(LAYOUTS[layout](values((2, 6, 8, 10), torch.float32, device)), (2, 2))
    assert patches.is_contiguous(memory_format=kept)
    assert patch_merge(patches, (2, 2), (7, 9)).is_contiguous(memory_format=kept)


def test_merge_to_less_than_the_patches_hold(device: torch.device) -> None:
    """What is cropped off gets no gradient, and a size of 0 is no fault."""
    patches = values((4, 3, 4, 4), torch.float32, device).requires_grad_()
    merged = patch_merge(patches, (2, 2), (3, 5))  # the second row of patches is cropped off whole
    assert torch.equal(merged, reference.patch_merge(patches, (2, 2), (3, 5)))
    (grad,) = torch.autograd.grad(merged.sum(), patches)
    assert torch.equal(grad, gradient(reference.patch_merge(patches, (2, 2), (3, 5)).sum(), patches, grad.new_ones(())))
    assert grad[2:].abs().sum() == 0
    assert patch_merge(patches, (2, 2), (0, 5)).shape == (1, 3, 0, 5)


@pytest.mark.parametrize(("shape", "grid"), EMPTY, ids=short_name)
def test_empty(device: torch.device, shape: tuple[int, ...], grid: tuple[int, int]) -> None:
    x = torch.ones(shape, device=device, requires_grad=True)
    patches = patch_split(x, grid)
    assert patches.shape == reference.patch_split(x, grid).shape
    merged = patch_merge(patches, grid, shape[2:])
    assert merged.shape == x.shape
    assert gradient(merged, x, torch.ones_like(merged)).shape == x.shape


@pytest.mark.parametrize("channels_last", [False, True])
def test_gradcheck(device: torch.device, channels_last: bool) -> None:
    x = values((2, 3, 5, 4), torch.float64, device)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    patches = patch_split(x, (2, 3), 2).detach().requires_grad_()
    for function, source in [
        (lambda source: patch_split(source, (2, 3), 2), x),
        (lambda source: patch_merge(source, (2, 3), (5, 4)), patches),
    ]:
        assert torch.autograd.gradcheck(function, source)
        assert torch.autograd.gradgradcheck(function, source)


@pytest.mark.parametrize("layout", ["nchw", "channels_last", "transposed"])
def test_opcheck(device: torch.device, layout: str) -> None:
    x = LAYOUTS[layout](values((2, 3, 5, 4), torch.float32, device))
    torch.library.opcheck(torch.ops.wsss_ops.patch_split.default, (x.requires_grad_(), 2, 2, 3, 2))
    patches = LAYOUTS[layout](values((8, 3, 3, 2), torch.float32, device))
    torch.library.opcheck(torch.ops.wsss_ops.patch_merge.default, (patches.requires_grad_(), 2, 2, 5, 4))


def chain(x: Tensor) -> Tensor:
    """Split, a layer per patch, merge; under autocast the layer computes in bfloat16."""
    patches = patch_split(x, (2, 2), 2)
    mixed = torch.nn.functional.conv2d(patches, torch.ones(4, 3, 3, 3, device=x.device), padding=1)
    return patch_merge(mixed, (2, 2), (x.shape[2], x.shape[3]))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_compile(device: torch.device, layout: str, autocast: bool) -> None:
    torch.compiler.reset()
    compiled = torch.compile(chain, fullgraph=True)
    for shape in [(2, 3, 9, 7), (1, 3, 12, 5)]:  # the second makes sizes dynamic
        x = LAYOUTS[layout](values(shape, torch.float32, device)).requires_grad_()
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            got, expected = compiled(x), chain(x)
        assert got.dtype == expected.dtype == (torch.bfloat16 if autocast else torch.float32)
        assert got.stride() == expected.stride()
        tolerance = 1e-2 if autocast else 1e-6
        assert relative_error(got, expected) < tolerance
        grad = values(expected.shape, expected.dtype, device)
        assert relative_error(gradient(got, x, grad), gradient(expected, x, grad)) < tolerance


def test_more_than_2_31_elements_apart(device: torch.device) -> None:
    """Rows, planes and images whose offsets do not fit 32 bits, in memory that is reserved but hardly touched."""
    storage = untouched(2**32 + 2**10, torch.uint8, device)
    for stride in [(2**31 + 5, 64, 8, 1), (64, 2**31 + 16, 8, 1), (32, 16, 2**30 + 3, 1)]:
        x = storage.as_strided((2, 2, 3 if stride[2] > 8 else 8, 8), stride)
        x.copy_(values(x.shape, torch.uint8, device))
        patches = patch_split(x, (2, 2))
        assert torch.equal(patches, reference.patch_split(x.contiguous(), (2, 2)))


def test_negated_views(device: torch.device) -> None:
    """DLPack does not carry PyTorch's lazy negation: it must be resolved before."""
    x = torch.randn(2, 3, 4, 4, dtype=torch.complex64, device=device).conj().imag
    assert x.is_neg()
    assert torch.equal(patch_split(x, (2, 2)), reference.patch_split(x.resolve_neg(), (2, 2)))


def test_threads(device: torch.device) -> None:
    """Calls from several Python threads at once do not disturb each other."""
    x = values((2, 8, 16, 16), torch.float32, device)
    expected = reference.patch_split(x, (4, 4))

    def work() -> None:
        for _ in range(5):
            assert torch.equal(patch_split(x, (4, 4)), expected)

    in_threads(work)


def test_current_stream_and_graphs() -> None:
    """Launches go to PyTorch's current stream, and can be captured."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU: streams and graphs exist nowhere else")
    x = torch.zeros(4, 64, 64, 64, device="cuda")
    with another_stream():
        torch.cuda._sleep(50_000_000)
        x.fill_(3)
        patches = patch_split(x, (4, 4))
    assert bool((patches == 3).all())

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = patch_merge(patch_split(x, (4, 4)), (4, 4), (64, 64))
    x.fill_(5)
    graph.replay()
    assert bool((captured == 5).all())


def test_second_gpu() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    x = values((2, 3, 8, 8), torch.float32, torch.device("cuda:1"))
    assert torch.equal(patch_split(x, (2, 2)), reference.patch_split(x, (2, 2)))
    assert torch.cuda.current_device() == 0


BAD = {
    "x not a tensor": (lambda x: patch_split([1.0], (2, 2)), TypeError, r"x must be a torch.Tensor, got list"),
    "x rank": (lambda x: patch_split(x[0], (2, 2)), ValueError, r"x must have the 4 dimensions .*\[3, 8, 8\]"),
    "x complex": (lambda x: patch_split(x.to(torch.complex64), (2, 2)), TypeError, r"x must be one of .*complex64"),
    "x sparse": (lambda x: patch_split(x.to_sparse(), (2, 2)), TypeError, r"x must be a dense tensor"),
    "grid number": (lambda x: patch_split(x, 2), TypeError, r"grid must be a pair of ints, got 2"),
    "grid triple": (lambda x: patch_split(x, (2, 2, 2)), TypeError, r"grid must be a pair"),
    "grid zero": (lambda x: patch_split(x, (0, 2)), ValueError, r"grid\[0\] must be at least 1, got 0"),
    "grid float": (lambda x: patch_split(x, (2, 2.0)), TypeError, r"grid\[1\] must be an int, got 2.0"),
    "multiple": (lambda x: patch_split(x, (2, 2), 0), ValueError, r"multiple must be at least 1, got 0"),
    "multiple bool": (lambda x: patch_split(x, (2, 2), True), TypeError, r"multiple must be an int, got True"),
    "patches rank": (lambda x: patch_merge(x[0], (2, 2), (8, 8)), ValueError, r"patches must have the 4"),
    "patches count": (lambda x: patch_merge(x, (2, 2), (8, 8)), ValueError, r"multiple of 2 \* 2 patches .*got 2"),
    "size": (lambda x: patch_merge(x, (1, 2), (9, 8)), ValueError, r"size must be at most \(8, 16\).*got \(9, 8\)"),
    "size negative": (lambda x: patch_merge(x, (1, 2), (8, -1)), ValueError, r"size\[1\] must be at least 0"),
    "size text": (lambda x: patch_merge(x, (1, 2), "88"), TypeError, r"size must be a pair"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(device: torch.device, case: str) -> None:
    function, error, message = BAD[case]
    with pytest.raises(error, match=message):
        function(torch.ones(2, 3, 8, 8, device=device))
