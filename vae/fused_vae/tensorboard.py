"""The rows of metrics.csv as curves in TensorBoard, where it is installed."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FOLDER = "tensorboard"
LEFT_OUT = ("epoch", "step", "seconds")


class Board:
    """Event files in ``RUN/tensorboard``, written afresh from the history when a run is resumed.

    Without the package tensorboard this does nothing.
    """

    def __init__(self, run: Path, history: Sequence[dict[str, float]]) -> None:
        self._writer: Any = None
        if not available():
            return
        from torch.utils.tensorboard import SummaryWriter

        folder = run / FOLDER
        if folder.exists():
            shutil.rmtree(folder)
        self._writer = SummaryWriter(str(folder))
        for row in history:
            self.add(row)

    def add(self, row: dict[str, float]) -> None:
        """One row of the history, at its step."""
        if self._writer is None:
            return
        for name, value in row.items():
            if name not in LEFT_OUT:
                self._writer.add_scalar(_tag(name), value, int(row["step"]))
        self._writer.flush()

    def close(self) -> None:
        """Before the run folder is renamed."""
        if self._writer is not None:
            self._writer.close()


def available() -> bool:
    """Whether TensorBoard is installed."""
    return importlib.util.find_spec("tensorboard") is not None


def _tag(name: str) -> str:
    if name == "beta":
        return "train/beta"
    if name.startswith("train_"):
        return "train/" + name.removeprefix("train_")
    return "held-out/" + name
