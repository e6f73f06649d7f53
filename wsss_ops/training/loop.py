"""The training loop of all systems: stages, epochs, steps, checkpoints.

The random state of a step is set from (seed, stage, step, rank) and its batch from (seed, epoch, index), so a run
that was killed goes on from its last checkpoint to the very numbers of an unbroken one.
"""

import random
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn, optim
from tqdm import tqdm

from wsss_ops.training import checkpoints
from wsss_ops.training.batches import Batch, TrainingBatches
from wsss_ops.training.processes import Processes
from wsss_ops.training.system import System

WARM_UP, DECAY_POWER = 0.05, 0.9
EPOCHS_APART = 1000  # between the epoch numbers of one stage and the next


def seed_everything(*numbers: int) -> None:
    """Seeds Python, NumPy and PyTorch (CPU and GPUs) from a tuple of numbers."""
    words = np.random.SeedSequence(numbers).generate_state(2)
    random.seed(int(words[0]))
    np.random.seed(words[0])
    torch.manual_seed(int(words[0]) << 31 | int(words[1]) >> 1)


def make_optimiser(groups: list[dict[str, Any]], weight_decay: float) -> optim.Optimizer:
    """AdamW over a stage's parameter groups; each group remembers its initial rate for the decay."""
    return optim.AdamW([{**group, "initial_lr": group["lr"]} for group in groups], weight_decay=weight_decay)


def train_step(system: System, optimiser: optim.Optimizer, batch: Batch, processes: Processes) -> dict[str, Tensor]:
    """One optimiser step; returns the figures of the system's loss."""
    optimiser.zero_grad(set_to_none=True)
    with system.autocast(batch.images.device):
        loss, figures = system.loss(batch)
    loss.backward()
    processes.average_gradients(p for group in optimiser.param_groups for p in group["params"])
    optimiser.step()
    processes.average_statistics(system.network)
    return figures


def channels_last(network: nn.Module) -> None:
    """Brings the weights of convolutions into the layout of the batches."""
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def rate(progress: float) -> float:
    """The learning rate as a share of its peak at progress 0..1 of a stage: linear warm-up, polynomial decay."""
    return min(1.0, 0.1 + progress / WARM_UP) * (1 - progress) ** DECAY_POWER


class Position(NamedTuple):
    """The step that comes next."""

    stage: int
    epoch: int
    step: int


class Training:
    """The training of one system into one run folder.

    save_every: seconds between checkpoints within an epoch; one is written at the end of every epoch besides.
    about: what model files hold beside the network. model.pt comes with the end of the last stage; where there are
    several stages, each leaves a file of its name too. start: the network's state after the first stage, trained
    elsewhere; what the first stage lacks keeps its initial value.
    """

    def __init__(self, system: System, batches: TrainingBatches, processes: Processes, out: Path, *, save_every: float,
                 about: dict[str, Any], start: dict[str, Tensor] | None = None) -> None:  # fmt: skip
        self.system, self.batches, self.processes, self.out = system, batches, processes, out
        self.save_every, self.about, self.start = save_every, about, start
        self.checkpoint = out / checkpoints.CHECKPOINT
        self.stages = system.stages()
        self._began = time.monotonic()

    @property
    def seconds(self) -> float:
        """Time spent so far, in the runs before a resumption too."""
        return time.monotonic() - self._began

    def run(self) -> None:
        """Trains all stages, from the run folder's checkpoint on where there is one."""
        network = self.system.network.to(self.processes.device)
        start, state = Position(0, 0, 0), None
        if self.checkpoint.exists():
            state = checkpoints.load(self.checkpoint)
            checkpoints.restore(network, state, self.checkpoint)
            start = Position(*state["position"])
            self._began -= state["seconds"]
            position = f"{self.stages[start.stage].name}, epoch {start.epoch + 1}, step {start.step + 1}"
            self.processes.print(f"resuming at {position}")
        else:
            if self.start is not None:
                network.load_state_dict(self.start, strict=False)
                self._save_model(self.stages[0].name)
                start = Position(1, 0, 0)
            self.processes.print(
                f"starting with {self.stages[start.stage].name}, {self.batches.steps} steps an epoch; a first "
                f"checkpoint after {self.save_every:.0f} s"
            )
        self.processes.share_state(network)
        channels_last(network)
        for stage in range(start.stage, len(self.stages)):
            optimiser = make_optimiser(self.system.enter(stage), self.system.settings.weight_decay)
            if state:
                optimiser.load_state_dict(state["optimiser"])
            for epoch in range(start.epoch, self.stages[stage].epochs):
                self._epoch(optimiser, Position(stage, epoch, start.step))
                start = start._replace(step=0)
                self._save(optimiser, Position(stage, epoch + 1, 0))
            start, state = Position(stage + 1, 0, 0), None
            self._save_model(self.stages[stage].name)
        self.processes.wait()

    def _epoch(self, optimiser: optim.Optimizer, start: Position) -> None:
        stage, steps = self.stages[start.stage], self.batches.steps
        self.system.network.train()
        stream = self.batches.epoch(start.stage * EPOCHS_APART + start.epoch, start.step)
        title = f"{stage.name} {start.epoch + 1}/{stage.epochs}"
        bar = tqdm(stream, title, steps, initial=start.step, disable=None if self.processes.is_main else True)
        saved = time.monotonic()
        for step, batch in enumerate(bar, start.step):
            done = start.epoch * steps + step
            seed_everything(self.system.settings.seed, start.stage, done, self.processes.rank)
            for group in optimiser.param_groups:
                group["lr"] = group["initial_lr"] * rate(done / (stage.epochs * steps))
            figures = train_step(self.system, optimiser, batch, self.processes)
            if step % 10 == 0 and not bar.disable:
                bar.set_postfix({name: f"{float(value):.3f}" for name, value in figures.items()})
            if time.monotonic() - saved >= self.save_every and step + 1 < steps:
                self._save(optimiser, start._replace(step=step + 1))
                saved = time.monotonic()
        if bar.disable:  # no terminal: a line an epoch in place of the bar
            loss = ", ".join(f"{name} {float(value):.3f}" for name, value in figures.items())
            self.processes.print(f"{title}: {loss}, {self.seconds:.0f} s so far")

    def _save_model(self, stage: str) -> None:
        if self.processes.is_main:
            content = self.about | {"network": self.system.network.state_dict()}
            names = [f"{stage}.pt"] if len(self.stages) > 1 else []
            if stage == self.stages[-1].name:
                names.append(checkpoints.MODEL)
            for name in names:
                checkpoints.save(self.out / name, content)

    def _save(self, optimiser: optim.Optimizer, position: Position) -> None:
        if self.processes.is_main:
            content = {"position": tuple(position), "seconds": self.seconds, "optimiser": optimiser.state_dict()}
            checkpoints.save(self.checkpoint, content | {"network": self.system.network.state_dict()})
