"""OCR's training: pseudo-labels and their geometry, the loss, figures against brute force, resumption, errors."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from training.runs import command, evaluate_here, killed_at, train_apart, train_here
from training.systems import ToySystem, infer_cams
from training.voc_folder import make_voc, save_mask

import wsss_ops
from wsss_ops import reference
from wsss_ops._files import write_json
from wsss_ops.training import checkpoints, segmentation, train
from wsss_ops.training.batches import Batch, TrainingBatches, augment
from wsss_ops.training.data import Sample, open_dataset, with_background
from wsss_ops.training.ocr import OcrSettings, OcrSystem
from wsss_ops.training.processes import Processes
from wsss_ops.training.pseudo_labels import PseudoLabelled, make_pseudo_labels

SMALL: dict[str, Any] = {"backbone": "tiny", "size": 32, "batch_size": 4, "cams": "somewhere"}


@pytest.fixture(scope="module")
def voc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_voc(tmp_path_factory.mktemp("ocr") / "voc")


@pytest.fixture(scope="module")
def cams(voc: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("ocr") / "cams"
    assert train_here(*command("cam", voc, out)) == 0
    return out


def make(ops: Any = wsss_ops, **settings: Any) -> OcrSystem:
    torch.manual_seed(0)
    return OcrSystem(OcrSettings(**SMALL | settings), 3, ops)


def batch() -> Batch:
    torch.manual_seed(1)
    tags = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, 0.0]])
    masks = torch.randint(0, 3, (4, 33, 33), dtype=torch.uint8)
    valid = torch.ones(4, 33, 33, dtype=torch.bool)
    valid[:, :, 20:] = False
    masks[~valid] = 255
    return Batch(torch.randn(4, 3, 33, 33), tags, valid, masks)


def test_masks_go_through_the_geometry_of_their_image() -> None:
    mask = torch.zeros(40, 60, dtype=torch.uint8)
    mask[5:25, 30:50] = 7
    image = torch.where(mask == 7, 220, 40).to(torch.uint8).expand(3, -1, -1)
    flipped = set()
    for seed in range(20):
        crop, valid, cut = augment(image, mask, 48, np.random.default_rng(seed))
        assert torch.equal(cut == 255, ~valid)
        bright = crop.mean(0) > crop.mean(0)[valid].median() + 0.5
        differs = (bright != (cut == 7)) & valid
        assert differs.sum() <= 0.04 * valid.sum()  # along the square's border, where the resized photo is in between
        columns = (cut == 7).any(0).nonzero()
        if len(columns):
            flipped.add(bool(columns.float().mean() < valid.any(0).nonzero().float().mean()))
    assert flipped == {True, False}


def test_masks_change_nothing_else_of_a_batch(voc: Path) -> None:
    data = open_dataset(voc, "train")
    options = {"size": 32, "batch_size": 4, "seed": 3, "workers": 0, "processes": Processes()}
    plain, with_masks = (list(TrainingBatches(data, masks=masks, **options).epoch(1)) for masks in (False, True))
    for a, b in zip(plain, with_masks, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a[:3], b[:3], strict=True))
        assert a.masks is None
        assert (b.masks[~b.valid] == 255).all()


def test_pseudo_labels_are_the_best_cam_above_the_threshold(voc: Path, tmp_path: Path) -> None:
    data, system = open_dataset(voc, "train"), ToySystem(20)
    make_pseudo_labels(system, data, (1.0,), 0.4, tmp_path, Processes(), {"cams": "toy"})
    record = json.loads((tmp_path / "labels.json").read_text())
    assert record["threshold"] == 0.4
    assert record["cams"] == "toy"
    labelled, seen = PseudoLabelled(data, tmp_path), set()
    for index in range(len(data)):
        sample = data[index]
        cam = infer_cams(system, sample.image[None], sample.tags[None], (1.0,))[0]
        best, label = cam.max(0)
        expected = torch.where(best > 0.4, label + 1, 0)
        assert torch.equal(labelled[index].mask.long(), expected)
        assert torch.equal(labelled[index].image, sample.image)
        seen.update(expected.unique().tolist())
    assert len(seen) > 2


def test_pseudo_labels_that_are_there_are_kept(voc: Path, tmp_path: Path) -> None:
    data = open_dataset(voc, "train")
    name, shape = data[3].name, data[3].mask.shape
    save_mask(tmp_path / f"{name}.png", np.full(shape, 5, np.uint8))
    make_pseudo_labels(ToySystem(20), data, (1.0,), 0.4, tmp_path, Processes(), {})
    labelled = PseudoLabelled(data, tmp_path)
    assert (labelled[3].mask == 5).all()
    assert not (labelled[4].mask == 5).all()
    (tmp_path / f"{name}.png").unlink()
    with pytest.raises(ValueError, match=f"pseudo-label .*{name}.png cannot be read"):
        labelled[3]
    save_mask(tmp_path / f"{name}.png", np.zeros((4, 5), np.uint8))
    with pytest.raises(ValueError, match=rf"{name}.png is \[4, 5\] pixels, its image"):
        labelled[3]


class Painter(ToySystem):
    """A segmenter that knows what to say: three classes by brightness, at stride 1."""

    stride = 1

    def logits(self, images: Tensor) -> Tensor:
        grey = images.mean(1)
        return torch.stack([-((grey - level) ** 2) for level in (-2.0, 0.0, 2.0)], 1)


class Few:
    """Three images whose pixels are dark, middling or bright at random; classes background, a, b."""

    classes, report_classes = ("background", "a", "b"), (0, 1, 2)

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> Sample:
        generator = torch.Generator().manual_seed(index)
        levels = torch.tensor([10, 120, 240], dtype=torch.uint8)
        image = levels[torch.randint(0, 3, (9, 11), generator=generator)].expand(3, -1, -1)
        mask = torch.randint(0, 3, (9, 11), generator=generator).byte()
        mask[0, :4] = 255
        tags = torch.tensor([index != 1, index == 2])
        return wsss_ops.training.data.Sample(image, mask, tags, f"image {index}")


def test_figures_are_those_of_brute_force() -> None:
    result = segmentation.evaluate(Painter(), Few(), Few(), (1.0,), Processes())["validation"]
    outside = total = 0
    hits, unions = [0] * 3, [0] * 3
    for index in range(3):
        sample = Few()[index]
        for y in range(9):
            for x in range(11):
                predicted = {10: 0, 120: 1, 240: 2}[int(sample.image[0, y, x])]
                total += 1
                outside += predicted > 0 and not bool(sample.tags[predicted - 1])
                true = int(sample.mask[y, x])
                if true == 255:
                    continue
                for c in range(3):
                    hits[c] += predicted == c == true
                    unions[c] += c in (predicted, true)
    assert result["oc_rate"] == pytest.approx(outside / total, abs=1e-6)
    assert 0 < outside < total
    for c, name in enumerate(Few.classes):
        assert result["classes"][name]["IoU"] == pytest.approx(hits[c] / unions[c], abs=1e-6)
    assert result["mIoU"] == pytest.approx(sum(h / u for h, u in zip(hits, unions, strict=True)) / 3, abs=1e-6)


def test_the_loss_is_cross_entropy_and_the_weighted_ranking() -> None:
    given = batch()
    system = make(ocr_weight=0.7, ocr_threshold=0.3, ocr_margin=0.1, ocr_scale=2.0)
    system.network.prior.copy_(torch.rand(3, 3))
    system.network.eval()
    loss, figures = system.loss(given)
    logits = system.logits(given.images)
    assert logits.shape[2:] == (5, 5)  # stride 8: centres on pixels 0 to 32
    resized = F.interpolate(logits, (33, 33), mode="bilinear", align_corners=True)
    entropy = F.cross_entropy(resized, given.masks.long(), ignore_index=255)
    ranking = reference.ocr_loss(
        resized, with_background(given.tags), prior=system.network.prior, threshold=0.3, margin=0.1, scale=2.0,
        ignore=~given.valid,
    )  # fmt: skip
    assert ranking > 0
    torch.testing.assert_close(loss, entropy + 0.7 * ranking, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(figures["OCR"], ranking.detach(), rtol=1e-5, atol=1e-6)


def test_without_the_ranking_no_operator_is_called() -> None:
    class Forbidden:
        def __getattr__(self, name: str) -> NoReturn:
            raise AssertionError(f"{name} must not be called")

    loss, figures = make(Forbidden(), ocr_weight=0.0).loss(batch())
    assert set(figures) == {"loss", "cross-entropy"}
    assert loss.requires_grad


@pytest.mark.parametrize("prior", ["tags", "none"])
def test_fused_and_reference_agree(prior: str) -> None:
    pair = make(reference, prior=prior), make(wsss_ops, prior=prior)
    losses = [system.loss(batch())[0] for system in pair]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-6)
    for loss in losses:
        loss.backward()
    for (name, one), (_, other) in zip(*(system.network.named_parameters() for system in pair), strict=True):
        tolerance = 1e-5 * float(one.grad.abs().max())
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-3, atol=max(tolerance, 1e-7), msg=name)


def test_a_run_is_compared_with_its_baseline(
    voc: Path, cams: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    without, again = tmp_path / "without", tmp_path / "with"
    assert train_here(*command("ocr", voc, without, "--cams", cams, "--ocr-weight", 0)) == 0
    record = json.loads((without / "pseudo_labels/labels.json").read_text())
    assert record["threshold"] == json.loads((cams / "metrics.json").read_text())["threshold"]
    assert train_here(*command("ocr", voc, again, "--cams", without, "--baseline", without)) == 0
    assert not (again / "pseudo_labels").exists()
    printed = capsys.readouterr().out
    figures = [json.loads((out / "metrics.json").read_text())["validation"] for out in (without, again)]
    for name, own in zip(("baseline", "this run"), figures, strict=True):
        row = next(line for line in printed.splitlines() if line.startswith(name))
        assert f"{own['mIoU']:.4f}" in row
        assert f"{own['oc_rate']:.2%}" in row
    columns = [Image.open(out / "oc.png").width for out in (without, again)]
    assert columns[1] > columns[0]  # before and after
    prior = checkpoints.load(again / "model.pt")["network"]["prior"]
    tags = with_background(open_dataset(voc, "train").tags)
    assert torch.equal(prior, reference.annotation_correlation(tags))


def test_evaluate_repeats_the_figures_of_training(
    voc: Path, cams: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_here(*command("ocr", voc, tmp_path / "run", "--cams", cams)) == 0
    run = tmp_path / "run"
    assert evaluate_here(run, tmp_path / "again") == 0
    before = (run / "metrics.json").read_text()
    assert json.loads(before)["validation"] == json.loads((tmp_path / "again/metrics.json").read_text())["validation"]
    capsys.readouterr()
    assert evaluate_here(run, tmp_path / "compared", "--baseline", run) == 0
    assert (
        len([line for line in capsys.readouterr().out.splitlines() if line.startswith(("baseline", "this run"))]) == 2
    )
    widths = [Image.open(tmp_path / out / "oc.png").width for out in ("again", "compared")]
    assert widths[1] > widths[0]
    assert evaluate_here(run, run) == 2
    assert "is the folder of a training run, whose figures stay" in capsys.readouterr().err
    assert (run / "metrics.json").read_text() == before
    assert evaluate_here(cams, tmp_path / "other", "--baseline", run) == 2
    assert "--baseline is for runs of ocr" in capsys.readouterr().err


KILLED_LABELLING = """
import os, signal
from wsss_ops.training import pseudo_labels
write, written = pseudo_labels.write_atomic, []
def write_or_die(path, content):
    write(path, content)
    written.append(path)
    if sum(file.suffix == ".png" for file in written) == 5:
        os.kill(os.getpid(), signal.SIGKILL)
