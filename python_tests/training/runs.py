"""Runs of the command line: training, in this process or in one of its own that may be killed, and evaluation."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from wsss_ops.__main__ import main

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2]), "OMP_NUM_THREADS": "1"}
RUNNER = """
import sys
from wsss_ops.__main__ import main
sys.exit(main(["train", *sys.argv[1:]]))
"""


QUICK = ["--backbone", "tiny", "--epochs", "2", "--size", "32", "--batch-size", "4", "--workers", "0",
         "--device", "cpu", "--panels", "2", "--save-every", "0"]  # fmt: skip


def command(system: str, voc: Path, out: Path, *more: object) -> list[object]:
    """The options of a run that takes seconds; more: further ones, which take the place of these."""
    return [system, "--data", voc, *QUICK, "--out", out, *more]


def train_here(*options: object) -> int:
    """The exit status of `wsss-ops train` with these options."""
    return main(["train", *map(str, options)])


def evaluate_here(checkpoint: Path, out: Path, *more: object) -> int:
    """The exit status of `wsss-ops evaluate` of a run or model file on the CPU, with further options."""
    options = ("--checkpoint", checkpoint, "--out", out, "--device", "cpu", *more)
    return main(["evaluate", *map(str, options)])


def train_apart(*options: object, prelude: str = "") -> subprocess.CompletedProcess[str]:
    """The finished process of `wsss-ops train` with these options, on one thread; prelude: code that it runs first."""
    command = [sys.executable, "-c", prelude + RUNNER, *map(str, options)]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)


def killed_at(stage: int, epoch: int, step: int) -> str:
    """A prelude: the process kills itself when it has saved the checkpoint of this position."""
    return f"""
import os, signal
from wsss_ops.training import checkpoints
save = checkpoints.save
def save_or_die(path, content):
    save(path, content)
    if content.get("position") == {(stage, epoch, step)}:
        os.kill(os.getpid(), signal.SIGKILL)
checkpoints.save = save_or_die
"""
