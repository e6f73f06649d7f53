"""Time, host overhead and peak memory of functions that compete in one run."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
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


def interleaved(sets: Sequence[Mapping[str, Function]], device: torch.device, rounds: int) -> dict[str, Timing]:
    """Times every function once per round, so that a machine's drift reaches all of them alike.

    `sets` hold the same functions on different data. Each call takes the next set: inputs then come from memory, as
    in training, and not from the cache that the call before has filled. The order within a round is random (the
    same in every run): what a function finds of its predecessor's freed memory in the cache evens out.
    """
    order = random.Random(0)
    sample = _cuda_sample if device.type == "cuda" else _cpu_sample
    for functions in sets:
        for function in functions.values():
            function()
            function()
    samples: dict[str, list[float]] = {name: [] for name in sets[0]}
    turn = 0
    for _ in range(rounds):
        for name in order.sample(list(sets[0]), len(sets[0])):
            samples[name].append(sample(sets[turn % len(sets)][name]))
            turn += 1
    floor = next(iter(samples.values()))
    timings = {}
    for name, seconds in samples.items():
        deciles = quantiles(seconds, n=10)
        ratio = median(own / first for own, first in zip(seconds, floor, strict=True))
        timings[name] = Timing(median(seconds), deciles[0], deciles[-1], ratio)
    return timings


def _cpu_sample(function: Function) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _cuda_sample(function: Function) -> float:
    torch.cuda._sleep(100_000)  # 50 us, in which the host enqueues the function: its own time stays out
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
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profile:
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
