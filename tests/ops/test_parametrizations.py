"""Scale parametrizations: values and gradients agree with float64, at full speed or before it."""

import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from fused_elbo import (
    DiagonalGaussian,
    ELBOLoss,
    GaussianLogLikelihood,
    NoiseKey,
    Parametrization,
    Reparameterize,
    elbo_loss,
    gaussian_kl,
    gaussian_log_likelihood,
    reparameterize,
    reparameterize_kl,
)
from tests.ops import truth
from tests.ops.support import DTYPES, assert_within, laid_out, leaf

KEY = NoiseKey(seed=31, stream=1)
PARAMS = {
    "logvar, floor": Parametrization("logvar", 1e-2),
    "logvar, clamp": Parametrization("logvar", clamp=(-1.0, 1.5)),
    "logvar, soft clamp": Parametrization("logvar", clamp=(-2.0, 3.0), soft_clamp=True),
    "logstd": Parametrization("logstd"),
    "logstd, floor and soft clamp": Parametrization("logstd", 1e-2, (-5.0, 5.0), True),
    "logstd, clamp": Parametrization("logstd", 0.0, (-0.5, 0.75)),
    "softplus_std": Parametrization("softplus_std"),
    "softplus_std, floor": Parametrization("softplus_std", 1e-1),
    "softplus_std, soft clamp": Parametrization("softplus_std", 1e-3, (-4.0, 4.0), True),
    "var": Parametrization("var"),
    "var, floor": Parametrization("var", 0.5),
    "var, clamp": Parametrization("var", 1e-6, (0.25, 2.0)),
}
each_param = pytest.mark.parametrize("param", PARAMS.values(), ids=PARAMS)
# In units of the sum of the magnitudes of the terms: a logvar is rounded once, which moves its
# exponential by up to 2 ulp at the 4 that these parameters reach, beside what logvar itself costs.
RELATIVE = {
    torch.float32: 3e-6,
    torch.bfloat16: 3e-6,
    torch.float16: 3e-6,
    torch.float64: 1e-13,
}


def parameter(*shape, param, dtype=torch.float32, device):
    """Parameters on both sides of every bound; variances are positive."""
    wide = 0.75 if dtype == torch.float16 else 1.5  # gradients must not overflow it
    p = leaf(*shape, dtype=dtype, device=device, scale=wide)
    return (p.detach().abs() + 0.02).to(dtype).requires_grad_() if param.name == "var" else p


def logvar_of(p, param):
    return 2 * torch.log(truth.std(p, *param))


