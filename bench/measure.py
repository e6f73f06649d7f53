"""Time, host overhead and peak memory of functions that compete in one run."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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


@contextmanager
def noting(errors: dict[str, str], name: str) -> Iterator[None]:
    """Goes on after an error, of which it keeps the text: the exception would hold the memory of what raised it."""
    try:
        yield
    except Exception as error:
        first_line = str(error).strip().partition("\n")[0]
        errors[name] = f"{type(error).__name__}: {first_line[:300]}"


def interleaved(
    sets: Sequence[Mapping[str, Function]], device: torch.device, rounds: int
) -> tuple[dict[str, Timing], dict[str, str]]:
    """Times every function once per round, so that a machine's drift reaches all of them alike.

    Also returns the errors of those that raised one, which are called no more and have no time; without the first
    function, to which the others are compared, none has.

    `sets` hold the same functions on different data. Each call takes the next set: inputs then come from memory, as
    in training, and not from the cache that the call before has filled. The order within a round is random (the
    same in every run): what a function finds of its predecessor's freed memory in the cache evens out.
    """
    order = random.Random(0)
    errors: dict[str, str] = {}
    host: dict[str, float] = {}
    for name in sets[0]:
        with noting(errors, name):
            host[name] = max(_warm_up(functions[name], device) for functions in sets)
    samples: dict[str, list[float]] = {name: [] for name in sets[0]}
    turn = 0
    for _ in range(rounds):
        for name in order.sample(list(sets[0]), len(sets[0])):
            function = sets[turn % len(sets)][name]
            turn += 1
            if name in errors:
                continue
            with noting(errors, name):
                samples[name].append(
                    _cuda_sample(function, host[name]) if device.type == "cuda" else _cpu_sample(function)
                )
    first, floor = next(iter(samples.items()))
    timings: dict[str, Timing] = {}
    for name, seconds in samples.items():
        if first in errors or name in errors:
            continue
        deciles = quantiles(seconds, n=10)
        ratio = median(own / first for own, first in zip(seconds, floor, strict=True))
        timings[name] = Timing(median(seconds), deciles[0], deciles[-1], ratio)
    return timings, errors


def _warm_up(function: Function, device: torch.device) -> float:
    """Seconds until the second call returned, which a GPU may still be at."""
    function()
    _synchronize(device)
    start = time.perf_counter()
    function()
    seconds = time.perf_counter() - start
    _synchronize(device)  # an error of this call shows here, and not in the next function
    return seconds


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _cpu_sample(function: Function) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _cuda_sample(function: Function, host: float) -> float:
    # The GPU sleeps while the host enqueues the function, which takes it `host` seconds: its own time stays out. Twice
    # that long, because it varies; in cycles of 2 GHz, more than GPUs have.
    torch.cuda._sleep(int(min(2 * host + 50e-6, 0.1) * 2e9))
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
        _synchronize(device)
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
