"""A whole training step of a system, for the cases that exchange the operators in it."""

from __future__ import annotations

import torch

from wsss_ops.training.batches import Batch
from wsss_ops.training.loop import channels_last, make_optimiser, train_step
from wsss_ops.training.processes import Processes
from wsss_ops.training.system import System

from ..measure import Function

SIDE, CLASSES = 256, 21


def make_batch(images: int, device: torch.device) -> Batch:
    """Noise of SIDE pixels, each image tagged with the same class."""
    tags = torch.zeros(images, CLASSES - 1, device=device)
    tags[:, 3] = 1
    return Batch(
        torch.randn(images, 3, SIDE, SIDE, device=device).contiguous(memory_format=torch.channels_last),
        tags,
        torch.ones(images, SIDE, SIDE, dtype=torch.bool, device=device),
    )


def training_step(system: System, stage: int, batch: Batch) -> Function:
    """A step of the stage on the batch, again and again."""
    network = system.network.to(batch.images.device)
    channels_last(network)
    optimiser = make_optimiser(system.enter(stage), system.settings.weight_decay)
    network.train()
    processes = Processes()
    return lambda: train_step(system, optimiser, batch, processes)
