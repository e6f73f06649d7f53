"""Pictures of runs: colours, panels, curves and displacements, and the errors of what cannot be drawn."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
import torch
from PIL import Image

from wsss_ops.training.pictures import (
    GAP,
    Row,
    colorize,
    has_matplotlib,
    overlay,
    palette,
    save_curve,
    save_displacements,
    save_panels,
)

HEADINGS = 2 * 23 + GAP  # above the first picture: the columns' headings and the row's title


def make_row(height: int = 96, width: int = 96, maps: int = 2, **changes: object) -> Row:
    mask = np.zeros((height, width), np.uint8)
    mask[height // 4 : height // 2, width // 4 : width // 2] = 1
    mask[height // 2, width // 4 : width // 2] = 255
    score = np.zeros((maps, height, width), np.float32)
    score[-1, :, width // 2 :] = 1.0
    image = np.full((3, height, width), 200, np.uint8)
    prediction = np.full((height, width), 2, np.uint8)
    return Row(image, mask, score, prediction, "a row")._replace(**changes)


def test_palette_has_the_voc_colours() -> None:
    colours = palette()
    assert colours.shape == (256, 3)
    assert colours.dtype == np.uint8
    voc = [(0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128)]
    assert [tuple(c) for c in colours[:5].tolist()] == voc
    assert tuple(colours[20].tolist()) == (0, 64, 128)
    assert tuple(colours[255].tolist()) == (224, 224, 192)
    assert len({tuple(c) for c in colours.tolist()}) == 256


def test_palette_cannot_be_changed_by_a_caller() -> None:
    with pytest.raises(ValueError, match="read-only"):
        palette()[0] = 1


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
def test_colorize(kind: Callable[[np.ndarray], Any]) -> None:
    picture = colorize(kind(np.array([[0, 1], [15, 255]], np.uint8)))
    assert picture.tolist() == [[[0, 0, 0], [128, 0, 0]], [[192, 128, 128], [224, 224, 192]]]


def test_overlay_goes_from_blue_to_red_over_the_photo() -> None:
    heat = np.array([[0.0, 0.5, 1.0]])
    picture = overlay(np.full((3, 1, 3), 128, np.uint8), heat).astype(int)
    cold, middle, hot = picture[0]
    assert cold[2] > cold[0] + 10
    assert middle[1] > middle[0] + 40
    assert hot[0] > hot[2] + 80
    brighter = overlay(np.full((3, 1, 3), 228, np.uint8), heat).astype(int)
    assert (brighter > picture + 30).all(), "the photo must stay visible under the heat"


@pytest.mark.parametrize(
    ("image", "heat", "message"),
    [
        (np.zeros((4, 5, 3), np.uint8), np.zeros((4, 5)), r"image must be uint8 of shape \[3, any, any\]"),
        (np.zeros((3, 4, 5), np.float32), np.zeros((4, 5)), "image must be uint8 .* got float32"),
        (np.zeros((3, 4, 5), np.uint8), np.zeros((5, 4)), r"heat must be floating of shape \[4, 5\]"),
        (np.zeros((3, 4, 5), np.uint8), np.zeros((4, 5), int), "heat must be floating"),
        (np.zeros((3, 4, 5), np.uint8), np.full((4, 5), 1.5), "heat must lie in 0..1, got 1.5 to 1.5"),
        (np.zeros((3, 4, 5), np.uint8), np.full((4, 5), np.nan), "heat must lie in 0..1, got nan"),
    ],
)
def test_overlay_refuses(image: np.ndarray, heat: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        overlay(image, heat)


def test_panels_show_the_pictures_in_their_columns(tmp_path: Path) -> None:
    row = make_row()
    save_panels(tmp_path / "panels.png", [row])
    sheet = np.asarray(Image.open(tmp_path / "panels.png"))
    cell = 192  # 96 pixels, enlarged twice
    assert sheet.shape[1] == GAP + 4 * (cell + GAP)
    left = [GAP + column * (cell + GAP) for column in range(4)]

    def at(column: int, y: int, x: int) -> tuple[int, ...]:
        """The colour of pixel (y, x) of the original in a column."""
        return tuple(sheet[HEADINGS + 2 * y, left[column] + 2 * x].tolist())

    assert at(0, 40, 40) == (200, 200, 200)
    assert at(1, 0, 0) == (0, 0, 0)
    assert at(1, 24, 24) == (128, 0, 0)
    assert at(1, 47, 47) == (128, 0, 0)
    assert at(1, 48, 30) == (224, 224, 192)
    expected = overlay(row.image, row.score.max(0))
    assert at(2, 10, 10) == tuple(expected[10, 10].tolist())
    assert at(2, 10, 90) == tuple(expected[10, 90].tolist())
    assert at(3, 0, 0) == at(3, 95, 95) == (0, 128, 0)
    assert tuple(sheet[HEADINGS, left[1] - 2].tolist()) == (255, 255, 255)
    for column in range(4):  # every column has its heading
        assert (sheet[GAP : GAP + 20, left[column] : left[column] + cell] < 128).any()


def test_legend_names_the_classes_that_appear(tmp_path: Path) -> None:
    save_panels(tmp_path / "panels.png", [make_row()], ["background", "cat", "dog", "cow"])
    sheet = np.asarray(Image.open(tmp_path / "panels.png"))
    legend = sheet[HEADINGS + 192 + GAP :].reshape(-1, 3)
    colours = {tuple(c) for c in np.unique(legend, axis=0).tolist()}
    assert {(0, 0, 0), (128, 0, 0), (0, 128, 0), (224, 224, 192)} <= colours
    assert (128, 128, 0) not in colours, "the cow appears nowhere"
    save_panels(tmp_path / "other.png", [make_row()], ["background", "cat", "sheep", "cow"])
    assert not np.array_equal(sheet, np.asarray(Image.open(tmp_path / "other.png")))


def test_many_classes_wrap_inside_the_sheet(tmp_path: Path) -> None:
    mask = np.arange(96 * 96).reshape(96, 96).astype(np.uint8) % 80
    names = [f"a rather long name {index}" for index in range(80)]
    save_panels(tmp_path / "few.png", [make_row()], names)
    save_panels(tmp_path / "many.png", [make_row(mask=mask)], names)
    few, many = (Image.open(tmp_path / name) for name in ("few.png", "many.png"))
    assert many.width == few.width
    assert many.height > few.height + 10 * 23
    assert (np.asarray(many)[:, -GAP // 2 :] == 255).all(), "nothing runs over the margin"


def test_images_of_differing_sizes(tmp_path: Path) -> None:
    rows = [make_row(96, 96), make_row(500, 334), make_row(200, 256)]
    save_panels(tmp_path / "panels.png", rows)
    sheet = np.asarray(Image.open(tmp_path / "panels.png"))
    assert sheet.shape[1] == GAP + 4 * (257 + GAP), "the widest: 500 x 334 reduced to 384 x 257"
    first = GAP + (257 - 192) // 2
    assert tuple(sheet[HEADINGS, first].tolist()) == (200, 200, 200)
    assert tuple(sheet[HEADINGS, first - 1].tolist()) == (255, 255, 255)
    assert sheet.shape[0] > 192 + 384 + 200 + 3 * 23


def test_tensors_and_a_very_long_title(tmp_path: Path) -> None:
    row = make_row(title="long " * 200)
    tensors = Row(*(torch.from_numpy(part) for part in row[:4]), row.title)
    save_panels(tmp_path / "tensors.png", [tensors])
    save_panels(tmp_path / "arrays.png", [row])
    assert (tmp_path / "tensors.png").read_bytes() == (tmp_path / "arrays.png").read_bytes()
    sheet = np.asarray(Image.open(tmp_path / "arrays.png"))
    assert (sheet[:, -GAP // 2 :] == 255).all(), "nothing runs over the margin"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": np.zeros((96, 96, 3), np.uint8)}, "image must be uint8"),
        ({"mask": np.zeros((96, 95), np.uint8)}, r"mask must be uint8 of shape \[96, 96\], got uint8 \[96, 95\]"),
        ({"mask": np.zeros((96, 96), np.int64)}, "mask must be uint8 .* got int64"),
        ({"score": np.zeros((96, 96))}, "score must be floating"),
        ({"score": np.zeros((0, 96, 96))}, "score must be floating"),
        ({"score": np.full((1, 96, 96), 2.0)}, "heat must lie in 0..1"),
        ({"prediction": np.zeros((1, 96, 96), np.uint8)}, "prediction must be uint8"),
    ],
)
def test_panels_refuse_a_bad_row_and_leave_the_old_file(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = tmp_path / "panels.png"
    path.write_bytes(b"old")
    with pytest.raises(ValueError, match=r"rows\[1\] \(a row\): " + message):
        save_panels(path, [make_row(), make_row(**changes)])
    assert [file.name for file in tmp_path.iterdir()] == ["panels.png"]
    assert path.read_bytes() == b"old"


def test_panels_refuse_no_rows_and_classes_without_a_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="rows must hold at least one"):
        save_panels(tmp_path / "panels.png", [])
    with pytest.raises(ValueError, match="classes must name class 2, got 2 names"):
        save_panels(tmp_path / "panels.png", [make_row()], ["background", "cat"])
    assert not list(tmp_path.iterdir())


def test_no_part_of_a_file_is_left_when_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Image.Image, file: BinaryIO, *args: object) -> None:
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        save_panels(tmp_path / "panels.png", [make_row()])
    assert not list(tmp_path.iterdir())


THRESHOLDS = [0.0, 0.25, 0.5, 0.75, 1.0]
CURVES = {"mIoU": [0.1, 0.4, 0.5, 0.3, 0.1], "precision": [0.1, 0.4, 0.6, 0.9, float("nan")]}


def test_curve(tmp_path: Path) -> None:
    save_curve(tmp_path / "a.png", THRESHOLDS, CURVES, 0.5, "title")
    save_curve(tmp_path / "b.png", THRESHOLDS, CURVES, 0.25, "title")
    a, b = (np.asarray(Image.open(tmp_path / name).convert("RGB")).astype(int) for name in ("a.png", "b.png"))
    assert a.shape == b.shape
    assert a.shape[1] > 600
    dark = [(abs(picture - 102).max(2) < 40).sum(0) for picture in (a, b)]  # the dashed line is 40 % grey
    columns = [int(line.argmax()) for line in dark]
    assert columns[1] < columns[0] - 100, "the mark follows the chosen threshold"


@pytest.mark.parametrize(
    ("thresholds", "curves", "chosen", "message"),
    [
        ([], CURVES, 0.5, "thresholds must be ascending"),
        ([0.0, 0.5, 0.25, 0.75, 1.0], CURVES, 0.5, "thresholds must be ascending"),
        (THRESHOLDS, {}, 0.5, "curves must hold at least one"),
        (THRESHOLDS, {"recall": [0.5]}, 0.5, r"curves\['recall'\] must have 5 values, got 1"),
        (THRESHOLDS, CURVES, 1.5, "chosen must lie among the thresholds, 0.0 to 1.0, got 1.5"),
        (THRESHOLDS, CURVES, float("nan"), "chosen must lie among"),
    ],
)
def test_curve_refuses(
    tmp_path: Path, thresholds: list[float], curves: dict[str, list[float]], chosen: float, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        save_curve(tmp_path / "curve.png", thresholds, curves, chosen, "title")
    assert not list(tmp_path.iterdir())


def test_curve_says_how_to_get_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert has_matplotlib()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not has_matplotlib()
    with pytest.raises(ImportError, match="pip install matplotlib"):
        save_curve(tmp_path / "curve.png", THRESHOLDS, CURVES, 0.5, "title")
    assert not list(tmp_path.iterdir())


def test_curve_keeps_out_of_the_global_state_of_pyplot(tmp_path: Path) -> None:
    sys.modules.pop("matplotlib.pyplot", None)
    save_curve(tmp_path / "curve.png", THRESHOLDS, CURVES, 0.5, "title")
    assert "matplotlib.pyplot" not in sys.modules


@pytest.mark.parametrize(("length", "drawn"), [(20.0, 20), (1.0, 4), (0.0, 0)])
def test_displacements_are_drawn_from_cells_to_where_they_point(tmp_path: Path, length: float, drawn: int) -> None:
    """To the right, on grey photos of 256 pixels (drawn twice as large); short ones are drawn longer."""
    field = torch.zeros(2, 3, 3)
    field[1] = length
    photo = np.full((3, 256, 256), 128, np.uint8)
    save_displacements(tmp_path / "d.png", [(photo, field, f"photo {number}") for number in range(5)])
    sheet = np.asarray(Image.open(tmp_path / "d.png")).astype(int)
    assert sheet.shape[1] > 4 * 512  # four columns, and a second row
    assert sheet.shape[0] > 2 * 512
    red = (sheet[:, :, 0] > 180) & (sheet[:, :, 1] < 60)
    top, left = GAP + 2 * 23, GAP  # of the first photo
    middle = red[top + 255 - 3 : top + 255 + 4, left + 255 : left + 255 + 200]
    reach = int(middle.any(0).nonzero()[0].max(initial=0))
    assert reach == pytest.approx(2 * drawn, abs=2)


def test_displacements_of_a_wrong_shape_are_refused(tmp_path: Path) -> None:
    photo = np.zeros((3, 8, 8), np.uint8)
    with pytest.raises(ValueError, match=r"pictures\[0\] \(odd\): displacements must be"):
        save_displacements(tmp_path / "d.png", [(photo, np.zeros((3, 2, 2), np.float32), "odd")])
    assert not list(tmp_path.iterdir())
