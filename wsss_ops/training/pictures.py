"""Pictures of results: panels of photo, annotation, CAM and prediction, and curves over thresholds."""

import functools
import importlib.util
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from wsss_ops._files import write_atomic
from wsss_ops.training.data import VOID, Sample

Array = Tensor | NDArray[np.generic]
Pixels = NDArray[np.uint8]

COLUMNS = ("photo", "ground truth", "CAM", "prediction")
GAP, TEXT = 10, 15  # pixels between pictures, height of letters
_LINE = TEXT + 8
_PAPER, _INK, _MUTED = (255, 255, 255), (32, 34, 38), (110, 114, 120)
_ENLARGED_TO, _REDUCED_TO = (
    256,
    384,
)  # pictures are enlarged by whole factors up to, and reduced to, this side
_OUTSIDE = (214, 30, 50)
_DISPLACED_COLUMNS = 4
_VISIBLE, _MOST_TIMES_LONGER = 4, 50  # pixels that a displacement is drawn long at least, where that suffices
_HEAT = ((0.06, 0.05, 0.26), (0.16, 0.26, 0.78), (0.10, 0.72, 0.68), (0.99, 0.84, 0.20), (0.86, 0.10, 0.06))


PANELS = "panels.png"


class Row(NamedTuple):
    """One row of a panel; tensors on the CPU, or arrays."""

    image: Array  # uint8 [3, H, W]
    mask: Array  # uint8 [H, W], 255 void
    score: Array  # float [K, H, W] in 0..1, maps of foreground classes
    prediction: Array  # uint8 [H, W]
    title: str


def make_row(sample: Sample, scores: Tensor, classes: Sequence[str]) -> Row:
    """The row of an image whose classes have the scores [C, H, W], background first."""
    scores = scores.cpu()
    return Row(sample.image, sample.mask, scores[1:], scores.argmax(0).byte(), title_of(sample, classes))


def title_of(sample: Sample, classes: Sequence[str]) -> str:
    """The name of an image and its tags."""
    return f"{sample.name}: {', '.join(classes[int(index) + 1] for index in sample.tags.nonzero())}"


@functools.cache
def palette() -> Pixels:
    """The PASCAL VOC colours, uint8 [256, 3], read-only; the last one, void, is pale."""
    index = np.arange(256)
    colours = np.zeros((256, 3), np.uint8)
    for bit in range(8):
        for channel in range(3):
            colours[:, channel] |= ((index >> (3 * bit + channel) & 1) << (7 - bit)).astype(np.uint8)
    colours.flags.writeable = False
    return colours


def colorize(mask: Array) -> Pixels:
    """mask uint8 [H, W] -> VOC colours, uint8 [H, W, 3]. Raises ValueError for another shape or dtype."""
    return palette()[_checked("mask", mask, np.uint8, (None, None))]


def overlay(image: Array, heat: Array) -> Pixels:
    """A heat map over a photo: image uint8 [3, H, W], heat float [H, W] in 0..1 -> uint8 [H, W, 3].

    Dark blue is 0, red 1. Raises ValueError for other shapes, dtypes or values.
    """
    photo = _checked("image", image, np.uint8, (3, None, None)).transpose(1, 2, 0)
    warmth = _checked("heat", heat, np.floating, photo.shape[:2]).astype(np.float32)
    if not ((warmth >= 0) & (warmth <= 1)).all():
        raise ValueError(f"heat must lie in 0..1, got {warmth.min()} to {warmth.max()}")
    stops = np.linspace(0, 1, len(_HEAT))
    colour = np.stack([np.interp(warmth, stops, channel) for channel in zip(*_HEAT, strict=True)], axis=-1)
    opacity = 0.35 + 0.3 * warmth[..., None]
    return (photo * (1 - opacity) + 255 * colour * opacity + 0.5).astype(np.uint8)


def save_panels(path: str | os.PathLike[str], rows: Sequence[Row], classes: Sequence[str] | None = None) -> None:
    """Saves a PNG with a row per image: photo, ground truth, CAM (the maximum over its maps) and prediction.

    classes names the classes in the legend, background first; without it they are numbered. Images may differ
    in size: small ones are enlarged by a whole factor, large ones reduced. Raises ValueError naming the row for
    shapes, dtypes and values other than those of `Row`, for classes beyond the names, and where there are no
    rows; then nothing is written.
    """
    if not rows:
        raise ValueError("rows must hold at least one row, got none")
    drawn = [_pictures(number, row) for number, row in enumerate(rows)]
    legend = _legend([np.asarray(part) for row in rows for part in (row.mask, row.prediction)], classes)
    _save_sheet(path, COLUMNS, [row.title for row in rows], drawn, legend)


