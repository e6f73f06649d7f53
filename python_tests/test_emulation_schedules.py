"""The order in which emulated blocks, warps and lanes run: any, drawn from a seed, and the same again from the same."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from selftest import Selftest, load


def order(selftest: Selftest, seed: int, blocks: int, threads: int) -> np.ndarray:
    """[blocks, threads, 3]: when each thread started, left a __syncwarp and then a __syncthreads."""
    selftest("set_seed", seed)
    clock, out = np.zeros(1, np.int32), np.full((blocks, threads, 3), -1, np.int32)
    selftest("order", clock, out, blocks, threads)
    assert sorted(out.flatten()) == list(range(out.size))
    return out


def test_seed_decides(selftest: Selftest) -> None:
    first = order(selftest, 1, 7, 200)
    np.testing.assert_array_equal(order(selftest, 1, 7, 200), first)
    assert (order(selftest, 2, 7, 200) != first).any()


def test_launches_of_one_seed_differ(selftest: Selftest) -> None:
    """So a kernel whose result hangs on the order gives two results when it is called twice."""
    first = order(selftest, 1, 7, 200)
    clock, out = np.zeros(1, np.int32), np.zeros_like(first)
    selftest("order", clock, out, 7, 200)
    assert (out != first).any()


def test_every_order_of_blocks(selftest: Selftest) -> None:
    seen = {tuple(order(selftest, seed, 3, 1)[:, 0, 0].argsort()) for seed in range(60)}
    assert seen == set(itertools.permutations(range(3)))


def test_every_order_of_warps(selftest: Selftest) -> None:
    for moment in range(3):
        seen = {tuple(order(selftest, seed, 1, 96)[0, ::32, moment].argsort()) for seed in range(60)}
        assert seen == set(itertools.permutations(range(3)))


def test_lanes_start_anywhere_and_go_both_ways(selftest: Selftest) -> None:
    starts = [order(selftest, seed, 1, 32)[0, :, 0] for seed in range(300)]
    assert {int(start.argmin()) for start in starts} == set(range(32))
    for a, b in ((0, 1), (5, 9), (31, 0)):
        assert {bool(start[a] < start[b]) for start in starts} == {True, False}


def test_a_warp_runs_ahead(selftest: Selftest) -> None:
    """In some orders one reaches the barrier before others start, in some they go step by step."""
    moments = [order(selftest, seed, 1, 128)[0].reshape(4, 32, 3) for seed in range(40)]
    ahead = [any(m[w, :, 1].max() < np.delete(m, w, 0)[:, :, 0].min() for w in range(4)) for m in moments]
    together = [m[:, :, 0].max() < m[:, :, 1].min() for m in moments]
    assert any(ahead)
    assert any(together)


@pytest.mark.parametrize("fault", ["missing_syncthreads", "missing_second_syncthreads", "missing_syncwarp"])
def test_schedules_show_missing_barriers_unchecked(fault: str) -> None:
    """One order gives the right result, another does not, and poison is what was read instead."""
    unchecked = load("unchecked")
    results = set()
    for seed in range(20):
        memory = np.zeros(1024, np.int32)
        unchecked("set_seed", seed)
        unchecked("fault", fault, memory)
        results.add(tuple(memory[:128]))
    assert len(results) > 1
