"""SFC: what learns and from what, the steps of its loss, the bank in a run, the parts of its CAM, resumption."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from training.runs import command, killed_at, train_apart, train_here
from training.systems import batch, gradients, infer_cams
from training.voc_folder import make_voc

import wsss_ops
from wsss_ops import reference
from wsss_ops.training import checkpoints, evaluate
from wsss_ops.training.cam import CAM, CamSystem
from wsss_ops.training.comparison import compare
from wsss_ops.training.inference import infer_parts
from wsss_ops.training.loop import seed_everything
from wsss_ops.training.processes import Processes
from wsss_ops.training.settings import Settings
from wsss_ops.training.sfc import SfcSettings, SfcSystem, affinity, halve, propagate

SMALL: dict[str, Any] = {"backbone": "tiny", "size": 32, "batch_size": 4}
SFC = 1
OWN = ("sides.", "embedding.")  # what the later stage adds


def make(ops: ModuleType = wsss_ops, stage: int | None = None, **settings: Any) -> SfcSystem:
    torch.manual_seed(0)
    system = SfcSystem(SfcSettings(**SMALL, **settings), 3, ops)
    if stage is not None:
        system.enter(stage)
        system.network.train()
    return system


@pytest.mark.parametrize("stage", [CAM, SFC])
@pytest.mark.parametrize("tune_blocks", [-1, 2])
def test_gradients_reach_what_a_stage_trains_and_nothing_else(stage: int, tune_blocks: int) -> None:
    system = make(tune_blocks=tune_blocks)
    assert [one.name for one in system.stages()] == ["cam", "sfc"]
    groups = system.enter(stage)
    system.network.train()
    found = gradients(system, system.loss(batch())[0])
    tuned = {id(p) for p in system.network.backbone.tune(tune_blocks)}
    prefixes = ("sampler.", "classifier.", *(() if stage == CAM else OWN))
    named = dict(system.network.named_parameters())
    expected = {name for name, p in named.items() if name.startswith(prefixes) or id(p) in tuned}
    assert set(found) == expected
    assert {id(p) for group in groups for p in group["params"]} == {id(named[name]) for name in expected}
    assert all(gradient.abs().sum() > 0 for gradient in found.values())
    rates = [4e-3] * 2 if stage == CAM else [0.3 * 4e-3, 0.3 * 4e-3, 4e-3]
    assert [group["lr"] for group in groups] == pytest.approx(rates)


def test_the_backbone_learns_nothing_from_sides_and_embedding() -> None:
    system = make(stage=SFC)
    maps = system.network.maps(batch().images)
    loss = sum(level.square().sum() for level in maps.levels) + affinity(maps.embedded).square().sum()
    found = gradients(system, loss)
    assert set(found) == {name for name, _ in system.network.named_parameters() if name.startswith(OWN)}


def test_what_makes_the_cam_learns_from_the_consistency_loss_too() -> None:
    with_it, without = (
        gradients(system, system.loss(batch())[0])
        for system in (make(stage=SFC), make(stage=SFC, prototype_weight=0.0, scale_weight=0.0))
    )
    for name in ("classifier.weight", "sampler.weight", "backbone.stem.0.weight"):
        assert (with_it[name] - without[name]).abs().max() > 1e-5
    assert not any(gradient.any() for name, gradient in without.items() if name.startswith(OWN))


def test_pixels_become_weighted_means_of_those_like_them() -> None:
    torch.manual_seed(0)
    embedded, cam = torch.randn(2, 5, 2, 3), torch.rand(2, 4, 2, 3)
    weights = affinity(embedded)
    assert torch.allclose(weights.sum(1), torch.ones(2, 6), atol=1e-4)
    assert (weights >= 0).all()
    assert (weights == 0).any()  # opposite pixels take no part
    expected = cam.flatten(2)
    for _ in range(2):
        before, expected = expected, torch.zeros_like(expected)
        for n in range(2):
            pixels = embedded[n].flatten(1).T
            for target in range(6):
                alike = [max(0.0, float(F.cosine_similarity(pixels[target], one, dim=0))) for one in pixels]
                for source in range(6):
                    expected[n, :, target] += alike[source] / sum(alike) * before[n, :, source]
    assert torch.allclose(propagate(cam, weights), expected.view_as(cam), rtol=1e-3, atol=1e-5)
    flat = torch.full_like(cam, 0.7)
    assert torch.allclose(propagate(flat, weights), flat, rtol=1e-3)


def test_the_background_is_what_no_class_claims_tagged_or_not() -> None:
    cam = torch.tensor([[[[4.0, 2.0], [-1.0, 0.0]], [[0.0, 6.0], [3.0, -2.0]]]])
    present = torch.tensor([[1.0, 1.0, 0.0]])
    valid = torch.tensor([[[True, True], [True, False]]])
    normalised, inside = make().normalise(cam, present, valid)
    first = [[1.0, 0.5], [0.0, 0.0]]
    background = [[0.0, 0.0], [0.5, 0.0]]  # the second class, not tagged, takes its share; the last pixel is padding
    expected = torch.tensor([[background, first, [[0.0, 0.0], [0.0, 0.0]]]])
    assert torch.allclose(normalised, expected, atol=1e-5)
    assert torch.equal(inside, valid)
    whole, none = make().normalise(cam, present, None)
    assert none is None
    assert whole[0, 0, 1, 1] == 1


def test_valid_is_brought_to_the_size_of_the_cam() -> None:
    valid = torch.zeros(1, 4, 4, dtype=torch.bool)
    valid[:, 2:] = True
    normalised, inside = make().normalise(torch.ones(1, 2, 2, 2), torch.ones(1, 3), valid)
    assert inside.tolist() == [[[False, False], [True, True]]]
    assert not normalised[:, :, 0].any()


def test_loss_is_that_of_the_pieces() -> None:
    weights = {"prototype_weight": 0.7, "scale_weight": 1.3, "background_scale": 0.6}
    system = make(stage=SFC, **weights)
    network, given = system.network, batch()
    network.coefficients.copy_(torch.tensor([0.5, 2.0]))
    present = torch.cat([torch.ones(4, 1), given.tags], 1)
    cams, refined, logits = [], [], []
    for images in (given.images, F.interpolate(given.images, (16, 16), mode="bilinear", align_corners=True)):
        levels = network.backbone.levels(images)
        raw = network.classifier(network.sampler(levels[-1]).relu())
        logits.append(raw.mean((2, 3)))
        size = raw.shape[2:]
        cam = raw.relu() / (raw.relu().amax((2, 3), keepdim=True) + 1e-5)
        cam = torch.cat([1 - cam.amax(1, keepdim=True), cam], 1) * present[:, :, None, None]
        inside = F.interpolate(given.valid[:, None].float(), size)
        cams.append(cam * inside)
        shown = torch.cat([F.interpolate(images, size, mode="bilinear", align_corners=True), levels[-1]], 1)
        pixels = F.normalize(network.embedding(shown).flatten(2), dim=1)
        alike = torch.einsum("ndi,ndj->nij", pixels, pixels).relu()
        alike = alike / alike.sum(1, keepdim=True)
        refined.append(torch.einsum("nci,nij,njk->nck", cams[-1].flatten(2), alike, alike).view_as(cam))
    maps = [side(level) for side, level in zip(network.sides, network.backbone.levels(given.images), strict=True)]
    valid = F.interpolate(given.valid[:, None].float(), cams[0].shape[2:])[:, 0].bool()
    prototypes = reference.prototype_cam(maps, cams[0], present, valid=valid, background_scale=0.6)
    consistency = reference.msdw_loss(
        refined[0], prototypes, refined[1], present, network.coefficients, prototype_weight=0.7, scale_weight=1.3
    )
    classification = sum(F.binary_cross_entropy_with_logits(one, given.tags) for one in logits) / 2
    loss, figures = system.loss(given)
    assert float(figures["cls"]) == pytest.approx(classification.item(), rel=1e-5)
    assert float(figures["msdw"]) == pytest.approx(consistency.item(), rel=1e-4)
    assert loss.item() == pytest.approx((classification + consistency).item(), rel=1e-4)
    assert consistency.item() > 0.05


def sizes_seen(system: SfcSystem, steps: int) -> list[int]:
    """How many images each step's first pass had."""
    seen, maps = [], system.network.maps
    system.network.maps = lambda images: (seen.append(len(images)), maps(images))[1]
    for step in range(steps):
        seed_everything(step)
        system.loss(batch(step))
    return seen[::2]


