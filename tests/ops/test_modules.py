"""nn.Module forms: the functions with their options fixed, and good citizens of torch."""

import copy
import pickle

import pytest
import torch
from torch import nn

from fused_elbo import (
    ELBOLoss,
    GaussianLogLikelihood,
    NoiseKey,
    Reparameterize,
    elbo_loss,
    gaussian_log_likelihood,
    reparameterize_kl,
)
from tests.ops.support import leaf

KEY = NoiseKey(seed=4)
MODULES = [
    Reparameterize(),
    Reparameterize(num_samples=3, reduction="none"),
    GaussianLogLikelihood(),
    GaussianLogLikelihood(-1.5, reduction="sum"),
    GaussianLogLikelihood(0.5, learn=True),
    ELBOLoss(),
    ELBOLoss(beta=0.25, reduction="sample"),
]


def run(module, device):
    """The module's outputs on inputs that are the same every time."""
    torch.manual_seed(1)
    a, b, c, d = (leaf(5, 3, device=device) for _ in range(4))
    if isinstance(module, Reparameterize):
        return module(a, b, key=KEY)
    if isinstance(module, GaussianLogLikelihood):
        return (module(a, b),)
    return module(a, b, c, d)


def same(outputs, expected):
    return all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))


def test_modules_are_the_functions_with_their_options(device):
    a, b, c, d = (leaf(5, 3, device=device) for _ in range(4))
    for reduction in ("none", "sample", "sum", "batchmean"):
        module = Reparameterize(2, reduction)
        expected = reparameterize_kl(a, b, c, d, num_samples=2, key=KEY, reduction=reduction)
        assert same(module(a, b, c, d, key=KEY), expected)
        module = GaussianLogLikelihood(0.75, reduction=reduction)
        assert torch.equal(module(a, b), gaussian_log_likelihood(a, b, 0.75, reduction=reduction))
        assert torch.equal(module(a, b, c), gaussian_log_likelihood(a, b, c, reduction=reduction))
    for reduction in ("batchmean", "sum", "sample"):
        module = ELBOLoss(0.25, reduction)
        expected = elbo_loss(a, b, c, d, recon_logvar=-0.5, beta=0.25, reduction=reduction)
        assert same(module(a, b, c, d, recon_logvar=-0.5), expected)
        kl = torch.rand(5, device=device)
        assert same(module(a, b, kl=kl), elbo_loss(a, b, kl=kl, beta=0.25, reduction=reduction))


def test_a_generator_reaches_the_draw(device):
    a, b = (leaf(5, 3, device=device) for _ in range(2))
    draws = [
        Reparameterize()(a, b, generator=torch.Generator(device).manual_seed(s))[0]
        for s in (1, 1, 2)
    ]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_beta_may_change_between_calls(device):
    a, b, c, d = (leaf(5, 3, device=device) for _ in range(4))
    module = ELBOLoss()
    module.beta = 3.0
    assert torch.equal(module(a, b, c, d).loss, elbo_loss(a, b, c, d, beta=3.0).loss)


def test_a_learned_variance_is_a_parameter_that_trains(device):
    module = GaussianLogLikelihood(0.5, learn=True).to(device)
    assert [(n, p.item()) for n, p in module.named_parameters()] == [("logvar", 0.5)]
    assert list(module.state_dict()) == ["logvar"]
    x, mean = torch.randn(200, 3, device=device), torch.zeros(200, 3, device=device)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.1)
    for _ in range(100):
        optimizer.zero_grad()
        (-module(x, mean).mean()).backward()
        optimizer.step()
    # The maximum likelihood variance is the mean square.
    assert module.logvar.exp().item() == pytest.approx(x.square().mean().item(), rel=1e-2)


def test_a_variance_that_is_not_learned_is_no_parameter():
    for module in (
        GaussianLogLikelihood(),
        GaussianLogLikelihood(1.0),
        Reparameterize(),
        ELBOLoss(),
    ):
        assert not list(module.parameters())
        assert not module.state_dict()


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_pickling_and_copying_keep_what_a_module_does(module, device):
    module = copy.deepcopy(module).to(device)
    expected = run(module, device)
    for twin in (pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
        assert type(twin) is type(module)
        assert same(run(twin, device), expected)
        for a, b in zip(twin.parameters(), module.parameters()):
            assert a is not b


def test_a_model_with_them_saves_and_loads(device, tmp_path):
    model = nn.ModuleDict({"q": Reparameterize(), "p": GaussianLogLikelihood(0.0, learn=True)}).to(
        device
    )
    with torch.no_grad():
        model["p"].logvar.fill_(1.25)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    fresh = nn.ModuleDict({"q": Reparameterize(), "p": GaussianLogLikelihood(0.0, learn=True)}).to(
        device
    )
    fresh.load_state_dict(torch.load(tmp_path / "model.pt"))
    assert fresh["p"].logvar.item() == 1.25


@pytest.mark.parametrize(
    ("module", "text"),
    [
        (MODULES[1], "Reparameterize(num_samples=3, reduction='none')"),
        (MODULES[3], "GaussianLogLikelihood(logvar=-1.5, reduction='sum')"),
        (MODULES[6], "ELBOLoss(beta=0.25, reduction='sample')"),
    ],
)
def test_their_representation_names_their_options(module, text):
    assert repr(module) == text


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_the_backend_of_a_module_is_the_one_that_runs(module):
    other = copy.deepcopy(module)
    other.backend = "tpu"
    with pytest.raises(ValueError, match="unknown backend 'tpu'"):
        run(other, torch.device("cpu"))
