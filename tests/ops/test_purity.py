"""What an operation leaves behind: inputs unwritten, only inputs and key saved."""

import pytest
import torch

from fused_elbo import (
    DiagonalGaussian,
    NoiseKey,
    elbo_loss,
    gaussian_kl,
    gaussian_log_likelihood,
    reparameterize,
    reparameterize_kl,
)
from tests.ops.support import leaf

KEY = NoiseKey(seed=8)


def calls(device):
    """Every operation, as (name, inputs, outputs that carry a gradient)."""
    a, b, c, d, e = (leaf(6, 4, 3, 5, device=device) for _ in range(5))
    variance, kl = leaf(4, 1, 1, device=device), leaf(6, device=device)
    seed, beta = torch.tensor(77, device=device), torch.tensor(0.5, device=device)
    return [
        ("reparameterize", (a, b, seed), lambda: (reparameterize(a, b, key=NoiseKey(seed)),)),
        ("gaussian_kl", (a, b, c, d), lambda: (gaussian_kl(a, b, c, d),)),
        ("reparameterize_kl", (a, b), lambda: reparameterize_kl(a, b, key=KEY)),
        (
            "with priors",
            (a, b, c, d),
            lambda: reparameterize_kl(a, b, c, d, num_samples=3, key=KEY),
        ),
        ("from_moments", (a,), lambda: DiagonalGaussian.from_moments(a).sample_kl(key=KEY)),
        ("unit variance", (a, b), lambda: (gaussian_log_likelihood(a, b),)),
        ("channel variance", (a, b, variance), lambda: (gaussian_log_likelihood(a, b, variance),)),
        ("full variance", (a, b, c), lambda: (gaussian_log_likelihood(a, b, c),)),
        (
            "elbo_loss",
            (a, b, c, d, e, beta),
            lambda: (elbo_loss(a, b, c, d, recon_logvar=e, beta=beta).loss,),
        ),
        ("elbo_loss of kl", (a, b, kl), lambda: (elbo_loss(a, b, kl=kl).loss,)),
    ]


NAMES = [name for name, *_ in calls(torch.device("cpu"))]


def call(name, device):
    return next((inputs, run) for n, inputs, run in calls(device) if n == name)


@pytest.mark.parametrize("name", NAMES)
def test_no_input_and_no_upstream_gradient_is_written(name, device):
    inputs, run = call(name, device)
    before = [(t.detach().clone(), t._version) for t in inputs]
    outputs = run()
    upstream = [torch.randn_like(t) for t in outputs]
    kept = [(t.clone(), t._version) for t in upstream]
    torch.autograd.backward(outputs, upstream, retain_graph=True)
    torch.autograd.backward(outputs, upstream)
    for t, (value, version) in zip((*inputs, *upstream), before + kept):
        assert torch.equal(t, value)
        assert t._version == version


@pytest.mark.kernels
@pytest.mark.parametrize("name", [name for name in NAMES if "elbo" not in name])
def test_backward_saves_only_inputs_and_key(name, device):
    inputs, run = call(name, device)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        run()
    storages = {t.untyped_storage().data_ptr() for t in inputs}
    assert saved
    for t in saved:
        assert t.untyped_storage().data_ptr() in storages, (
            f"saved a new tensor of shape {tuple(t.shape)}"
        )


@pytest.mark.kernels
def test_a_drawn_seed_is_the_only_thing_saved_beside_the_inputs(device):
    mean, logvar = (leaf(6, 50, device=device) for _ in range(2))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        reparameterize_kl(mean, logvar)
    storages = {t.untyped_storage().data_ptr() for t in (mean, logvar)}
    new = [t for t in saved if t.untyped_storage().data_ptr() not in storages]
    assert [(t.shape, t.dtype) for t in new] == [((), torch.int64)]


@pytest.mark.kernels
def test_elbo_loss_saves_its_inputs_and_one_gradient_for_each_but_x(device):
    """Backward of the loss only scales, so the gradients of the forward pass are what it keeps."""
    recon_x, x, mean, logvar = (leaf(6, 50, device=device) for _ in range(4))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        elbo_loss(recon_x, x, mean, logvar)
    storages = {t.untyped_storage().data_ptr() for t in (recon_x, x, mean, logvar)}
    new = [t for t in saved if t.untyped_storage().data_ptr() not in storages]
    assert sum(t.numel() for t in new) == 3 * 6 * 50


def test_nothing_is_saved_where_no_gradient_is_wanted(device):
    def refuse(t):
        raise AssertionError("saved a tensor")

    for _, _, run in calls(device):
        with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(refuse, refuse):
            assert not any(t.requires_grad for t in run())


def test_a_key_touches_no_random_state(device):
    every = calls(device)
    before = random_states(device)
    for _, _, run in every:
        outputs = run()
        torch.autograd.backward(outputs, [torch.ones_like(t) for t in outputs])
    assert all(torch.equal(a, b) for a, b in zip(before, random_states(device)))


def random_states(device):
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state()] if device.type == "cuda" else [])


@pytest.mark.kernels
def test_changing_an_input_between_forward_and_backward_is_an_error(device):
    """What saving inputs buys: autograd's version check protects them."""
    for name in ("reparameterize_kl", "full variance", "elbo_loss"):
        inputs, run = call(name, device)
        loss = sum(t.sum() for t in run())
        with torch.no_grad():
            inputs[1].add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_outputs_do_not_share_memory_with_inputs_or_each_other(device):
    for _, inputs, run in calls(device):
        outputs = run()
        grads = torch.autograd.grad(
            outputs, [t for t in inputs if t.requires_grad], [torch.ones_like(t) for t in outputs]
        )
        storages = [t.untyped_storage().data_ptr() for t in (*inputs, *outputs, *grads)]
        assert len(set(storages)) == len(storages)
