"""torch.func and forward mode: grad, vmap, jacrev, hessian, jvp, with the noise of plain calls."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, grad_and_value, hessian, jacfwd, jacrev, jvp, vjp, vmap

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

KEY = NoiseKey(seed=14, stream=1)


def total_of_latent(a, b, c, d):
    z, kl = reparameterize_kl(a, b, c, d, key=KEY)
    return (z.square().sum(-1) * kl).sum()


def total_of_samples(a, b, c, d):
    z, kl = reparameterize_kl(a, b, key=NoiseKey(torch.tensor(9, device=a.device)), num_samples=2)
    return z.sin().sum() + (kl.square() * c.sum()).sum() + d.sum()


def total_of_moments(a, b, c, d):
    z, kl = DiagonalGaussian.from_moments(torch.cat((a, b), 1), clamp=(-5.0, 5.0)).sample_kl(
        key=KEY
    )
    return (z * c).sum() + (kl * d.sum(-1)).sum()


def total_of_likelihood(a, b, c, d):
    return gaussian_log_likelihood(a, b, c).sin().sum() + gaussian_log_likelihood(a, b, d[:1]).sum()


def total_of_elbo(a, b, c, d):
    out = elbo_loss(a, b, c, d, recon_logvar=a[:1].detach(), beta=0.5)
    return out.loss.square()


def total_of_halves(a, b, c, d):
    kl = gaussian_kl(a, b, c, d, reduction="none")
    return (reparameterize(a, b, key=KEY) * kl).sum() + elbo_loss(
        c, d, kl=kl.sum(-1), reduction="sum"
    ).loss


TOTALS = [
    total_of_latent,
    total_of_samples,
    total_of_moments,
    total_of_likelihood,
    total_of_elbo,
    total_of_halves,
]
every_total = pytest.mark.parametrize("total", TOTALS, ids=lambda f: f.__name__)


def inputs(device, *batch):
    return tuple(
        leaf(*batch, 3, 4, dtype=torch.float64, device=device, scale=0.7).detach() for _ in range(4)
    )


def plain_gradients(total, arguments):
    leaves = [t.clone().requires_grad_() for t in arguments]
    return torch.autograd.grad(total(*leaves), leaves, materialize_grads=True)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@every_total
def test_func_grad_is_autograd(total, device):
    arguments = inputs(device)
    gradients, value = grad_and_value(total, argnums=(0, 1, 2, 3))(*arguments)
    close(value, total(*arguments))
    close(gradients, plain_gradients(total, arguments))


@every_total
def test_one_argument_alone(total, device):
    arguments = inputs(device)
    for i in range(4):
        close(grad(total, argnums=i)(*arguments), plain_gradients(total, arguments)[i])


@every_total
def test_vmap_is_a_loop(total, device):
    arguments = inputs(device, 5)
    expected = torch.stack([total(*(t[i] for t in arguments)) for i in range(5)])
    close(vmap(total)(*arguments), expected)


@every_total
def test_vmap_over_some_arguments_and_other_dimensions(total, device):
    arguments = inputs(device, 2)
    mapped = arguments[0], arguments[1][0], arguments[2].movedim(0, 1), arguments[3][0]
    actual = vmap(total, in_dims=(0, None, 1, None))(*mapped)
    expected = [total(arguments[0][i], mapped[1], arguments[2][i], mapped[3]) for i in range(2)]
    close(actual, torch.stack(expected))


@every_total
def test_vmap_of_grad_gives_gradients_per_sample(total, device):
    arguments = inputs(device, 4)
    actual = vmap(grad(total, argnums=(0, 1, 2, 3)))(*arguments)
    rows = [plain_gradients(total, [t[i] for t in arguments]) for i in range(4)]
    close(actual, tuple(torch.stack(column) for column in zip(*rows)))


@every_total
def test_jacrev_and_jacfwd_agree_with_autograd(total, device):
    arguments = inputs(device)
    expected = plain_gradients(total, arguments)
    close(jacrev(total, argnums=(0, 1, 2, 3))(*arguments), expected)
    close(jacfwd(total, argnums=(0, 1, 2, 3))(*arguments), expected)


@every_total
def test_hessian_agrees_with_autograd(total, device):
    arguments = inputs(device)
    for i in range(2):

        def of_one(t, i=i):
            return total(*arguments[:i], t, *arguments[i + 1 :])

        expected = torch.autograd.functional.hessian(of_one, arguments[i])
        close(hessian(of_one)(arguments[i]), expected)


@every_total
def test_jvp_is_the_directional_derivative(total, device):
    arguments, directions = inputs(device), inputs(device)
    value, tangent = jvp(total, arguments, directions)
    close(value, total(*arguments))
    expected = sum((g * d).sum() for g, d in zip(plain_gradients(total, arguments), directions))
    close(tangent, expected)
    assert tangent.abs() > 1e-3


@every_total
def test_dual_numbers_carry_the_directional_derivative(total, device):
    arguments, directions = inputs(device), inputs(device)
    with forward_ad.dual_level():
        out = total(*(forward_ad.make_dual(t, d) for t, d in zip(arguments, directions)))
        value, tangent = forward_ad.unpack_dual(out)
    close(value, total(*arguments))
    close(
        tangent, sum((g * d).sum() for g, d in zip(plain_gradients(total, arguments), directions))
    )


def test_vjp_of_both_outputs(device):
    mean, logvar, *_ = inputs(device)
    outputs, pull = vjp(lambda a, b: reparameterize_kl(a, b, key=KEY), mean, logvar)
    upstream = tuple(torch.randn_like(t) for t in outputs)
    leaves = [t.clone().requires_grad_() for t in (mean, logvar)]
    expected = torch.autograd.grad(reparameterize_kl(*leaves, key=KEY), leaves, upstream)
    close(pull(upstream), expected)


def test_each_entry_under_vmap_has_the_noise_of_a_call_of_its_own(device):
    zeros = torch.zeros(3, 2, 5, device=device)
    z = vmap(lambda a: reparameterize(a, a, key=KEY))(zeros)
    expected = reparameterize(zeros[0], zeros[0], key=KEY)
    for i in range(3):
        assert torch.equal(z[i], expected)


def test_a_seed_per_entry_under_vmap(device):
    seeds = torch.tensor([3, 4, -5], device=device)
    zeros = torch.zeros(2, 5, device=device)
    z = vmap(lambda seed: reparameterize(zeros, zeros, key=NoiseKey(seed)))(seeds)
    for i, seed in enumerate(seeds.tolist()):
        assert torch.equal(z[i], reparameterize(zeros, zeros, key=NoiseKey(seed)))


def test_vmap_without_a_key_obeys_its_randomness_argument(device):
    zeros = torch.zeros(3, 2, 5, device=device)
    same = vmap(lambda a: reparameterize(a, a), randomness="same")(zeros)
    assert torch.equal(same[0], same[1])
    different = vmap(lambda a: reparameterize(a, a), randomness="different")(zeros)
    assert not torch.equal(different[0], different[1])
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(lambda a: reparameterize(a, a))(zeros)


def test_per_sample_gradients_of_a_model(device):
    """The opacus recipe: functional_call under vmap(grad)."""
    model = torch.nn.Linear(4, 6).to(device).double()
    parameters = dict(model.named_parameters())
    x = torch.randn(5, 4, dtype=torch.float64, device=device)

    def loss(parameters, x):
        mean, logvar = torch.func.functional_call(model, parameters, x[None]).chunk(2, 1)
        z, kl = reparameterize_kl(mean, logvar, key=KEY)
        return (z.square().sum(1) + kl).sum()

    actual = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    for i in range(5):
        expected = torch.autograd.grad(loss(parameters, x[i]), list(parameters.values()))
        for name, e in zip(parameters, expected):
            close(actual[name][i], e)
