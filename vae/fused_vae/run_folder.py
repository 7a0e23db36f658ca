"""The folder of one run, written so that nothing already in it can be lost.

``RUN`` is always a complete run. An unfinished one lives beside it in ``RUN.partial`` and takes its
name, and the place of an older run, only when it is complete. Every file inside is replaced whole:
written beside, flushed to the disk, renamed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from .config import dumps
from .errors import UserError

CONFIG = "config.json"
CHECKPOINT = "checkpoint.safetensors"
EARLY = "early.safetensors"
METRICS = "metrics.csv"
WRITING = "writing-"
"""Begins the name of a file that is not yet whole."""


class RunFolder:
    """Where the files of a run go until it is complete (`folder`), and then (`final`)."""

    def __init__(self, path: str | Path) -> None:
        self.final = Path(path).resolve()
        if not self.final.name:
            raise UserError(f"{path}: a run folder needs a name of its own")
        self.folder = self.final.with_name(self.final.name + ".partial")

    def create(self, *, overwrite: bool) -> None:
        """Start a new run, having made sure that it may take this name.

        Raises:
            UserError: the name is taken, or the folder cannot be written.
        """
        try:
            self._check_names(overwrite)
            if self.folder.exists():
                shutil.rmtree(self.folder)
            self.folder.mkdir(parents=True)
        except OSError as error:
            raise unwritable(self.folder, error) from error

    def _check_names(self, overwrite: bool) -> None:
        if self.final.exists() and not self.final.is_dir():
            raise UserError(f"{self.final}: is a file, a run needs a folder")
        for folder in (self.final, self.folder):
            if folder.is_dir() and not (folder / CONFIG).is_file() and _whole_files(folder):
                raise UserError(f"{folder}: holds files that are not a run; choose another --run")
        if (self.final / CONFIG).is_file() and not overwrite:
            raise UserError(
                f"{self.final}: already holds a run; --overwrite replaces it once the new one is"
                " complete, --run names another folder"
            )
        if (self.folder / CONFIG).is_file() and not overwrite:
            raise UserError(
                f"{self.folder}: holds an unfinished run; --resume continues it, --overwrite"
                " starts afresh"
            )

    def read_config(self) -> dict[str, Any]:
        """config.json of the unfinished run.

        Raises:
            UserError: there is none, or it is damaged.
        """
        if not (self.folder / CONFIG).is_file():
            if (self.final / CONFIG).is_file():
                raise UserError(f"{self.final}: this run is complete, there is nothing to resume")
            raise UserError(f"{self.final}: there is no run to resume")
        return read_json(self.folder / CONFIG)

    def write(self, name: str, writer: Callable[[Path], object]) -> None:
        """Replace file `name` by what `writer` writes to the path it is given, or leave it as it
        was.

        Raises:
            UserError: the disk is full, or the folder not writable.
        """
        path = self.folder / name
        beside = path.with_name(WRITING + name)
        try:
            writer(beside)
            with open(beside, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(beside, path)
            _sync_folder(self.folder)
        except BaseException as error:  # an interrupt too
            beside.unlink(missing_ok=True)
            if isinstance(error, OSError) or type(error).__name__ == "SafetensorError":
                raise unwritable(path, error) from error
            raise

    def write_json(self, name: str, value: Any) -> None:
        """Replace file `name` by this value."""
        self.write(name, lambda path: path.write_text(dumps(value), encoding="utf-8"))

    def save_tensors(self, name: str, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Tensors and everything else that resuming needs, in one file, so that they always belong
        together.
        """
        from safetensors.torch import save

        content = save(tensors, metadata={"state": json.dumps(state)})
        self.write(name, lambda path: path.write_bytes(content))

    def finish(self) -> None:
        """Give the run its name; a run that had it goes away only then."""
        older = self.final.with_name(self.final.name + ".replaced")
        try:
            if older.exists():
                shutil.rmtree(older)
            if self.final.exists():
                os.rename(self.final, older)
            os.rename(self.folder, self.final)
            _sync_folder(self.final.parent)
            if older.exists():
                shutil.rmtree(older)
        except OSError as error:
            raise unwritable(self.final, error) from error
        self.folder = self.final


def read_checkpoint(
    folder: Path, name: str = CHECKPOINT
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `RunFolder.save_tensors` saved.

    Raises:
        UserError: no checkpoint, or a damaged one.
    """
    from safetensors import SafetensorError, safe_open

    path = folder / name
    if not path.is_file():
        raise UserError(f"{folder}: holds no {name}")
    try:
        with safe_open(path, framework="pt") as file:
            state = json.loads(file.metadata()["state"])
            return {name: file.get_tensor(name) for name in file.keys()}, state  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a checkpoint of this program ({error})") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        UserError: unreadable or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object")
    return value


def _whole_files(folder: Path) -> list[Path]:
    """What is in a folder, but for files that a killed process was writing."""
    return [file for file in folder.iterdir() if not file.name.startswith(WRITING)]


def unwritable(path: Path, error: BaseException) -> UserError:
    """The error for a file or folder that cannot be written."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return UserError(f"{path}: cannot be written ({reason})")


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
