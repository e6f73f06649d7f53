"""One process or several: device, threads, and what processes exchange."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, distributed, nn

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Processes:
    """This process's place among those of the run."""

    rank: int = 0
    count: int = 1
    device: torch.device = CPU

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that prints and writes."""
        return self.rank == 0

    def print(self, text: str) -> None:
        """Prints in the main process alone."""
        if self.is_main:
            print(text, flush=True)

    def sum(self, values: Tensor) -> Tensor:
        """The sum of values over all processes, on the device of values."""
        if self.count == 1:
            return values
        total = values.to(self.device, copy=True)
        distributed.all_reduce(total)
        return total.to(values.device)

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replaces each gradient by its mean over the processes, in one message per dtype."""
        if self.count == 1:
            return
        by_dtype: dict[torch.dtype, list[nn.Parameter]] = {}
        for parameter in parameters:
            if parameter.requires_grad:
                by_dtype.setdefault(parameter.dtype, []).append(parameter)
        for group in by_dtype.values():
            # A parameter that this process's loss did not reach still takes part: another process's may have.
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in group]
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            distributed.all_reduce(flat)
            means = flat.div_(self.count).split([p.numel() for p in group])
            for parameter, gradient, mean in zip(group, gradients, means, strict=True):
                parameter.grad = gradient.copy_(mean.view_as(gradient))

    def average_statistics(self, module: nn.Module) -> None:
        """Replaces the running statistics that BatchNorm is gathering by their mean over the processes."""
        if self.count == 1:
            return
        gathering = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d) and m.training]
        buffers = [b for m in gathering for b in (m.running_mean, m.running_var) if b is not None]
        if buffers:
            flat = torch.cat(buffers)
            distributed.all_reduce(flat)
            for buffer, mean in zip(buffers, flat.div_(self.count).split([len(b) for b in buffers]), strict=True):
                buffer.copy_(mean)

    def share_state(self, module: nn.Module) -> None:
        """Gives every process the main process's parameters and buffers."""
        if self.count > 1:
            for value in (*module.parameters(), *module.buffers()):
                shared = value.detach().contiguous()
                distributed.broadcast(shared, 0)
                value.detach().copy_(shared)

    def wait(self) -> None:
        """Waits for all processes."""
        if self.count > 1:
            distributed.barrier()


@contextmanager
def join_processes(device: str | None = None) -> Iterator[Processes]:
    """The process group of torchrun where the environment has one, else a single process.

    device: "cpu", "cuda" or None for CUDA where there is a GPU. Under torchrun CUDA means nccl and the GPU of the
    local rank, CPU means gloo; CPU cores are divided among the processes of a machine. Raises ValueError for CUDA
    without a GPU, or with fewer GPUs than processes.
    """
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind not in ("cpu", "cuda"):
        raise ValueError(f'device must be "cpu" or "cuda", got {device!r}')
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError('device "cuda" was asked for, but PyTorch finds no usable GPU')
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Processes(device=torch.device(kind))
        return
    local_rank, local_count = (int(os.environ[name]) for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    if kind == "cuda":
        if torch.cuda.device_count() < local_count:
            raise ValueError(f"{local_count} processes need as many GPUs, got {torch.cuda.device_count()}")
        torch.cuda.set_device(local_rank)
    # torchrun sets one thread per process unless told; the cores of this machine are ours to divide.
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_count))
    distributed.init_process_group("nccl" if kind == "cuda" else "gloo")
    try:
        place = torch.device("cuda", local_rank) if kind == "cuda" else torch.device("cpu")
        yield Processes(distributed.get_rank(), count, place)
    finally:
        distributed.destroy_process_group()