pseudo_labels.write_atomic = write_or_die
"""


def test_a_run_killed_twice_ends_as_an_unbroken_one(voc: Path, cams: Path, tmp_path: Path) -> None:
    def started(out: Path, prelude: str = "") -> subprocess.CompletedProcess[str]:
        return train_apart(*command("ocr", voc, out, "--cams", cams), prelude=prelude)

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    done = started(whole)
    assert done.returncode == 0, done.stderr
    assert started(broken, KILLED_LABELLING).returncode == -signal.SIGKILL
    assert len(list((broken / "pseudo_labels").iterdir())) == 5
    assert started(broken, killed_at(0, 1, 2)).returncode == -signal.SIGKILL
    again = started(broken)
    assert again.returncode == 0, again.stderr
    assert "resuming at segmentation, epoch 2, step 3" in again.stdout
    figures = [json.loads((out / "metrics.json").read_text())["validation"] for out in (whole, broken)]
    assert figures[0] == figures[1]
    models = [checkpoints.load(out / "model.pt")["network"] for out in (whole, broken)]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cams": None}, "cams must name a finished run of a CAM system, got none"),
        ({"cam_threshold": 1.5}, "cam_threshold must be at most 1, got 1.5"),
        ({"ocr_weight": -1.0}, "ocr_weight must be at least 0, got -1.0"),
        ({"ocr_threshold": 2.0}, "ocr_threshold must be at most 1, got 2.0"),
        ({"ocr_scale": 0.0}, "ocr_scale must be above 0, got 0.0"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        OcrSettings(**SMALL | settings)


def test_what_does_not_fit_is_an_error_before_anything_is_made(
    voc: Path, cams: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    classes = open_dataset(voc, "train").classes
    settings = {"backbone": "tiny", "cams": "somewhere"}
    network = OcrSystem(OcrSettings(**settings), len(classes), wsss_ops).network.state_dict()
    model = {"system": "ocr", "classes": classes, "settings": settings, "network": network}
    for name in ("bare", "old"):
        (tmp_path / name).mkdir()
        checkpoints.save(tmp_path / name / "model.pt", model)
    (tmp_path / "old/pseudo_labels").mkdir()
    record = {"threshold": 0.5, "training_images": "2 images, labels 0"}
    write_json(tmp_path / "old/pseudo_labels/labels.json", record)
    cases = [
        (["--cams", tmp_path / "none"], f"cams: {tmp_path}/none does not exist"),
        (["--cams", cams, "--baseline", tmp_path / "none"], f"baseline: {tmp_path}/none does not exist"),
        (["--cams", cams / "model.pt"], "cam_threshold must be given, because"),
        (["--cams", tmp_path / "bare"], "is a run of a segmentation network that has no pseudo-labels"),
        (["--cams", tmp_path / "old"], "are of 2 images, labels 0, not of "),
        (["--cams", cams, "--baseline", tmp_path / "bare"], "is no finished and evaluated run of this system"),
        (["--cams", cams, "--baseline", cams], "is no finished and evaluated run of this system"),
    ]
    for options, message in cases:
        assert train_here(*command("ocr", voc, tmp_path / "out", *options)) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_the_example_in_the_readme_runs() -> None:
    readme = (Path(train.__file__).parent / "README.md").read_text()
    example = readme.split("## OCR")[1].split("```python\n")[1].split("```")[0]
    logits = torch.randn(2, 4, 8, 8, requires_grad=True)
    labels = torch.randint(0, 4, (2, 64, 64))
    labels[:, :5] = 255
    tags, training_tags = torch.tensor([[1, 0, 0], [0, 1, 1]]), torch.randint(0, 2, (30, 3))
    space = {"logits": logits, "labels": labels, "tags": tags, "training_tags": training_tags}
    exec(example, space)
    plain = F.cross_entropy(F.interpolate(logits, (64, 64), mode="bilinear"), labels, ignore_index=255)
    assert space["loss"] > plain
    assert logits.grad.abs().sum() > 0
