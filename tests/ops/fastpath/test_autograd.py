"""The nodes of the fast path are as good citizens of autograd as those that torch has itself."""

from __future__ import annotations

import gc
import importlib
import os
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fused_elbo import (
    NoiseKey,
    elbo_loss,
    gaussian_log_likelihood,
    reparameterize_kl,
)
from tests.ops.fastpath.calls import CALLS, EVENT, leaves, run


@pytest.mark.parametrize("name", CALLS)
def test_nodes_are_those_of_c_plus_plus(name: str) -> None:
    torch.manual_seed(0)
    outputs = CALLS[name](leaves(EVENT, EVENT, EVENT, EVENT, (3, 1), (), (6,)))
    first = outputs if isinstance(outputs, Tensor) else outputs[0]  # type: ignore[index]
    assert first.grad_fn is not None
    kind = {"likelihood": "LikelihoodBackward", "elbo": "ELBOBackward"}.get(name.split(",")[0])
    assert first.grad_fn.name() == (kind or "LatentBackward")
    assert not isinstance(first.grad_fn, torch.autograd.function.BackwardCFunction)


def test_no_graph_is_made_where_no_gradient_is_wanted() -> None:
    mean, logvar = leaves(EVENT, EVENT)
    with torch.no_grad():
        assert reparameterize_kl(mean, logvar)[0].grad_fn is None
    with torch.inference_mode():
        z, kl = reparameterize_kl(mean, logvar)
    assert z.grad_fn is None and z.is_inference() and kl.is_inference()
    z, kl = reparameterize_kl(mean.detach(), logvar.detach())
    assert not z.requires_grad and not kl.requires_grad


def test_an_input_changed_after_forward_is_noticed() -> None:
    for changed in range(3):
        mean, logvar = (t.clone() for t in leaves(EVENT, EVENT))
        seed = torch.tensor(5)
        z, _ = reparameterize_kl(mean, logvar, key=NoiseKey(seed))
        with torch.no_grad():
            (mean, logvar, seed)[changed].add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            z.sum().backward()


@pytest.mark.parametrize("name", ["reparameterize_kl", "likelihood", "elbo"])
def test_a_second_backward_needs_the_graph_kept(name: str) -> None:
    outputs = CALLS[name](leaves(EVENT, EVENT, EVENT, EVENT))
    total = outputs.sum() if isinstance(outputs, Tensor) else outputs[0].sum()  # type: ignore[index]
    total.backward(retain_graph=True)
    total.backward()
    with pytest.raises(RuntimeError, match="second time"):
        total.backward()


@pytest.mark.parametrize("name", ["reparameterize_kl, prior", "likelihood, full", "elbo, full"])
def test_hooks_see_everything_that_is_saved(name: str) -> None:
    inputs = leaves(EVENT, EVENT, EVENT, EVENT, (3, 1), (), (6,))
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t) or len(saved) - 1, saved.__getitem__
    ):
        outputs = CALLS[name](inputs)
        first = outputs if isinstance(outputs, Tensor) else outputs[0]  # type: ignore[index]
        torch.autograd.grad(first.sum(), inputs, allow_unused=True)
    kept = {t.data_ptr() for t in saved} - {t.data_ptr() for t in inputs}
    # Besides inputs: the seed; for the ELBO the gradients of recon_x and recon_logvar.
    assert (
        sum(t.data_ptr() in kept and t.numel() > 0 for t in saved)
        == {
            "reparameterize_kl, prior": 1,
            "likelihood, full": 0,
            "elbo, full": 2,
        }[name]
    )


def test_an_error_in_a_backward_with_a_graph_arrives_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(*_: object) -> None:
        raise ZeroDivisionError("from the formula")

    (mean, logvar) = leaves(EVENT, EVENT)
    monkeypatch.setattr("fused_elbo.calls.latent_backward_plain", fails)
    z, _ = reparameterize_kl(mean, logvar)
    with pytest.raises(ZeroDivisionError, match="from the formula"):
        torch.autograd.grad(z.sum(), mean, create_graph=True)


@pytest.fixture
def graphs() -> Iterator[list[torch.fx.GraphModule]]:
    """What backward is compiled into inside."""
    compiled_autograd = importlib.import_module("torch._dynamo.compiled_autograd")
    found: list[torch.fx.GraphModule] = []

    def compiler(graph: torch.fx.GraphModule) -> torch.fx.GraphModule:
        found.append(graph)
        return graph

    on = importlib.import_module("torch._dynamo.config").patch(compiled_autograd=True)
    with on, compiled_autograd._enable(compiler):
        yield found
    compiled_autograd.reset()


@pytest.mark.parametrize("name", CALLS)
def test_compiled_autograd_has_the_nodes_in_its_graph(
    name: str, graphs: list[torch.fx.GraphModule]
) -> None:
    inputs = leaves(EVENT, EVENT, EVENT, EVENT, (3, 1), (), (6,))
    found = run(CALLS[name], inputs)
    with torch._dynamo.compiled_autograd._disable():
        expected = run(CALLS[name], inputs)
    assert len(graphs) == 1
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


def test_compiled_autograd_compiles_once_for_all_keys(graphs: list[torch.fx.GraphModule]) -> None:
    mean, logvar = leaves((2, 3), (2, 3))
    for key in (NoiseKey(5), NoiseKey(6, 1, 2)):
        z, kl = reparameterize_kl(mean, logvar, key=key)
        (grad,) = torch.autograd.grad(z.sum() + kl.sum(), logvar)
        eps = (z - mean) / (logvar / 2).exp()
        expected = (eps * (logvar / 2).exp() + logvar.exp() - 1) / 2
        torch.testing.assert_close(grad, expected)
    assert len(graphs) == 1


def test_nothing_is_kept_alive() -> None:
    mean, logvar = leaves((256, 1024), (256, 1024))
    gone = []

    def step() -> None:
        z, kl = reparameterize_kl(mean, logvar)
        out = elbo_loss(z, mean, kl=kl)
        ll = gaussian_log_likelihood(z, mean)
        gone.append([weakref.ref(each) for each in (z, kl, out.loss, ll)])
        torch.autograd.grad(out.loss + ll.sum(), (mean, logvar), create_graph=len(gone) % 2 == 0)

    def resident() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    for _ in range(20):
        step()
    gc.collect()
    before = resident()
    for _ in range(200):  # 1 MB a tensor: anything kept would show
        step()
    gc.collect()
    assert resident() - before < 50e6
    assert not [ref for refs in gone for ref in refs if ref() is not None]
