"""Kernels with one planted fault each, csrc/emulation/faults.cu: what the emulation says of it."""

from __future__ import annotations

import re
import sys

import numpy as np
import pytest
from selftest import COMPILER, EMULATION, Selftest, library, load, run

SOURCE = (EMULATION / "faults.cu").read_text().splitlines()
BLOCK = r"block \(\d+, 0, 0\) of grid \(\d+, 1, 1\), thread \(\d+, 0, 0\) of block \(\d+, 1, 1\): "
UNWRITTEN = "reads shared memory that no thread of its block has written"

# kernel -> (message, the code on the line that the message ends with)
FAULTS = {
    "beyond_static": ("access to a int beyond the end of the variable", "first[threadIdx.x + 1];"),
    "beyond_local": ("access to a int beyond the end of the variable", "first[threadIdx.x + 1];"),
    "beyond_array": (r"index 128 is outside int \[128\]", "tile[threadIdx.x + 1] = 1;"),
    "missing_syncthreads": (
        rf"{UNWRITTEN}|reads shared memory that thread .* wrote at .*, with no __syncthreads between,",
        "tile[before] + 1;",
    ),
    "missing_second_syncthreads": (
        r"(reads shared memory that thread .* wrote|writes shared memory that thread .* read) at .*, with no "
        r"__syncthreads between,",
        "tile[",
    ),
    "missing_syncwarp": (rf"{UNWRITTEN}|with no __syncwarp or __syncthreads between,", "tile[before] + 1;"),
    "shuffle_for_syncwarp": ("with no __syncwarp or __syncthreads between,", "tile[other];"),
    "missing_atomic": ("global memory that thread .*, with no __sync", "memory[threadIdx.x / 64] += 1;"),
    "missing_atomic_of_blocks": (
        r"global memory that thread \(\d+, 0, 0\) of block \(\d, 0, 0\) wrote at .*, with no order between blocks,",
        "memory[threadIdx.x] += 1;",
    ),
    "missing_fence": (r"of block \(\d, 0, 0\) wrote at .*, with no order between blocks,", "memory[500] += memory[i];"),
    "barriers_in_two_branches": (
        r"__syncthreads, but other threads of the block are at the barrier at \S+faults\.cu:\d+",
        "__syncthreads();",
    ),
    "waits_for_memory": ("33554432 accesses without meeting others", "while (*flag == 0)"),
    "mask_names_exited": (
        "exited, but other lanes wait for it at __shfl_down_sync with mask 0xffffffff"
        "|__shfl_down_sync with mask 0xffffffff, which names lanes that have exited",
        "__shfl_down_sync",
    ),
    "mask_names_absent": (
        "__shfl_down_sync with mask 0xffffffff, which names lanes that have exited or that the block does not have: "
        "0xffffff00",
        "__shfl_down_sync",
    ),
    "lane_outside_mask": ("__shfl_sync reads lane 16, which its mask does not name", "__shfl_sync"),
    "misaligned_float4": (
        "misaligned access: a const struct float4 needs an address that is a multiple of 16, this one is 4 bytes",
        "reinterpret_cast<const float4*>",
    ),
    "misaligned_ldg": (
        "misaligned access: a const struct uint4 needs an address that is a multiple of 16, this one is 8 bytes",
        "__ldg",
    ),
    "misaligned_half2": ("misaligned access: .* needs an address that is a multiple of 4", "<const __half2*>"),
    "missing_wait": (UNWRITTEN, "tile[4 * threadIdx.x]"),
    "wait_for_wrong_group": (UNWRITTEN, "tile[4 * threadIdx.x]"),
    "copy_over_what_is_read": (
        r"(reads shared memory that thread .* wrote|writes shared memory that thread .* read) at .*, with no "
        r"__syncthreads between,",
        "tile",
    ),
    "float_for_tf32": ("mma of a float that is not TF32", "multiply_add<float>"),
    "unwritten_static": (UNWRITTEN, "= tile[threadIdx.x];"),
    "unwritten_dynamic": (UNWRITTEN, "= tile[threadIdx.x];"),
    "overflow_in_index": (r"signed overflow: 70\d\d\d \* 70000 does not fit int", "row * columns"),
    "nan_to_int": ("conversion of -?nan, which is outside the range of int", "zero / zero"),
    "trap": ("__trap", "__trap();"),
}


