"""Runs: resumption, settings, several processes, comparison of operators, the command line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import numpy as np
import pytest
import torch
from training.runs import ENVIRONMENT, RUNNER, command, evaluate_here, train_apart, train_here
from training.systems import TwoStages
from training.voc_folder import make_voc

import wsss_ops
from wsss_ops.__main__ import main
from wsss_ops._files import write_atomic
from wsss_ops.training import checkpoints
from wsss_ops.training.batches import Batch, TrainingBatches
from wsss_ops.training.cam import CamSystem
from wsss_ops.training.comparison import compare
from wsss_ops.training.data import open_dataset
from wsss_ops.training.loop import Training
from wsss_ops.training.processes import Processes
from wsss_ops.training.settings import Settings
from wsss_ops.training.system import System

FUSED = SimpleNamespace(scale=lambda x: x * 2)
REFERENCE = SimpleNamespace(scale=lambda x: x + x)
WRONG = SimpleNamespace(scale=lambda x: x * 2.5)


@pytest.fixture(scope="module")
def voc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_voc(tmp_path_factory.mktemp("voc"))


def metrics(out: Path) -> dict[str, Any]:
    """What a run found, without what may differ: its time, and the commit while someone works here."""
    content = json.loads((out / "metrics.json").read_text())
    return {key: value for key, value in content.items() if key not in ("training_seconds", "environment")}


@pytest.fixture(scope="module")
def unbroken(voc: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("run") / "unbroken"
    done = train_apart(*command("cam", voc, out))
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_a_run_leaves_model_figures_and_pictures(unbroken: tuple[Path, str]) -> None:
    out, printed = unbroken
    assert {file.name for file in out.iterdir()} == {
        "settings.json", "checkpoint.pt", "model.pt", "metrics.json", "curve.png", "panels.png",
    }  # fmt: skip
    assert "mIoU" in printed
    assert 0 < metrics(out)["validation"]["mIoU"] <= 1


KILLED = """
import os, signal
from wsss_ops.training import checkpoints
save = checkpoints.save
def save_or_die(path, content):
    if content.get("position") == (0, 1, 3):
        os.fsync = lambda file: os.kill(os.getpid(), signal.SIGKILL)  # written, but not under its name yet
    save(path, content)
checkpoints.save = save_or_die
"""


def test_a_killed_run_resumes_to_the_figures_of_an_unbroken_one(
    voc: Path, unbroken: tuple[Path, str], tmp_path: Path
) -> None:
    out = tmp_path / "killed"
    assert train_apart(*command("cam", voc, out), prelude=KILLED).returncode == -signal.SIGKILL
    assert checkpoints.load(out / "checkpoint.pt")["position"] == (0, 1, 2)
    assert not (out / "metrics.json").exists()
    assert len(list(out.glob(".checkpoint.pt.*"))) == 1
    done = train_apart(*command("cam", voc, out))
    assert done.returncode == 0, done.stderr
    assert "resuming" in done.stdout
    assert {file.name for file in out.iterdir()} == {file.name for file in unbroken[0].iterdir()}
    assert metrics(out) == metrics(unbroken[0])
    one, other = (torch.load(folder / "model.pt", weights_only=True)["network"] for folder in (out, unbroken[0]))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_the_command_runs_under_torchrun(voc: Path, unbroken: tuple[Path, str], tmp_path: Path) -> None:
    out = tmp_path / "two"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    script = tmp_path / "runner.py"
    script.write_text(RUNNER)
    arguments = [*launcher, str(script), *map(str, command("cam", voc, out))]
    done = subprocess.run(arguments, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("trained in") == 1  # only one process prints
    assert metrics(out)["validation"]["images"] == 12
    assert metrics(out)["run"] == metrics(unbroken[0])["run"]
    # BatchNorm sees half the batch in each process, so the models are near each other, not equal: the convolutions are
    # up to 0.3 of their norm apart, those of another seed 1.4.
    one, two = (torch.load(folder / "model.pt", weights_only=True)["network"] for folder in (unbroken[0], out))
    for name in (name for name, value in one.items() if value.ndim == 4):
        assert 0 < (two[name] - one[name]).norm() < 0.5 * one[name].norm(), name


TWO_RANKS = """
import sys, torch, wsss_ops
from pathlib import Path
from torch import nn
from wsss_ops.training.cam import CamSystem
from wsss_ops.training.batches import TrainingBatches
from wsss_ops.training.data import open_dataset
from wsss_ops.training.evaluation import count_pixels
from wsss_ops.training.loop import Training
from wsss_ops.training.processes import Processes, join_processes
from wsss_ops.training.settings import Settings
with join_processes("cpu") as processes:
    torch.manual_seed(processes.rank)
    layer = nn.Linear(3, 2).to(torch.float64)
    processes.share_state(layer)
    layer(torch.full((1, 3), 1.0 + processes.rank, dtype=torch.float64)).sum().backward()
    if processes.rank == 0:
        layer.bias.grad = None
    processes.average_gradients(layer.parameters())
    assert torch.equal(layer.weight.grad, torch.full((2, 3), 1.5, dtype=torch.float64))
    assert torch.equal(layer.bias.grad, torch.full((2,), 0.5, dtype=torch.float64))
    weights = layer.weight.detach().clone()
    total = processes.sum(weights)
    assert torch.equal(total, weights * 2), "share_state left the processes with different parameters"
    torch.set_num_threads(1)
    settings = Settings(data=sys.argv[1], backbone="tiny", size=32, epochs=1, batch_size=4)
    torch.manual_seed(processes.rank)
    system, data = CamSystem(settings, 21, wsss_ops), open_dataset(sys.argv[1], "val")
    batches = TrainingBatches(open_dataset(sys.argv[1], "train"), size=32, batch_size=4, seed=0, workers=0,
                              processes=processes)
    Training(system, batches, processes, Path(sys.argv[2]), save_every=0, about={}).run()
    for name, value in system.network.state_dict().items():
        mean = processes.sum(value.double()) / processes.count
        assert torch.equal(mean, value.double()), f"the processes differ in {name} after training"
    shared = count_pixels(system, data, (1.0,), processes, "shared")
    alone = count_pixels(system, data, (1.0,), Processes(), "alone")
    assert list(shared) == list(alone) == ["combined"]
    assert torch.equal(shared["combined"].counts, alone["combined"].counts)
    print("agreed")
