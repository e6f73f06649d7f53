"""The emulation of CUDA on the CPU, against numpy: csrc/emulation/selftest.cu compiled by g++ and run."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

CSRC = Path(__file__).parents[1] / "csrc"
SOURCES = [CSRC / "emulation" / name for name in ("selftest.cu", "engine.cpp", "fiber.cpp", "symbols.cpp")]
COMPILER = os.environ.get("CXX", "g++")
FLAGS = ["-std=c++17", "-x", "c++", "-shared", "-fPIC", "-g", "-DWSSS_EMULATED=1", f"-I{CSRC}"]
FLAGS += ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]

Selftest = Callable[..., None]


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)


def compile_selftest(folder: Path, *flags: str) -> Path:
    library = folder / "libselftest.so"
    done = run(COMPILER, *FLAGS, *flags, *map(str, SOURCES), "-o", str(library))
    assert done.returncode == 0, done.stderr
    return library


def load(library: Path) -> Selftest:
    """selftest(name, *arguments) runs one function on the default stream and raises its error."""
    functions = ctypes.CDLL(str(library))

    def selftest(name: str, *arguments: object) -> None:
        function = getattr(functions, f"selftest_{name}")
        function.restype = ctypes.c_char_p
        message = function(*(as_c(argument) for argument in arguments), None)
        if message is not None:
            raise RuntimeError(message.decode())

    return selftest


def as_c(value: object) -> object:
    if isinstance(value, np.ndarray):
        assert value.flags.c_contiguous
        return ctypes.c_void_p(value.ctypes.data)
    if isinstance(value, torch.Tensor):
        assert value.is_contiguous()
        return ctypes.c_void_p(value.data_ptr())
    return ctypes.c_float(value) if isinstance(value, float) else value


@pytest.fixture(scope="session")
def selftest(tmp_path_factory: pytest.TempPathFactory) -> Selftest:
    # WSSS_SELFTEST_LIBRARY is given to the process that runs under the sanitizers.
    given = os.environ.get("WSSS_SELFTEST_LIBRARY")
    return load(Path(given) if given else compile_selftest(tmp_path_factory.mktemp("selftest"), "-O1"))


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
        ((1,), (1,), 227 * 1024 + 1, "232449 bytes of shared memory"),
    ],
)
def test_limits(selftest: Selftest, grid: tuple[int, ...], block: tuple[int, ...], shared: int, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        selftest("empty", dims(*grid), dims(*block), ctypes.c_size_t(shared))


FAULTS = [  # in the order of SelftestFault
    r"thread \(16, 0, 0\).*__syncthreads, but other threads of the block are at the barrier at .*selftest\.cu",
    r"__shfl_down_sync with mask 0xffffffff",
    r"(?s)threads wait for others that never come.*threads 0-15, 32-47: __shfl_down_sync with mask 0xffffffff"
    r" at .*selftest\.cu:\d+.*threads 16-31, 48-63: __syncthreads at .*selftest\.cu:\d+",
    r"names lanes that have exited or that the block does not have: 0xffffff00",
    r"__shfl_sync reads lane 16, which its mask does not name",
    r"__trap at .*selftest\.cu:\d+",
]


@pytest.mark.parametrize("fault", range(len(FAULTS)))
def test_faults_are_reported_and_do_not_hang(selftest: Selftest, fault: int) -> None:
    out = np.zeros(64, np.int32)
    with pytest.raises(RuntimeError, match=FAULTS[fault]) as error:
        selftest("fault", fault, out)
    assert "fault_kernel" in str(error.value)
    assert "block (0, 0, 0) of grid (2, 1, 1)" in str(error.value)
    test_scan(selftest, np.random.default_rng(0), 100)  # the next launch is not disturbed


def test_shared_memory_starts_poisoned(selftest: Selftest) -> None:
    sums = np.zeros(1, np.float32)
    selftest("sum", np.ones(100, np.float32), sums, 100, 1, 0)
    out = np.zeros(256, np.float32)
    selftest("unwritten", out, 128)
    assert np.isnan(out).all()


def test_python_threads_take_turns(selftest: Selftest) -> None:
    x = np.arange(600, dtype=np.int32)
    failures: list[int] = []

    def work() -> None:
        for _ in range(50):
            out = np.zeros_like(x)
            selftest("scan", x, out, 1, x.size)
            if not np.array_equal(out, x.cumsum()):
                failures.append(1)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_portable_context_switch(tmp_path: Path) -> None:
    """Machines other than x86-64 switch by ucontext."""
    portable = load(compile_selftest(tmp_path, "-O0", "-DWSSS_EMULATION_UCONTEXT"))
    test_scan(portable, np.random.default_rng(0), 1024)
    test_shuffles(portable, np.random.default_rng(0), 3, 8, np.float16)
    for fault in range(len(FAULTS)):
        test_faults_are_reported_and_do_not_hang(portable, fault)


@pytest.fixture(scope="session")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    flags = ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    return compile_selftest(tmp_path_factory.mktemp("sanitized"), *flags)


@pytest.fixture(scope="session")
def sanitizer_environment() -> dict[str, str]:
    """Python itself is not sanitized, so the runtimes have to be there before it."""
    names = ("libasan.so", "libubsan.so")
    runtimes = [run(COMPILER, f"-print-file-name={name}").stdout.strip() for name in names]
    return {"LD_PRELOAD": ":".join(runtimes), "ASAN_OPTIONS": "detect_leaks=0"}


def test_selftest_is_clean_under_sanitizers(sanitized: Path, sanitizer_environment: dict[str, str]) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    command += ["-k", "not sanitizers and not portable"]
    done = run(*command, WSSS_SELFTEST_LIBRARY=str(sanitized), **sanitizer_environment)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("fault", "message"),
    [(6, "global-buffer-overflow"), (7, "heap-buffer-overflow"), (8, "stack-buffer-overflow")],
)
def test_sanitizers_see_accesses_out_of_bounds(
    sanitized: Path, sanitizer_environment: dict[str, str], fault: int, message: str
) -> None:
    call = f"import ctypes; ctypes.CDLL({str(sanitized)!r})"
    call += f".selftest_fault({fault}, (ctypes.c_int * 64)(), None)"
    done = run(sys.executable, "-c", call, **sanitizer_environment)
    assert done.returncode != 0
    assert message in done.stderr
    assert "selftest.cu" in done.stderr.split("#1")[0], done.stderr
