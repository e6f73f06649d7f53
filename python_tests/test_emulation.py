"""The emulation of CUDA on the CPU, against numpy: csrc/emulation/selftest.cu compiled by g++ and run."""

from __future__ import annotations

import ctypes
from bisect import bisect_left
from fractions import Fraction

import numpy as np
import pytest
import torch
from harness import in_threads
from selftest import Selftest, load


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def dims(*sizes: int) -> np.ndarray:
    return np.array((*sizes, 1, 1)[:3], np.uint32)


def bits_of(lanes: np.ndarray) -> np.ndarray:
    return (lanes.astype(np.uint64) << np.arange(32, dtype=np.uint64)).sum(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("n", [0, 1, 31, 33, 255, 257, 1000, 4099])
def test_block_sums(selftest: Selftest, n: int, dtype: torch.dtype) -> None:
    blocks = 3
    x = torch.randint(-50, 50, (n,), generator=torch.Generator().manual_seed(n)).to(dtype)
    sums = torch.full((blocks,), -1.0)
    selftest("sum", x, sums, n, blocks, [torch.float32, torch.float16, torch.bfloat16].index(dtype))
    expected = [sum(x[b * 256 + k :: blocks * 256].float().sum() for k in range(256)) for b in range(blocks)]
    assert sums.tolist() == [float(e) for e in expected]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(1, 1), (16, 16), (17, 5), (33, 47), (1, 100)])
def test_transpose(selftest: Selftest, rng: np.random.Generator, shape: tuple[int, int], dtype: type) -> None:
    x = rng.standard_normal(shape).astype(dtype)
    out = np.zeros(shape[::-1], dtype)
    selftest("transpose", x, out, *shape, [np.float32, np.float64].index(dtype))
    np.testing.assert_array_equal(out, x.T)


@pytest.mark.parametrize("length", [1, 31, 32, 33, 100, 1023, 1024])
def test_scan(selftest: Selftest, rng: np.random.Generator, length: int) -> None:
    x = rng.integers(-1000, 1000, (3, length), dtype=np.int32)
    out = np.zeros_like(x)
    selftest("scan", x, out, 3, length)
    np.testing.assert_array_equal(out, x.cumsum(axis=1))


def test_votes(selftest: Selftest, rng: np.random.Generator) -> None:
    share = np.array([0.5, 0.9, 0.99, 0.01, 0.0, 1.0, 0.5])
    x = (rng.random((7, 3, 32)) < share[:, None, None]).astype(np.int32)
    out = np.zeros((7, 3, 6), np.uint32)
    selftest("votes", x, out, 21)
    np.testing.assert_array_equal(out[..., 0], bits_of(x))
    np.testing.assert_array_equal(out[..., 1], x.any(-1))
    np.testing.assert_array_equal(out[..., 2], x.all(-1))
    np.testing.assert_array_equal(out[..., 3], np.broadcast_to(x.sum((1, 2))[:, None], (7, 3)))
    np.testing.assert_array_equal(out[..., 4], np.broadcast_to(x.all((1, 2))[:, None], (7, 3)))
    np.testing.assert_array_equal(out[..., 5], np.broadcast_to(x.any((1, 2))[:, None], (7, 3)))


@pytest.mark.parametrize("dtype", [np.int32, np.uint64, np.float64, np.float16])
@pytest.mark.parametrize("width", [1, 2, 8, 32])
@pytest.mark.parametrize("step", [0, 1, 3, 9, 31])
def test_shuffles(selftest: Selftest, rng: np.random.Generator, step: int, width: int, dtype: type) -> None:
    n = 128
    x = rng.integers(0, 30, n).astype(dtype)
    out = np.zeros((n, 5), dtype)
    selftest("shuffle", x, out, n, step, width, [np.int32, np.uint64, np.float64, np.float16].index(dtype))
    i = np.arange(n)
    lane, warp = i % 32, i // 32 * 32
    first = lane // width * width
    last = first + width - 1
    xor = lane ^ step
    sources = [
        first + step % width,
        np.where(lane - step < first, lane, lane - step),
        np.where(lane + step > last, lane, lane + step),
        np.where(xor > last, lane, xor),
    ]
    for column, source in enumerate(sources):
        np.testing.assert_array_equal(out[:, column], x[warp + source])
    np.testing.assert_array_equal(out[:, 4], x.reshape(-1, width).sum(1).repeat(width))


