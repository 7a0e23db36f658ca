"""The fast path: the same results as the Python it stands for, and no call that it should leave."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import fused_elbo
from fused_elbo import (
    elbo_loss,
    fastpath,
    gaussian_kl,
    gaussian_log_likelihood,
    reparameterize_kl,
)
from tests.ops.fastpath.calls import CALLS, EVENT, leaves, run


@contextmanager
def in_python(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Everything inside runs without the fast path."""
    with monkeypatch.context() as patched:
        for name in fastpath._FUNCTIONS:
            patched.setattr(fastpath, name, fastpath._not_here)
        yield


@pytest.mark.usefixtures("called")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CALLS)
def test_results_and_gradients_are_bitwise_those_of_python(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    nats = (6,)
    shapes = (EVENT, EVENT, EVENT, EVENT, (3, 1), (), nats)
    inputs = leaves(*shapes, dtype=dtype)
    fast = run(CALLS[name], inputs)
    with in_python(monkeypatch):
        slow = run(CALLS[name], inputs)
    for a, b in zip(fast, slow, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert a.dtype == b.dtype
            assert torch.equal(a, b)


class Watched(Tensor):
    """A subclass that takes part in everything."""


class Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        return func(*args, **(kwargs or {}))


def _subclass() -> tuple[object, ...]:
    return (torch.zeros(2, 3).as_subclass(Watched), torch.zeros(2, 3))


PASSED_ON: dict[str, Callable[[], tuple[object, ...]]] = {
    "no tensor": lambda: ([[0.0]], torch.zeros(1, 1)),
    "None": lambda: (None, torch.zeros(1, 1)),
    "integers": lambda: (torch.zeros(2, 3, dtype=torch.int64),) * 2,
    "complex": lambda: (torch.zeros(2, 3, dtype=torch.complex64),) * 2,
    "no batch": lambda: (torch.zeros(()), torch.zeros(())),
    "two shapes": lambda: (torch.zeros(2, 3), torch.zeros(2, 1)),
    "two dtypes": lambda: (torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bfloat16)),
    "two devices": lambda: (torch.zeros(2, 3), torch.zeros(2, 3, device="meta")),
    "meta": lambda: (torch.zeros(2, 3, device="meta"),) * 2,
    "sparse": lambda: (torch.zeros(2, 3).to_sparse(),) * 2,
    "a lazy negation": lambda: (torch.zeros(2, 3, dtype=torch.complex64).conj().imag,) * 2,
    "a subclass": _subclass,
}


@pytest.mark.parametrize("name", PASSED_ON)
def test_what_is_not_plain_is_left_to_python(name: str) -> None:
    first, second = PASSED_ON[name]()
    assert fastpath.reparameterize_kl(first, second, None, None, "sample") is None
    assert fastpath.gaussian_kl(first, second, None, None, "sample") is None
    assert fastpath.posterior(first, second, -1, -1.0, 1.0, True, "sample") is None
    assert fastpath.gaussian_log_likelihood(first, second, None, "sample") is None
    assert fastpath.elbo_loss(first, second, second, second, None, None, 1.0, "sum") is None


@pytest.mark.parametrize("reduction", ["mean", 1, ["sum"], None])
def test_reductions_that_do_not_exist_are_left_to_python(reduction: object) -> None:
    a = torch.zeros(2, 3)
    assert fastpath.gaussian_kl(a, a, None, None, reduction) is None
    assert fastpath.gaussian_log_likelihood(a, a, None, reduction) is None
    assert fastpath.elbo_loss(a, a, a, a, None, None, 1.0, reduction) is None
    if reduction is not None:  # which stands for no KL there
        assert fastpath.posterior(a, a, -1, -1.0, 1.0, True, reduction) is None
        assert fastpath.reparameterize_kl(a, a, None, None, reduction) is None


def test_odd_combinations_of_arguments_are_left_to_python() -> None:
    a, row, nats = torch.zeros(2, 3), torch.zeros(3), torch.zeros(2)
    assert fastpath.reparameterize_kl(a, a, a, None, "sample") is None
    assert fastpath.reparameterize_kl(a, a, row, row, "sample") is None
    assert fastpath.gaussian_log_likelihood(a, a, "unit", "sample") is None
    assert fastpath.gaussian_log_likelihood(a, a, float("nan"), "sample") is None
    assert fastpath.gaussian_log_likelihood(a, a, True, "sample") is None
    assert fastpath.gaussian_log_likelihood(a, row, None, "sample") is None
    assert fastpath.elbo_loss(a, a, a, a, nats, None, 1.0, "sum") is None
    assert fastpath.elbo_loss(a, a, None, None, None, None, 1.0, "sum") is None
    assert fastpath.elbo_loss(a, a, a, None, None, None, 1.0, "sum") is None
    assert fastpath.elbo_loss(a, a, a[:1], a[:1], None, None, 1.0, "sum") is None
    assert fastpath.elbo_loss(a, a, None, None, row, None, 1.0, "sum") is None
    assert fastpath.elbo_loss(a, a, None, None, nats.double(), None, 1.0, "sum") is None
    assert fastpath.elbo_loss(a, a, a.double(), a.double(), None, None, 1.0, "sum") is None
    assert fastpath.elbo_loss(a, a, a, a, None, None, float("nan"), "sum") is None
    assert fastpath.elbo_loss(a, a, a, a, None, None, 1.0, "none") is None


def test_whoever_watches_sees_python() -> None:
    a = torch.zeros(2, 3)

    def taken(mean: Tensor) -> bool:
        done = fastpath.reparameterize_kl(mean, mean, None, None, "sample")
        return done is not None

    assert taken(a)
    with Mode():
        assert not taken(a)
    with FakeTensorMode() as mode:
        assert not taken(mode.from_tensor(a))
    with forward_ad.dual_level():
        assert not taken(forward_ad.make_dual(a, a))
    seen = []
    torch.func.grad(lambda t: (seen.append(taken(t)), t.sum())[1])(a)
    torch.func.vmap(lambda t: (seen.append(taken(t)), t)[1])(a.expand(4, 2, 3))
    torch.jit.trace(lambda t: (seen.append(taken(t)), t + 1)[1], (a,), check_trace=False)
    assert seen == [False, False, False]
    assert taken(a)


def test_an_explicit_choice_of_another_backend_is_respected() -> None:
    a = torch.zeros(2, 3)
    assert fastpath.gaussian_kl(a, a, None, None, "sample") is not None
    with fused_elbo.use_backend("reference"):
        gaussian_kl(a, a)
        assert fastpath.gaussian_kl(a, a, None, None, "sample") is None
        with fused_elbo.use_backend("cpu"):
            gaussian_kl(a, a)
            assert fastpath.gaussian_kl(a, a, None, None, "sample") is not None
        assert fastpath.gaussian_kl(a, a, None, None, "sample") is None
    fused_elbo.tracing.enable()
    try:
        assert fastpath.gaussian_kl(a, a, None, None, "sample") is None
    finally:
        fused_elbo.tracing.disable()
    assert fastpath.gaussian_kl(a, a, None, None, "sample") is not None


def test_a_parameter_is_a_plain_tensor() -> None:
    mean = torch.nn.Parameter(torch.zeros(2, 3))
    z, _ = reparameterize_kl(mean, mean)
    assert z.grad_fn is not None and z.grad_fn.name() == "LatentBackward"


@pytest.mark.usefixtures("called")
def test_the_profiler_shows_the_operations_by_name() -> None:
    mean, logvar = leaves(EVENT, EVENT)
    with torch.profiler.profile(record_shapes=True) as profile:
        z, kl = reparameterize_kl(mean, logvar)
        (z.sum() + kl.sum()).backward()
        elbo_loss(mean, logvar, mean, logvar).loss.backward()
        gaussian_log_likelihood(mean, logvar).sum().backward()
    shapes = {e.key: e.input_shapes for e in profile.key_averages(group_by_input_shape=True)}
    for name in ("latent_forward", "latent_backward", "likelihood_forward", "likelihood_backward"):
        assert shapes[f"fused_elbo::{name}"][:2] == [list(EVENT), list(EVENT)]
    assert "fused_elbo::elbo_forward" in shapes


def test_a_wrong_number_of_arguments_is_an_error() -> None:
    with pytest.raises(TypeError, match="expected 5 arguments, got 2"):
        fastpath.gaussian_kl(torch.zeros(1, 1), torch.zeros(1, 1))
