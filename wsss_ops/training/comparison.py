"""`--ops both`: a few identical training steps with fused and with reference operators, side by side."""

import statistics
import time
from collections.abc import Mapping, Sequence

import torch

from wsss_ops.bench.measure import peak_memory
from wsss_ops.training.batches import Batch
from wsss_ops.training.loop import channels_last, make_optimiser, seed_everything, train_step
from wsss_ops.training.processes import Processes
from wsss_ops.training.system import System


def compare(systems: Mapping[str, System], batches: Sequence[Batch], processes: Processes) -> str:
    """Trains copies of one system on the same batches from the same state; returns a table to print.

    systems: "reference" and "fused". Per stage: median step time without the first step, peak memory of one step,
    the loss of the last step, and the largest differences of losses and of parameters after all steps.
    """
    lines = [f"{'stage':<12}{'operators':<12}{'step':>10}{'peak memory':>14}{'last loss':>12}"]
    names = [stage.name for stage in next(iter(systems.values())).stages()]
    for stage, name in enumerate(names):
        losses = {}
        for kind, system in systems.items():
            seconds, memory, losses[kind] = _trial(system, stage, batches, processes)
            milliseconds, mebibytes = f"{seconds * 1e3:.1f} ms", f"{memory / 2**20:.1f} MiB"
            lines.append(f"{name:<12}{kind:<12}{milliseconds:>10}{mebibytes:>14}{losses[kind][-1]:>12.6f}")
        apart = max(abs(a - b) for a, b in zip(*losses.values(), strict=True))
        lines.append(f"{name:<12}largest difference of losses {apart:.2e}, of parameters {_distance(systems):.2e}")
    return "\n".join(lines)


def _trial(
    system: System, stage: int, batches: Sequence[Batch], processes: Processes
) -> tuple[float, int, list[float]]:
    device = processes.device
    processes.share_state(system.network.to(device))
    channels_last(system.network)
    optimiser = make_optimiser(system.enter(stage), system.settings.weight_decay)
    system.network.train()  # after enter: what keeps its statistics can depend on the stage
    times, losses = [], []
    for step, batch in enumerate(batches):
        seed_everything(system.settings.seed, stage, step, processes.rank)
        began = time.perf_counter()
        figures = train_step(system, optimiser, batch, processes)
        losses.append(float(figures["loss"]))  # waits for the device
        times.append(time.perf_counter() - began)
    memory = peak_memory(lambda: train_step(system, optimiser, batches[-1], processes), device)
    return statistics.median(times[1:] or times), memory, losses


@torch.no_grad()
def _distance(systems: Mapping[str, System]) -> float:
    one, other = ([*system.network.parameters(), *system.network.buffers()] for system in systems.values())
    return max(float((a.double() - b.double()).abs().max()) for a, b in zip(one, other, strict=True) if a.numel())