def test_images_of_the_bank_join_from_the_second_step_on() -> None:
    assert sizes_seen(make(stage=SFC, bank=3), 3) == [4, 7, 7]
    without = make(stage=SFC, bank=0)
    assert sizes_seen(without, 3) == [4, 4, 4]
    assert len(without.network.bank) == 0
    assert len(sizes_seen(make(stage=CAM), 2)) == 0


def test_what_joins_are_the_last_images_with_their_tags_and_valid() -> None:
    system = make(stage=SFC, bank=2)
    earlier = batch(0)
    system.with_bank(earlier)
    for seed in (1, 2):  # the second time what the bank gave before must not have come back into it
        given = batch(seed)
        images, tags, valid = system.with_bank(given)
        assert torch.equal(images[:4], given.images)
        found = []
        for image, row, mask in zip(images[4:], tags[4:], valid[4:], strict=True):
            found.append(next(i for i in range(4) if torch.equal(image, earlier.images[i])))
            assert torch.equal(row, earlier.tags[found[-1]])
            assert torch.equal(mask, earlier.valid[found[-1]])
        assert sorted(found) == [2, 3]  # the last ones of either class
        earlier = given


def test_the_bank_survives_a_checkpoint(tmp_path: Path) -> None:
    system = make(stage=SFC)
    sizes_seen(system, 2)
    checkpoints.save(tmp_path / "model.pt", {"network": system.network.state_dict()})
    other = make()
    other.network.load_state_dict(checkpoints.load(tmp_path / "model.pt")["network"])
    other.enter(SFC)
    drawn = []
    for one in (system, other):
        torch.manual_seed(5)
        drawn.append(one.with_bank(batch(9)))
    assert len(drawn[0][0]) == 8
    assert all(map(torch.equal, *drawn))


