"""Compiles every .cu file for three architectures, warnings as errors, and fails where a kernel spills registers.

python .ci/compile_kernels.py      prints registers, stack and spills of each kernel
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

CSRC = Path(__file__).resolve().parent.parent / "csrc"
ARCHITECTURES = ("80", "90", "100")
FLAGS = [
    "-std=c++17",
    "-O3",
    f"-I{CSRC}",
    "-Werror",
    "all-warnings",
    "-Xcompiler",
    "-Wall,-Wextra,-Werror",
    "-Xptxas",
    "-v",
]
RESOURCES = re.compile(
    r"Compiling entry function '(?P<kernel>\w+)' for 'sm_(?P<arch>\d+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers",
    re.DOTALL,
)


def compile_source(source: Path, target: Path) -> str:
    """What ptxas says of the kernels of one file."""
    architectures = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHITECTURES]
    command = ["nvcc", *FLAGS, *architectures, "-c", str(source), "-o", str(target)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise SystemExit(f"{source} does not compile:\n{result.stdout}{result.stderr}")
    return result.stderr


def main() -> int:
    sources = sorted(CSRC.rglob("*.cu"))
    found: list[re.Match[str]] = []
    with tempfile.TemporaryDirectory() as folder:
        for source in sources:
            kernels = list(RESOURCES.finditer(compile_source(source, Path(folder, "kernel.o"))))
            if not kernels:
                raise SystemExit(f"{source} holds no kernel, or ptxas reports in an unknown form")
            found += kernels
    names = "\n".join(match["kernel"] for match in found)
    readable = subprocess.run(["c++filt"], input=names, capture_output=True, text=True, check=True).stdout.splitlines()
    print(f"{'arch':>6} {'registers':>9} {'stack':>6} {'spills':>6}  kernel")
    spilled = 0
    for match, name in zip(found, readable, strict=True):
        spills = int(match["stores"]) + int(match["loads"])
        spilled += spills > 0
        short = re.sub(r"wsss::|\(anonymous namespace\)::|^void ", "", name).split("(")[0]
        print(f"{'sm_' + match['arch']:>6} {match['registers']:>9} {match['stack']:>6} {spills:>6}  {short}")
    print(f"{len(sources)} files, {len(found)} kernels, {spilled} with spills")
    return 1 if spilled else 0


if __name__ == "__main__":
    sys.exit(main())
