"""pythae: its VAE family on the kernels, against its own formulas."""

import pytest
import torch

from fused_elbo.integrations import pythae as fused_pythae

models = pytest.importorskip("pythae.models", reason="the peer pythae is not installed")


def build(name, reconstruction_loss="mse"):
    torch.manual_seed(0)
    config = getattr(models, f"{name}Config")(
        input_dim=(1, 4, 4), latent_dim=3, reconstruction_loss=reconstruction_loss
    )
    return getattr(models, name)(config)


def losses_and_gradients(model, x):
    torch.manual_seed(1)
    model.zero_grad()
    output = model({"data": x})
    output.loss.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    return [output.loss, output.recon_loss, output.reg_loss], gradients


@pytest.mark.parametrize("reconstruction_loss", ["mse", "bce"])
@pytest.mark.parametrize("name", ["VAE", "BetaVAE", "DisentangledBetaVAE"])
def test_losses_and_gradients_are_those_of_the_library_in_float64(name, reconstruction_loss):
    model, x = build(name, reconstruction_loss), torch.rand(5, 1, 4, 4)
    expected = losses_and_gradients(model.double(), x.double())
    with fused_pythae.applied(noise="upstream"):
        actual = losses_and_gradients(model, x.double())
        for a, b in zip(actual[0] + actual[1], expected[0] + expected[1]):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        output = model.float()({"data": x})
    single = [loss.double() for loss in (output.loss, output.recon_loss, output.reg_loss)]
    assert all(loss.requires_grad for loss in single)
    assert abs(single[1] + getattr(model, "beta", 1.0) * single[2] - single[0]) < 1e-5 or (
        name == "DisentangledBetaVAE"
    )


def test_a_good_reconstruction_keeps_its_digits():
    model = build("VAE")
    x = torch.rand(4, 1, 4, 4)
    recon_x = x + 1e-4 * torch.randn_like(x)
    mu, log_var = torch.zeros(4, 3), torch.zeros(4, 3)
    expected = 0.5 * (recon_x.double() - x.double()).square().flatten(1).sum(1).mean()
    with fused_pythae.applied():
        _, reconstruction, _ = model.loss_function(recon_x, x, mu, log_var, mu)
    torch.testing.assert_close(reconstruction.double(), expected, rtol=1e-6, atol=0)


def test_samples_come_with_their_noise():
    model = build("VAE")
    mu, std = torch.randn(64, 128), torch.rand(64, 128)
    with fused_pythae.applied():
        torch.manual_seed(3)
        z, eps = model._sample_gauss(mu, std)
        torch.manual_seed(3)
        assert torch.equal(model._sample_gauss(mu, std)[1], eps)
    assert torch.equal(z, mu + eps * std)
    n = eps.numel()
    assert abs(eps.mean()) < 4 / n**0.5 and abs(eps.var() - 1) < 4 * (2 / n) ** 0.5
    torch.manual_seed(3)
    expected = model._sample_gauss(mu, std)
    torch.manual_seed(3)
    with fused_pythae.applied(noise="upstream"):
        assert all(map(torch.equal, model._sample_gauss(mu, std), expected))


def test_every_sampler_is_replaced_and_the_very_same_methods_restored():
    own = {
        (cls, name): value
        for cls in vars(models).values()
        if isinstance(cls, type)
        for name, value in vars(cls).items()
        if name in ("_sample_gauss", "loss_function")
    }
    with fused_pythae.applied():
        samplers = [cls for cls, name in own if name == "_sample_gauss"]
        assert len(samplers) >= 15
        assert all(vars(cls)["_sample_gauss"] is not own[cls, "_sample_gauss"] for cls in samplers)
    assert all(vars(cls)[name] is value for (cls, name), value in own.items())


def test_a_subclass_keeps_its_own_loss():
    class Mine(models.VAE):
        def loss_function(self, recon_x, x, mu, log_var, z):
            return "mine"

    with fused_pythae.applied():
        assert Mine.loss_function(None, *[None] * 5) == "mine"


def test_a_version_of_other_methods_is_refused(monkeypatch):
    monkeypatch.setattr(models.BetaVAE, "loss_function", lambda self, x: None)
    with pytest.raises(RuntimeError, match=r"BetaVAE.loss_function must take .*got \(self, x\)"):
        fused_pythae.apply()
    with pytest.raises(ValueError, match="noise must be"):
        fused_pythae.apply(noise="none")