def test_a_model_file_of_an_earlier_version_is_named(tmp_path):
    system, file = make(stage=SFC), tmp_path / "model.pt"
    state = system.network.state_dict()
    state["bank._extra_state"] = {"images": [], "slots": {}}  # as it was once
    model = {"system": "sfc", "settings": dataclasses.asdict(system.settings), "classes": ("background", "a", "b")}
    checkpoints.save(file, model | {"network": state})
    with pytest.raises(ValueError, match=r"model\.pt was written by an earlier version, which .* 'num_classes'"):
        evaluate.load_system(file)


@pytest.mark.parametrize("processes", [1, 2])
def test_coefficients_come_from_the_training_tags(processes: int) -> None:
    tags = torch.zeros(10, 4, dtype=torch.bool)
    tags[:8, 0] = tags[:2, 1] = tags[7:, 2] = True
    torch.manual_seed(0)
    system = SfcSystem(SfcSettings(**SMALL, bank=3), 5, wsss_ops)

    class Images(SimpleNamespace):
        def __len__(self) -> int:
            return 10

    system.prepare(Images(tags=tags), Processes(count=processes))
    resampled = processes * 3 * 2 / 3  # two steps an epoch, three classes seen
    expected = reference.distribution_coefficients([8, 2, 3], resampled)
    assert torch.allclose(system.network.coefficients, torch.tensor([*expected, 1.0]))  # no image of the last
    assert "coefficients" in system.network.state_dict()


def test_fused_and_reference_agree() -> None:
    systems = {"reference": make(reference), "fused": make(wsss_ops)}
    table = compare(systems, [batch(seed) for seed in range(4)], Processes())
    apart = [line for line in table.splitlines() if "largest difference" in line]
    assert [line.split()[0] for line in apart] == ["cam", "sfc"]
    for line in apart:
        losses, parameters = float(line.split("losses ")[1].split(",")[0]), float(line.split()[-1])
        assert losses < 1e-5
        assert parameters < 1e-4


def test_statistics_are_those_of_the_cam() -> None:
    system = make(stage=SFC)
    before = {name: value.clone() for name, value in system.network.backbone.named_buffers()}
    assert before  # the tiny backbone has BatchNorm
    system.loss(batch())
    assert all(torch.equal(before[name], value) for name, value in system.network.backbone.named_buffers())


def pictures(height: int = 40, width: int = 56) -> tuple[Tensor, Tensor]:
    torch.manual_seed(3)
    tags = torch.tensor([[True, False], [True, True]])
    return torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8), tags


