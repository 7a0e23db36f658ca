"""What a run may use, and whether it is there."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass

import torch

from .errors import UserError, missing_package


@dataclass(frozen=True)
class Machine:
    """What a run may use, which its result does not depend on (threads: to rounding)."""

    device: str | None = None
    threads: int | None = None
    progress: bool = True
    tensorboard: bool = False  # asked for: say so if it is not installed

    def prepare(self) -> torch.device:
        """Apply the thread count and check the device.

        Raises:
            UserError: no such device.
        """
        if self.threads is not None:
            if self.threads < 1:
                raise UserError(f"--threads must be at least 1, got {self.threads}")
            torch.set_num_threads(self.threads)
        name = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        if name not in ("cpu", "cuda"):
            raise UserError(f"--device must be cpu or cuda, got {name}")
        if name == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda: this torch sees no GPU")
        if name == "cpu":
            return torch.device(name)
        device = torch.device(name, int(os.environ.get("LOCAL_RANK", "0")))
        if device.index >= torch.cuda.device_count():
            count = torch.cuda.device_count()
            raise UserError(f"--device cuda: more ranks than the {count} GPUs of this machine")
        torch.cuda.set_device(device)
        return device


def check_packages() -> None:
    """Say at the start, not after the first epoch, what is missing.

    Raises:
        UserError: how to install it.
    """
    for package, purpose in (
        ("safetensors", "saving a run"),
        ("matplotlib", "drawing"),
        ("tqdm", "the progress bar"),
    ):
        if importlib.util.find_spec(package) is None:
            raise missing_package(package, purpose)
