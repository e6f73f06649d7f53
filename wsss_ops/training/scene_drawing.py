"""Drawing for the generated scenes: noise, pieces of objects, landscape, water, rails, roads and the camera.

Everything here uses + - * / and square root on numbers from `Generator.random` alone, so that a picture is
the same to the byte on every machine: IEEE 754 rounds these correctly, while the last bits of sines, powers,
matrix products and sums differ between processors. Lengths are shares of the picture's size, colours are RGB
in 0..1.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]  # float32 at run time
Colour = tuple[float, float, float]
T = TypeVar("T")

HEAD, BODY, SURROUNDINGS = 1, 2, 3  # the values of Canvas.part

WHITE, BLACK = (0.97, 0.96, 0.94), (0.07, 0.06, 0.08)
_FOLIAGE = (0.16, 0.33, 0.17)
_GROUNDS = (
    ((0.42, 0.60, 0.27), (0.25, 0.44, 0.20)),  # meadow
    ((0.76, 0.68, 0.40), (0.58, 0.52, 0.28)),  # stubble
    ((0.87, 0.79, 0.62), (0.74, 0.64, 0.47)),  # sand
    ((0.93, 0.95, 0.98), (0.78, 0.83, 0.91)),  # snow
    ((0.56, 0.50, 0.40), (0.40, 0.42, 0.28)),  # heath
)
_SKIES = (  # above, at the horizon, tint of the light
    ((0.36, 0.58, 0.86), (0.80, 0.89, 0.95), (1.00, 1.00, 1.00)),  # noon
    ((0.45, 0.50, 0.74), (0.97, 0.78, 0.58), (1.08, 0.97, 0.84)),  # evening
    ((0.62, 0.67, 0.72), (0.82, 0.84, 0.85), (0.92, 0.95, 0.98)),  # overcast
    ((0.50, 0.66, 0.80), (0.95, 0.87, 0.86), (1.02, 0.98, 1.00)),  # morning
)


class Shape(NamedTuple):
    """A piece of an object that looks to the right: x right, y down, in units of half the object's length."""

    kind: str  # ellipse, box or triangle (tip up)
    x: float
    y: float
    rx: float
    ry: float
    colour: Colour | None = None  # None: the coat of this object
    second: Colour | None = None  # stripes of this colour


_BUSH = (
    Shape("ellipse", -0.3, 0.1, 0.60, 0.42, _FOLIAGE),
    Shape("ellipse", 0.3, 0.0, 0.62, 0.55, _FOLIAGE),
)


class Frame(NamedTuple):
    """Where an object is: centre, half its length, facing 1 (right) or -1, cosine and sine of its tilt."""

    x: float
    y: float
    half: float
    facing: float
    cos: float
    sin: float


def between(rng: np.random.Generator, low: float, high: float) -> float:
    return low + (high - low) * float(rng.random())


def pick(rng: np.random.Generator, options: Sequence[T]) -> T:
    return options[int(rng.random() * len(options))]


def frame_at(rng: np.random.Generator, x: float, y: float, half: float, lean: float = 0.1) -> Frame:
    """A frame with a random tilt and facing; lean is the largest tangent of half the tilt."""
    t = between(rng, -lean, lean)
    facing = 1.0 if rng.random() < 0.5 else -1.0
    return Frame(x, y, half, facing, (1 - t * t) / (1 + t * t), 2 * t / (1 + t * t))


def _ramp(values: Floats) -> Floats:
    """0 below 0, 1 above 1, smooth between."""
    t = values.clip(0, 1)
    return t * t * (3 - 2 * t)


def _noise(rng: np.random.Generator, size: int, rows: int, columns: int, octaves: int = 3) -> Floats:
    """Smooth fractal noise [size, size] in -1..1, with rows x columns cells in its coarsest octave."""
    total = np.zeros((size, size), np.float32)
    for octave in range(octaves):
        cells = (rows << octave, columns << octave)
        field = (rng.random((cells[0] + 1, cells[1] + 1)) * 2 - 1).astype(np.float32)
        for n in (cells[1], cells[0]):  # interpolate along the columns, transpose, then along the rows
            place = (np.arange(size, dtype=np.float32) + 0.5) * (n / size)
            cell = place.astype(np.int64)
            step = _ramp(place - cell)
            field = (field[:, cell] * (1 - step) + field[:, cell + 1] * step).T
        total += field * (1.0 / (1 << octave))
    return total * (0.5 / (1 - 0.5**octaves))


