"""The drawn scenes: repeatable, annotated as the protocol says, with the difficulties that the methods are about."""

from __future__ import annotations

import hashlib
import itertools
from typing import Any

import numpy as np
import pytest
import torch

from wsss_ops.training.data import VOID
from wsss_ops.training.scene_drawing import BODY, HEAD, SURROUNDINGS
from wsss_ops.training.scenes import CLASSES, CONTEXT, FAMILIES, SHARED_FEATURES, SceneDataset

COUNT = 150


@pytest.fixture(scope="module")
def scenes() -> SceneDataset:
    return SceneDataset("train", count=COUNT)


@pytest.fixture(scope="module")
def samples(scenes: SceneDataset) -> list:
    return [scenes[index] for index in range(len(scenes))]


@pytest.fixture(scope="module")
def parts(scenes: SceneDataset) -> list[torch.Tensor]:
    return [scenes.parts(index) for index in range(len(scenes))]


def mean_colour(samples: list, parts: list[torch.Tensor], name: str, part: int) -> torch.Tensor:
    """Mean colour of a part, over all pixels of a class."""
    wanted = CLASSES.index(name)
    chosen = [s.image[:, (s.mask == wanted) & (p == part)].float() for s, p in zip(samples, parts, strict=True)]
    return torch.cat(chosen, 1).mean(1)