def test_warp_reductions(selftest: Selftest, rng: np.random.Generator) -> None:
    x = rng.integers(-5, 5, (4, 32), dtype=np.int32)
    x[1] = rng.integers(-(2**31), 2**31, 32)
    out = np.zeros((4, 32, 6), np.uint32)
    selftest("warp", x, out, x.size)
    np.testing.assert_array_equal(out[..., 5].view(np.int32), x[:, ::-1])
    np.testing.assert_array_equal(out[..., 0], bits_of(x[:, :, None] == x[:, None, :]))
    for column, reduced in enumerate((x.sum(1), x.min(1), x.max(1), np.bitwise_or.reduce(x, 1)), start=1):
        np.testing.assert_array_equal(out[..., column], reduced.astype(np.uint32)[:, None].repeat(32, 1))


@pytest.mark.parametrize("n", [1, 100, 5000])
def test_histogram_by_atomics(selftest: Selftest, rng: np.random.Generator, n: int) -> None:
    x = rng.integers(0, 37, n, dtype=np.int32)
    counts = np.zeros(37, np.uint32)
    extremes = np.array([99, -99], np.int32)
    selftest("histogram", x, n, counts, 37, extremes)
    np.testing.assert_array_equal(counts, np.bincount(x, minlength=37))
    assert extremes.tolist() == [x.min(), x.max()]


def test_atomic_add_of_every_type(selftest: Selftest, rng: np.random.Generator) -> None:
    n, m = 300, 6
    x = rng.integers(-3, 4, n).astype(np.float32)  # sums small enough to be exact in bfloat16
    results = [torch.zeros(m, dtype=t) for t in (torch.float32, torch.float64)]
    results += [torch.zeros(m, dtype=t) for t in (torch.float16, torch.bfloat16) * 2]
    selftest("atomic_add", x, n, m, *results)
    expected = [x[k::m].sum() for k in range(m)]
    for result in results:
        assert result.tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_tensor_cores_and_asynchronous_copies(selftest: Selftest, dtype: torch.dtype) -> None:
    depth = 32 // dtype.itemsize
    left, right = torch.randn(16, depth).to(dtype), torch.randn(depth, 8).to(dtype)
    if dtype == torch.float32:  # few enough bits for TF32
        left, right = left.half().float(), right.half().float()
    for _ in range(4):  # each launch draws anew when its copies happen
        out = torch.full((16, 8), torch.nan)
        code = [torch.float16, torch.bfloat16, torch.float32].index(dtype)
        selftest("product", left, right.t().contiguous(), out, code)
        torch.testing.assert_close(out, left.float() @ right.float())


def test_floats_as_tf32(selftest: Selftest, rng: np.random.Generator) -> None:
    """One of them, the nearest, of a tie the larger; or two, as near as a float's last bit."""
    x = rng.integers(0, 2**32, 200_000, dtype=np.uint32).view(np.float32)
    ties = 1 + 2.0**-11 * np.array([1, 3, 5])
    x = np.concatenate([x[np.abs(x) < 3.4e38], [0, 1, -3], ties, -ties]).astype(np.float32)
    nearest, high, low = np.zeros((3, x.size), np.float32)
    selftest("tf32", x, nearest, high, low, x.size)
    for part in (nearest, high, low):
        assert not (part.view(np.uint32) & 0x1FFF).any()
    exact = x.astype(np.float64)
    mantissa, exponent = np.frexp(np.abs(exact))
    normal = np.abs(exact) > 2.0**-126
    expected = np.copysign(np.ldexp(np.floor(np.ldexp(mantissa, 11) + 0.5), exponent - 11), exact)
    np.testing.assert_array_equal(nearest[normal], expected[normal])
    np.testing.assert_array_equal(high[normal], expected[normal])
    error = np.abs(exact - high - low.astype(np.float64))
    assert (error <= np.maximum(2.0**-23 * np.abs(exact), 2.0**-136)).all()


def test_what_is_not_a_number_is_none_as_tf32(selftest: Selftest) -> None:
    x = np.array([0x7F800001, 0x7FC00000, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F800000], np.uint32).view(np.float32)
    nearest, high, low = np.zeros((3, x.size), np.float32)
    selftest("tf32", x, nearest, high, low, x.size)
    assert np.isnan(nearest).tolist() == [True, True, True, True, False]
    assert np.isinf(nearest[-1])
    assert np.isnan(low).all()


@pytest.mark.parametrize("n", [1, 4, 63, 258, 1027])
def test_vector_access(selftest: Selftest, rng: np.random.Generator, n: int) -> None:
    x = torch.from_numpy(rng.standard_normal(n).astype(np.float32)).clone()  # torch aligns to 64 bytes
    y = torch.zeros(n)
    selftest("scale", x, y, n, 1.5)
    assert torch.equal(y, x * 1.5)


