"""torch.distributions: the registered KLs and FusedNormal, against torch's formulas in float64."""

import pytest
import torch
from torch.distributions import Exponential, Independent, LogNormal, Normal, kl_divergence
from torch.distributions import kl as registry

from fused_elbo.integrations import distributions
from fused_elbo.integrations.distributions import FusedNormal


def parameters(*shape, dtype=torch.float32):
    loc = torch.randn(shape, dtype=dtype).requires_grad_()
    return loc, (torch.rand(shape, dtype=dtype) + 0.3).requires_grad_()


def double(*tensors):
    return [t.detach().double().requires_grad_() for t in tensors]


def both(compute, *tensors):
    """Value and gradients with the KLs of this package, and those of torch in float64."""
    results = []
    exact = double(*tensors)
    with distributions.applied():
        results.append((compute(*tensors), tensors))
    results.append((compute(*exact), exact))
    weights = torch.randn(results[0][0].shape)
    return [
        (value, torch.autograd.grad(value, inputs, weights.to(value.dtype)))
        for value, inputs in results
    ]


def assert_same(compute, *tensors):
    (value, gradients), (expected, expected_gradients) = both(compute, *tensors)
    torch.testing.assert_close(value.double(), expected, rtol=3e-6, atol=2e-6)
    for a, b in zip(gradients, expected_gradients):
        torch.testing.assert_close(a.double(), b, rtol=2e-5, atol=1e-6 * b.abs().max().item())


SHAPES = [
    ((), ()),
    ((5,), ()),
    ((3, 4), (3, 4)),
    ((3, 1), (1, 4)),
    ((2, 3, 4), (4,)),
    ((4,), (3, 4)),
]


@pytest.mark.parametrize(("p", "q"), SHAPES, ids=str)
def test_kl_of_normals(p, q):
    assert_same(
        lambda a, b, c, d: kl_divergence(Normal(a, b), Normal(c, d)),
        *parameters(*p),
        *parameters(*q),
    )


@pytest.mark.parametrize("events", [1, 2, 3])
def test_kl_of_independent_normals(events):
    def compute(a, b, c, d):
        p, q = Normal(a, b), Normal(c, d).expand(a.shape)
        return kl_divergence(Independent(p, events), Independent(q, events))

    assert_same(compute, *parameters(2, 3, 4), *parameters(3, 4))


def test_kl_near_zero_keeps_its_digits():
    loc, scale = torch.zeros(1000), torch.linspace(1 - 1e-4, 1 + 1e-4, 1000)
    exact = kl_divergence(Normal(loc.double(), scale.double()), Normal(0.0, 1.0))
    with distributions.applied():
        kl = kl_divergence(Normal(loc, scale), Normal(torch.zeros(()), torch.ones(())))
    assert (kl >= 0).all()
    torch.testing.assert_close(kl.double(), exact, rtol=1e-5, atol=0)


def test_the_kl_of_independents_is_the_sum_of_the_elements_bit_for_bit():
    p, q = Normal(*parameters(3, 700)), Normal(*parameters(3, 700))
    with distributions.applied():
        kl = kl_divergence(Independent(p, 1), Independent(q, 1))
        elements = kl_divergence(p, q)
    assert "Latent" in elements.grad_fn.next_functions[0][0].name() + elements.grad_fn.name()
    assert torch.equal(kl, elements.sum(-1))


def test_other_kls_are_left_to_torch():
    p, q = Normal(*parameters(3, 4)), Normal(*parameters(3, 4))
    rate = Exponential(torch.ones(3, 4))
    with distributions.applied():
        torch.testing.assert_close(
            kl_divergence(Independent(rate, 1), Independent(rate, 1)), torch.zeros(3)
        )
        with pytest.raises(NotImplementedError):
            kl_divergence(Independent(p, 1), Independent(q, 2))
        reached = kl_divergence(LogNormal(p.loc, p.scale), LogNormal(q.loc, q.scale))
        torch.testing.assert_close(reached, kl_divergence(p, q))


def test_a_subclass_with_a_kl_of_its_own_keeps_it():
    class Mine(Normal):
        pass

    @registry.register_kl(Mine, Mine)
    def kl_mine_mine(p, q):
        return torch.full(p.batch_shape, 7.0)

    try:
        p = Mine(*parameters(3, 4))
        with distributions.applied():
            assert (kl_divergence(Independent(p, 1), Independent(p, 1)) == 28).all()
    finally:
        del registry._KL_REGISTRY[Mine, Mine]
        registry._KL_MEMOIZE.clear()


