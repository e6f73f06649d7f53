"""Compiles every .cu file for three architectures, warnings as errors, and compares what each kernel takes of a GPU
with .ci/kernels.txt: a register or a byte of stack more, a kernel that is new or gone, is to be seen in review.

python .ci/compile_kernels.py             fails where the table differs, a kernel spills registers, or one that is not
                                          of bytes stores single bytes
python .ci/compile_kernels.py --update    writes the table

Registers depend on the compiler: by another nvcc than the table's only kernels and spills are compared.
"""

import argparse
import difflib
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
TABLE = ROOT / ".ci" / "kernels.txt"
ARCHITECTURES = ("80", "90", "100")
FLAGS = ["-std=c++17", "-O3", f"-I{CSRC}", "-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra,-Werror"]

Usage = tuple[int, int, int]  # registers, bytes of stack, bytes of spills
Kernels = dict[str, dict[str, Usage]]  # name -> architecture -> usage


def compile_source(source: Path) -> tuple[Kernels, set[str]]:
    """What ptxas says of the kernels of one file, by mangled name; and those that store single bytes."""
    architectures = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHITECTURES]
    with tempfile.TemporaryDirectory() as folder:
        output = ["--keep", "--keep-dir", folder, "-o", f"{folder}/kernels.o"]
        command = ["nvcc", *FLAGS, *architectures, "-Xptxas", "-v", "-c", str(source), *output]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            raise SystemExit(f"{source} does not compile:\n{result.stdout}{result.stderr}")
        assemblies = [path.read_text() for path in Path(folder).glob("*.ptx")]
    if len(assemblies) != len(ARCHITECTURES):
        raise SystemExit(f"{source}: nvcc kept {len(assemblies)} assembly files of {len(ARCHITECTURES)}")
    kernels: Kernels = {}
    for report in result.stderr.split("Compiling entry function ")[1:]:
        entry = re.match(r"'(\w+)' for 'sm_(\w+)'", report)
        registers = re.search(r"Used (\d+) registers", report)
        # Functions that were not inlined have stacks and spills of their own.
        stacks = [int(number) for number in re.findall(r"(\d+) bytes stack frame", report)]
        spills = [int(number) for number in re.findall(r"(\d+) bytes spill", report)]
        if entry is None or registers is None or not stacks or not spills:
            raise SystemExit(f"{source}: ptxas reports in an unknown form:\n{report}")
        kernels.setdefault(entry[1], {})[entry[2]] = (int(registers[1]), sum(stacks), sum(spills))
    if not kernels:
        raise SystemExit(f"{source} holds no kernel, or ptxas reports in an unknown form")
    return kernels, {name for assembly in assemblies for name in storing_bytes(assembly)}


def storing_bytes(assembly: str) -> set[str]:
    """The kernels of an assembly that store to memory byte by byte."""
    bodies = re.split(r"\.entry (\w+)\(", assembly)[1:]
    return {
        name for name, body in zip(bodies[::2], bodies[1::2], strict=True) if re.search(r"\bst\.[\w.]*[bsu]8\b", body)
    }


def readable(mangled: list[str]) -> list[str]:
    """room::kernel<arguments> of each name."""
    result = subprocess.run(["c++filt"], input="\n".join(mangled), capture_output=True, text=True, check=True)
    names = [short(name) for name in result.stdout.splitlines()]
    if twice := {name for name in names if names.count(name) > 1}:
        raise SystemExit(f"several kernels are called {', '.join(sorted(twice))}: the table needs one name for each")
    return names


def short(name: str) -> str:
    """Without return type, parameters, outer namespace: 'void wsss::(anonymous namespace)::f<2>(int)' is 'f<2>'."""
    depth = 0
    for end in range(len(name) - 1, -1, -1):  # the parenthesis that opens the parameters
        depth += (name[end] == ")") - (name[end] == "(")
        if depth == 0:
            break
    return re.sub(r"wsss::|\(anonymous namespace\)::|^void ", "", name[:end])


def table(kernels: Kernels, nvcc: str) -> list[str]:
    columns = "".join(f"{'sm_' + arch:>19}" for arch in ARCHITECTURES)
    lines = [
        f"# nvcc {nvcc}: registers, bytes of stack and bytes of spills; written by .ci/compile_kernels.py --update",
        f"#{columns[1:]}  kernel",
    ]
    for name in sorted(kernels):
        usages = (kernels[name][arch] for arch in ARCHITECTURES)
        numbers = "".join(f"{registers:7}{stack:6}{spills:6}" for registers, stack, spills in usages)
        lines.append(f"{numbers}  {name}")
    return lines


def names(lines: list[str]) -> list[str]:
    return [line.split(maxsplit=3 * len(ARCHITECTURES))[-1] for line in lines if not line.startswith("#")]


def compiler_version() -> str:
    output = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    version = re.search(r"release (\d+\.\d+)", output)
    return version[1] if version else "of unknown version"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", help="write .ci/kernels.txt")
    update = parser.parse_args().update

    sources = sorted(CSRC.rglob("*.cu"))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        compiled = dict(zip(sources, pool.map(compile_source, sources), strict=True))
    # The emulation's own kernels are there to compile, not to be fast.
    of_operators = [result for source, result in compiled.items() if source.parent.name != "emulation"]
    mangled = {name: usage for kernels, _ in of_operators for name, usage in kernels.items()}
    kernels = dict(zip(readable(list(mangled)), mangled.values(), strict=True))
    # The compiler stores wider numbers so where it has lost sight of their alignment.
    bytewise = [
        name
        for name in readable(sorted(name for _, found in of_operators for name in found))
        if not re.search(r"unsigned char|bool", name)
    ]

    nvcc = compiler_version()
    lines = table(kernels, nvcc)
    print("\n".join(lines))
    spilling = sorted(
        f"{name} on sm_{arch}" for name, usages in kernels.items() for arch, usage in usages.items() if usage[2]
    )
    if spilling:
        print(f"registers are spilled by {', '.join(spilling)}", file=sys.stderr)
    if bytewise:
        print(f"single bytes are stored by {', '.join(bytewise)}", file=sys.stderr)
    if update:
        TABLE.write_text("\n".join(lines) + "\n")
        return 1 if spilling or bytewise else 0

    known = TABLE.read_text().splitlines() if TABLE.exists() else []
    if known and not known[0].startswith(f"# nvcc {nvcc}:"):
        print(f"this is nvcc {nvcc}, the table is another's: registers and stack are not compared", file=sys.stderr)
        known, lines = names(known), names(lines)
    differences = list(difflib.unified_diff(known, lines, ".ci/kernels.txt", "compiled", lineterm="", n=0))
    if differences:
        print("\n".join(differences), file=sys.stderr)
        print("If this is meant: python .ci/compile_kernels.py --update, and commit the table", file=sys.stderr)
    return 1 if spilling or bytewise or differences else 0


if __name__ == "__main__":
    sys.exit(main())