def test_every_half_and_bfloat16_to_float(selftest: Selftest) -> None:
    bits = np.arange(65536, dtype=np.uint16)
    half, bfloat16 = np.zeros((2, bits.size), np.float32)
    selftest("to_float", bits, half, bfloat16, bits.size)
    np.testing.assert_array_equal(half, bits.view(np.float16).astype(np.float32))
    np.testing.assert_array_equal(bfloat16, (bits.astype(np.uint32) << 16).view(np.float32))
    np.testing.assert_array_equal(np.signbit(half[half == 0]), bits[half == 0] != 0)


def test_float_to_half_and_bfloat16(selftest: Selftest, rng: np.random.Generator) -> None:
    every = np.arange(65536, dtype=np.uint16)
    exact = [every.view(np.float16).astype(np.float32), (every.astype(np.uint32) << 16).view(np.float32)]
    # Every tie between two neighbours, and the floats beside it; then anything.
    ties = [np.nextafter(tie, np.float32(to)) for tie in between(*exact) for to in (-np.inf, np.inf)]
    random = rng.integers(0, 2**32, 200_000, dtype=np.uint32).view(np.float32)
    near_half = (rng.standard_normal(100_000) * 2.0 ** rng.integers(-28, 18, 100_000)).astype(np.float32)
    x = np.concatenate([*exact, *between(*exact), *ties, random, near_half])
    half, bfloat16 = np.zeros((2, x.size), np.uint16)
    selftest("from_float", x, half, bfloat16, x.size)
    for bits, dtype in ((half, torch.float16), (bfloat16, torch.bfloat16)):
        expected = torch.from_numpy(x).to(dtype).view(torch.int16).numpy().view(np.uint16)
        np.testing.assert_array_equal(bits[~np.isnan(x)], expected[~np.isnan(x)])
        assert (bits[np.isnan(x)] == 0x7FFF).all()  # CUDA's NaN


def between(*tables: np.ndarray) -> list[np.ndarray]:
    """The middle of each two neighbouring numbers, which float32 holds exactly."""
    sorted_tables = [np.unique(table[np.isfinite(table)]).astype(np.float64) for table in tables]
    return [((t[1:] + t[:-1]) / 2).astype(np.float32) for t in sorted_tables]


