"""The Triton backend: NVIDIA GPUs without the compiled extension, AMD GPUs, and the Triton
interpreter.

Importing this package does not import Triton, which is slow and may be missing; `library.register`
does. What lives where: `formulas`, `scale` and `noise` are the arithmetic, `tiles` the addressing,
`latent`, `likelihood`, `elbo` and `reduction` the kernels, `geometry` strides and launch shapes,
`launch` and `*_operations` the launchers, `library` their registration, `warmup` and `aot`
compilation before use.
"""

from __future__ import annotations

import importlib.util
import os

__all__ = ["interpreting", "reason"]


def interpreting() -> bool:
    """Whether Triton runs kernels in its interpreter, on the CPU (``TRITON_INTERPRET=1``, set
    before Triton is imported).
    """
    return os.environ.get("TRITON_INTERPRET") == "1"


def reason() -> str | None:
    """Why this backend cannot run here, or None if it can. Does not import Triton."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    if interpreting():
        return None
    import torch

    if torch.version.cuda is None and torch.version.hip is None:
        return (
            "this torch is built for the CPU alone (TRITON_INTERPRET=1 runs Triton's interpreter)"
        )
    if not torch.cuda.is_available():
        return "torch finds no GPU (TRITON_INTERPRET=1 runs Triton's interpreter)"
    return None
