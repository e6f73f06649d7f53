"""Compiles csrc into one module per backend with ninja; everything else is in pyproject.toml.

    wsss_ops._cpu       always; each operator once per instruction set
    wsss_ops._cuda      where nvcc is found
    wsss_ops._emulated  the CUDA sources on the CPU, for tests: python setup.py build_ext --inplace --emulated
    wsss_ops._emulated_sanitized  the same under AddressSanitizer: --sanitized in place of --emulated

Environment: WSSS_OPS_CUDA=0 leaves CUDA out, 1 demands it; CUDA_HOME; TORCH_CUDA_ARCH_LIST ("8.0 9.0+PTX"); CXX;
CXXFLAGS; NVCC_APPEND_FLAGS; MAX_JOBS.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
# One folder per interpreter, outside the temporary folders that pip builds in: what did not change is not rebuilt.
BUILD = ROOT / "build" / f"{sys.implementation.cache_tag}-{platform.machine()}"
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
OPERATORS = ("clip", "deform", "msdw", "ocr", "patch", "prototype")

X86_LEVELS = {
    "x86_64": "",
    # Every processor with AVX2 and FMA has F16C; older compilers cannot ask for it at run time.
    "x86_64_v3": "-mavx2 -mfma -mbmi -mbmi2 -mf16c",
    "x86_64_v4": "-mavx2 -mfma -mbmi -mbmi2 -mf16c -mavx512f -mavx512bw -mavx512cd -mavx512dq -mavx512vl",
}
LEVELS = X86_LEVELS if platform.machine() in ("x86_64", "AMD64") else {"generic": ""}
DEFAULT_ARCHITECTURES = "8.0 9.0 10.0+PTX"


@dataclass(frozen=True)
class Cuda:
    nvcc: str
    architectures: tuple[str, ...]  # as in TORCH_CUDA_ARCH_LIST

    @property
    def flags(self) -> str:
        flags = []
        for name in self.architectures:
            number = name.removesuffix("+PTX").replace(".", "")
            flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
            if name.endswith("+PTX"):
                flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
        return " ".join(flags)


def find_cuda() -> Cuda | None:
    """The CUDA compiler and what to compile for, or None; SystemExit where it is demanded and missing."""
    wanted = os.environ.get("WSSS_OPS_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise SystemExit(f"WSSS_OPS_CUDA must be 0, 1 or unset, got {wanted!r}")
    if wanted == "0":
        return None
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which(str(Path(home, "bin", "nvcc")) if home else "nvcc")
    if nvcc is None:
        if wanted == "1":
            raise SystemExit(
                f"WSSS_OPS_CUDA=1, but nvcc was not found {'under CUDA_HOME=' + home if home else 'on PATH'}: install "
                "the CUDA toolkit (12.6 or later) and set CUDA_HOME to it"
            )
        return None
    return Cuda(nvcc, find_architectures(nvcc))


def find_architectures(nvcc: str) -> tuple[str, ...]:
    names = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    if not names:
        names = present_architectures() or DEFAULT_ARCHITECTURES
    found = tuple(dict.fromkeys(names.replace(";", " ").split()))
    for name in found:
        if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", name):
            raise SystemExit(f"TORCH_CUDA_ARCH_LIST: {name!r} is not of the form 9.0, 9.0a or 9.0+PTX")
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    supported = tuple(
        name for name in found if "compute_" + name.removesuffix("+PTX").rstrip("af").replace(".", "") in known
    )
    if supported != found:
        print(f"wsss_ops: {nvcc} cannot compile for {' '.join(n for n in found if n not in supported)}")
    if not supported:
        raise SystemExit(f"{nvcc} can compile for none of {' '.join(found)}; it knows {' '.join(known)}")
    return supported


def present_architectures() -> str:
    try:
        query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        result = subprocess.run(query, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return " ".join(re.findall(r"^\d+\.\d$", result.stdout, re.MULTILINE))


class NinjaFile:
    """Rules and edges of one build.ninja, written in the order in which they are added."""

    def __init__(self) -> None:
        includes = f"-I{CSRC} -isystem {self._stable_pybind11()} -isystem {sysconfig.get_path('include')}"
        common = f"-std=c++17 -O3 -g0 -Wall -Wextra {includes}"
        extra = os.environ.get("CXXFLAGS", "")
        self.cxx = os.environ.get("CXX", "g++")
        self.cxx_flags = f"{common} -fPIC -fvisibility=hidden -fopenmp -fno-math-errno -fno-trapping-math {extra}"
        self.nvcc_flags = f"-std=c++17 -O3 {includes} -Xcompiler -fPIC,-fvisibility=hidden,-Wall,-Wextra -lineinfo"
        self.lines = [
            "ninja_required_version = 1.5",
            "rule cxx",
            f"  command = {self.cxx} -MMD -MF $out.d {self.cxx_flags} $flags -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = $out",
            "rule link",
            f"  command = {self.cxx} -shared -fopenmp $in -o $out $flags",
            "  description = $out",
        ]

    @staticmethod
    def _stable_pybind11() -> Path:
        """pip's isolated builds put pybind11 into a new folder each time; a link of a constant name does not."""
        link = BUILD / f"pybind11-{pybind11.__version__}"
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(pybind11.get_include(), target_is_directory=True)
        return link

    def compile(self, source: Path, folder: str, flags: str, rule: str = "cxx") -> str:
        target = f"{folder}/{source.relative_to(CSRC).as_posix().replace('/', '_')}.o"
        self.lines += [f"build {target}: {rule} {source}", f"  flags = {flags}"]
        return target

    def add_cpu(self) -> None:
        flags = "-DWSSS_BACKEND_CPU=1 -DWSSS_MODULE=_cpu"
        objects = [self.compile(CSRC / name, "cpu", flags) for name in ("bindings.cpp", "cpu_level.cpp")]
        for level, level_flags in LEVELS.items():
            for operator in OPERATORS:
                source = CSRC / operator / "cpu.cpp"
                objects.append(self.compile(source, level, f"-DWSSS_BACKEND_CPU=1 -DWSSS_LEVEL={level} {level_flags}"))
        self.link("_cpu", objects)

    def add_emulated(self, module: str, folder: str, engine_flags: str, kernel_flags: str) -> None:
        emulation = CSRC / "emulation"
        flags = f"-DWSSS_EMULATED=1 -DWSSS_BACKEND_EMULATED=1 -DWSSS_MODULE={module} -g -x c++"
        kernel_flags = f"-O1 -Wno-unknown-pragmas {(emulation / 'checks.flags').read_text().strip()} {kernel_flags}"
        sources = [CSRC / "bindings.cpp", *sorted(emulation.glob("*.cpp"))]
        objects = [self.compile(source, folder, f"{flags} {engine_flags}") for source in sources]
        kernels = [CSRC / operator / "cuda.cu" for operator in OPERATORS]
        objects += [self.compile(source, folder, f"{flags} {kernel_flags}") for source in kernels]
        self.link(module, objects, flags=engine_flags)

    def add_cuda(self, cuda: Cuda) -> None:
        self.lines += [
            "rule nvcc",
            f"  command = {shlex.quote(cuda.nvcc)} -MMD -MF $out.d {self.nvcc_flags} $flags -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = $out",
            "rule nvcc_link",
            f"  command = {shlex.quote(cuda.nvcc)} -shared -cudart static $in -o $out",
            "  description = $out",
        ]
        names = " ".join(cuda.architectures)
        binding = f"-DWSSS_BACKEND_CUDA=1 -DWSSS_MODULE=_cuda '-DWSSS_CUDA_ARCHITECTURES=\"{names}\"'"
        objects = [self.compile(CSRC / "bindings.cpp", "cuda", binding, "nvcc")]
        for operator in OPERATORS:
            flags = f"-DWSSS_BACKEND_CUDA=1 {cuda.flags}"
            objects.append(self.compile(CSRC / operator / "cuda.cu", "cuda", flags, "nvcc"))
        self.link("_cuda", objects, rule="nvcc_link")

    def link(self, module: str, objects: list[str], rule: str = "link", flags: str = "") -> None:
        self.lines += [f"build {module}{SUFFIX}: {rule} {' '.join(objects)}", f"  flags = {flags}"]

    def run(self, modules: list[str]) -> None:
        (BUILD / "build.ninja").write_text("\n".join(self.lines) + "\n")
        command = [sys.executable, "-m", "ninja", "-C", str(BUILD)]
        if jobs := os.environ.get("MAX_JOBS"):
            command += ["-j", jobs]
        if subprocess.run([*command, *(module + SUFFIX for module in modules)], check=False).returncode:
            hint = "; WSSS_OPS_CUDA=0 leaves the CUDA backend out" if "_cuda" in modules else ""
            raise SystemExit(f"wsss_ops: compiling {', '.join(modules)} failed, see above{hint}")