def test_undo_restores_the_very_same_rules():
    before = dict(registry._KL_REGISTRY)
    distributions.apply()
    distributions.apply()
    assert registry._KL_REGISTRY[Normal, Normal] is not before[Normal, Normal]
    p = Normal(*parameters(3))
    kl_divergence(p, p)  # torch remembers which rule it chose
    distributions.undo()
    assert all(registry._KL_REGISTRY[pair] is rule for pair, rule in before.items())
    assert "Latent" not in kl_divergence(p, p).grad_fn.name()


def test_half_precision_nats_are_float32():
    loc, scale = torch.tensor([400.0]).half(), torch.tensor([1.0]).half()
    with distributions.applied():
        kl = kl_divergence(Normal(loc, scale), Normal(torch.zeros_like(loc), scale))
    assert kl.dtype == torch.float32 and kl.item() == 80000


def test_traces_of_torch_jit_keep_their_gradients():
    def compute(loc, scale):
        return kl_divergence(Normal(loc, scale), Normal(torch.zeros(3), torch.ones(3))).sum()

    inputs = parameters(3)
    with distributions.applied():
        traced = torch.jit.trace(compute, inputs)
        gradients = torch.autograd.grad(traced(*inputs), inputs)
    expected = torch.autograd.grad(compute(*inputs), inputs)
    for a, b in zip(gradients, expected):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("value", [(3, 4), (5, 3, 4), (4,), ()], ids=str)
def test_log_prob(value):
    loc, scale = parameters(3, 4)
    x = torch.randn(value).requires_grad_()
    log_prob = FusedNormal(loc, scale).log_prob(x)
    exact = double(loc, scale, x)
    expected = Normal(*exact[:2]).log_prob(exact[2])
    torch.testing.assert_close(log_prob.double(), expected, rtol=2e-6, atol=2e-6)
    weights = torch.randn(log_prob.shape)
    gradients = torch.autograd.grad(log_prob, (loc, scale, x), weights)
    for a, b in zip(gradients, torch.autograd.grad(expected, exact, weights.double())):
        torch.testing.assert_close(a.double(), b, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("batch", [(), (3,), (3, 4)], ids=str)
@pytest.mark.parametrize("sample", [(), (2,), (2, 5), (0,)], ids=str)
def test_samples_have_torchs_shapes(batch, sample):
    loc, scale = parameters(*batch)
    fused = FusedNormal(loc, scale)
    assert fused.rsample(sample).shape == Normal(loc, scale).rsample(sample).shape
    assert not fused.sample(sample).requires_grad


def test_samples_are_normal_reproducible_and_reparameterized():
    loc, scale = parameters(64, 256)
    normal = FusedNormal(loc, scale)
    torch.manual_seed(1)
    z = normal.rsample((4,))
    torch.manual_seed(1)
    assert torch.equal(normal.rsample((4,)), z)
    eps = ((z - loc) / scale).detach()
    n = eps.numel()
    assert abs(eps.mean()) < 4 / n**0.5 and abs(eps.var() - 1) < 4 * (2 / n) ** 0.5
    assert abs((eps[0] * eps[1]).mean()) < 4 / (n / 4) ** 0.5  # samples are independent
    weights = torch.randn_like(z)
    grad_loc, grad_scale = torch.autograd.grad(z, (loc, scale), weights)
    torch.testing.assert_close(grad_loc, weights.sum(0))
    torch.testing.assert_close(grad_scale, (weights * eps).sum(0), rtol=1e-4, atol=1e-4)


def test_it_expands_and_validates_as_a_normal():
    normal = FusedNormal(torch.zeros(4), torch.ones(4), validate_args=True).expand((3, 4))
    assert type(normal) is FusedNormal and normal.rsample().shape == (3, 4)
    independent = Independent(normal, 1)
    assert independent.log_prob(independent.rsample((2,))).shape == (2, 3)
    with pytest.raises(ValueError, match="scale"):
        FusedNormal(torch.zeros(4), -torch.ones(4), validate_args=True)
    with pytest.raises(ValueError, match="value"):
        normal.log_prob(torch.full((3, 4), float("nan")))