class Outside(NamedTuple):
    """What segmentation networks make of an image, and where that is none of the image's tags."""

    image: Array  # uint8 [3, H, W]
    mask: Array  # uint8 [H, W], 255 void
    predictions: Sequence[tuple[Array, Array]]  # per network: uint8 [H, W], and bool [H, W], out of candidate
    title: str


def save_outside(
    path: str | os.PathLike[str], rows: Sequence[Outside], networks: Sequence[str], classes: Sequence[str]
) -> None:
    """Saves a PNG with a row per image: photo, ground truth, and for each network its prediction and, red over the
    photo, its out-of-candidate pixels.

    networks names these, classes the classes. Raises ValueError naming the row for shapes and dtypes other than those
    of `Outside`, and where there are no rows; then nothing is written.
    """
    if not rows:
        raise ValueError("rows must hold at least one row, got none")
    drawn = [_outside_pictures(number, row, len(networks)) for number, row in enumerate(rows)]
    masks = [np.asarray(part) for row in rows for part in (row.mask, *(label for label, _ in row.predictions))]
    headings = [text for name in networks for text in (name, f"{name}: OC pixels")]
    _save_sheet(path, ("photo", "ground truth", *headings), [r.title for r in rows], drawn, _legend(masks, classes))


def save_displacements(path: str | os.PathLike[str], pictures: Sequence[tuple[Array, Array, str]]) -> None:
    """Saves a PNG of photographs, side by side, with a line from each cell to the point where a sampler looks instead.

    pictures: image uint8 [3, H, W]; displacements float [2, h, w] in pixels, y before x, for cells that are spread
    evenly, the first and last on the image's edges; and a title. Lines that would be hard to see are drawn longer, by
    a factor that the heading tells. Raises ValueError for other shapes.
    """
    checked = []
    for number, (image, field, title) in enumerate(pictures):
        try:
            photo = _checked("image", image, np.uint8, (3, None, None)).transpose(1, 2, 0)
            shifts = _checked("displacements", field, np.floating, (2, None, None))
        except ValueError as error:
            raise ValueError(f"pictures[{number}] ({title}): {error}") from error
        checked.append((photo, shifts, title))
    mean = float(np.mean([np.hypot(*shifts).mean() for _, shifts, _ in checked]))
    longer = max(1, min(_MOST_TIMES_LONGER, round(_VISIBLE / max(mean, 1e-6))))
    heading = f"dot: a cell of the map; line: to where it looks instead, {mean:.1f} pixels away on average"
    heading += f", drawn {longer} times as long" * (longer > 1)

    drawn = [(_displaced(photo, shifts, longer), title) for photo, shifts, title in checked]
    cell = max(picture.width for picture, _ in drawn)
    rows = [drawn[first : first + _DISPLACED_COLUMNS] for first in range(0, len(drawn), _DISPLACED_COLUMNS)]
    width = max(GAP + max(map(len, rows)) * (cell + GAP), int(_font().getlength(heading)) + 2 * GAP)
    sheet = Image.new(
        "RGB", (width, GAP + _LINE + sum(max(p.height for p, _ in r) + _LINE + GAP for r in rows)), _PAPER
    )
    draw = ImageDraw.Draw(sheet)
    draw.text((GAP, GAP), heading, _INK, _font())
    top = GAP + _LINE
    for row in rows:
        for column, (picture, title) in enumerate(row):
            left = GAP + column * (cell + GAP)
            draw.text((left, top + 2), _shortened(title, cell), _MUTED, _font())
            sheet.paste(picture, (left, top + _LINE))
        top += max(picture.height for picture, _ in row) + _LINE + GAP
    write_atomic(Path(path), lambda file: sheet.save(file, "PNG"))