def head_colours(samples: list, parts: list[torch.Tensor], name: str) -> torch.Tensor:
    """Shares of 64 coarse colours among the head pixels of a class; they sum to 1."""
    wanted = CLASSES.index(name)
    heads = [s.image[:, (s.mask == wanted) & (p == HEAD)].long() // 64 for s, p in zip(samples, parts, strict=True)]
    red, green, blue = torch.cat(heads, 1)
    counts = torch.bincount(16 * red + 4 * green + blue, minlength=64).double()
    return counts / counts.sum()


def test_samples_are_what_the_protocol_says(scenes: SceneDataset, samples: list) -> None:
    assert len(scenes) == COUNT
    assert scenes.classes[0] == "background"
    assert scenes.report_classes == tuple(range(len(scenes.classes)))
    assert scenes.tags.dtype == torch.bool
    assert scenes.tags.shape == (COUNT, len(scenes.classes) - 1)
    for sample in samples:
        assert sample.image.dtype == sample.mask.dtype == torch.uint8
        assert sample.image.shape == (3, 96, 96)
        assert sample.mask.shape == (96, 96)
    assert len({sample.name for sample in samples}) == COUNT


def test_tags_are_the_classes_of_the_mask(scenes: SceneDataset, samples: list) -> None:
    for index, sample in enumerate(samples):
        counts = torch.bincount(sample.mask.flatten(), minlength=256)
        present = counts[1 : len(CLASSES)] > 0
        assert torch.equal(present, sample.tags), sample.name
        assert torch.equal(sample.tags, scenes.tags[index])
        assert counts[1 : len(CLASSES)][present].min() >= 50, "too small to be found"
        assert counts[len(CLASSES) : VOID].sum() == 0


def test_void_is_a_thin_border_around_objects(samples: list, parts: list[torch.Tensor]) -> None:
    for sample, part in zip(samples, parts, strict=True):
        void = sample.mask == VOID
        assert 0.005 < void.float().mean() < 0.15
        thing = (sample.mask > 0) & ~void
        near = torch.nn.functional.max_pool2d(thing[None].float(), 5, 1, 2)[0] > 0
        assert near[void].float().mean() > 0.95
        on_object = ((part == HEAD) | (part == BODY)) & void
        assert on_object.sum() < 0.5 * void.sum(), "objects keep their pixels but where they touch"


def test_same_seed_same_bytes_on_every_machine() -> None:
    digest = hashlib.sha256()
    for split in ("train", "dev", "val"):
        dataset = SceneDataset(split, seed=3, count=4)
        for index in range(4):
            digest.update(dataset[index].image.numpy().tobytes() + dataset[index].mask.numpy().tobytes())
    assert digest.hexdigest()[:16] == "ea2df53610e3d6e0"


def test_order_count_and_repetition_do_not_matter(scenes: SceneDataset, samples: list) -> None:
    fewer = SceneDataset("train", count=10)
    for index in (9, 3, 3):
        assert torch.equal(fewer[index].image, samples[index].image)
        assert torch.equal(fewer[index].mask, samples[index].mask)
    assert torch.equal(fewer.tags, scenes.tags[:10])
    assert torch.equal(scenes[-1].image, samples[-1].image)
    assert scenes[-1].name == samples[-1].name


def test_splits_and_seeds_share_no_scene() -> None:
    datasets = [SceneDataset(s, seed, count=12) for s in ("train", "dev", "val") for seed in (0, 1)]
    images = [data[index].image.numpy().tobytes() for data in datasets for index in range(12)]
    assert len(set(images)) == len(images)
    for one, other in itertools.combinations(datasets, 2):
        assert not torch.equal(one.tags, other.tags)


def test_a_larger_size_shows_the_same_scenes_in_more_detail() -> None:
    small, large = (SceneDataset("val", size=size, count=12) for size in (64, 128))
    assert torch.equal(small.tags, large.tags)
    assert large[0].image.shape == (3, 128, 128)
    agreement = []
    for index in range(12):
        masks = large[index].mask[::2, ::2], small[index].mask
        agreement.append(((masks[0] == masks[1]) | (masks[0] == VOID) | (masks[1] == VOID)).float().mean())
    # Whether a head is half hidden is judged in pixels, so a borderline scene is drawn anew at one size only.
    assert sum(share > 0.97 for share in agreement) >= 11


def test_iteration_ends() -> None:
    assert len(list(SceneDataset("dev", count=3))) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "test"}, "split must be one of train, dev, val, got 'test'"),
        ({"split": "train", "seed": -1}, "seed must not be negative, got -1"),
        ({"split": "train", "size": 16}, "size must be at least 32 pixels, got 16"),
        ({"split": "train", "count": 0}, "count must be at least 1, got 0"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SceneDataset(**arguments)


@pytest.mark.parametrize("index", [3, -4])
def test_index_out_of_range(index: int) -> None:
    dataset = SceneDataset("dev", count=3)
    with pytest.raises(IndexError, match=f"scene {index} is out of range for 3 scenes"):
        dataset[index]


def test_small_head_and_large_body(samples: list, parts: list[torch.Tensor]) -> None:
    """ESOL, PPL: the part that tells the class is small."""
    for name in CLASSES[1:]:
        areas = [
            ((s.mask == CLASSES.index(name)) & (p == part)).sum()
            for part in (HEAD, BODY)
            for s, p in zip(samples, parts, strict=True)
        ]
        heads, bodies = sum(areas[:COUNT]), sum(areas[COUNT:])
        assert heads > 0
        assert bodies > 1.8 * heads, name


def test_heads_tell_the_classes_and_bodies_do_not(samples: list, parts: list[torch.Tensor]) -> None:
    for name, other in (("dog", "cow"), ("bus", "train")):  # of one family, with heads of their own
        heads = mean_colour(samples, parts, name, HEAD) - mean_colour(samples, parts, other, HEAD)
        bodies = mean_colour(samples, parts, name, BODY) - mean_colour(samples, parts, other, BODY)
        assert heads.norm() > 60
        assert bodies.norm() < 0.5 * heads.norm()


def test_rare_classes_share_the_head_of_a_frequent_one(samples: list, parts: list[torch.Tensor]) -> None:
    """SFC: shared features, and a long tail."""
    frequencies = dict(zip(CLASSES[1:], SceneDataset("train").tags.double().mean(0).tolist(), strict=True))
    heads = {name: head_colours(samples, parts, name) for name in CLASSES[1:]}
    for rare, frequent in SHARED_FEATURES.items():
        assert frequencies[frequent] > 3 * frequencies[rare]
        assert frequencies[rare] > 0.03
        alike = {name: float(torch.minimum(heads[rare], heads[name]).sum()) for name in heads if name != rare}
        assert max(alike, key=alike.__getitem__) == frequent
        assert alike[frequent] > 0.6
        assert alike[frequent] > 1.2 * max(alike[name] for name in alike if name != frequent)


def test_surroundings_come_with_their_classes(scenes: SceneDataset, parts: list[torch.Tensor]) -> None:
    """ESOL's shrinkage, OCR: context that is no part of the object."""
    tagged = scenes.tags[:, [CLASSES.index(name) - 1 for name in CONTEXT]].any(1)
    shown = torch.tensor([bool((part == SURROUNDINGS).float().mean() > 0.01) for part in parts])
    assert shown[tagged].float().mean() > 0.85
    assert 0.02 < shown[~tagged].float().mean() < 0.4


def test_surroundings_are_background(samples: list, parts: list[torch.Tensor]) -> None:
    for sample, part in zip(samples, parts, strict=True):
        values = sample.mask[part == SURROUNDINGS]
        assert ((values == 0) | (values == VOID)).all()


def test_several_classes_in_an_image(scenes: SceneDataset) -> None:
    """OCR: candidates to choose from, with an annotation correlation to learn."""
    numbers = torch.bincount(scenes.tags.sum(1), minlength=4)
    assert numbers[0] == 0
    assert len(numbers) == 4
    assert (numbers[1:] > 0.1 * COUNT).all()
    tags = SceneDataset("train").tags.double()
    lift = (tags.T @ tags) * len(tags) / (tags.sum(0)[:, None] * tags.sum(0))
    within = [lift[CLASSES.index(a) - 1, CLASSES.index(b) - 1] for a, b in (("dog", "cow"), ("bus", "train"))]
    across = [lift[CLASSES.index(a) - 1, CLASSES.index(b) - 1] for a, b in (("dog", "bus"), ("cow", "duck"))]
    assert min(within) > max(across)


def test_objects_touch(samples: list) -> None:
    def touches(mask: np.ndarray) -> bool:
        """Whether pixels of two classes lie within three pixels of each other, on either side of a void border."""
        pairs = [(mask[:, :-3], mask[:, 3:]), (mask[:-3], mask[3:])]
        thing = [(a > 0) & (a < VOID) & (b > 0) & (b < VOID) & (a != b) for a, b in pairs]
        return any(bool(t.any()) for t in thing)

    several = [s for s in samples if s.tags.sum() > 1]
    touching = [s for s in several if touches(s.mask.numpy())]
    assert len(touching) > 0.3 * len(several)


def test_bodies_join_their_heads(samples: list, parts: list[torch.Tensor]) -> None:
    for sample, part in zip(samples, parts, strict=True):
        head, body = ((part == which)[None].float() for which in (HEAD, BODY))
        beside = torch.nn.functional.max_pool2d(head, 5, 1, 2) * body
        assert beside.sum() > 0, sample.name


def test_every_class_has_a_family() -> None:
    assert sorted(itertools.chain(*FAMILIES)) == sorted(CLASSES[1:])
