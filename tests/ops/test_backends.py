"""Which backend runs: argument, context, environment, device, in this order; and who says so."""

import logging
import subprocess
import sys

import pytest
import torch

import fused_elbo
from fused_elbo import NoiseKey, backends, explain, reparameterize, use_backend
from fused_elbo.backends import Backend

TENSOR = torch.zeros(2, 3)


@pytest.fixture
def fresh(monkeypatch):
    """Nothing chosen, nothing remembered."""
    with monkeypatch.context() as patched:
        patched.delenv("FUSED_ELBO_BACKEND", raising=False)
        patched.setattr(backends, "_selected", {})
        patched.setattr(backends, "_override", None)
        backends._direct_fastpath()
        yield
    backends._direct_fastpath()


def broken(name, devices=("cpu",)):
    return Backend(name, frozenset(devices), lambda: "it is broken", lambda: None)


def test_the_backend_of_the_suite_is_the_one_that_runs(backend, device):
    kernels = backends.select(device.type, None)
    namespaces = {
        "reference": {None},
        "cpu": {"fused_elbo"},
        "cuda": {"fused_elbo", "fused_elbo_emulated"},
        "triton": {"fused_elbo_triton"},
    }
    assert getattr(kernels, "namespace", None) in namespaces[backend]
    assert explain(torch.zeros(1, device=device)).startswith(f"{backend}: requested")


def test_every_operation_obeys_its_backend_argument(backend, device):
    """Asking for the backend by argument is asking for it by context."""
    mean = torch.randn(4, 5, device=device)
    expected = reparameterize(mean, mean, key=NoiseKey(1))
    with use_backend("reference"):
        assert torch.equal(reparameterize(mean, mean, key=NoiseKey(1), backend=backend), expected)


def test_an_argument_beats_a_context_beats_the_environment(fresh, monkeypatch):
    monkeypatch.setenv("FUSED_ELBO_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="unknown backend 'nonsense'"):
        reparameterize(TENSOR, TENSOR)
    with use_backend("reference"):
        assert backends.select("cpu", None) is None
        monkeypatch.setitem(backends._BACKENDS, "cpu", broken("cpu"))
        with pytest.raises(RuntimeError, match="it is broken"):
            reparameterize(TENSOR, TENSOR, backend="cpu")
    with pytest.raises(ValueError, match="unknown backend 'nonsense'"):
        reparameterize(TENSOR, TENSOR, key=NoiseKey(1))


def test_an_explicit_choice_that_cannot_run_raises_and_says_why(fresh, monkeypatch):
    monkeypatch.setitem(backends._BACKENDS, "cpu", broken("cpu"))
    with pytest.raises(RuntimeError) as error:
        reparameterize(TENSOR, TENSOR, backend="cpu")
    assert str(error.value) == "fused_elbo: backend 'cpu' (requested) cannot run: it is broken"
    monkeypatch.setenv("FUSED_ELBO_BACKEND", "cpu")
    with pytest.raises(RuntimeError) as error:
        reparameterize(TENSOR, TENSOR)
    assert str(error.value) == (
        "fused_elbo: backend 'cpu' (requested by FUSED_ELBO_BACKEND) cannot run: it is broken"
    )


def test_a_backend_for_another_device_raises_and_never_copies(fresh, monkeypatch):
    monkeypatch.setitem(backends._BACKENDS, "cuda", broken("cuda", ["cuda"]))
    with pytest.raises(RuntimeError) as error:
        reparameterize(TENSOR, TENSOR, backend="cuda")
    assert str(error.value) == (
        "fused_elbo: backend 'cuda' (requested) runs on cuda tensors, got a cpu tensor"
    )


def test_an_automatic_fallback_is_logged_once(fresh, monkeypatch, caplog):
    monkeypatch.setitem(backends._BACKENDS, "cpu", broken("cpu"))
    with caplog.at_level(logging.WARNING, logger="fused_elbo"):
        for _ in range(3):
            reparameterize(TENSOR, TENSOR)
    messages = [record.getMessage() for record in caplog.records]
    assert messages == [
        "fused_elbo: using the reference backend on cpu tensors: cpu cannot: it is broken"
    ]
    assert (
        explain(TENSOR)
        == "reference: the first that can run on cpu tensors (cpu cannot: it is broken)"
    )


def test_cpu_tensors_run_on_the_cpu_kernels_by_default(fresh):
    if "cpu" not in {
        name for name, reason in fused_elbo.available_backends().items() if reason is None
    }:
        pytest.skip("the suite was asked to run without the cpu backend")
    assert explain(TENSOR).startswith("cpu: the first that can run")
    assert backends.select("cpu", None).namespace == "fused_elbo"


def test_use_backend_restores_what_was_before(fresh):
    with use_backend("reference"):
        with pytest.raises(ZeroDivisionError), use_backend("cpu"):
            raise ZeroDivisionError
        assert explain(TENSOR).startswith("reference: requested")
    assert backends._override is None


def test_available_backends_gives_a_reason_for_each_that_cannot_run(fresh):
    available = fused_elbo.available_backends()
    assert list(available) == ["cpu", "cuda", "triton", "reference"]
    assert available["reference"] is None
    assert all(reason is None or len(reason) > 10 for reason in available.values())


def test_import_is_cheap_and_initializes_no_device():
    """Importing must not load triton, Dynamo or the kernels, nor touch a device."""
    program = (
        "import sys, torch; before = set(sys.modules); import fused_elbo; "
        "new = {name.split('.')[0] for name in set(sys.modules) - before}; "
        "assert not {'triton', 'numpy', 'scipy', 'nvtx'} & new, new; "
        "assert 'torch._dynamo' in before or 'torch._dynamo' not in sys.modules; "
        "assert not torch.cuda.is_initialized(); "
        "assert not hasattr(torch.ops.fused_elbo, 'latent_forward')"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_public_names_are_all_there():
    assert all(hasattr(fused_elbo, name) for name in fused_elbo.__all__)
    for name in (
        "DiagonalGaussian",
        "ELBOLoss",
        "GaussianLogLikelihood",
        "NoiseKey",
        "Reparameterize",
        "elbo_loss",
        "gaussian_kl",
        "gaussian_log_likelihood",
        "reparameterize",
        "reparameterize_kl",
    ):
        assert name in fused_elbo.__all__