def _level(kind: str, u: Floats, v: Floats) -> Floats:
    """Below 1 inside the shape that fills -1..1, 1 on its edge."""
    if kind == "ellipse":
        return np.sqrt(u * u + v * v)
    if kind == "box":  # a superellipse of degree 8: rounded corners
        u4, v4 = u * u * u * u, v * v * v * v
        return np.sqrt(np.sqrt(np.sqrt(u4 * u4 + v4 * v4)))
    return np.maximum(np.abs(u) + 0.5 * (1 - v), np.abs(v))


class Canvas:
    """A picture under construction.

    image float32 [3, size, size] in 0..1; owner int64 [size, size], the number of the object at each pixel,
    -1 for none; part uint8 [size, size], what the pixel shows.
    """

    def __init__(self, size: int, rng: np.random.Generator) -> None:
        self.size = size
        self.rng = rng
        self.image = np.zeros((3, size, size), np.float32)
        self.owner = np.full((size, size), -1, np.int64)
        self.part = np.zeros((size, size), np.uint8)
        at = (np.arange(size, dtype=np.float32) + 0.5) / size
        self.x, self.y = at[None, :], at[:, None]
        self.grain = _noise(rng, size, 14, 14)
        self.cloud = _noise(rng, size, 3, 3)
        self.ripple = _noise(rng, size, 22, 5, 2)
        self.tint: Colour = (1.0, 1.0, 1.0)

    def lay(self, alpha: Floats, colour: Colour, second: Colour | None = None, mix: Floats | float = 0.0) -> None:
        """Lay a colour over the picture with opacity alpha; mix (0..1) moves it towards the second colour."""
        for channel, first, other in zip(self.image, colour, second or colour, strict=True):
            channel += alpha * (first + (other - first) * mix - channel)

    def backdrop(self) -> float:
        """Sky, hills, ground and bushes; returns the height of the horizon."""
        rng, y = self.rng, self.y
        horizon = between(rng, 0.14, 0.34)
        high, low, self.tint = pick(rng, _SKIES)
        light, dark = pick(rng, _GROUNDS)
        self.lay(np.ones_like(self.grain), high, low, _ramp(y / horizon))
        self.lay(_ramp(self.cloud * 2.2 - 0.1) * 0.7, WHITE)
        sharp = 0.35 * self.size
        for rise, colour, row in ((0.10, (0.52, 0.60, 0.66), 0), (0.06, (0.38, 0.48, 0.42), self.size // 2)):
            top = horizon - rise * (0.5 + self.cloud[row])
            self.lay(_ramp((y - top) * sharp), colour)
        ground = _ramp((y - horizon) * sharp)
        self.lay(ground, light, dark, (0.5 + 0.55 * self.cloud + 0.35 * self.grain).clip(0, 1))
        haze = ((1 - y) / (1 - horizon)).clip(0, 1)
        self.lay(ground * haze * 0.3, low)
        for _ in range(int(rng.random() * 4)):
            self.draw(_BUSH, frame_at(rng, float(rng.random()), horizon, between(rng, 0.05, 0.10)), _FOLIAGE)
        return horizon

    def water(self, frames: Sequence[Frame]) -> None:
        """One pond around all the frames."""
        levels = []
        for frame in frames:
            along, across = self._lines(frame)
            along, across = along / (2.0 * frame.half + 0.12), across / (0.75 * frame.half + 0.05)
            levels.append(np.sqrt(along * along + across * across))
        level = levels[0]
        for other in levels[1:]:
            level = np.minimum(level, other)
        level = level + 0.22 * self.cloud
        self.lay(_ramp((1.12 - level) * 9), (0.72, 0.66, 0.52))  # the shore
        alpha = _ramp((1.02 - level) * 9)
        self.lay(alpha, (0.16, 0.42, 0.58), (0.55, 0.76, 0.86), _ramp(0.35 + 0.9 * self.ripple))
        self.part[alpha > 0.5] = SURROUNDINGS

    def road(self, frames: Sequence[Frame]) -> None:
        """A road along each frame, across the picture."""
        for frame in frames:
            along, across, alpha = self._band(frame)
            tarmac = (0.5 + 0.5 * self.grain).clip(0, 1)
            self.lay(alpha, (0.34, 0.34, 0.36), (0.46, 0.45, 0.45), tarmac)
            self.lay(alpha * (across < 0.2) * _dashes(along, 9, 0.55), WHITE)

    def rails(self, frames: Sequence[Frame]) -> None:
        """A railway track along each frame, across the picture."""
        for frame in frames:
            along, across, alpha = self._band(frame)
            ballast = (0.5 + 0.7 * self.grain).clip(0, 1)
            self.lay(alpha, (0.46, 0.42, 0.40), (0.62, 0.58, 0.55), ballast)
            self.lay(alpha * (across < 0.85) * _dashes(along, 15, 0.45), (0.30, 0.19, 0.13))
            self.lay(alpha * _ramp(3 - np.abs(across - 0.5) * 9), (0.78, 0.80, 0.84))

    def _lines(self, frame: Frame) -> tuple[Floats, Floats]:
        """Coordinates along and across the line under an object, in shares of the picture."""
        dx, dy = self.x - frame.x, self.y - frame.y
        along, across = dx * frame.cos + dy * frame.sin, dy * frame.cos - dx * frame.sin
        return along, across - 0.48 * frame.half

    def _band(self, frame: Frame) -> tuple[Floats, Floats, Floats]:
        """Coordinate along a band under an object, distance from its middle (1 at the edge), opacity."""
        along, across = self._lines(frame)
        width = 0.20 * frame.half + 0.02
        across = np.abs(across) / width
        alpha = _ramp((1 - across) * (width * self.size) + 0.5)
        self.part[alpha > 0.5] = SURROUNDINGS
        return along, across, alpha

    def shadow(self, frame: Frame) -> None:
        """The shadow on the ground below an object."""
        along, across = self._lines(frame)
        u, v = along / (0.95 * frame.half), (across - 0.28 * frame.half) / (0.16 * frame.half)
        self.lay(0.38 * _ramp(1.3 - np.sqrt(u * u + v * v)), BLACK)

    def draw(self, shapes: Sequence[Shape], frame: Frame, coat: Colour, owner: int = -1, part: int = 0) -> None:
        """Draw shapes at the frame, lit from above; their pixels become the owner's, and that part of it."""
        reach = 1.5 * frame.half
        window = tuple(
            slice(max(0, int((c - reach) * self.size)), max(0, int((c + reach) * self.size) + 1))
            for c in (frame.y, frame.x)
        )
        dx = (self.x[:, window[1]] - frame.x) / frame.half
        dy = (self.y[window[0]] - frame.y) / frame.half
        x, y = (dx * frame.cos + dy * frame.sin) * frame.facing, dy * frame.cos - dx * frame.sin
        grain = self.grain[window]
        for shape in shapes:
            u, v = (x - shape.x) / shape.rx, (y - shape.y) / shape.ry
            inward = (1 - _level(shape.kind, u, v)) * (min(shape.rx, shape.ry) * frame.half * self.size)
            alpha = (0.5 + inward).clip(0, 1)  # half a pixel of soft edge
            first = shape.colour or coat
            mix = _dashes(u + v, 1.1, 0.5)
            shade = 1.04 - 0.16 * v + 0.10 * grain
            for channel, one, other in zip(self.image, first, shape.second or first, strict=True):
                view = channel[window]
                view += alpha * ((one + (other - one) * mix) * shade - view)
            inside = alpha > 0.5
            self.owner[window][inside] = owner
            self.part[window][inside] = part

    def develop(self) -> NDArray[np.uint8]:
        """Light, exposure, vignette and sensor noise; then bytes [3, size, size]."""
        rng, x, y = self.rng, self.x - 0.5, self.y - 0.5
        slope = x * between(rng, -0.3, 0.3) + y * between(rng, -0.2, 0.2)
        light = (1 + slope - 0.35 * (x * x + y * y)) * between(rng, 0.82, 1.12)
        noise = (rng.random(self.image.shape) + rng.random(self.image.shape) - 1).astype(np.float32)
        tint = np.array(self.tint, np.float32)[:, None, None]
        picture = self.image * tint * light + noise * between(rng, 0.015, 0.05)
        return (picture.clip(0, 1) * 255 + 0.5).astype(np.uint8)


def _dashes(along: Floats, count: float, share: float) -> Floats:
    """1 on that share of each of count periods a unit, else 0."""
    phase = along * count
    return (phase - np.floor(phase) < share).astype(np.float32)
