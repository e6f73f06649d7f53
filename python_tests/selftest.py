"""The emulation's own kernels, csrc/emulation/{selftest,faults}.cu, compiled by g++ and called through ctypes."""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
EMULATION = ROOT / "csrc" / "emulation"
BUILD = ROOT / "build" / "selftest"
COMPILER = os.environ.get("CXX", "g++")
FLAGS = f"-std=c++17 -g -fPIC -fvisibility=hidden -Wall -Wextra -Werror -Wno-unknown-pragmas -I{EMULATION.parent}"
CHECKS = (EMULATION / "checks.flags").read_text().strip()
VARIANTS = {  # name -> (flags of the engine and of the link, flags of the kernels)
    "checked": ("-O2", f"-O1 {CHECKS} -fsanitize=thread"),  # as wsss_ops._emulated is
    "sanitized": ("-O1 -fsanitize=address", f"-O1 {CHECKS} -fsanitize=address"),
    # What is left without GCC's help, and with the context switch of machines other than x86-64.
    "unchecked": ("-O1 -DWSSS_EMULATION_UCONTEXT", "-O1"),
}

Selftest = Callable[..., None]


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a command with no sanitizer but one that it is given."""
    kept = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    return subprocess.run(command, env={**kept, **environment}, capture_output=True, text=True, check=False)


@functools.cache
def library(variant: str) -> Path:
    """The path of the library, compiled where its sources have changed."""
    engine, kernels = VARIANTS[variant]
    lines = [
        "rule cxx",
        f"  command = {COMPILER} {FLAGS} $flags -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {COMPILER} -shared {engine} $in -o $out",
    ]
    objects = []
    for source in [*sorted(EMULATION.glob("*.cpp")), *sorted(EMULATION.glob("*.cu"))]:
        flags = engine if source.suffix == ".cpp" else f"{kernels} -x c++ -DWSSS_EMULATED=1"
        lines += [f"build {source.name}.o: cxx {source}", f"  flags = {flags}"]
        objects.append(f"{source.name}.o")
    lines.append(f"build libselftest.so: link {' '.join(objects)}")
    folder = BUILD / variant
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text("\n".join(lines) + "\n")
    done = run(sys.executable, "-m", "ninja", "-C", str(folder))
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "libselftest.so"


def load(variant: str) -> Selftest:
    """selftest(name, *arguments) runs one function on the default stream and raises its error."""
    functions = ctypes.CDLL(str(library(variant)))

    def selftest(name: str, *arguments: object) -> None:
        function = getattr(functions, f"selftest_{name}")
        if name == "set_seed":
            function(ctypes.c_uint64(arguments[0]))
            return
        function.restype = ctypes.c_char_p
        message = function(*(as_c(argument) for argument in arguments), None)
        if message is not None:
            raise RuntimeError(message.decode())

    return selftest


def as_c(value: object) -> object:
    if isinstance(value, np.ndarray):
        assert value.flags.c_contiguous
        return ctypes.c_void_p(value.ctypes.data)
    if isinstance(value, torch.Tensor):
        assert value.is_contiguous()
        return ctypes.c_void_p(value.data_ptr())
    if isinstance(value, str):
        return value.encode()
    return ctypes.c_float(value) if isinstance(value, float) else value
