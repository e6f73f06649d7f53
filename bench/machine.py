"""What bench/gpu.sh finds on a machine, told before anything is built; 1 where it can do nothing there."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sys
import sysconfig
from pathlib import Path

NEEDED = ("setuptools", "pybind11", "ninja", "numpy", "PIL", "tqdm")
WANTED = {
    "pytest": "tests, also under compute-sanitizer",
    "torchvision": "the peer of deform_conv2d",
    "triton": "torch.compile'd references",
    "matplotlib": "plots",
}


def main() -> int:
    print(f"Python {platform.python_version()}, {os.cpu_count()} processors")
    lacking = [f"the Python package {name}" for name in NEEDED if importlib.util.find_spec(name) is None]
    lacking += [f"the command {name}" for name in ("nvcc", os.environ.get("CXX", "g++")) if shutil.which(name) is None]
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        lacking.append(f"Python's headers in {sysconfig.get_path('include')}")
    if importlib.util.find_spec("torch") is None:
        lacking.append("the Python package torch")
    else:
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