"""


def test_processes_train_one_model_and_count_what_one_counts(voc: Path, tmp_path: Path) -> None:
    script = tmp_path / "ranks.py"
    script.write_text(TWO_RANKS)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launcher, str(script), str(voc), str(tmp_path)], env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("agreed") == 2


def test_a_finished_run_prints_its_figures_and_does_nothing(
    voc: Path, unbroken: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    out, _ = unbroken
    before = {file: file.stat().st_mtime_ns for file in out.iterdir()}
    assert train_here(*command("cam", voc, out)) == 0
    assert "is finished" in capsys.readouterr().out
    assert {file: file.stat().st_mtime_ns for file in out.iterdir()} == before


def test_other_settings_are_an_error_that_names_them(
    voc: Path, unbroken: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    out, _ = unbroken
    before = {file: file.stat().st_mtime_ns for file in out.iterdir()}
    assert train_here(*command("cam", voc, out, "--lr", 0.5, "--seed", 7)) == 2
    message = capsys.readouterr().err
    assert "seed: 0 there, 7 now" in message
    assert "lr: 0.004 there, 0.5 now" in message
    assert "epochs" not in message
    assert {file: file.stat().st_mtime_ns for file in out.iterdir()} == before


def test_a_folder_of_something_else_is_left_alone(
    voc: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model.pt").write_text("precious")
    assert train_here(*command("cam", voc, tmp_path)) == 2
    assert "holds model.pt" in capsys.readouterr().err
    assert (tmp_path / "model.pt").read_text() == "precious"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--epochs", "0"], "epochs must be"),
        (["--scales", "0"], "scales must be"),
        (["--scales", "inf"], "scales must be"),
        (["--batch-size", "17"], "batch_size must be at least 1 and at most the 16 training images, got 17"),
        (["--size", "7"], "size must be at least output_stride, 8, got 7"),
        (["--lr", "nan"], "lr must be finite, got nan"),
        (["--backbone-lr", "-1"], "backbone_lr must be at least 0, got -1.0"),
        (["--seed", "-1"], "seed must be at least 0, got -1"),
        (["--output-stride", "32"], "output_stride of tiny"),
        (["--weights", "absent.pth"], "absent.pth is not a readable PyTorch file"),
        (["--tune-blocks", "99"], "tune_blocks must be"),
    ],
)
def test_bad_options_leave_nothing_behind(
    voc: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    assert train_here(*command("cam", voc, tmp_path / "run", *more)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_faulty_data_leave_nothing_behind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    voc = make_voc(tmp_path / "voc")
    np.savez(voc / "VOC2012" / "cls_labels.npz", ids=np.array(["a"]), labels=np.ones((1, 19)))
    assert train_here(*command("cam", voc, tmp_path / "run", "--check", "headers")) == 2
    assert "cls_labels.npz: labels must be" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "reason"), [("file", "it is a file"), ("file/x", "Not a directory"), ("/proc/nope", "")]
)
def test_a_folder_that_cannot_be_made_is_told_before_the_work(
    voc: Path, unbroken: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch, name: str, reason: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(Training, "run", lambda self: pytest.fail("trained"))
    monkeypatch.setattr("wsss_ops.training.evaluate.evaluate_and_report", lambda *_, **__: pytest.fail("evaluated"))
    (tmp_path / "file").write_text("precious")
    out = tmp_path / name
    message = f"error: --out: {out} cannot be made a folder: {reason}"
    assert train_here(*command("cam", voc, out)) == 2
    assert message in capsys.readouterr().err
    assert evaluate_here(unbroken[0], out) == 2
    assert message in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "precious"


INTERRUPTED = """
import os, signal
from wsss_ops.training import checkpoints
save = checkpoints.save
def save_and_interrupt(path, content):
    save(path, content)
    os.kill(os.getpid(), signal.SIGINT)
