"""PPL: what learns in each stage and from where, what a stage starts with, fused against reference, resumption."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from training.runs import command, killed_at, train_apart, train_here
from training.systems import batch, gradients
from training.voc_folder import make_voc

import wsss_ops
from wsss_ops import reference
from wsss_ops.training import checkpoints, evaluate
from wsss_ops.training.comparison import compare
from wsss_ops.training.ppl import CAM, PplSettings, PplSystem
from wsss_ops.training.processes import Processes

SMALL: dict[str, Any] = {"backbone": "tiny", "size": 32, "batch_size": 4}
MODES = ("progressive", "explicit")
STAGES = {"progressive": ["cam", "patches1", "patches2"], "explicit": ["cam", "patches"]}


def make(ops: ModuleType = wsss_ops, **settings: Any) -> PplSystem:
    torch.manual_seed(0)
    return PplSystem(PplSettings(**SMALL, **settings), 3, ops)


def cams(system: PplSystem, stage: int) -> Tensor:
    system.enter(stage)
    system.network.eval()
    with torch.no_grad():
        return system.cam(batch().images)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("tune_blocks", [-1, 2])
def test_gradients_reach_what_a_stage_trains_and_nothing_else(mode: str, tune_blocks: int) -> None:
    system = make(mode=mode, tune_blocks=tune_blocks)
    assert [stage.name for stage in system.stages()] == STAGES[mode]
    for stage in range(len(STAGES[mode])):
        groups = system.enter(stage)
        system.network.train()
        found = gradients(system, system.loss(batch())[0])
        head = "classifier." if stage == CAM else "patch_classifier."
        expected = {name for name, _ in system.network.named_parameters() if name.startswith(("sampler.", head))}
        tuned = {id(p) for p in system.network.backbone.tune(tune_blocks)}
        expected |= {name for name, p in system.network.named_parameters() if id(p) in tuned}
        assert set(found) == expected
        trained = {id(p) for group in groups for p in group["params"]}
        assert trained == {id(p) for name, p in system.network.named_parameters() if name in expected}
        assert all(gradient.abs().sum() > 0 for gradient in found.values())
        rate = 1.0 if stage == CAM else 0.3
        assert [group["lr"] for group in groups] == pytest.approx([4e-3 * rate] * 2)


@pytest.mark.parametrize("mode", MODES)
def test_explicit_gradients_end_where_maps_are_split(mode: str) -> None:
    """With the whole map out of the classifier, gradients come through the patches alone."""
    system = make(mode=mode, positions=(2,), grids=(2,))
    system.enter(1)
    with torch.no_grad():
        system.network.patch_classifier.weight[:, :256] = 0
    found = gradients(system, system.network(batch().images)[1].sum())
    reached = {name.split(".")[2] for name, g in found.items() if name.startswith("backbone.layers.") and g.any()}
    assert reached == ({"1", "2"} if mode == "explicit" else {"0", "1", "2"})


def test_a_stage_is_patch_learning_at_its_position() -> None:
    system = make()
    network, images = system.network, batch().images
    for stage, (last, side) in enumerate(((3, 2), (2, 4)), 1):
        system.enter(stage)
        network.eval()
        branch = reference.PatchLearning(torch.nn.Sequential(*network.blocks), 4 - last, (side, side))
        expected = F.conv2d(branch(images), network.patch_classifier.weight)
        assert torch.allclose(network(images)[1], expected, rtol=1e-4, atol=1e-6)


def test_explicit_stage_concatenates_all_branches() -> None:
    system = make(mode="explicit", positions=(2, 3, 2), grids=(1, 2, 4))
    system.enter(1)
    network, images = system.network.eval(), batch().images
    weight = network.patch_classifier.weight
    assert weight.shape == (2, 4 * 256, 1, 1)
    maps = []
    for last, side in ((3, 2), (2, 1), (2, 4)):  # by position, equal ones as given
        branch = reference.PatchLearning(torch.nn.Sequential(*network.blocks), 4 - last, (side, side))
        maps.append(branch(images))
    whole, _ = maps[0].chunk(2, 1)
    expected = F.conv2d(torch.cat([whole, *(both.chunk(2, 1)[1] for both in maps)], 1), weight)
    assert torch.allclose(network(images)[1], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_stages_start_where_the_one_before_ended(mode: str) -> None:
    """Patches as large as the map show what the map does. 4 x 4 cells of 8 pixels: no patch is padded."""
    system = make(mode=mode, grids=(1, 1))
    images = batch().images[:, :, :32, :32]
    maps = []
    for stage in range(len(STAGES[mode])):
        system.enter(stage)
        system.network.eval()
        with torch.no_grad():
            maps.append(system.cam(images))
    for later in maps[1:]:
        assert torch.allclose(later, maps[0], rtol=1e-4, atol=1e-6)


def test_a_stage_goes_on_with_the_classifier_of_the_stage_before() -> None:
    system = make()
    system.enter(CAM)
    system.enter(1)
    weight = system.network.patch_classifier.weight
    assert torch.equal(weight, system.network.classifier.weight.repeat(1, 2, 1, 1) / 2)
    with torch.no_grad():
        weight.add_(1)
    learnt = weight.clone()
    system.enter(1)  # a resumption
    assert torch.equal(weight, learnt)
    system.enter(2)
    assert torch.equal(weight, learnt)


def test_statistics_are_those_of_the_cam() -> None:
    system = make()
    system.enter(1)
    system.network.train()
    before = {name: value.clone() for name, value in system.network.backbone.named_buffers()}
    assert before  # the tiny backbone has BatchNorm
    system.loss(batch())
    assert all(torch.equal(before[name], value) for name, value in system.network.backbone.named_buffers())


@pytest.mark.parametrize("mode", MODES)
def test_fused_and_reference_agree(mode: str) -> None:
    systems = {"reference": make(reference, mode=mode), "fused": make(wsss_ops, mode=mode)}
    table = compare(systems, [batch()] * 3, Processes())
    apart = [line for line in table.splitlines() if "largest difference" in line]
    assert [line.split()[0] for line in apart] == STAGES[mode]
    for line in apart:
        losses, parameters = float(line.split("losses ")[1].split(",")[0]), float(line.split()[-1])
        assert losses < 1e-5
        assert parameters < 1e-4


def test_the_model_file_knows_its_stage() -> None:
    system = make()
    expected = cams(system, 2)
    other = make(seed=1)
    other.network.load_state_dict(system.network.state_dict())
    other.network.eval()
    assert torch.equal(other.cam(batch().images), expected)
    names = set(system.network.state_dict())  # nothing is there twice, and what a CAM run wrote keeps its name
    assert {name.split(".")[0] for name in names} == {
        "backbone", "sampler", "classifier", "patch_classifier", "_extra_state"
    }  # fmt: skip


@pytest.mark.parametrize("size", [(9, 9), (17, 33), (65, 41)])
@pytest.mark.parametrize("mode", MODES)
def test_maps_of_any_size_have_patches(mode: str, size: tuple[int, int]) -> None:
    """Smaller than the grid, too."""
    system = make(mode=mode)
    system.enter(1)
    system.network.eval()
    assert system.cam(torch.randn(2, 3, *size)).shape == (2, 2, (size[0] - 1) // 8 + 1, (size[1] - 1) // 8 + 1)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"stage_epochs": 0}, "stage_epochs must be above 0, got 0"),
        ({"stage_rate": 0.0}, "stage_rate must be above 0, got 0.0"),
        ({"positions": (2, -1)}, r"positions must be at least 0, got \(2, -1\)"),
        ({"positions": ()}, "positions must be one or more numbers, got none"),
        ({"grids": (2,)}, r"grids must be as many numbers as positions has, 2, got \(2,\)"),
        ({"grids": (2, 0)}, r"grids must be above 0, got \(2, 0\)"),
        ({"grids": (2, 5)}, r"grids must be at most 4, the cells of a crop's side, got \(2, 5\)"),
        ({"positions": (5, 2)}, r"positions must be at most 4, the blocks of tiny, got \(5, 2\)"),
    ],
)
def test_bad_settings(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**setting)


@pytest.mark.parametrize("mode", MODES)
def test_a_run_can_start_from_a_finished_cam_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], mode: str) -> None:
    voc = make_voc(tmp_path / "voc")
    assert train_here(*command("cam", voc, tmp_path / "cam", "--epochs", 1, "--panels", 0)) == 0
    capsys.readouterr()
    options = ["--mode", mode, "--stage-epochs", 1, "--panels", 0, "--positions", 3, 1, "--grids", 2, 3]
    assert train_here(*command("ppl", voc, tmp_path / "ppl", *options, "--start", tmp_path / "cam")) == 0
    assert f"starting with {STAGES[mode][1]}" in capsys.readouterr().out
    cam = checkpoints.load(tmp_path / "cam/model.pt")["network"]
    first = checkpoints.load(tmp_path / "ppl/cam.pt")["network"]
    assert all(torch.equal(first[name], value) for name, value in cam.items())
    figures = [json.loads((tmp_path / run / "metrics.json").read_text()) for run in ("cam", "ppl")]
    assert list(figures[1]["stages"]) == STAGES[mode]
    assert figures[1]["stages"]["cam"]["mIoU"] == figures[0]["validation"]["mIoU"]
    system, _ = evaluate.load_system(tmp_path / "ppl")
    assert system.settings.positions == (3, 1)
    assert system.network.stage == len(STAGES[mode]) - 1


def test_a_run_killed_in_the_last_stage_ends_as_an_unbroken_one(tmp_path: Path) -> None:
    voc = make_voc(tmp_path / "voc")

    def run(out: Path, prelude: str = "") -> subprocess.CompletedProcess[str]:
        return train_apart(*command("ppl", voc, out, "--epochs", 1, "--stage-epochs", 1), prelude=prelude)

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    done = run(whole)
    assert done.returncode == 0, done.stderr
    assert run(broken, killed_at(2, 0, 2)).returncode == -signal.SIGKILL
    again = run(broken)
    assert again.returncode == 0, again.stderr
    assert "resuming at patches2, epoch 1, step 3" in again.stdout
    found = [json.loads((out / "metrics.json").read_text())["stages"] for out in (whole, broken)]
    assert found[0] == found[1]
    assert list(found[0]) == STAGES["progressive"]
    models = [checkpoints.load(out / "model.pt")["network"] for out in (whole, broken)]
    assert all(torch.equal(models[0][key], models[1][key]) for key in models[0] if torch.is_tensor(models[0][key]))
    for folder in (whole, whole / "cam", whole / "patches1"):
        assert {"metrics.json", "curve.png", "panels.png"} <= {file.name for file in folder.iterdir()}
