"""Registers the operations in the namespace ``fused_elbo_triton``; `fused_elbo.ops` adds shapes and
autograd.
"""

from __future__ import annotations

import functools

import torch

from ..schemas import SCHEMAS
from . import interpreting

NAMESPACE = "fused_elbo_triton"
_library: torch.library.Library | None = None  # collected, it would take the operations with it


@functools.cache
def register() -> None:
    """Defines every raw operation for CUDA and ROCm tensors, and for CPU tensors under the
    interpreter. Imports Triton.
    """
    global _library
    from . import elbo_operations, latent_operations, likelihood_operations

    _library = torch.library.Library(NAMESPACE, "DEF")
    keys = ("CUDA", "CPU") if interpreting() else ("CUDA",)
    for name, schema in SCHEMAS.items():
        modules = (latent_operations, likelihood_operations, elbo_operations)
        (operation,) = {vars(module)[name] for module in modules if name in vars(module)}
        _library.define(name + schema)
        for key in keys:
            _library.impl(name, operation, key)
