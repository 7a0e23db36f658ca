"""diffusers: its posterior on the kernels, against the library's own formulas."""

import pickle

import pytest
import torch

from fused_elbo import DiagonalGaussian, NoiseKey
from fused_elbo.integrations import diffusers as fused_diffusers

vae = pytest.importorskip(
    "diffusers.models.autoencoders.vae", reason="the peer diffusers is not installed"
)
Posterior = vae.DiagonalGaussianDistribution
METHODS = ("__init__", "sample", "kl", "nll", "mode")


def moments(*shape, dtype=torch.float32, layout=torch.contiguous_format, scale=1.0):
    values = (scale * torch.randn(shape or (3, 8, 5, 6))).to(dtype)
    return values.contiguous(memory_format=layout).requires_grad_()


def upstream(parameters, compute):
    """The library's value and gradient in float64."""
    parameters = parameters.detach().double().requires_grad_()
    value = compute(Posterior(parameters))
    (gradient,) = torch.autograd.grad(value.sum(), parameters)
    return value.detach(), gradient


COMPUTED = {
    "kl": lambda p: p.kl(),
    "kl(other)": lambda p: p.kl(Posterior(p.parameters.detach().flip(0) * 0.7)),
    "nll": lambda p: p.nll(torch.linspace(-1, 1, 6).to(p.parameters).expand(3, 4, 5, 6)),
    "nll(dims)": lambda p: p.nll(p.parameters.new_zeros(3, 4, 5, 6), dims=(1, 3)),
    "mean": lambda p: p.mean,
    "logvar": lambda p: p.logvar,
    "std": lambda p: p.std,
    "var": lambda p: p.var,
    "mode": lambda p: p.mode(),
}


@pytest.mark.parametrize("name", COMPUTED)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_values_and_gradients_are_those_of_the_library_in_float64(name, layout):
    parameters = moments(layout=layout)
    with torch.no_grad():
        parameters[0, 4, 0, 0], parameters[0, 4, 0, 1] = 25.0, -31.0  # beyond the clamp
    expected, expected_gradient = upstream(parameters, COMPUTED[name])
    with fused_diffusers.applied():
        value = COMPUTED[name](Posterior(parameters))
        (gradient,) = torch.autograd.grad(value.sum(), parameters)
    torch.testing.assert_close(value.double(), expected, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=2e-6, atol=2e-6)


def test_upstream_noise_gives_the_samples_of_the_library_bit_for_bit():
    parameters = moments()

    def draw():
        one = torch.Generator().manual_seed(1)
        several = [torch.Generator().manual_seed(i) for i in range(3)]
        torch.manual_seed(2)
        posterior = Posterior(parameters)
        return posterior.sample(one), posterior.sample(several), posterior.sample()

    expected = draw()
    with fused_diffusers.applied(noise="upstream"):
        actual = draw()
    assert all(map(torch.equal, actual, expected))


