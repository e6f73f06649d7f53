"""Files that appear under their final name in one step, whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO


def write_atomic(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Calls write on a temporary file beside path, brings it to disk and gives it its name.

    A reader, or a run after a crash, finds the old file or the new one, never a part.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


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
