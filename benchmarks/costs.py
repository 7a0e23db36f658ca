"""What a pass costs besides time: memory, launches, and how far its numbers are from float64."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .providers import Compute
from .timing import Pass
from .workloads import Inputs, Workload

# Operations that move no data.
_METADATA = frozenset(
    f"aten::{name}"
    for name in (
        *(
            "empty",
            "empty_like",
            "empty_strided",
            "new_empty",
            "new_empty_strided",
            "view",
            "reshape",
        ),
        *(
            "expand",
            "expand_as",
            "as_strided",
            "detach",
            "alias",
            "chunk",
            "split",
            "narrow",
            "slice",
        ),
        *("squeeze", "unsqueeze", "flatten", "unflatten", "t", "transpose", "permute", "select"),
        *(
            "_unsafe_view",
            "_reshape_alias",
            "result_type",
            "resize_",
            "item",
            "_local_scalar_dense",
        ),
        *("is_nonzero", "set_", "lift_fresh", "to", "resolve_conj", "resolve_neg", "unbind"),
    )
)


def peak_and_launches(each: Pass, device: torch.device) -> tuple[int, int]:
    """(bytes, kernels) of a forward and backward pass.

    Bytes: the most that is allocated at one time beyond what was there before. Kernels: on a GPU
    those launched; on a CPU the operations that touch data (compiled code counts none, see
    `compiled_kernels`).
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    with torch.profiler.profile(activities=activities, profile_memory=device.type == "cpu") as run:
        each.backward(each.forward())
        if device.type == "cuda":
            torch.cuda.synchronize()
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() - before
        kernels = [e for e in run.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        return peak, len([e for e in kernels if not e.name.startswith(("Memset", "Memcpy"))])
    held = peak = 0
    for event in run.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak, len([e for e in run.events() if _touches_data(e)])


def _touches_data(event: Any) -> bool:
    if event.name in _METADATA or not event.name.startswith(("aten::", "fused_elbo")):
        return False
    return not any(_touches_data(child) for child in event.cpu_children)


def compiled_kernels() -> int:
    """How many kernels torch.compile has generated since the last call."""
    from torch._inductor import metrics

    count = int(metrics.generated_kernel_count)
    metrics.reset()
    return count


def saved_bytes(each: Pass, inputs: Iterable[Tensor]) -> int:
    """What forward keeps for backward besides its inputs."""
    known = {t.untyped_storage().data_ptr() for t in inputs}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = each.forward()
    del outputs
    return sum(kept.values())


def errors(workload: Workload, compute: Compute, inputs: Inputs) -> tuple[float, float]:
    """Relative error of the nats, and of their gradients (against the largest), against float64.

    z takes no part: every provider draws noise of its own.
    """
    exact_inputs = inputs.double()
    exact = _exact(workload, exact_inputs)
    nats = compute(inputs)[-1]
    if nats.dim() == 0 and exact.dim() > 0:
        exact = exact.sum()
    wanted = torch.autograd.grad(exact.sum(), exact_inputs.leaves)
    given = torch.autograd.grad(nats.sum(), inputs.leaves)
    error = _largest((nats.double() - exact).abs() / exact.abs())
    gradient_error = max(
        _largest((g.double() - w).abs() / w.abs().max()) for g, w in zip(given, wanted)
    )
    return error, gradient_error


def _largest(values: Tensor) -> float:
    return math.nan if values.isnan().any() else float(values.detach().max())


def _exact(workload: Workload, i: Inputs) -> Tensor:
    from fused_elbo import reference
    from fused_elbo.parametrization import PLAIN_SCALE

    if workload.kind in ("latent", "moments"):
        if workload.kind == "latent":
            mean, logvar = i["mean"], i["logvar"]
        else:
            mean, logvar = i["moments"].chunk(2, 1)
            logvar = logvar.clamp(-30.0, 20.0)
        priors = i.get("prior_mean"), i.get("prior_logvar")
        kl = reference.sample_and_kl(mean, logvar, *priors, None, PLAIN_SCALE, "sample")[1]
        assert kl is not None
        return kl
    if workload.kind == "likelihood":
        logvar = i.get("logvar")
        batch_dims = 2 if workload.samples else 1
        variance = 0.0 if logvar is None else logvar
        return reference.log_likelihood(i["x"], i["mean"], variance, batch_dims, "sample")
    posterior = i["posterior_mean"], i["posterior_logvar"]
    return reference.elbo(i["mean"], i["x"], 0.0, *posterior, None, 1.0, "batchmean")[0]
