"""How deform_conv2d divides its columns on a GPU."""

from __future__ import annotations

import pytest

from wsss_ops._columns import _chunks, _in_parts

PROCESSORS = 132


def turns(chunks: list[slice], width: int) -> int:
    tiles = [-(-(chunk.stop - chunk.start) // 128) * -(-width // 128) for chunk in chunks]
    return sum(-(-number // PROCESSORS) for number in tiles)


@pytest.mark.parametrize(
    ("rows", "most", "width"),
    [(16384, 2730, 2048), (65536, 10922, 256), (65536, 10922, 2304), (300, 100, 64), (1000, 1, 8), (129, 128, 1)],
)
def test_chunks_cover_all_rows_and_fit(rows: int, most: int, width: int) -> None:
    chunks = _chunks(rows, most, width, PROCESSORS)
    assert [row for chunk in chunks for row in range(chunk.start, chunk.stop)] == list(range(rows))
    assert max(chunk.stop - chunk.start for chunk in chunks) <= most
    assert chunks[0].stop == max(chunk.stop - chunk.start for chunk in chunks)


@pytest.mark.parametrize(
    ("rows", "most", "width"), [(16384, 2730, 2048), (16384, 2730, 18432), (65536, 10922, 256), (65536, 10922, 2304)]
)
def test_chunks_leave_few_multiprocessors_idle(rows: int, most: int, width: int) -> None:
    """Hardly more turns than one product of all rows: D1 in bfloat16 and D2 in float32, forward and backward."""
    chunks = _chunks(rows, most, width, PROCESSORS)
    assert turns(chunks, width) <= 1.05 * turns([slice(0, rows)], width)
    assert len(chunks) <= 1.2 * -(-rows // most)


@pytest.mark.parametrize(("count", "most"), [(9, 1), (9, 2), (9, 4), (9, 9), (9, 20), (1, 1), (1000, 7)])
def test_parts_are_nearly_equal(count: int, most: int) -> None:
    sizes = [part.stop - part.start for part in _in_parts(count, most)]
    assert sum(sizes) == count
    assert max(sizes) <= most
    assert len(sizes) == -(-count // most)
    assert max(sizes) - min(sizes) < len(sizes)