def test_the_cam_is_the_refined_one_and_a_share_of_the_prototypes() -> None:
    system = make(stage=SFC, prototype_share=0.5)
    system.network.eval()
    images, tags = pictures()
    classifier, refined, prototype = infer_parts(system, images, tags, (1.0, 0.5))
    assert list(system.parts) == ["classifier", "refined", "prototype"]
    alone = CamSystem(Settings(**SMALL), 3, wsss_ops)
    alone.network.load_state_dict(system.network.state_dict(), strict=False)
    alone.network.eval()
    assert torch.allclose(classifier, infer_cams(alone, images, tags, (1.0, 0.5)), atol=1e-6)
    assert not torch.allclose(classifier, prototype, atol=0.1)
    assert prototype[1].amax((1, 2)) == pytest.approx([1, 1], abs=1e-3)
    assert not prototype[0, 1].any()  # not tagged
    combined = infer_cams(system, images, tags, (1.0, 0.5))
    assert torch.allclose(combined, (refined + 0.5 * prototype) / 1.5, atol=1e-6)


def test_inference_refines_the_classifiers_cam() -> None:
    system = make(stage=SFC)
    network = system.network.eval()
    images, tags = batch().images, torch.ones(4, 2, dtype=torch.bool)
    with torch.no_grad():
        raw, refined, _ = system.cams(images, tags)
        weights = affinity(network.maps(images).embedded)
    expected = torch.einsum("nci,nij,njk->nck", raw.relu().flatten(2), weights, weights).view_as(raw)
    assert torch.allclose(refined, expected, atol=1e-6)
    assert not torch.allclose(refined, raw.relu(), atol=1e-4)


def test_prototypes_of_inference_are_those_of_training() -> None:
    """From the unrefined CAM, masked by the tags, with the background scaled."""
    system = make(stage=SFC, background_scale=0.8)
    network = system.network.eval()
    images, tags = batch().images, torch.tensor([[True, False], [False, True], [True, True], [True, False]])
    with torch.no_grad():
        raw, _, prototype = system.cams(images, tags)
        cam = reference.normalize_cam(network(images)[1])
        cam = torch.cat([1 - cam.amax(1, keepdim=True), cam], 1)
        present = torch.cat([torch.ones(4, 1), tags], 1)
        maps = [side(level) for side, level in zip(network.sides, network.backbone.levels(images), strict=True)]
        cam = cam * present[:, :, None, None]
        expected = reference.prototype_cam(maps, cam, present, background_scale=0.8)[:, 1:]
        assert torch.equal(raw, network(images)[1])
    assert torch.allclose(prototype, expected, atol=1e-5)
    assert prototype.any()


def test_the_stage_cam_has_one_part() -> None:
    system = make(stage=CAM)
    system.network.eval()
    images, tags = pictures()
    assert system.parts == {"cam": 1.0}
    (part,) = infer_parts(system, images, tags, (1.0,))
    assert torch.equal(part, infer_cams(system, images, tags, (1.0,)))


def test_the_model_file_knows_its_stage() -> None:
    system = make(stage=SFC)
    system.network.eval()
    images, tags = pictures()
    expected = infer_cams(system, images, tags, (1.0,))
    other = make(seed=1)
    other.network.load_state_dict(system.network.state_dict())
    other.network.eval()
    assert torch.equal(infer_cams(other, images, tags, (1.0,)), expected)
    names = set(system.network.state_dict())  # what a CAM run wrote keeps its name
    assert {name.split(".")[0] for name in names} == {
        "backbone", "sampler", "classifier", "sides", "embedding", "bank", "coefficients", "_extra_state"
    }  # fmt: skip