def test_fused_noise_is_seeded_by_the_generator_given():
    parameters = moments().detach()
    with fused_diffusers.applied():
        posterior = Posterior(parameters)
        first, again, other = (
            posterior.sample(torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
        )
        torch.manual_seed(3)
        default = posterior.sample()
        torch.manual_seed(3)
        assert torch.equal(posterior.sample(), default)
    assert torch.equal(first, again) and not torch.equal(first, other)
    seed = torch.empty((), dtype=torch.int64).random_(generator=torch.Generator().manual_seed(1))
    gaussian = DiagonalGaussian.from_moments(parameters)
    assert torch.equal(first, gaussian.rsample(key=NoiseKey(seed)))


def test_each_generator_of_a_list_seeds_one_row():
    parameters = moments().detach()
    with fused_diffusers.applied():
        rows = Posterior(parameters).sample([torch.Generator().manual_seed(i) for i in range(3)])
        for i in range(3):
            alone = Posterior(parameters[i : i + 1]).sample(torch.Generator().manual_seed(i))
            assert torch.equal(rows[i], alone[0])
        batch = Posterior(parameters).sample([torch.Generator().manual_seed(7)])
        assert torch.equal(batch, Posterior(parameters).sample(torch.Generator().manual_seed(7)))
        with pytest.raises(ValueError, match="each of the 3 rows, got a list of 2"):
            Posterior(parameters).sample([torch.Generator()] * 2)
        with pytest.raises(TypeError, match="got int"):
            Posterior(parameters).sample(5)


def test_a_generator_on_the_cpu_serves_another_device():
    generator = torch.Generator()
    before = generator.get_state()
    with fused_diffusers.applied():
        z = Posterior(moments().detach().to("meta")).sample(generator)
    assert z.device.type == "meta" and z.shape == (3, 4, 5, 6)
    assert not torch.equal(generator.get_state(), before)  # its seed was drawn where it lives


def test_fused_samples_are_normal_with_the_mean_and_deviation_of_the_posterior():
    parameters = moments(64, 8, 16, 16)
    with fused_diffusers.applied():
        posterior = Posterior(parameters)
        eps = ((posterior.sample() - posterior.mean) / posterior.std).detach().double()
    n = eps.numel()  # 65536: four standard errors
    assert abs(eps.mean()) < 4 / n**0.5
    assert abs(eps.var() - 1) < 4 * (2 / n) ** 0.5
    assert abs(eps.pow(4).mean() - 3) < 4 * (96 / n) ** 0.5


def test_video_latents_are_summed_over_the_whole_event_and_compat_sums_three_dimensions():
    parameters = moments(2, 8, 3, 4, 5)
    other = moments(2, 8, 3, 4, 5)
    sample = torch.randn(2, 4, 3, 4, 5)

    def nats():
        p, q = Posterior(parameters), Posterior(other)
        return p.kl(), p.kl(q), p.nll(sample)

    library = nats()
    assert library[0].shape == (2, 5)
    with fused_diffusers.applied():
        for fused, expected in zip(nats(), library):
            torch.testing.assert_close(fused, expected.sum(1))
    with fused_diffusers.applied(compat=True):
        for compatible, expected in zip(nats(), library):
            assert torch.equal(compatible, expected)


def test_audio_latents_of_one_dimension_work():
    parameters = moments(2, 8, 50)
    with fused_diffusers.applied():
        p = Posterior(parameters)
        expected = 0.5 * (p.mean.square() + p.var - 1 - p.logvar).double().sum((1, 2))
        torch.testing.assert_close(p.kl().double(), expected, rtol=1e-6, atol=0)


def test_half_precision_nats_are_float32_and_do_not_overflow():
    parameters = torch.zeros(1, 2, 4, 4, dtype=torch.float16)
    parameters[:, 1] = 11.0
    assert Posterior(parameters).kl().isinf().all()
    with fused_diffusers.applied():
        kl = Posterior(parameters).kl()
        assert kl.dtype == torch.float32
        torch.testing.assert_close(kl, 8 * torch.expm1(torch.tensor([11.0])) - 88)
    with fused_diffusers.applied(compat=True):
        assert Posterior(parameters).kl().isinf().all()


def test_a_deterministic_posterior_is_its_mean_without_nats():
    parameters = moments()
    with fused_diffusers.applied():
        p = Posterior(parameters, deterministic=True)
        assert torch.equal(p.sample(), p.mean) and torch.equal(p.mode(), p.mean)
        assert not p.std.any() and not p.var.any()
        assert torch.equal(p.kl(), torch.zeros(3)) and torch.equal(p.nll(p.mean), torch.zeros(3))
        assert Posterior(moments()).kl(p).isinf().all()  # no density but at its mean
    with fused_diffusers.applied(compat=True):
        assert Posterior(parameters, deterministic=True).kl().shape == (1,)


def test_sampling_and_kl_compute_no_attribute():
    with fused_diffusers.applied():
        posterior = Posterior(moments())
        posterior.sample(), posterior.kl(), posterior.nll(torch.zeros(3, 4, 5, 6))
        assert not {"mean", "logvar", "std", "var"} & posterior.__dict__.keys()
        assert posterior.std is posterior.std


def test_an_assigned_attribute_is_honored():
    parameters = moments()
    with fused_diffusers.applied(noise="fused"):
        posterior = Posterior(parameters)
        posterior.mean = torch.zeros_like(posterior.mean)
        kl, sample = posterior.kl(), posterior.sample(torch.Generator().manual_seed(0))
    reference = Posterior(parameters)
    reference.mean = torch.zeros_like(reference.mean)
    assert torch.equal(kl, reference.kl())
    assert torch.equal(sample, reference.sample(torch.Generator().manual_seed(0)))


def test_undo_restores_the_very_same_methods():
    before = dict(vars(Posterior))
    fused_diffusers.apply()
    fused_diffusers.apply(noise="upstream")
    for name in METHODS:
        assert vars(Posterior)[name] is not before[name]
        assert vars(Posterior)[name].__doc__ == before[name].__doc__
    fused_diffusers.undo()
    after = vars(Posterior)
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before)