class BuildModules(build_ext):
    """build_ext whose compiling is ninja's; --emulated and --sanitized build that module and nothing else."""

    user_options: ClassVar = [
        *build_ext.user_options,
        ("emulated", None, "build only the module for tests"),
        ("sanitized", None, "build only the module for tests under AddressSanitizer"),
    ]
    boolean_options: ClassVar = [*build_ext.boolean_options, "emulated", "sanitized"]

    def initialize_options(self) -> None:
        super().initialize_options()
        self.emulated = False
        self.sanitized = False

    def finalize_options(self) -> None:
        super().finalize_options()
        if self.emulated:
            self.extensions = [Extension("wsss_ops._emulated", sources=[])]
        if self.sanitized:
            self.extensions = [Extension("wsss_ops._emulated_sanitized", sources=[])]

    def build_extensions(self) -> None:
        modules = [extension.name.rpartition(".")[2] for extension in self.extensions]
        ninja = NinjaFile()
        ninja.add_cpu()
        # What -fsanitize=thread has GCC call is in csrc/emulation/accesses.cpp; it excludes AddressSanitizer.
        ninja.add_emulated("_emulated", "emulated", "", "-fsanitize=thread")
        ninja.add_emulated("_emulated_sanitized", "sanitized", "-fsanitize=address", "-fsanitize=address")
        if CUDA is not None:
            ninja.add_cuda(CUDA)
        ninja.run(modules)
        for extension, module in zip(self.extensions, modules, strict=True):
            target = Path(self.get_ext_fullpath(extension.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(BUILD / f"{module}{SUFFIX}", target)

    def copy_extensions_to_source(self) -> None:
        if CUDA is None:  # not to be found beside newer modules
            (ROOT / "wsss_ops" / f"_cuda{SUFFIX}").unlink(missing_ok=True)
        for extension in self.extensions:
            built = Path(self.build_lib, self.get_ext_filename(extension.name))
            target = ROOT / self.get_ext_filename(extension.name)
            if target.exists() and target.read_bytes() == built.read_bytes():
                continue
            shutil.copyfile(built, target.with_suffix(".new"))
            target.with_suffix(".new").replace(target)  # a process that runs keeps the file that it has loaded


CUDA = find_cuda()
setup(
    ext_modules=[
        Extension("wsss_ops._cpu", sources=[]),
        *([Extension("wsss_ops._cuda", sources=[])] if CUDA else []),
    ],
    cmdclass={"build_ext": BuildModules},
)
