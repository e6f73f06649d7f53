"""ESOL: what learns in each stage and in which direction, fused against reference, resumption."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from training.runs import command, killed_at, train_apart, train_here
from training.systems import batch, gradients
from training.voc_folder import make_voc

import wsss_ops
from wsss_ops import DeformSampler, reference
from wsss_ops.training import checkpoints
from wsss_ops.training.comparison import compare
from wsss_ops.training.data import open_dataset
from wsss_ops.training.esol import CAM, EXPANSION, SHRINKAGE, EsolSettings, EsolSystem, area_loss
from wsss_ops.training.processes import Processes

SMALL: dict[str, Any] = {"backbone": "tiny", "size": 32, "batch_size": 4}


def make(ops: ModuleType = wsss_ops, **settings: Any) -> EsolSystem:
    torch.manual_seed(0)
    return EsolSystem(EsolSettings(**SMALL, **settings), 3, ops)


def learn_offsets(sampler: DeformSampler, scale: float = 0.05) -> None:
    """The branch as it might be after some steps: away from zero, where a layer has no gradient behind it."""
    for parameter in sampler.offset_branch.parameters():
        nn.init.normal_(parameter, std=scale)


def gradients_in(system: EsolSystem, stage: int) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """The optimiser groups of a stage, and the gradients of its loss."""
    groups = system.enter(stage)
    system.network.train()
    return groups, gradients(system, system.loss(batch())[0])


AT = pytest.mark.parametrize("at", ["features", "maps"])
LEARNS = {
    CAM: ("backbone.", "sampler.", "classifier."),
    EXPANSION: ("expansion.offset_branch.", "classifier."),
    SHRINKAGE: ("shrinkage.offset_branch.", "classifier."),
}


@pytest.mark.parametrize("stage", LEARNS)
@pytest.mark.parametrize("classifier_lr", [0.0, 1e-4])
@AT
def test_gradients_reach_what_a_stage_trains_and_nothing_else(stage: int, classifier_lr: float, at: str) -> None:
    rates = {f"{name}_classifier_lr": classifier_lr for name in ("expansion", "shrinkage")}
    system = make(**rates, expansion_at=at)
    learn_offsets(system.network.expansion)
    groups, found = gradients_in(system, stage)
    prefixes = LEARNS[stage] if stage == CAM or classifier_lr > 0 else LEARNS[stage][:1]
    expected = {name for name, _ in system.network.named_parameters() if name.startswith(prefixes)}
    assert set(found) == expected
    trained = {id(p) for group in groups for p in group["params"]}
    assert trained == {id(p) for name, p in system.network.named_parameters() if name in expected}
    assert all(gradient.abs().sum() > 0 for gradient in found.values())


def test_offsets_climb_the_loss_that_the_classifier_descends() -> None:
    system = make(alpha=0.5, expansion_classifier_lr=1e-3)
    learn_offsets(system.network.expansion)
    _, found = gradients_in(system, EXPANSION)
    network, given = system.network, batch()
    network.zero_grad(set_to_none=True)
    features = network.backbone(given.images).detach()
    cam = network.classifier(wsss_ops.clip_features(network.expansion(features).relu(), system.settings.beta))
    F.binary_cross_entropy_with_logits(cam.mean((2, 3)), given.tags).backward()
    for name, parameter in network.named_parameters():
        if name.startswith("expansion.offset_branch."):
            assert torch.allclose(found[name], -0.5 * parameter.grad, rtol=1e-4, atol=1e-9)
    assert torch.allclose(found["classifier.weight"], network.classifier.weight.grad, rtol=1e-4, atol=1e-9)


@AT
def test_stages_start_where_the_one_before_ended(at: str) -> None:
    """Zero offsets and no clipping leave the CAM as it was."""
    system = make(beta=1.0, expansion_at=at)
    images = batch().images
    maps = []
    for stage in (CAM, EXPANSION, SHRINKAGE):
        system.enter(stage)
        system.network.eval()
        with torch.no_grad():
            maps.append(system.cam(images))
    for later in maps[1:]:
        assert torch.allclose(later, maps[0], rtol=1e-4, atol=1e-6)


def test_frozen_parts_keep_their_statistics() -> None:
    system = make()
    system.enter(EXPANSION)
    system.network.train()
    before = {name: value.clone() for name, value in system.network.backbone.named_buffers()}
    assert before  # the tiny backbone has BatchNorm
    system.loss(batch())
    assert all(torch.equal(before[name], value) for name, value in system.network.backbone.named_buffers())


def test_area_is_that_of_the_present_classes_normalised_maps() -> None:
    cam = torch.zeros(2, 2, 2, 2)
    cam[0, 0] = torch.tensor([[4.0, 2.0], [-8.0, 0.0]])  # 1, 1/2, 0, 0
    cam[0, 1] = 5.0
    cam[1, 1] = torch.tensor([[3.0, 3.0], [3.0, 0.0]])
    tags = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert float(area_loss(cam, tags)) == pytest.approx((0.375 + 0.75) / 2, abs=1e-4)
    assert float(area_loss(cam, torch.zeros(2, 2))) == 0


@AT
def test_fused_and_reference_agree(at: str) -> None:
    systems = {"reference": make(reference, expansion_at=at), "fused": make(wsss_ops, expansion_at=at)}
    table = compare(systems, [batch()] * 3, Processes())
    apart = [line for line in table.splitlines() if "largest difference" in line]
    assert [line.split()[0] for line in apart] == ["cam", "expansion", "shrinkage"]
    for line in apart:
        losses, parameters = float(line.split("losses ")[1].split(",")[0]), float(line.split()[-1])
        assert losses < 1e-5
        assert parameters < 1e-4


def test_the_model_file_knows_its_stage() -> None:
    system = make()
    system.enter(SHRINKAGE)
    other = make()
    other.network.load_state_dict(system.network.state_dict())
    assert other.network.stage == SHRINKAGE
    assert other.displacements(batch().images).shape == (4, 2, 5, 5)
    other.enter(CAM)
    assert other.displacements(batch().images) is None


@pytest.mark.parametrize(
    ("setting", "message"),
    [({"beta": 0.0}, "beta must be above 0, got 0.0"), ({"area": -1.0}, "area must be at least 0, got -1.0")],
)
def test_bad_settings(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EsolSettings(**SMALL, **setting)


def test_a_run_can_start_from_a_finished_cam_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    voc = make_voc(tmp_path / "voc")
    assert train_here(*command("cam", voc, tmp_path / "cam", "--epochs", 1, "--panels", 0)) == 0
    short = ["--expansion-epochs", 1, "--shrinkage-epochs", 1, "--panels", 0, "--start", tmp_path / "cam"]
    capsys.readouterr()
    assert train_here(*command("esol", voc, tmp_path / "esol", *short)) == 0
    assert "starting with expansion" in capsys.readouterr().out
    cam = checkpoints.load(tmp_path / "cam/model.pt")["network"]
    first = checkpoints.load(tmp_path / "esol/cam.pt")["network"]
    assert all(torch.equal(first[name], value) for name, value in cam.items())
    figures = [json.loads((tmp_path / run / "metrics.json").read_text()) for run in ("cam", "esol")]
    assert figures[1]["stages"]["cam"]["mIoU"] == figures[0]["validation"]["mIoU"]
    assert not (tmp_path / "esol/cam").exists()  # evaluated once, by the first run
    assert train_here(*command("esol", voc, tmp_path / "2", *short, "--scales", 2)) == 0
    assert (tmp_path / "2/cam/metrics.json").exists()  # at another scale


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--start", "{tmp}/none"], "start: {tmp}/none does not exist; a cam run writes it"),
        (["--start", "{tmp}/esol.pt"], "start: {tmp}/esol.pt is no model of a cam run, it is one of 'esol'"),
        (["--start", "{tmp}/cam.pt"], "start: {tmp}/cam.pt knows the classes background, ox; {data} has others"),
        (["--start", "{tmp}/deep.pt"], "start: {tmp}/deep.pt has backbone 'resnet18', this run 'tiny'"),
    ],
)
def test_a_start_that_does_not_fit_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    voc = make_voc(tmp_path / "voc")
    classes = open_dataset(str(voc), "train").classes
    settings = {"backbone": "tiny", "output_stride": 8}
    made = {"system": "cam", "classes": classes, "settings": settings, "network": {}}
    checkpoints.save(tmp_path / "esol.pt", made | {"system": "esol"})
    checkpoints.save(tmp_path / "cam.pt", made | {"classes": ("background", "ox")})
    checkpoints.save(tmp_path / "deep.pt", made | {"settings": {"backbone": "resnet18", "output_stride": 8}})
    options = [option.format(tmp=tmp_path) for option in options]
    assert train_here(*command("esol", voc, tmp_path / "out", *options)) == 2
    assert message.format(tmp=tmp_path, data=voc) in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_run_killed_in_the_expansion_ends_as_an_unbroken_one(tmp_path: Path) -> None:
    voc = make_voc(tmp_path / "voc")

    def run(out: Path, prelude: str = "") -> subprocess.CompletedProcess[str]:
        options = ("--epochs", 1, "--expansion-epochs", 1, "--shrinkage-epochs", 1)
        return train_apart(*command("esol", voc, out, *options), prelude=prelude)

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    done = run(whole)
    assert done.returncode == 0, done.stderr
    assert run(broken, killed_at(1, 0, 2)).returncode == -signal.SIGKILL
    assert (broken / "cam.pt").exists()
    assert not (broken / "model.pt").exists()  # an unfinished run is not taken for a finished one
    again = run(broken)
    assert again.returncode == 0, again.stderr
    assert "resuming at expansion, epoch 1, step 3" in again.stdout
    found = [json.loads((out / "metrics.json").read_text())["stages"] for out in (whole, broken)]
    assert found[0] == found[1]
    assert list(found[0]) == ["cam", "expansion", "shrinkage"]
    models = [checkpoints.load(out / "model.pt")["network"] for out in (whole, broken)]
    assert all(torch.equal(models[0][key], models[1][key]) for key in models[0] if torch.is_tensor(models[0][key]))
    for folder in (whole, whole / "cam", whole / "expansion"):
        names = {file.name for file in folder.iterdir()}
        assert {"metrics.json", "curve.png", "panels.png"} <= names
        assert ("displacements.png" in names) == (folder != whole / "cam")