@pytest.mark.parametrize("num_samples", [None, 2])
@pytest.mark.parametrize("with_prior", [False, True], ids=["standard prior", "prior"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@each_param
def test_samples_kl_and_gradients_agree_with_float64(
    param, dtype, with_prior, num_samples, device, interpreted
):
    for shape in [(2, 3, 5, 7)] if interpreted else [(5, 3), (2, 3, 5, 7), (3, 4099), (40, 64)]:
        inputs = []
        for _ in range(2 if with_prior else 1):
            inputs += [
                leaf(*shape, dtype=dtype, device=device),
                parameter(*shape, param=param, dtype=dtype, device=device),
            ]
        z, kl = reparameterize_kl(*inputs, key=KEY, num_samples=num_samples, param=param)
        upstream = torch.randn_like(z), torch.randn_like(kl)
        grads = torch.autograd.grad((z, kl), inputs, upstream)

        inputs64 = truth.double(*inputs)
        mean, p, *prior = inputs64
        eps = truth.normals(shape, KEY.seed, KEY.stream, num_samples=num_samples, dtype=dtype)
        std = truth.std(p, *param)
        prior = (prior[0], logvar_of(prior[1], param)) if prior else ()
        z64, kl64 = mean + std * eps, truth.kl(mean, 2 * torch.log(std), *prior)
        assert_within(z, z64, RELATIVE[dtype] * (mean.abs() + std * (1 + eps.abs())))
        assert_within(kl, kl64, RELATIVE[dtype] * kl64)
        expected = torch.autograd.grad((z64, kl64), inputs64, [u.cpu().double() for u in upstream])
        for a, e in zip(grads, expected):
            # Sums of up to 6 terms, some of which cancel: bounded by the largest of a tensor.
            assert_within(a, e, RELATIVE[dtype] * (e.abs() + e.abs().max()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_param
def test_log_likelihoods_and_gradients_agree_with_float64(param, dtype, device, interpreted):
    shapes = [(4, 6), (3,), (2, 1)]
    for shape in shapes if interpreted else [*shapes, (3, 2, 5, 7), (3, 4099)]:
        x, mean = (leaf(*shape, dtype=dtype, device=device) for _ in range(2))
        p = parameter(*shape, param=param, dtype=dtype, device=device)
        ll = gaussian_log_likelihood(x, mean, p, param=param)
        upstream = torch.randn_like(ll)
        grads = torch.autograd.grad(ll, (x, mean, p), upstream)

        inputs64 = truth.double(x, mean, p)
        x64, mean64, p64 = inputs64
        logvar = logvar_of(p64, param)
        expected = truth.log_likelihood(x64, mean64, logvar)
        terms = 0.5 * ((x64 - mean64) ** 2 * torch.exp(-logvar) + logvar.abs() + 1.8379)
        assert_within(ll, expected, RELATIVE[dtype] * terms.reshape(shape[0], -1).sum(1))
        expected = torch.autograd.grad(expected, inputs64, upstream.cpu().double())
        # To nearest; Triton's interpreter truncates bfloat16.
        half_ulp = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}.get(dtype, 0.0)
        rounding = 2 * half_ulp if interpreted and dtype == torch.bfloat16 else half_ulp
        for a, e in zip(grads, expected):
            bound = RELATIVE[dtype] * (e.abs() + e.abs().max()) + rounding * e.abs() + 1e-7
            assert_within(a, e, bound if rounding else bound - 1e-7)


@each_param
@pytest.mark.parametrize("shape", [(), (3, 1, 1), (4, 5), (1, 3, 4, 5)], ids=str)
def test_a_broadcast_parameter_has_the_gradient_of_its_shape(shape, param, device):
    x, mean = leaf(2, 3, 4, 5, device=device), leaf(2, 3, 4, 5, device=device)
    p = parameter(*shape, param=param, device=device)
    ll = gaussian_log_likelihood(x, mean, p, param=param)
    upstream = torch.randn_like(ll)
    (grad,) = torch.autograd.grad(ll, p, upstream)
    x64, mean64, p64 = truth.double(x, mean, p)
    expected = truth.log_likelihood(x64, mean64, logvar_of(p64, param))
    (of_p,) = torch.autograd.grad(expected, p64, upstream.cpu().double())
    assert grad.shape == shape
    assert_within(ll, expected, 1e-5 * (1 + expected.abs()))
    assert_within(grad, of_p, 1e-5 * (60 + of_p.abs()))


@pytest.mark.parametrize("shape", [(5, 1), (1, 1), (3, 1, 1)], ids=str)
def test_events_of_one_element_have_parameters(shape, device):
    x, mean, p = (leaf(*shape, device=device) for _ in range(3))
    out = elbo_loss(mean, x, mean, p, recon_logvar=p, recon_param="logstd", reduction="sample")
    expected = torch.distributions.Normal(mean, p.exp()).log_prob(x).flatten(1).sum(1)
    torch.testing.assert_close(out.log_likelihood, expected.detach())
    ll = gaussian_log_likelihood(x, mean, p, param="logstd")
    torch.testing.assert_close(ll, expected)
    (a,), (b,) = torch.autograd.grad(ll.sum(), p), torch.autograd.grad(expected.sum(), p)
    torch.testing.assert_close(a, b)


def test_an_expanded_parameter_has_its_gradient(device):
    x, mean, p = (leaf(*shape, device=device) for shape in ((4, 300), (4, 300), (4, 1)))
    for param, std in (("logvar", (0.5 * p).exp()), ("logstd", p.exp())):
        ll = gaussian_log_likelihood(x, mean, p.expand(4, 300), param=param)
        expected = torch.distributions.Normal(mean, std).log_prob(x).sum(1)
        torch.testing.assert_close(ll, expected)
        (a,), (b,) = torch.autograd.grad(ll.sum(), p), torch.autograd.grad(expected.sum(), p)
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-3)


def test_a_number_is_read_by_its_parametrization(device):
    x, mean = leaf(2, 3, device=device), leaf(2, 3, device=device)
    for value, param, std in (
        (0.5, "logstd", math.exp(0.5)),
        (0.25, "var", 0.5),
        (0.0, Parametrization("softplus_std", 0.1), math.log(2) + 0.1),
    ):
        ll = gaussian_log_likelihood(x, mean, value, param=param)
        expected = torch.distributions.Normal(mean, std).log_prob(x).sum(1)
        torch.testing.assert_close(ll, expected)


@each_param
def test_gradients_of_parameters_to_second_order(param, device):
    def make(*shape):
        return leaf(*shape, dtype=torch.float64, device=device)

    def scale():
        # Below a variance's floor what passes is no derivative.
        p = parameter(2, 3, param=param, dtype=torch.float64, device=device)
        return (p.detach() + param.floor).requires_grad_() if param.name == "var" else p

    inputs = (make(2, 3), scale(), make(2, 3), scale())

    def z_kl(*t):
        return reparameterize_kl(*t, key=KEY, param=param)

    assert gradcheck(z_kl, inputs)
    assert gradgradcheck(z_kl, inputs)

    def ll(*t):
        return gaussian_log_likelihood(*t, param=param)

    assert gradcheck(ll, (make(2, 3), make(2, 3), scale()))
    assert gradgradcheck(ll, (make(2, 3), make(2, 3), scale()))


def test_below_the_floor_of_a_variance_the_gradient_passes(device):
    x, mean = torch.full((1, 3), 2.0, device=device), torch.zeros(1, 3, device=device)
    var = torch.tensor([[0.1, 0.3, 0.9]], device=device, requires_grad=True)
    ll = gaussian_log_likelihood(x, mean, var, param=Parametrization("var", 0.25)).sum()
    ll.backward()
    clamped = torch.tensor([0.25, 0.3, 0.9])
    torch.testing.assert_close(
        var.grad.cpu()[0], 0.5 * (4.0 / clamped**2 - 1 / clamped), rtol=1e-5, atol=0
    )


def test_softplus_does_not_underflow_where_its_logarithm_does_not(device):
    p = torch.tensor([[-150.0, -40.0, -9.0, 30.0, 150.0]], device=device, requires_grad=True)
    kl = gaussian_kl(torch.zeros_like(p), p, param="softplus_std", reduction="none")
    p64 = p.detach().cpu().double()
    logvar = 2 * torch.log(torch.log1p(torch.exp(-p64.abs())) + torch.relu(p64))
    expected = truth.kl(torch.zeros(1, 5), logvar, reduction="none")
    assert_within(kl, expected, RELATIVE[torch.float32] * expected)
    (grad,) = torch.autograd.grad(kl[0, :3].sum(), p)
    assert_within(grad[0, :2], torch.tensor([-1.0, -1.0]).double(), 1e-6)


def test_nan_and_infinity_stay_what_they_are(device):
    p = torch.tensor([[math.nan, math.inf, -math.inf, 0.0]], device=device)
    for param in ("logstd", "softplus_std"):
        kl = gaussian_kl(torch.zeros_like(p), p, param=param, reduction="none")[0].tolist()
        assert math.isnan(kl[0])
        assert kl[1] == kl[2] == math.inf
        assert math.isfinite(kl[3])
    kl = gaussian_kl(torch.zeros_like(p), p, param="var", reduction="none")[0].tolist()
    assert math.isnan(kl[0])
    assert kl[1] == kl[2] == kl[3] == math.inf
    hard = Parametrization("logstd", clamp=(-1.0, 1.0))
    kl = gaussian_kl(torch.zeros_like(p), p, param=hard, reduction="none")[0].tolist()
    assert math.isnan(kl[0])
    assert all(math.isfinite(v) for v in kl[1:])


@pytest.mark.kernels
def test_a_slope_of_0_lets_no_gradient_through_not_even_of_an_infinity(device):
    p = torch.full((1, 3), math.inf, device=device, requires_grad=True)
    kl = gaussian_kl(torch.zeros_like(p), p, param="softplus_std")
    (grad,) = torch.autograd.grad(kl.sum(), p)
    assert kl.tolist() == [math.inf]
    assert grad.tolist() == [[0.0, 0.0, 0.0]]


@pytest.mark.parametrize("name", ["logvar", "logstd"])
def test_with_a_floor_a_log_likelihood_reaches_beyond_the_largest_exponential(name, device):
    p = torch.full((1, 4), 95.0, device=device, requires_grad=True)
    zeros = torch.zeros_like(p, requires_grad=False)
    ll = gaussian_log_likelihood(zeros, zeros, p, param=Parametrization(name, 1e-2))
    factor = 2 if name == "logstd" else 1
    expected = -0.5 * 4 * (factor * 95.0 + math.log(2 * math.pi))
    assert ll.tolist() == pytest.approx([expected], rel=1e-6)
    (grad,) = torch.autograd.grad(ll.sum(), p)
    assert grad.tolist()[0] == pytest.approx([-0.5 * factor] * 4)


def test_logvar_by_name_changes_nothing(device):
    mean, logvar = leaf(5, 6, device=device), leaf(5, 6, device=device)
    for plain, named in zip(
        reparameterize_kl(mean, logvar, key=KEY),
        reparameterize_kl(mean, logvar, key=KEY, param=Parametrization()),
    ):
        assert torch.equal(plain, named)


@pytest.mark.parametrize("layout", ["channels_last", "chunk of channels_last", "every second row"])
def test_parameters_of_any_layout(layout, device):
    param = Parametrization("softplus_std", 0.1)
    mean, p = (laid_out(leaf(4, 4, 6, 6, device=device), layout) for _ in range(2))
    z, kl = reparameterize_kl(mean, p, key=KEY, param=param)
    dense = [t.detach().contiguous().requires_grad_() for t in (mean, p)]
    z_dense, kl_dense = reparameterize_kl(*dense, key=KEY, param=param)
    torch.testing.assert_close(z, z_dense, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(kl, kl_dense, rtol=1e-5, atol=1e-5)
    grads = torch.autograd.grad(z.sum() + kl.sum(), (mean, p))
    expected = torch.autograd.grad(z_dense.sum() + kl_dense.sum(), dense)
    for a, e in zip(grads, expected):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dim", [1, -1])
def test_moments_hold_a_parameter_in_their_second_half(dim, device):
    moments = leaf(3, 4, 5, 6, device=device)
    param = Parametrization("logstd", 1e-2, (-5.0, 5.0), True)
    q = DiagonalGaussian.from_moments(moments, dim, param=param)
    mean, p = moments.chunk(2, dim)
    assert_within(q.std, truth.std(p.detach().cpu().double(), *param), 1e-5)
    z, kl = q.sample_kl(key=KEY)
    z_pair, kl_pair = reparameterize_kl(mean, p, key=KEY, param=param)
    torch.testing.assert_close(z, z_pair, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(kl, kl_pair)
    weights = torch.randn_like(z)
    (a,) = torch.autograd.grad((z * weights).sum() + kl.sum(), moments)
    (b,) = torch.autograd.grad((z_pair * weights).sum() + kl_pair.sum(), moments)
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_gaussians_of_different_parametrizations_have_a_kl(device):
    mean, p, prior_mean, r = (leaf(3, 4, device=device) for _ in range(4))
    q = DiagonalGaussian(mean, p, "logstd")
    for name, logvar in (("logstd", 2 * r), ("logvar", r)):
        prior = DiagonalGaussian(prior_mean, r, name)
        expected = truth.kl(*truth.double(mean, 2 * p, prior_mean, logvar))
        assert_within(q.kl(prior), expected, 1e-5 * (1 + expected.detach()))
    expected = truth.kl(*truth.double(prior_mean, r, mean, 2 * p))
    assert_within(DiagonalGaussian(prior_mean, r).kl(q), expected, 1e-5 * (1 + expected.detach()))


def test_elbo_loss_reads_both_parametrizations(device):
    recon_x, x, p = (leaf(3, 4, 5, device=device) for _ in range(3))
    mean, r = (leaf(3, 6, device=device) for _ in range(2))
    recon_param = Parametrization("softplus_std", 1e-2)
    out = elbo_loss(
        recon_x, x, mean, r, recon_logvar=p, param="logstd", recon_param=recon_param, beta=2.0
    )
    inputs = (recon_x, x, p, mean, r)
    grads = torch.autograd.grad(out.loss, inputs)
    inputs64 = truth.double(*inputs)
    recon64, x64, p64, mean64, r64 = inputs64
    ll = truth.log_likelihood(x64, recon64, logvar_of(p64, recon_param))
    kl = truth.kl(mean64, 2 * r64)
    loss = (2.0 * kl - ll).mean()
    assert_within(out.log_likelihood, ll, 1e-5 * (10 + ll.detach().abs()))
    assert_within(out.kl, kl, 1e-5 * (1 + kl.detach()))
    for a, e in zip(grads, torch.autograd.grad(loss, inputs64)):
        assert_within(a, e, 1e-5 * (1 + e.abs()))


def test_modules_keep_their_parametrization(device):
    mean, p, x = (leaf(3, 4, device=device) for _ in range(3))
    expected = reparameterize_kl(mean, p, key=KEY, param="logstd")
    for a, e in zip(Reparameterize(param="logstd")(mean, p, key=KEY), expected):
        assert torch.equal(a, e)
    ll = GaussianLogLikelihood(param="logstd")(x, mean, p)
    assert torch.equal(ll, gaussian_log_likelihood(x, mean, p, param="logstd"))
    loss = ELBOLoss(param="logstd", recon_param="logstd")(x, mean, mean, p, recon_logvar=p).loss
    assert torch.equal(
        loss,
        elbo_loss(x, mean, mean, p, recon_logvar=p, param="logstd", recon_param="logstd").loss,
    )


def test_compiled_code_has_the_same_numbers(device):
    mean, p = leaf(4, 6, device=device), leaf(4, 6, device=device)
    param = Parametrization("softplus_std", 0.1)

    def step(mean, p):
        z, kl = reparameterize_kl(mean, p, key=KEY, param=param)
        return (gaussian_log_likelihood(z, mean, p, param="logstd") - kl).sum()

    eager = torch.autograd.grad(step(mean, p), (mean, p))
    compiled = torch.autograd.grad(torch.compile(step, fullgraph=True)(mean, p), (mean, p))
    for a, e in zip(compiled, eager):
        torch.testing.assert_close(a, e)


def test_functional_transforms_know_parameters(device):
    mean, p = (torch.randn(4, 6, dtype=torch.float64, device=device) for _ in range(2))

    def of_p(p):
        return gaussian_kl(mean, p, param="softplus_std").sum()

    p64 = p.clone().requires_grad_()
    (expected,) = torch.autograd.grad(of_p(p64), p64)
    torch.testing.assert_close(torch.func.grad(of_p)(p), expected)


@pytest.mark.parametrize(
    ("param", "error", "message"),
    [
        ("sigma", ValueError, 'param must be one of "logvar", "logstd", "softplus_std", "var"'),
        (3, TypeError, "param must be a name or a fused_elbo.Parametrization, got int"),
        (Parametrization("var", -1.0), ValueError, "the floor of param must be at least 0"),
        (Parametrization("var", math.nan), ValueError, "the floor of param must be at least 0"),
        (Parametrization("logvar", clamp=(2.0, 1.0)), ValueError, "clamp of param must be"),
        (Parametrization("logvar", soft_clamp=True), ValueError, "a soft clamp of param needs"),
        (
            Parametrization("logvar", clamp=(-math.inf, 1.0), soft_clamp=True),
            ValueError,
            "a soft clamp of param needs",
        ),
    ],
)
def test_a_bad_parametrization_is_refused(param, error, message):
    mean = torch.zeros(2, 3)
    for call in (
        lambda: reparameterize(mean, mean, param=param),
        lambda: gaussian_log_likelihood(mean, mean, mean, param=param),
        lambda: elbo_loss(mean, mean, mean, mean, param=param),
        lambda: Reparameterize(param=param),
        lambda: DiagonalGaussian(mean, mean, param),
    ):
        with pytest.raises(error, match=message.replace("(", r"\(")):
            call()


def test_what_does_not_go_together_is_refused():
    mean = torch.zeros(2, 4)
    with pytest.raises(ValueError, match="prior_logvar must be given with prior_mean"):
        gaussian_kl(mean, mean, mean, param="logstd")
    with pytest.raises(ValueError, match="give the clamp of logstd in"):
        DiagonalGaussian.from_moments(mean, clamp=(-1.0, 1.0), param="logstd")
