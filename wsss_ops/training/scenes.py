"""Generated scenes: the default data set, which needs no download.

Little landscapes with animals, water birds and vehicles, with pixel masks and image-level tags, drawn from
numbers alone. They are built to show the failures that the four systems treat:

- **A small part tells the class** (ESOL, PPL). Every object has a head of distinctive colours on a large
  plain body. The classes of a family share their bodies, coats and liveries, and boulders and sheds in the
  landscape wear these as well, so a body is weak evidence: a CAM lights the head and misses the body, and
  recall is low. The body still belongs to the object: it is joined to the head, has legs, tail or wheels,
  and stands out from the ground.
- **A rare class shares its features with a frequent one** (SFC). Class frequencies have a long tail. `fox`
  has the head of `dog` but for ears and cheek, `goose` that of `duck` but for crest and cheek, `tram` that
  of `bus` but for a white band and the pantograph: see `SHARED_FEATURES`.
- **Context comes with a class** (ESOL's shrinkage, OCR). Water lies under most birds, rails under most
  trains, a road under most buses and trams, and each now and then without them: see `CONTEXT`. A CAM spills
  onto it, and precision is low.
- **Classes are confused** (OCR). Up to three classes stand in an image, near enough to touch and overlap,
  more often of one family than chance has it, and their bodies look alike: a segmentation network predicts
  classes that the image's tags exclude.

The same (seed, split, index) gives the same bytes on every machine; see `scene_drawing` for how.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wsss_ops.training.data import SPLITS, VOID, Sample
from wsss_ops.training.scene_drawing import (
    BLACK,
    BODY,
    HEAD,
    WHITE,
    Canvas,
    Frame,
    Shape,
    between,
    frame_at,
    pick,
)

CLASSES = ("background", "dog", "duck", "bus", "cow", "train", "fox", "goose", "tram")
ANIMALS, BIRDS, VEHICLES = FAMILIES = (("dog", "cow", "fox"), ("duck", "goose"), ("bus", "train", "tram"))
SHARED_FEATURES = {"fox": "dog", "goose": "duck", "tram": "bus"}  # rare class: the frequent one it resembles
CONTEXT = {"duck": "water", "goose": "water", "bus": "road", "train": "rails", "tram": "road"}

_SCENES = {"train": 800, "dev": 160, "val": 240}  # by default
_WEIGHTS = dict(zip(CLASSES[1:], (30.0, 26.0, 22.0, 16.0, 13.0, 5.0, 5.0, 4.0), strict=True))  # long-tailed
_FAMILY_AFFINITY = 2.0  # how much more often a further class comes from the family of the first
_CONTEXT_WITH, _CONTEXT_WITHOUT = 0.9, 0.06  # P(context | a class of it in the image), P(context | none)

_ORANGE, _TEAL, _RED, _YELLOW = (0.91, 0.47, 0.10), (0.04, 0.42, 0.36), (0.84, 0.10, 0.12), (0.98, 0.80, 0.08)
_DARK, _BEAK, _PINK, _GLASS = (0.24, 0.11, 0.05), (0.99, 0.66, 0.05), (0.95, 0.55, 0.60), (0.16, 0.21, 0.27)
_COATS = ((0.86, 0.80, 0.69), (0.52, 0.38, 0.26), (0.60, 0.59, 0.58), (0.33, 0.31, 0.32), (0.70, 0.56, 0.42))
_LIVERIES = ((0.87, 0.84, 0.74), (0.30, 0.50, 0.56), (0.33, 0.38, 0.55), (0.58, 0.6, 0.58), (0.55, 0.4, 0.36))

_BODIES = {
    ANIMALS: (
        Shape("ellipse", -1.00, -0.10, 0.22, 0.07),
        *(Shape("box", x, 0.46, 0.10, 0.36) for x in (-0.72, -0.46, 0.26, 0.50)),
        Shape("ellipse", -0.12, 0.02, 0.88, 0.42),
        Shape("ellipse", 0.60, -0.24, 0.26, 0.32),
    ),
    BIRDS: (
        Shape("triangle", -0.88, 0.02, 0.26, 0.26),
        Shape("ellipse", -0.10, 0.18, 0.86, 0.40),
        Shape("ellipse", 0.58, -0.16, 0.17, 0.40),
    ),
    VEHICLES: (
        Shape("box", -0.12, 0.00, 0.98, 0.42),
        *(Shape("box", x, -0.13, 0.13, 0.14, _GLASS) for x in (-0.86, -0.50, -0.14, 0.22)),
        *(Shape("ellipse", x, 0.42, 0.15, 0.15, BLACK) for x in (-0.72, -0.30, 0.42)),
    ),
}
_EYE = Shape("ellipse", 0.98, -0.56, 0.05, 0.06, BLACK)
_DOG_HEAD = (
    Shape("ellipse", 0.88, -0.48, 0.32, 0.30, _ORANGE),
    Shape("ellipse", 1.14, -0.40, 0.17, 0.14, _ORANGE),
    Shape("ellipse", 1.27, -0.44, 0.07, 0.06, BLACK),
)
_DUCK_HEAD = (
    Shape("ellipse", 1.00, -0.50, 0.24, 0.09, _BEAK),
    Shape("ellipse", 0.70, -0.55, 0.26, 0.25, _TEAL),
    Shape("ellipse", 0.80, -0.62, 0.04, 0.05, BLACK),
    Shape("box", 0.62, -0.28, 0.19, 0.07, WHITE),
)
_BUS_HEAD = (
    Shape("box", 0.78, 0.00, 0.30, 0.43, _RED),
    Shape("box", 0.86, -0.16, 0.17, 0.17, _GLASS),
    Shape("ellipse", 0.96, 0.26, 0.08, 0.09, _YELLOW),
)
_HEADS = {
    "dog": (*_DOG_HEAD, Shape("ellipse", 0.68, -0.44, 0.12, 0.27, _DARK), _EYE),
    "fox": (
        Shape("triangle", 0.70, -0.80, 0.12, 0.19, _DARK),
        Shape("triangle", 0.96, -0.80, 0.12, 0.19, _DARK),
        *_DOG_HEAD,
        Shape("ellipse", 0.94, -0.32, 0.14, 0.10, WHITE),
        _EYE,
    ),
    "cow": (
        Shape("triangle", 0.66, -0.82, 0.08, 0.20, WHITE),
        Shape("triangle", 1.04, -0.82, 0.08, 0.20, WHITE),
        Shape("ellipse", 0.86, -0.48, 0.33, 0.30, BLACK),
        Shape("ellipse", 1.00, -0.54, 0.12, 0.22, WHITE),
        Shape("ellipse", 1.12, -0.32, 0.22, 0.19, _PINK),
        _EYE,
    ),
    "duck": _DUCK_HEAD,
    "goose": (
        Shape("triangle", 0.58, -0.82, 0.12, 0.18, BLACK),
        *_DUCK_HEAD,
        Shape("ellipse", 0.62, -0.48, 0.11, 0.10, WHITE),
    ),
    "bus": _BUS_HEAD,
    "tram": (
        Shape("triangle", 0.68, -0.54, 0.15, 0.13, BLACK),
        Shape("box", 0.68, -0.67, 0.17, 0.04, BLACK),
        *_BUS_HEAD,
        Shape("box", 0.78, 0.10, 0.30, 0.06, WHITE),
    ),
    "train": (
        Shape("box", 0.78, 0.00, 0.30, 0.43, _YELLOW),
        Shape("box", 0.86, -0.20, 0.17, 0.13, _GLASS),
        Shape("box", 0.78, 0.20, 0.30, 0.20, _YELLOW, BLACK),
    ),
}
_BOULDER = (Shape("ellipse", 0.0, 0.1, 0.85, 0.48), Shape("ellipse", 0.35, 0.25, 0.55, 0.34))
_SHED = (
    Shape("box", 0.0, 0.1, 0.9, 0.42),
    Shape("box", -0.45, 0.0, 0.14, 0.15, _GLASS),
    Shape("box", 0.25, 0.0, 0.14, 0.15, _GLASS),
    Shape("triangle", 0.0, -0.45, 1.0, 0.22, (0.36, 0.36, 0.39)),
)


class SceneDataset:
    """Generated scenes of one split, drawn when asked for.

    split is "train", "dev" or "val"; the splits share no scene. size is the height and width in pixels, count
    the number of scenes (default: 800, 160 and 240); a smaller count gives the first scenes of the larger
    one. Items are `Sample`s: image uint8 [3, size, size], mask uint8 [size, size] with 0 background and 255
    void (a thin border around objects and between those that touch), tags bool [8], name. The classes in
    the mask are those of the tags. Index -1 is the last scene; beyond the ends IndexError is raised.

    Raises ValueError for an unknown split, a negative seed, a size below 32 or a count below 1.
    """

    classes: tuple[str, ...] = CLASSES
    report_classes: tuple[int, ...] = tuple(range(len(CLASSES)))

    def __init__(self, split: str, seed: int = 0, size: int = 96, count: int | None = None) -> None:
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
        if seed < 0:
            raise ValueError(f"seed must not be negative, got {seed}")
        if size < 32:
            raise ValueError(f"size must be at least 32 pixels, got {size}")
        if count is not None and count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        self.split, self.seed, self.size = split, seed, size
        rng = self._chance(0)
        self._objects = [_cast(rng.random(5)) for _ in range(count or _SCENES[split])]
        self.tags = torch.zeros(len(self._objects), len(CLASSES) - 1, dtype=torch.bool)
        for tags, objects in zip(self.tags, self._objects, strict=True):
            tags[[CLASSES.index(name) - 1 for name in objects]] = True

    def __len__(self) -> int:
        return len(self._objects)

    def __getitem__(self, index: int) -> Sample:
        canvas, image = self._draw(index)
        numbers = np.array([0, *(CLASSES.index(name) for name in self._objects[index])], np.uint8)
        mask = numbers[canvas.owner + 1]
        mask[_border(canvas.owner, max(1, self.size // 96))] = VOID
        return Sample(torch.from_numpy(image), torch.from_numpy(mask), self.tags[index].clone(), self.name(index))

    def name(self, index: int) -> str:
        return f"{self.split}-{self.seed}-{index % len(self):05d}"

    def parts(self, index: int) -> Tensor:
        """What each pixel shows, uint8 [size, size]: HEAD or BODY of an object, SURROUNDINGS (water,
        road, rails) or 0. It serves to measure what a CAM finds; no training may see it."""
        return torch.from_numpy(self._draw(index)[0].part)

    def _chance(self, stream: int) -> np.random.Generator:
        """Stream 0 decides which objects stand in the scenes, stream i + 1 draws scene i."""
        entropy = [SPLITS.index(self.split), stream, self.seed]
        return np.random.Generator(np.random.PCG64(np.random.SeedSequence(entropy)))

    def _draw(self, index: int) -> tuple[Canvas, NDArray[np.uint8]]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"scene {index} is out of range for {len(self)} scenes")
        rng = self._chance(index % len(self) + 1)
        while True:  # the objects of a crowded scene may hide each other: then it is drawn anew
            canvas = Canvas(self.size, rng)
            if _compose(canvas, self._objects[index]):
                return canvas, canvas.develop()


def _cast(chance: NDArray[np.float64]) -> tuple[str, ...]:
    """The objects of a scene from five numbers in 0..1: one to three classes, at times two of the first."""
    weights = dict(_WEIGHTS)
    names: list[str] = []
    for draw in chance[1 : 2 + int(chance[0] > 0.42) + int(chance[0] > 0.80)]:
        name = _weighted(weights, float(draw))
        if not names:
            weights = {n: w * (_FAMILY_AFFINITY if n in _family(name) else 1) for n, w in weights.items()}
        del weights[name]
        names.append(name)
    return (*names, names[0]) if chance[4] < 0.22 else tuple(names)


def _weighted(weights: dict[str, float], draw: float) -> str:
    """The class at the share draw (0..1) of the total weight."""
    left = draw * sum(weights.values())
    for name, weight in weights.items():
        left -= weight
        if left < 0:
            return name
    return name  # the last, where rounding leaves a rest


def _family(name: str) -> tuple[str, ...]:
    return next(family for family in FAMILIES if name in family)


def _compose(canvas: Canvas, objects: tuple[str, ...]) -> bool:
    """Draw landscape and objects; False where an object or its head is mostly hidden by another."""
    rng = canvas.rng
    horizon = canvas.backdrop()
    frames = _places(rng, len(objects), horizon)
    for kind, lay in (("water", canvas.water), ("road", canvas.road), ("rails", canvas.rails)):
        around = [f for f, name in zip(frames, objects, strict=True) if CONTEXT.get(name) == kind]
        if rng.random() < (_CONTEXT_WITH if around else _CONTEXT_WITHOUT):
            lay(around or [frame_at(rng, float(rng.random()), between(rng, horizon + 0.2, 0.9), 0.25)])
    for shapes, coats in ((_BOULDER, _COATS), (_SHED, _LIVERIES)):
        for _ in range(int(rng.random() * 2.6)):
            x, y, half = float(rng.random()), between(rng, horizon, 0.9), between(rng, 0.08, 0.2)
            canvas.draw(shapes, frame_at(rng, x, y, half, lean=0.02), pick(rng, coats))
    whole = {}
    for k in sorted(range(len(objects)), key=lambda k: frames[k].y + 0.8 * frames[k].half):  # far ones first
        family = _family(objects[k])
        coat = pick(rng, _LIVERIES if family == VEHICLES else _COATS)
        canvas.shadow(frames[k])
        canvas.draw(_BODIES[family], frames[k], coat, k, BODY)
        canvas.draw(_HEADS[objects[k]], frames[k], coat, k, HEAD)
        whole[k] = _pixels(canvas, k)
    seen = {k: _pixels(canvas, k) for k in whole}
    return all(2 * now >= then for k in whole for now, then in zip(seen[k], whole[k], strict=True))


def _places(rng: np.random.Generator, count: int, horizon: float) -> list[Frame]:
    """Frames for objects side by side, in random order and at random depth, near enough to overlap."""
    frames = []
    for column in np.argsort(rng.random(count), kind="stable"):
        half = between(rng, 0.20, 0.43 - 0.05 * count)
        foot = between(rng, max(horizon + 0.22, 1.9 * half), 0.96)
        half *= 0.6 + 0.45 * foot  # what is nearer is larger
        x = (int(column) + between(rng, 0.15, 0.85)) / count
        frames.append(frame_at(rng, min(max(x, 1.1 * half), 1 - 1.1 * half), foot - 0.8 * half, half))
    return frames


def _pixels(canvas: Canvas, k: int) -> tuple[int, int]:
    """Pixels in sight of object k, and of its head."""
    mine = canvas.owner == k
    return int(np.count_nonzero(mine)), int(np.count_nonzero(mine & (canvas.part == HEAD)))


def _border(owner: NDArray[np.int64], width: int) -> NDArray[np.bool_]:
    """Background pixels within width of an object, and object pixels within width of another object."""
    border = np.zeros(owner.shape, np.bool_)
    padded = np.pad(owner, width, mode="edge")
    rows, columns = owner.shape
    for step in range(1, width + 1):
        for dy, dx in ((-step, 0), (step, 0), (0, -step), (0, step)):
            other = padded[width + dy : width + dy + rows, width + dx : width + dx + columns]
            border |= (other != owner) & (other >= 0)
    return border
