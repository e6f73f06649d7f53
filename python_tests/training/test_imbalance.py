"""Long-tailed training sets: quotas and choice on known tags, groups of classes, and runs that use them."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from training.runs import command, evaluate_here, killed_at, train_apart, train_here
from training.voc_folder import make_voc

from wsss_ops.training import checkpoints, evaluate
from wsss_ops.training.data import fingerprint, open_dataset
from wsss_ops.training.imbalance import LongTailed, group_figures, group_table, kept_images, quotas
from wsss_ops.training.settings import Settings

RATIO = 4


def tags_of(*images: str) -> Tensor:
    """Tags of four classes from a text per image that names those in it."""
    return torch.tensor([[name in image for name in "abcd"] for image in images])


def kept_of(images: list[str], classes: int, ratio: float) -> tuple[list[str], list[int]]:
    """The images kept, and how many show each class."""
    tags = tags_of(*images)
    kept = kept_images(tags, range(1 + classes), ratio)
    return [images[index] for index in kept], tags[kept].sum(0)[:classes].tolist()


@pytest.mark.parametrize(
    ("images", "ratio", "expected"),
    [
        ([100, 90, 80], 4, [100, 50, 25]),
        ([80, 90, 100], 4, [25, 50, 100]),
        ([50, 80, 80], 4, [20, 80, 40]),  # the first of equals first
        ([100, 90, 80], 1, [100, 90, 80]),
        ([100, 30, 80], 1000, [100, 1, 3]),  # at least one
        ([100, 30, 80, 0], 1000, [100, 1, 10, 0]),
        ([100, 40, 20], 4, [100, 40, 20]),  # no more than there are
        ([7], 50, [7]),
        ([], 50, []),
        ([0, 0], 50, [0, 0]),
    ],
)
def test_quotas_fall_exponentially_with_the_rank(images: list[int], ratio: float, expected: list[int]) -> None:
    assert quotas(images, ratio) == expected


def test_quotas_are_met_from_the_rarest_class_on() -> None:
    images = ["a"] * 8 + ["ab"] * 2 + ["b"] * 4 + ["ac"] * 2 + ["bc"] * 2 + [""] * 3
    kept, found = kept_of(images, 3, 6)  # quotas 12, 5 and 2
    assert found[1:] == [5, 2]
    assert kept.count("a") == 8
    assert kept.count("") == 3
    assert kept.count("ac") + kept.count("bc") == 2
    assert kept.count("ab") + kept.count("b") + kept.count("bc") == 5


def test_a_frequent_class_loses_the_images_that_show_a_rare_one_too() -> None:
    kept, found = kept_of(["a", "ab"] * 6, 2, 4)  # quotas 12 and 3
    assert found == [9, 3]
    assert kept.count("a") == 6


def test_a_frequent_class_that_came_along_with_a_rare_one_is_not_exceeded() -> None:
    kept, found = kept_of(["a"] * 16 + ["bd"] * 8 + ["bc"] * 8, 4, 2)  # quotas 16, 13, 8 and 8
    assert found == [16, 13, 5, 8]
    assert kept == ["a"] * 16 + ["bd"] * 8 + ["bc"] * 5


def test_only_reported_classes_are_ranked() -> None:
    tags = tags_of(*["b"] * 9, *["c"] * 9, "a", "d")
    kept = kept_images(tags, (0, 2, 3), 3)
    assert tags[kept].sum(0).tolist() == [1, 9, 3, 1]
    for reported in ((0, 2), (0,)):  # one class and none have no tail
        assert kept_images(tags, reported, 3) == list(range(20))


@pytest.mark.parametrize("seed", range(20))
def test_no_class_exceeds_its_quota_and_no_image_is_dropped_without_need(seed: int) -> None:
    generator = np.random.default_rng(seed)
    rates, ratio = generator.uniform(0.02, 0.5, 6), float(generator.uniform(1, 40))
    tags = torch.from_numpy(generator.random((300, 6)) < rates)
    allowed = torch.tensor(quotas(tags.sum(0).tolist(), ratio))
    kept = kept_images(tags, range(7), ratio)
    found = tags[kept].sum(0)
    assert (found <= allowed).all()
    full = found == allowed
    dropped = sorted({*range(300)} - {*kept})
    assert (tags[dropped] & full).any(1).all()
    assert full[tags.sum(0).argmin()]
    assert kept_images(tags, range(7), 1) == list(range(300))


def test_the_choice_depends_on_nothing_else_and_is_spread() -> None:
    choices = []
    for seed in range(2):
        np.random.seed(seed)
        torch.manual_seed(seed)
        choices.append(kept_images(tags_of(*["a"] * 12, *["b"] * 12), (0, 1, 2), 3))
    assert choices[0] == choices[1] == [*range(12), 13, 14, 20, 22]


@pytest.fixture(scope="module")
def voc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_voc(tmp_path_factory.mktemp("imbalance") / "voc", training=50)


def test_the_thinned_set_has_the_items_of_the_whole(voc: Path) -> None:
    whole = open_dataset(voc, "train")
    thinned = LongTailed(whole, RATIO)
    assert thinned.summary() == "long-tailed: 23 of 40 images; cat 15, person 12, dog 6"
    assert len(thinned) == len(thinned.tags) == 23
    assert (thinned.classes, thinned.report_classes) == (whole.classes, whole.report_classes)
    for place, index in enumerate(thinned.indices):
        sample, other = thinned[place], whole[index]
        assert sample.name == other.name == thinned.name(place)
        assert torch.equal(sample.tags, thinned.tags[place])
        assert torch.equal(sample.image, other.image)
        assert torch.equal(sample.mask, other.mask)
    assert fingerprint(thinned) != fingerprint(whole)


def rows(*values: float | None) -> dict[str, dict[str, float | None]]:
    """Rows of classes c0, c1, ... whose IoU, precision and recall are a value, its half and its quarter."""
    return {
        f"c{number}": {"IoU": value, "precision": value and value / 2, "recall": value and value / 4}
        for number, value in enumerate(values)
    }


def test_groups_are_thirds_by_training_images_and_means_of_their_rows() -> None:
    images = {"c0": 5, "c1": 80, "c2": 70, "c3": 60, "c4": 50, "c5": 40, "c6": 30, "c7": 20}
    found = group_figures(rows(0.8, 0.2, 0.4, 0.6, 0.1, 0.5, None, 0.4), images)
    assert found == {
        "head": {"classes": ["c1", "c2", "c3"], "training_images": [80, 70, 60],
                 "mIoU": 0.4, "precision": 0.2, "recall": 0.1},
        "middle": {"classes": ["c4", "c5"], "training_images": [50, 40],
                   "mIoU": 0.3, "precision": 0.15, "recall": 0.075},
        "tail": {"classes": ["c6", "c7", "c0"], "training_images": [30, 20, 5],
                 "mIoU": 0.6, "precision": 0.3, "recall": 0.15},
    }  # fmt: skip
    text = group_table(found).splitlines()
    assert text[1] == "middle             0.300      0.150   0.075  c4 50, c5 40"


@pytest.mark.parametrize(("classes", "sizes"), [(1, [1, 0, 0]), (2, [1, 0, 1]), (3, [1, 1, 1]), (7, [3, 2, 2])])
def test_left_over_classes_go_to_the_head_then_to_the_tail(classes: int, sizes: list[int]) -> None:
    images = {f"c{number}": 9 - number for number in range(classes)}
    found = group_figures(rows(*[0.5] * classes), images)
    assert [len(group["classes"]) for group in found.values()] == sizes
    assert [group["mIoU"] for group in found.values()] == [0.5 if size else None for size in sizes]
    assert ("-" in group_table(found)) == (0 in sizes)


@pytest.mark.parametrize(("value", "what"), [(0.5, "at least 1"), (float("nan"), "finite"), (float("inf"), "finite")])
def test_an_imbalance_out_of_range_is_an_error(value: float, what: str) -> None:
    with pytest.raises(ValueError, match=f"imbalance must be {what}, got {value}"):
        Settings(imbalance=value)


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def check_groups(folder: Path, images: dict[str, int]) -> None:
    """That both splits have the groups of these training images, as means of their rows."""
    metrics = read(folder / "metrics.json")
    for split in ("development", "validation"):
        assert metrics[split]["groups"] == group_figures(metrics[split]["classes"], images)
    assert metrics["validation"]["groups"]["tail"]["classes"] == ["dog"]


@pytest.fixture(scope="module")
def long_tailed(voc: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a CAM run on a long tail that was killed and resumed, and what it printed."""
    out = tmp_path_factory.mktemp("imbalance") / "cam"
    options = command("cam", voc, out, "--imbalance", RATIO)
    killed = train_apart(*options, prelude=killed_at(0, 1, 2))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    done = train_apart(*options)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_a_run_on_a_long_tail_resumes_and_leaves_groups(voc: Path, long_tailed: tuple[Path, str]) -> None:
    out, printed = long_tailed
    assert "resuming at cam, epoch 2, step 3" in printed
    thinned = LongTailed(open_dataset(voc, "train"), RATIO)
    assert thinned.summary() in printed
    metrics = read(out / "metrics.json")
    assert metrics["run"] == read(out / "settings.json")
    assert metrics["run"]["training_images"] == fingerprint(thinned)
    assert metrics["run"]["imbalance"] == RATIO
    assert [metrics[split]["images"] for split in ("development", "validation")] == [10, 12]  # all of them
    check_groups(out, {"cat": 15, "person": 12, "dog": 6})
    assert re.search(r"^head .* cat 15\nmiddle .* person 12\ntail .* dog 6$", printed, re.MULTILINE)


