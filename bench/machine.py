"""What bench/gpu.sh finds on a machine, told before anything is built; 1 where it can do nothing there."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

# As pyproject.toml asks; what installs it there is not at hand on a machine without a network.
NEEDED = {"setuptools": "77", "pybind11": "2.13", "torch": "2.8", "ninja": "", "numpy": "", "pillow": "", "tqdm": ""}
WANTED = {
    "pytest": "tests, also under compute-sanitizer",
    "torchvision": "the peer of deform_conv2d",
    "triton": "torch.compile'd references",
    "matplotlib": "plots",
}


def lacking_package(name: str, least: str) -> str:
    """What is missing of a package, or nothing."""
    wanted = f"the Python package {name}" + (f" {least} or newer" if least else "")
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return wanted
    return f"{wanted} (here is {version})" if _numbers(version) < _numbers(least) else ""


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)[:2]]


def main() -> int:
    print(f"Python {platform.python_version()}, {os.cpu_count()} processors")
    lacking = [wanted for name, least in NEEDED.items() if (wanted := lacking_package(name, least))]
    lacking += [f"the command {name}" for name in ("nvcc", os.environ.get("CXX", "g++")) if shutil.which(name) is None]
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        lacking.append(f"Python's headers in {sysconfig.get_path('include')}")
    if importlib.util.find_spec("torch") is not None:
        import torch

        print(f"torch {torch.__version__}")
        if torch.cuda.is_available():
            print(f"{torch.cuda.get_device_name()}, {torch.cuda.mem_get_info()[1] / 2**30:.0f} GiB")
        else:
            lacking.append("a GPU that torch sees")
    absent = [f"{name} ({use})" for name, use in WANTED.items() if importlib.util.find_spec(name) is None]
    absent += ["compute-sanitizer"] if shutil.which("compute-sanitizer") is None else []
    print(f"goes without: {', '.join(absent) or 'nothing'}")
    print(f"missing: {', '.join(lacking) or 'nothing'}")
    return bool(lacking)


if __name__ == "__main__":
    sys.exit(main())