@pytest.fixture
def checked(emulation_seed: int) -> Selftest:
    functions = load("checked")
    functions("set_seed", emulation_seed)
    return functions


@pytest.fixture
def memory() -> np.ndarray:
    return np.zeros(1024, np.int32)


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_reported(checked: Selftest, memory: np.ndarray, fault: str, emulation_seed: int) -> None:
    message, code = FAULTS[fault]
    with pytest.raises(RuntimeError) as error:
        checked("fault", fault, memory)
    report = re.fullmatch(
        rf"kernel [\w:() ]*{fault}\(int\*\), {BLOCK}(?P<what>.*) at \S*/faults\.cu:(?P<line>\d+)\n"
        rf"  schedule: WSSS_EMULATION_SEED={emulation_seed}, launch 1",
        str(error.value),
    )
    assert report is not None, str(error.value)
    assert re.search(message, report["what"]), str(error.value)
    assert code in SOURCE[int(report["line"]) - 1], str(error.value)


def test_threads_that_wait_for_ever(checked: Selftest, memory: np.ndarray) -> None:
    with pytest.raises(RuntimeError) as error:
        checked("fault", "barrier_of_half_the_warp", memory)
    assert re.search(
        r"barrier_of_half_the_warp\(int\*\), block \(0, 0, 0\) of grid \(1, 1, 1\): threads wait for others that never "
        r"come\n"
        r"  threads 0-15, 32-47, 64-79, 96-111: __shfl_down_sync with mask 0xffffffff at \S+faults\.cu:\d+\n"
        r"  threads 16-31, 48-63, 80-95, 112-127: __syncthreads at \S+faults\.cu:\d+\n"
        r"  schedule: WSSS_EMULATION_SEED=\d+, launch 1$",
        str(error.value),
    )


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("beyond_launch_bounds<96>", r"block \(128, 1, 1\) .*: its __launch_bounds__ allow 96 threads"),
        (
            "too_much_shared",
            "204800 bytes of dynamic shared memory: with 40960 bytes of __shared__ variables that is over 232448",
        ),
    ],
)
def test_launch_is_refused(checked: Selftest, memory: np.ndarray, fault: str, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        checked("fault", fault, memory)
    assert not memory.any()


def test_next_launch_is_not_disturbed(checked: Selftest, memory: np.ndarray) -> None:
    for fault in ("barriers_in_two_branches", "mask_names_exited", "missing_atomic", "misaligned_ldg"):
        with pytest.raises(RuntimeError):
            checked("fault", fault, memory)
        x = np.arange(200, dtype=np.int32)
        sums = np.zeros_like(x)
        checked("scan", x, sums, 2, 100)
        np.testing.assert_array_equal(sums.reshape(2, 100), x.reshape(2, 100).cumsum(1))


@pytest.mark.parametrize(
    ("fault", "message", "code"),
    [
        ("beyond_global", "heap-buffer-overflow", "memory[threadIdx.x + 1024 - threads + 1] = 1;"),
        ("beyond_dynamic", "heap-buffer-overflow", "tile[threadIdx.x + 1];"),
    ],
)
def test_address_sanitizer_names_the_line(fault: str, message: str, code: str) -> None:
    runtimes = [run(COMPILER, f"-print-file-name={name}").stdout.strip() for name in ("libasan.so", "libstdc++.so.6")]
    program = f"import ctypes; selftest = ctypes.CDLL({str(library('sanitized'))!r})\n"
    program += f"selftest.selftest_fault({fault.encode()}, ctypes.create_string_buffer(4096), None)"
    done = run(sys.executable, "-c", program, LD_PRELOAD=" ".join(runtimes), ASAN_OPTIONS="detect_leaks=0")
    assert done.returncode != 0
    assert message in done.stderr
    frame = re.search(rf"#0 .* in {fault} \S+/faults\.cu:(\d+)", done.stderr)
    assert frame is not None, done.stderr
    assert code in SOURCE[int(frame[1]) - 1]
