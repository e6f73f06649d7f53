"""Time, host overhead and peak memory of functions that compete in one run."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

import torch

Function = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Seconds a call, over interleaved rounds; `ratio` is the median of the rounds' ratios to the first function."""

    median: float
    low: float  # tenth percentile
    high: float  # ninetieth
    ratio: float


def interleaved(functions: dict[str, Function], device: torch.device, rounds: int) -> dict[str, Timing]:
    """Times every function once per round, in turn, so that a machine's drift reaches all of them alike."""
    sample = _cuda_sample if device.type == "cuda" else _cpu_sample
    for function in functions.values():
        for _ in range(3):
            function()
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            samples[name].append(sample(function, device))
    floor = next(iter(samples.values()))
    timings = {}
    for name, seconds in samples.items():
        deciles = quantiles(seconds, n=10)
        ratio = median(own / first for own, first in zip(seconds, floor, strict=True))
        timings[name] = Timing(median(seconds), deciles[0], deciles[-1], ratio)
    return timings


def _cpu_sample(function: Function, _device: torch.device) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _cuda_sample(function: Function, device: torch.device) -> float:
    # Larger than any L2 cache: what a function reads comes from memory, as it does in training. Meanwhile the
    # host enqueues the function, so that its own time stays out of the GPU's.
    torch.empty(256 << 20, dtype=torch.uint8, device=device).zero_()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def host_overhead(function: Function, device: torch.device, rounds: int = 7, calls: int = 300) -> float:
    """Seconds until a call returns, on inputs too small to matter; a GPU is not waited for."""
    samples = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(calls):
            function()
        samples.append((time.perf_counter() - start) / calls)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return median(samples)


def peak_memory(function: Function, device: torch.device) -> int:
    """The most bytes that a call holds at once beyond what was allocated before it, its result included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    # The profiler's library logs each start and stop to stderr unless told not to before its first use.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        result = function()
    del result
    # profile.events() leaves out what operations allocate and free within themselves; the raw records hold it.
    raw: Any = profile.profiler
    events = [event for event in raw.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()  # negative where memory is given back
        peak = max(peak, held)
    return peak