def test_posteriors_live_through_apply_and_undo():
    parameters = moments()
    older = Posterior(parameters)
    with fused_diffusers.applied():
        newer = Posterior(parameters)
        copied = pickle.dumps(Posterior(parameters.detach()))
        torch.testing.assert_close(older.kl(), newer.kl())
    for posterior in (newer, pickle.loads(copied)):
        torch.testing.assert_close(posterior.kl(), older.kl())
        assert torch.equal(posterior.std, older.std)
        posterior.sample()
    newer.std.sum().backward()
    assert parameters.grad is not None


def test_compiled_sampling_serves_every_batch_size():
    def step(parameters):
        posterior = Posterior(parameters)
        return posterior.sample(), posterior.kl(), posterior.std

    torch._dynamo.reset()
    with fused_diffusers.applied():
        compiled = torch.compile(step, fullgraph=True, backend="eager", dynamic=True)
        for batch in (2, 3, 5):
            parameters = moments(batch, 8, 4, 4)
            z, kl, std = compiled(parameters)
            torch.testing.assert_close(kl, Posterior(parameters).kl())
            (z.sum() + kl.sum() + std.sum()).backward()
            assert parameters.grad is not None and parameters.grad.isfinite().all()


def test_a_version_of_other_methods_is_refused(monkeypatch):
    monkeypatch.setattr(Posterior, "kl", lambda self, other, reduction: None)
    before = dict(vars(Posterior))
    with pytest.raises(RuntimeError, match=r"kl must take \(self, other\), got .*reduction"):
        fused_diffusers.apply()
    assert dict(vars(Posterior)) == before


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"noise": "none"}, ValueError, 'noise must be "fused" or "upstream"'),
        ({"compat": 1}, TypeError, "compat must be a bool, got int"),
    ],
)
def test_unknown_options_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        fused_diffusers.apply(**options)
    assert "mean" not in vars(Posterior)


@pytest.fixture
def one_thread():
    """A model this small is slower on several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def train(steps):
    """The losses of a small AutoencoderKL."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    model = AutoencoderKL(
        block_out_channels=(8,),
        norm_num_groups=2,
        latent_channels=4,
        mid_block_add_attention=False,
    )
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    images = torch.randn(4, 3, 1, 1) + 0.1 * torch.randn(4, 3, 8, 8)
    noise, losses = torch.Generator().manual_seed(1), []
    for _ in range(steps):
        posterior = model.encode(images).latent_dist
        reconstruction = model.decode(posterior.sample(noise)).sample
        error = (reconstruction - images).square().flatten(1).sum(1)
        loss = (0.5 * error + posterior.kl()).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses)


def test_an_autoencoder_trains_along_the_same_losses(one_thread):
    expected = train(50)
    with fused_diffusers.applied(noise="upstream"):
        actual = train(50)
    assert expected[-1] < 0.95 * expected[0]  # it learns
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=0)


def test_in_training_the_kl_comes_from_the_pass_that_samples():
    parameters = moments()
    with fused_diffusers.applied():
        posterior = Posterior(parameters)
        z, kl = posterior.sample(), posterior.kl()
        assert z.grad_fn is kl.grad_fn
        with torch.no_grad():
            assert not posterior.kl().requires_grad
            unrecorded = Posterior(parameters)
            unrecorded.sample()
        assert unrecorded.kl().requires_grad
        (both,) = torch.autograd.grad(z.sum() + kl.sum(), parameters)
    mean, logvar = parameters.detach().chunk(2, 1)
    expected = torch.cat((1 + mean, 0.5 * (z.detach() - mean) + 0.5 * torch.expm1(logvar)), 1)
    torch.testing.assert_close(both, expected, rtol=1e-5, atol=1e-5)