checkpoints.save = save_and_interrupt
"""


def test_an_interrupted_run_says_that_the_same_command_resumes(voc: Path, tmp_path: Path) -> None:
    done = train_apart(*command("cam", voc, tmp_path / "run"), prelude=INTERRUPTED)
    assert done.returncode == 130
    assert done.stderr == f"interrupted; the same command resumes the run in {tmp_path / 'run'}\n"
    assert (tmp_path / "run" / "checkpoint.pt").exists()


def test_evaluate_repeats_the_figures_of_training(
    voc: Path, unbroken: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate_here(unbroken[0], tmp_path, "--panels", 0) == 0
    assert abs(metrics(tmp_path)["validation"]["mIoU"] - metrics(unbroken[0])["validation"]["mIoU"]) < 1e-3
    assert not (tmp_path / "panels.png").exists()
    assert "mIoU" in capsys.readouterr().out


def test_evaluate_refuses_bad_scales(
    unbroken: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate_here(unbroken[0], tmp_path / "out", "--scales", -1) == 2
    assert "scales must be" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "command",
    [
        ["train", "cam", "--workers"],
        ["train", "cam", "--panels"],
        ["evaluate", "--checkpoint", "somewhere", "--panels"],
    ],
)
def test_counts_below_0_are_usage_errors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    with pytest.raises(SystemExit) as error:
        main([*command, "-1", "--out", str(tmp_path / "out")])
    assert error.value.code == 2
    assert f"argument {command[-1]}: must be a whole number of at least 0, got -1" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["-1", "nan", "often"])
def test_times_between_checkpoints_that_cannot_be_are_usage_errors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], value: str
) -> None:
    with pytest.raises(SystemExit) as error:
        main(["train", "cam", "--out", str(tmp_path / "out"), "--save-every", value])
    assert error.value.code == 2
    assert f"argument --save-every: must be a number of at least 0, got {value}" in capsys.readouterr().err


def test_evaluate_tells_what_it_cannot_load(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.pt").write_bytes(b"nonsense")
    (tmp_path / "empty.pt").touch()
    for checkpoint, message in (
        (tmp_path, "model.pt does not exist"),
        (tmp_path / "x.pt", "is not a readable PyTorch file"),
        (tmp_path / "empty.pt", "is not a readable PyTorch file of tensors: it is empty"),
    ):
        assert evaluate_here(checkpoint, tmp_path / "out") == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_without_matplotlib_the_curve_is_left_out_and_training_says_so_first(
    voc: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wsss_ops.training.report.has_matplotlib", lambda: False)
    assert train_here(*command("cam", voc, tmp_path / "run", "--epochs", 1)) == 0
    printed = capsys.readouterr().out
    assert printed.index("pip install matplotlib") < printed.index("trained in")
    assert not (tmp_path / "run" / "curve.png").exists()
    assert (tmp_path / "run" / "panels.png").exists()


def test_a_claim_removes_what_dead_processes_left_half_written_alone(tmp_path: Path) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    left = [f".checkpoint.pt.{ended.pid}", f"cam/.metrics.json.{ended.pid}", f".model.pt.{os.getpid()}"]
    kept = [f".model.pt.{os.getppid()}", f".notes.{ended.pid}", f"model.pt.{ended.pid}"]
    (tmp_path / "cam").mkdir()
    for name in (*left, *kept):
        (tmp_path / name).touch()
    checkpoints.claim(tmp_path, {"system": "cam"})
    assert {file.name for file in tmp_path.rglob("*") if file.is_file()} == {*kept, "settings.json"}


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    checkpoints.save(path, {"value": 1})

    def fail(file: BinaryIO) -> None:
        file.write(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomic(path, fail)
    assert checkpoints.load(path) == {"value": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["x.pt"]


def toy_batches(voc: Path) -> TrainingBatches:
    return TrainingBatches(open_dataset(voc, "train"), size=16, batch_size=4, seed=0, workers=0, processes=Processes())


@pytest.mark.parametrize("stop", [(0, 1, 2), (1, 0, 0), (1, 0, 3)])
def test_stages_resume_where_they_stopped(
    voc: Path, tmp_path: Path, stop: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fresh() -> TwoStages:
        torch.manual_seed(0)
        return TwoStages(Settings(data=str(voc), backbone="tiny"), 21, FUSED)

    whole = fresh()
    (tmp_path / "whole").mkdir()
    Training(whole, toy_batches(voc), Processes(), tmp_path / "whole", save_every=0, about={}).run()
    assert whole.entered == [0, 1]
    left = {
        name: checkpoints.load(tmp_path / "whole" / f"{name}.pt")["network"] for name in ("weight", "bias", "model")
    }
    assert torch.equal(left["weight"]["weight"], left["model"]["weight"])
    assert not torch.equal(left["weight"]["bias"], left["model"]["bias"])
    assert torch.equal(left["bias"]["bias"], left["model"]["bias"])

    class StopError(Exception):
        pass

    save = checkpoints.save

    def save_and_stop(path: Path, content: dict[str, Any]) -> None:
        save(path, content)
        if content.get("position") == stop:
            raise StopError

    # The end of a stage is saved as the epoch behind its last; the next stage's start is the same place.
    if stop == (1, 0, 0):
        stop = (0, 2, 0)
    (tmp_path / "parts").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save", save_and_stop)
        with pytest.raises(StopError):
            Training(fresh(), toy_batches(voc), Processes(), tmp_path / "parts", save_every=0, about={}).run()
    resumed = fresh()
    Training(resumed, toy_batches(voc), Processes(), tmp_path / "parts", save_every=0, about={}).run()
    assert resumed.entered[0] == stop[0]
    for one, other in zip(whole.network.parameters(), resumed.network.parameters(), strict=True):
        assert torch.equal(one, other)


def test_comparison_of_operators_finds_equal_and_different_ones(voc: Path) -> None:
    steps = list(toy_batches(voc).epoch(0))[:3]

    def pair(reference: Any) -> dict[str, System]:
        systems: dict[str, System] = {}
        for kind, ops in (("reference", reference), ("fused", FUSED)):
            torch.manual_seed(0)
            systems[kind] = TwoStages(Settings(data="unused", backbone="tiny"), 21, ops)
        return systems

    def differences(text: str) -> list[float]:
        lines = [line.split() for line in text.splitlines() if "difference" in line]
        return [float(word.strip(",")) for words in lines for word in words if "e" in word and word[0].isdigit()]

    same, other = (compare(pair(ops), steps, Processes()) for ops in (REFERENCE, WRONG))
    assert differences(same) == [0, 0, 0, 0]
    assert len(differences(other)) == 4
    assert min(differences(other)) > 1e-4
    for text in ("weight      fused", "bias        reference", "MiB", " ms"):
        assert text in same


def test_cam_network_learns_only_what_is_asked(voc: Path) -> None:
    settings = Settings(data=str(voc), backbone="tiny", tune_blocks=1)
    system = CamSystem(settings, 21, wsss_ops)
    groups = system.enter(0)
    assert [group["lr"] for group in groups] == [settings.lr, settings.backbone_lr]
    batch = Batch(torch.randn(2, 3, 32, 32), torch.zeros(2, 20), torch.ones(2, 32, 32).bool())
    system.loss(batch)[0].backward()
    learning = {name for name, parameter in system.network.named_parameters() if parameter.grad is not None}
    assert {name.rsplit(".", 1)[0] for name in learning} == {
        "sampler", "classifier", "backbone.layers.2.conv1", "backbone.layers.2.bn1", "backbone.layers.2.conv2",
        "backbone.layers.2.bn2", "backbone.layers.2.downsample.0", "backbone.layers.2.downsample.1",
    }  # fmt: skip
    logits, cam = system.network(batch.images)
    torch.testing.assert_close(cam.mean((2, 3)), logits)


def test_settings_take_the_defaults_of_their_backbone() -> None:
    assert Settings().backbone == "tiny"
    assert Settings(data="x").backbone == "efficientnet_lite0"
    assert Settings(data="x").epochs != Settings().epochs
    assert Settings(epochs=2).epochs == 2