@pytest.mark.parametrize("size", [(9, 9), (17, 33), (65, 41)])
@pytest.mark.parametrize("output_stride", [8, 16])
def test_maps_of_any_size_have_all_parts_and_a_loss(size: tuple[int, int], output_stride: int) -> None:
    system = make(stage=SFC, output_stride=output_stride)
    given = batch()
    given = given._replace(images=torch.randn(4, 3, *size), valid=torch.ones(4, *size, dtype=torch.bool))
    loss, _ = system.loss(given)
    assert loss.isfinite()
    system.network.eval()
    shape = (4, 2, *((side - 1) // output_stride + 1 for side in size))
    assert [part.shape for part in system.cams(given.images, given.tags.bool())] == [shape] * 3


def test_half_an_image_keeps_its_corners() -> None:
    images = torch.randn(1, 3, 33, 40)
    half = halve(images)
    assert half.shape == (1, 3, 16, 20)
    for y in (0, -1):
        for x in (0, -1):
            assert torch.allclose(half[..., y, x], images[..., y, x], atol=1e-5)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"sfc_epochs": 0}, "sfc_epochs must be above 0, got 0"),
        ({"sfc_rate": 0.0}, "sfc_rate must be above 0, got 0.0"),
        ({"bank": -1}, "bank must be at least 0, got -1"),
        ({"prototype_weight": -0.1}, "prototype_weight must be at least 0, got -0.1"),
        ({"scale_weight": -0.1}, "scale_weight must be at least 0, got -0.1"),
        ({"background_scale": -1.0}, "background_scale must be at least 0, got -1.0"),
        ({"prototype_share": -0.5}, "prototype_share must be at least 0, got -0.5"),
    ],
)
def test_bad_settings(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SfcSettings(**SMALL, **setting)


def test_a_run_can_start_from_a_finished_cam_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    voc = make_voc(tmp_path / "voc")
    assert train_here(*command("cam", voc, tmp_path / "cam", "--epochs", 1, "--panels", 0)) == 0
    capsys.readouterr()
    options = ["--sfc-epochs", 1, "--panels", 0, "--bank", 2]
    assert train_here(*command("sfc", voc, tmp_path / "sfc", *options, "--start", tmp_path / "cam")) == 0
    printed = capsys.readouterr().out
    assert "starting with sfc" in printed
    assert "prototype " in printed
    cam = checkpoints.load(tmp_path / "cam/model.pt")["network"]
    first = checkpoints.load(tmp_path / "sfc/cam.pt")["network"]
    assert all(torch.equal(first[name], value) for name, value in cam.items())
    figures = [json.loads((tmp_path / run / "metrics.json").read_text()) for run in ("cam", "sfc")]
    assert "parts" not in figures[0]
    assert list(figures[1]["parts"]) == ["classifier", "refined", "prototype"]
    assert list(figures[1]["stages"]) == ["cam", "sfc"]
    assert figures[1]["stages"]["cam"]["mIoU"] == figures[0]["validation"]["mIoU"]
    assert figures[1]["stages"]["sfc"]["mIoU"] == figures[1]["validation"]["mIoU"]
    system, _ = evaluate.load_system(tmp_path / "sfc")
    assert system.network.stage == SFC
    assert len(system.network.bank) == 3  # cats, dogs and persons
    assert not torch.equal(system.network.coefficients, torch.ones(20))


def test_a_run_killed_in_the_last_stage_ends_as_an_unbroken_one(tmp_path: Path) -> None:
    voc = make_voc(tmp_path / "voc")

    def run(out: Path, prelude: str = "") -> subprocess.CompletedProcess[str]:
        options = ("--epochs", 1, "--sfc-epochs", 2, "--bank", 2)
        return train_apart(*command("sfc", voc, out, *options), prelude=prelude)

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    done = run(whole)
    assert done.returncode == 0, done.stderr
    assert run(broken, killed_at(1, 0, 2)).returncode == -signal.SIGKILL
    again = run(broken)
    assert again.returncode == 0, again.stderr
    assert "resuming at sfc, epoch 1, step 3" in again.stdout
    found = [json.loads((out / "metrics.json").read_text()) for out in (whole, broken)]
    for key in ("stages", "parts", "validation", "development"):
        assert found[0][key] == found[1][key]
    models = [checkpoints.load(out / "model.pt")["network"] for out in (whole, broken)]
    assert all(torch.equal(models[0][key], models[1][key]) for key in models[0] if torch.is_tensor(models[0][key]))
    banks = [model["bank._extra_state"] for model in models]
    assert banks[0]["slots"] == banks[1]["slots"]
    kept = zip(*(bank["images"] for bank in banks), strict=True)
    assert all(torch.equal(*pair) for images in kept for pair in zip(*images, strict=True))
    for folder, parts in ((whole, ("classifier", "refined", "prototype")), (whole / "cam", ())):
        files = {file.name for file in folder.iterdir()}
        assert {"metrics.json", "curve.png", "panels.png"} <= files
        assert {name for name in files if name.startswith("panels-")} == {f"panels-{part}.png" for part in parts}
