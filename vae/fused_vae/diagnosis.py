"""Where a number that is not finite came from: which layer, and which images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .recipe import Parts

SHOWN = 10
"""Image numbers in a message."""


@dataclass
class Finding:
    """What one rank found. `order` counts layers in the order in which they ran."""

    value: float
    order: int = 1 << 30
    where: str = "in the loss itself"
    images: list[int] = field(default_factory=list)  # their numbers in the data set


def forward_pass(
    model: nn.Module, run: Callable[[], Parts], value: float, numbers: list[int]
) -> Finding:
    """The first layer whose output is not finite when `run` is repeated, and the images whose
    parts are not.
    """
    finding = Finding(value)
    handles = []
    calls = 0

    def hook(name: str) -> Any:
        def look(_module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            nonlocal calls
            calls += 1
            if finding.order < calls:
                return
            if not all(_finite(t) for t in _tensors(inputs)):
                finding.order, finding.where = calls, f"in what layer {name} was given"
            elif not all(_finite(t) for t in _tensors(output)):
                finding.order, finding.where = calls, f"in layer {name}"

        return look

    for name, module in model.named_modules():
        if not any(module.children()):
            handles.append(module.register_forward_hook(hook(name)))
    try:
        with torch.no_grad():
            parts = run()
    finally:
        for handle in handles:
            handle.remove()
    finite = torch.ones(len(numbers), dtype=torch.bool)
    for part in parts.values():
        if part.dim() > 0:
            finite &= part.detach().reshape(len(part), -1).isfinite().all(1).cpu()
    finding.images = [number for number, good in zip(numbers, finite.tolist()) if not good]
    return finding


def backward_pass(
    model: nn.Module, loss_of: Callable[[int], Tensor], value: float, numbers: list[int]
) -> Finding:
    """The last layer whose gradient is not finite, the first that backward came to, and the images
    that have such a gradient when alone (``loss_of(i)``: the loss of the i-th).
    """
    finding = Finding(value)
    parameters = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    for place, (name, parameter) in enumerate(reversed(parameters)):
        if parameter.grad is not None and not _finite(parameter.grad):
            finding.order, finding.where = place, f"in layer {name.rpartition('.')[0]}"
            break
    for index, number in enumerate(numbers):
        gradients = torch.autograd.grad(
            loss_of(index), [p for _, p in parameters], allow_unused=True
        )
        if not all(_finite(g) for g in gradients if g is not None):
            finding.images.append(number)
    return finding


def message(what: str, findings: list[Finding], batch: int) -> str:
    """One line from what every rank found; `what`: the loss or the gradient."""
    first = min(findings, key=lambda f: f.order)
    value = next((f.value for f in findings if not -1e308 < f.value < 1e308), first.value)
    images = [number for finding in findings for number in finding.images]
    text = f"the {what} became {value}, first {first.where}"
    if images:
        shown = ", ".join(map(str, images[:SHOWN])) + (", ..." if len(images) > SHOWN else "")
        text += f", for {len(images)} of {batch} images of the batch (numbers {shown} of the data)"
    return f"{text}; nothing was updated; a lower --lr or another --variance may help"


def unusable_parameter(model: nn.Module) -> str | None:
    """The first parameter that is not finite."""
    return next((name for name, p in model.named_parameters() if not _finite(p)), None)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from _tensors(each)


def _finite(tensor: Tensor) -> bool:
    return bool(tensor.detach().isfinite().all())