def _displaced(photo: NDArray[np.generic], shifts: NDArray[np.generic], longer: int) -> Image.Image:
    """A pale photo with a dot for each cell and a line to where it looks."""
    height, width = photo.shape[:2]
    factor = max(1, 2 * _ENLARGED_TO // max(height, width))
    picture = Image.fromarray(photo // 2 + 96).resize((width * factor, height * factor))
    draw = ImageDraw.Draw(picture)
    rows, columns = (
        np.linspace(0, side - 1, cells) * factor for side, cells in zip((height, width), shifts.shape[1:], strict=True)
    )
    for i, y in enumerate(rows):
        for j, x in enumerate(columns):
            end_y, end_x = (at + factor * longer * float(s) for at, s in zip((y, x), shifts[:, i, j], strict=True))
            draw.line((x, y, end_x, end_y), (200, 20, 40), 2)
            draw.ellipse((x - 2, y - 2, x + 2, y + 2), (20, 30, 60))
    return picture


def has_matplotlib() -> bool:
    """Whether `save_curve` can draw."""
    return importlib.util.find_spec("matplotlib") is not None


def save_curve(
    path: str | os.PathLike[str],
    thresholds: Sequence[float],
    curves: Mapping[str, Sequence[float]],
    chosen: float,
    title: str,
) -> None:
    """Saves a PNG with a line per curve over the thresholds; values lie in 0..1 and are NaN where undefined.

    The chosen threshold is marked, and the legend gives every curve's value there. Raises ImportError where
    matplotlib is missing, and ValueError for curves of other lengths than the thresholds', thresholds that do
    not ascend and a chosen one beyond them; then nothing is written.
    """
    if not has_matplotlib():
        raise ImportError("curves are drawn with matplotlib, which is missing: pip install matplotlib")
    places = np.asarray(thresholds, np.float64)
    if places.ndim != 1 or not places.size or not (np.diff(places) > 0).all():
        raise ValueError(f"thresholds must be ascending numbers, got {thresholds!r}")
    if not places[0] <= chosen <= places[-1]:
        raise ValueError(f"chosen must lie among the thresholds, {places[0]} to {places[-1]}, got {chosen}")
    if not curves:
        raise ValueError("curves must hold at least one curve, got none")
    for name, values in curves.items():
        if len(values) != len(places):
            raise ValueError(f"curves[{name!r}] must have {len(places)} values, got {len(values)}")

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, values in curves.items():
        value = float(np.interp(chosen, places, values))
        (line,) = axes.plot(places, values, linewidth=2, label=f"{name}: {value:.3f}")
        axes.plot([chosen], [value], "o", color=line.get_color())
    axes.axvline(chosen, color="0.4", linestyle="--", linewidth=1, label=f"chosen: {chosen:.3g}")
    axes.set(xlabel="background threshold", ylim=(0, 1), title=title)
    axes.set_xlim(places[0], places[-1] if places.size > 1 else None)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    write_atomic(Path(path), lambda file: figure.savefig(file, format="png"))


def _save_sheet(
    path: str | os.PathLike[str], headings: Sequence[str], titles: Sequence[str],
    drawn: Sequence[Sequence[Image.Image]], legend: list[tuple[tuple[int, ...], str]],
) -> None:  # fmt: skip
    """Rows of pictures of equal size under headings, each row with its title, and the legend below."""
    cell = max(*(picture.width for pictures in drawn for picture in pictures), 120)
    width = GAP + len(headings) * (cell + GAP)
    entries = _flow(legend, width)
    top = GAP + _LINE
    tops = []
    for pictures in drawn:
        tops.append(top)
        top += _LINE + pictures[0].height + GAP
    height = top + (entries[-1][1] + 1) * _LINE + GAP if entries else top

    sheet = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, heading in enumerate(headings):
        middle = GAP + column * (cell + GAP) + cell // 2
        draw.text((middle, GAP), _shortened(heading, cell), _INK, _font(), anchor="ma")
    for title, pictures, y in zip(titles, drawn, tops, strict=True):
        draw.text((GAP, y + 2), _shortened(title, width - 2 * GAP), _MUTED, _font())
        for column, picture in enumerate(pictures):
            x = GAP + column * (cell + GAP) + (cell - picture.width) // 2
            sheet.paste(picture, (x, y + _LINE))
    for x, line, colour, name in entries:
        y = top + line * _LINE
        draw.rectangle((x, y, x + TEXT, y + TEXT), colour, _MUTED)
        draw.text((x + TEXT + 6, y), name, _INK, _font())
    write_atomic(Path(path), lambda file: sheet.save(file, "PNG"))


def _checked(name: str, array: Array, kind: type[np.generic], shape: tuple[int | None, ...]) -> NDArray[np.generic]:
    """The argument as an array. Raises ValueError unless its dtype and shape (None: any length) are these."""
    values = np.asarray(array)
    fits = values.ndim == len(shape) and all(
        length in (None, got) for length, got in zip(shape, values.shape, strict=True)
    )
    if not fits or 0 in values.shape or not np.issubdtype(values.dtype, kind):
        wanted = ", ".join("any" if length is None else str(length) for length in shape)
        raise ValueError(f"{name} must be {kind.__name__} of shape [{wanted}], got {values.dtype} {list(values.shape)}")
    return values


def _pictures(number: int, row: Row) -> list[Image.Image]:
    """The four pictures of a row, of equal size."""
    try:
        photo = _checked("image", row.image, np.uint8, (3, None, None))
        height, width = photo.shape[1:]
        mask = _checked("mask", row.mask, np.uint8, (height, width))
        score = _checked("score", row.score, np.floating, (None, height, width))
        prediction = _checked("prediction", row.prediction, np.uint8, (height, width))
        pictures = [
            photo.transpose(1, 2, 0),
            colorize(mask),
            overlay(photo, score.max(0)),
            colorize(prediction),
        ]
    except ValueError as error:
        raise ValueError(f"rows[{number}] ({row.title}): {error}") from error
    smooth, sharp = Image.Resampling.BICUBIC, Image.Resampling.NEAREST
    return _enlarged(pictures, (smooth, sharp, smooth, sharp))


def _outside_pictures(number: int, row: Outside, networks: int) -> list[Image.Image]:
    """The pictures of a row, of equal size."""
    try:
        if len(row.predictions) != networks:
            raise ValueError(f"predictions must be {networks}, one for each network, got {len(row.predictions)}")
        photo = _checked("image", row.image, np.uint8, (3, None, None))
        shape = photo.shape[1:]
        pictures = [photo.transpose(1, 2, 0), colorize(_checked("mask", row.mask, np.uint8, shape))]
        for label, outside in row.predictions:
            pictures.append(colorize(_checked("prediction", label, np.uint8, shape)))
            red = _checked("outside", outside, np.bool_, shape)[..., None]
            pale = photo.transpose(1, 2, 0) // 2 + 96
            pictures.append(np.where(red, np.array(_OUTSIDE, np.uint8), pale))
    except ValueError as error:
        raise ValueError(f"rows[{number}] ({row.title}): {error}") from error
    smooth, sharp = Image.Resampling.BICUBIC, Image.Resampling.NEAREST
    return _enlarged(pictures, (smooth, sharp, *(sharp, sharp) * networks))


def _enlarged(pictures: Sequence[NDArray[np.generic]], ways: Sequence[Image.Resampling]) -> list[Image.Image]:
    """Pictures of one size, brought to the size of the sheet."""
    height, width = pictures[0].shape[:2]
    side = max(height, width)
    factor = min(max(1, _ENLARGED_TO // side), _REDUCED_TO / side)
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    return [Image.fromarray(p).resize(size, way) for p, way in zip(pictures, ways, strict=True)]


def _legend(masks: list[NDArray[np.generic]], classes: Sequence[str] | None) -> list[tuple[tuple[int, ...], str]]:
    """Colour and name of every class in the masks."""
    present = sorted({int(index) for mask in masks for index in np.unique(mask)})
    if classes is None:
        classes = ["background", *(f"class {index}" for index in range(1, VOID))]
    beyond = [index for index in present if index >= len(classes) and index != VOID]
    if beyond:
        raise ValueError(f"classes must name class {beyond[-1]}, got {len(classes)} names")
    colours = [tuple(palette()[index].tolist()) for index in present]
    return [(c, "void" if i == VOID else classes[i]) for c, i in zip(colours, present, strict=True)]


def _flow(legend: list[tuple[tuple[int, ...], str]], width: int) -> list[tuple[int, int, tuple[int, ...], str]]:
    """The entries of a legend with their x and their line, broken where the width ends."""
    placed, x, line = [], GAP, 0
    for colour, name in legend:
        length = TEXT + 6 + round(_font().getlength(name)) + 2 * GAP
        if x > GAP and x + length > width:
            x, line = GAP, line + 1
        placed.append((x, line, colour, name))
        x += length
    return placed


@functools.cache
def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(TEXT)


def _shortened(text: str, width: int) -> str:
    """The text, cut with dots where it is wider than width pixels."""
    if _font().getlength(text) <= width:
        return text
    while text and _font().getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."