def rounded(value: Fraction, numbers: list[Fraction]) -> int:
    """The index of the number nearest to value; of two, the even one."""
    above = bisect_left(numbers, value)
    if above == 0 or numbers[above] == value:
        return above
    below, middle = above - 1, (numbers[above - 1] + numbers[above]) / 2
    return below if value < middle or (value == middle and below % 2 == 0) else above


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_arithmetic_rounds_once(selftest: Selftest, rng: np.random.Generator, dtype: torch.dtype) -> None:
    n = 1500
    digits = 10 if dtype == torch.float16 else 7
    x = np.ldexp(rng.integers(2**digits, 2 ** (digits + 1), (3, n)), rng.integers(-digits - 7, 4 - digits, (3, n)))
    x *= rng.choice([-1, 1], (3, n))
    x[2, : n // 3] = np.ldexp(np.sign(x[2, : n // 3]), -24)  # far below the product: a * b + c only just off a tie
    a, b, c = torch.from_numpy(x).to(dtype)
    out = np.zeros((n, 12), np.uint16)
    bits = [v.contiguous().view(torch.int16).numpy() for v in (a, b, c)]
    selftest("half", *bits, out, n, [torch.float16, torch.bfloat16].index(dtype))

    # Bit patterns of finite numbers >= 0 are in order; beyond the largest lies infinity.
    largest = 0x7C00 if dtype == torch.float16 else 0x7F80
    finite = torch.arange(largest, dtype=torch.int16).view(dtype).double().tolist()
    numbers = [Fraction(number) for number in finite]
    numbers.append(2 * numbers[-1] - numbers[-2])

    def pattern(value: Fraction, negative: bool) -> int:
        return rounded(abs(value), numbers) | (0x8000 if negative else 0)

    for i, (p, q, r) in enumerate(zip(*(map(Fraction, v.double().tolist()) for v in (a, b, c)), strict=True)):
        exact = [p + q, p - q, p * q, p / q, p * q + r, r * p + q, p + r, min(p, q), max(p, q), -p, abs(p)]
        assert out[i, :11].tolist() == [pattern(value, value < 0) for value in exact]
        assert out[i, 11] == (p < q) + 2 * (p >= q) + 4 * (p == q)


def test_integer_functions(selftest: Selftest, rng: np.random.Generator) -> None:
    n = 500
    a, b = rng.integers(-(2**31), 2**31, (2, n)).astype(np.int32)
    a[:4] = [0, 1, -1, -(2**31)]
    out = np.zeros((n, 10), np.int32)
    selftest("integers", a, b, out, n)
    for x, y, row in zip(a.tolist(), b.tolist(), out.tolist(), strict=True):
        word = x & 0xFFFFFFFF
        digits = f"{word:032b}"
        product = word * (y & 0xFFFFFFFF) >> 32
        lowest = (word & -word).bit_length()
        reverse = signed(int(digits[::-1], 2))
        assert row[:4] == [32 - word.bit_length(), digits.count("1"), lowest, reverse]
        assert row[4:8] == [x * y >> 32, signed(product), min(x, y), max(x, y)]
        remainder = abs(x) % 1024 * (1 if x >= 0 else -1)
        assert row[8:] == [x, round(remainder + 0.5)]


def signed(word: int) -> int:
    return word - 2**32 if word >= 2**31 else word


def test_last_block_adds_up(selftest: Selftest, rng: np.random.Generator) -> None:
    x = rng.integers(-100, 100, (5, 64), dtype=np.int32)
    of_block, count, total = np.zeros(5, np.int32), np.zeros(1, np.uint32), np.zeros(1, np.int32)
    selftest("last_block", x, 5, of_block, count, total)
    assert total[0] == x.sum()
    assert count[0] == 0


@pytest.mark.parametrize("n", [1, 32, 50, 128])
def test_exited_threads_are_not_waited_for_at_barriers(selftest: Selftest, n: int) -> None:
    count = np.array([-1], np.int32)
    selftest("early_exit", count, n)
    assert count[0] == n


@pytest.mark.parametrize(("grid", "block"), [((3, 2, 4), (5, 3, 2)), ((1, 1, 1), (4, 4, 64)), ((7,), (33,))])
def test_indices(selftest: Selftest, grid: tuple[int, ...], block: tuple[int, ...]) -> None:
    n = int(np.prod(grid) * np.prod(block))
    out = np.full(n, -1, np.int32)
    selftest("indices", out, dims(*grid), dims(*block))
    np.testing.assert_array_equal(out, np.arange(n))


@pytest.mark.parametrize("grid", [(0,), (5, 0), (5, 5, 0)])
def test_empty_grid_launches_nothing(selftest: Selftest, grid: tuple[int, ...]) -> None:
    selftest("empty", dims(*grid), dims(32), 0)


@pytest.mark.parametrize(
    ("grid", "block", "shared", "message"),
    [
        ((1,), (1025,), 0, r"empty_kernel.* block \(1025, 1, 1\) .*at most 1024 threads"),
        ((1,), (32, 33), 0, "at most 1024 threads"),
        ((1,), (1, 1, 65), 0, "at most 1024 x 1024 x 64"),
        ((1,), (0,), 0, "at least one thread"),
        ((2**31,), (1,), 0, r"grid \(2147483648, 1, 1\).*at most 2147483647 x 65535 x 65535"),
        ((1, 65536), (1,), 0, "at most 2147483647 x 65535 x 65535"),
        ((1, 1, 65536), (1,), 0, "at most 2147483647 x 65535 x 65535"),
        ((1,), (1,), 227 * 1024 + 1, "232449 bytes of dynamic shared memory"),
    ],
)
def test_limits(selftest: Selftest, grid: tuple[int, ...], block: tuple[int, ...], shared: int, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        selftest("empty", dims(*grid), dims(*block), ctypes.c_size_t(shared))


def test_python_threads_take_turns(selftest: Selftest) -> None:
    x = np.arange(600, dtype=np.int32)

    def work() -> None:
        for _ in range(25):
            out = np.zeros_like(x)
            selftest("scan", x, out, 1, x.size)
            np.testing.assert_array_equal(out, x.cumsum())

    in_threads(work)


def test_unchecked_with_the_portable_context_switch(rng: np.random.Generator) -> None:
    """Without GCC's checks, poison alone shows shared memory that nobody wrote."""
    unchecked = load("unchecked")
    test_scan(unchecked, rng, 1024)
    test_shuffles(unchecked, rng, 3, 8, np.float16)
    test_block_sums(unchecked, 1000, torch.float32)
    out = np.zeros(256, np.float32)
    unchecked("unwritten", out, 128)
    assert np.isnan(out).all()
    for fault in ("barriers_in_two_branches", "barrier_of_half_the_warp", "mask_names_exited", "trap"):
        with pytest.raises(RuntimeError, match=fault):
            unchecked("fault", fault, np.zeros(1024, np.int32))
