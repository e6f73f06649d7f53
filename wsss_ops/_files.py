"""Files that appear under their final name in one step, whole or not at all; whether they can, told before the work."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

TEMPORARY = re.compile(r"\..+\.(json|png|pt)\.(\d{1,7})")  # of `write_atomic`, with the process


def write_atomic(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Calls write on a temporary file beside path, brings it to disk and gives it its name.

    A reader, or a run after a crash, finds the old file or the new one, never a part.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")  # as TEMPORARY
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Removes the temporary files of `write_atomic` in folder and below, of processes that were ended while they wrote.

    Those of other processes that are alive stay. No other thread may be writing.
    """
    for file in list(folder.rglob(".*")):
        found = TEMPORARY.fullmatch(file.name)
        # In a container the process of the run before may have had the number of this one.
        if found and file.is_file() and (int(found[2]) == os.getpid() or not _is_alive(int(found[2]))):
            file.unlink()


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def make_folder(path: Path) -> None:
    """Makes the folder that --out names, unless it is there, and tries to write into it. Call it before long work.

    Raises ValueError where it cannot be one to write into.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = "it is a file" if path.is_file() else error.strerror
        raise ValueError(f"--out: {path} cannot be made a folder: {reason}") from error
    _try_writing("--out", path)


def check_file(option: str, path: Path) -> None:
    """Tries whether the file that an option names can be written. Call it before long work.

    Raises ValueError where it cannot.
    """
    if path.is_dir():
        raise ValueError(f"{option}: {path} is a folder, a file is needed")
    folder = path.absolute().parent
    if not folder.is_dir():
        raise ValueError(f"{option}: there is no folder {folder}")
    _try_writing(option, folder)


def _try_writing(option: str, folder: Path) -> None:
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"{option}: nothing can be written into {folder}: {error.strerror}") from error


def write_json(path: Path, content: Any) -> None:
    """Writes content as readable JSON, atomically."""
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    write_atomic(path, lambda file: file.write(text.encode()))


def read_json(path: Path) -> Any:
    """Reads what `write_json` wrote. Raises ValueError naming the file where it is no JSON."""
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