def test_a_finished_run_is_recognised_and_another_imbalance_named(
    voc: Path, long_tailed: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    out, _ = long_tailed
    assert train_here(*command("cam", voc, out, "--imbalance", RATIO)) == 0
    assert "is finished" in (printed := capsys.readouterr().out)
    assert "dog 6" in printed
    assert train_here(*command("cam", voc, out, "--imbalance", 2)) == 2
    assert "imbalance: 4.0 there, 2.0 now" in capsys.readouterr().err


def test_evaluation_afterwards_has_the_groups_of_the_model_file(long_tailed: tuple[Path, str], tmp_path: Path) -> None:
    assert evaluate_here(long_tailed[0], tmp_path, "--panels", 0) == 0
    check_groups(tmp_path, {"cat": 15, "person": 12, "dog": 6})


def test_a_run_on_all_images_is_that_of_before_the_setting(
    voc: Path, long_tailed: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its record is what older runs have, its model file loads where it lacks what theirs lack, and groups are none;
    a run on a long tail cannot start from it: its CAM has seen what the tail leaves out."""
    plain, esol = tmp_path / "plain", tmp_path / "esol"
    assert train_here(*command("cam", voc, plain)) == 0
    assert "imbalance" not in read(plain / "settings.json")
    assert "groups" not in read(plain / "metrics.json")["validation"]
    content = checkpoints.load(plain / "model.pt")
    del content["class_images"], content["settings"]["imbalance"]
    checkpoints.save(plain / "model.pt", content)
    system, _ = evaluate.load_system(plain)
    assert (system.class_images, system.settings.imbalance) == (None, 1)

    stages = ("--expansion-epochs", 1, "--shrinkage-epochs", 1, "--imbalance", RATIO)
    assert train_here(*command("esol", voc, esol, *stages, "--start", plain)) == 2
    assert "model.pt has imbalance 1, this run 4.0" in capsys.readouterr().err
    assert not esol.exists()
    assert train_here(*command("esol", voc, esol, *stages, "--start", long_tailed[0])) == 0
    assert not (esol / "cam").exists()  # the figures are those of the same long tail
    for folder in (esol, esol / "expansion"):
        check_groups(folder, {"cat": 15, "person": 12, "dog": 6})


def test_segmentation_networks_have_groups_too(voc: Path, long_tailed: tuple[Path, str], tmp_path: Path) -> None:
    out = tmp_path / "ocr"
    assert train_here(*command("ocr", voc, out, "--imbalance", RATIO, "--cams", long_tailed[0])) == 0
    assert len(list((out / "pseudo_labels").glob("*.png"))) == 23
    check_groups(out, {"cat": 15, "person": 12, "dog": 6})
