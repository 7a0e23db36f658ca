"""torch.library.opcheck: schemas, fake tensors and autograd of every registered operation."""

import math

import pytest
import torch
from torch.library import opcheck

from fused_elbo import backends
from fused_elbo.ops import SCHEMAS
from tests.ops.support import leaf

pytestmark = pytest.mark.kernels
INF = math.inf
DIFFERENTIABLE = ("latent", "likelihood", "elbo")


def namespace(backend, device):
    return getattr(torch.ops, backends.select(device.type, backend).namespace)


def latent_calls(device, requires_grad):
    def make(*shape, dtype=torch.float32):
        return leaf(*shape, dtype=dtype, device=device).requires_grad_(requires_grad)

    seed = torch.tensor(3, device=device)
    mask = torch.tensor([True, False], device=device).expand(3, 4, 2)
    a, b, c, d = (make(3, 4, 2) for _ in range(4))
    free = (0, 0.0, -INF, INF)  # scale, floor, clamp
    # mask, seed_value, stream, row_offset, num_samples, chunk_dim, scale, want_z, reduction
    yield "plain", (a, b, None, None, None, None, 7, 0, 0, 0, -1, *free, True, 1)
    yield "priors", (a, b, c, d, seed, None, 0, 1, 5, 3, -1, *free, True, 3)
    yield (
        "expanded prior",
        (
            *(a, b, c[:1].expand(3, 4, 2), d[:, :1].expand(3, 4, 2), seed, None, 0, 1, 5, 0),
            *(-1, *free, True, 0),
        ),
    )
    yield (
        "moments",
        (a, None, None, None, seed, None, *(0, 0, 0, 0, 1, 0, 0.0, -30.0, 20.0, True, 2)),
    )
    yield "no kl", (a, b, None, None, seed, None, 0, 0, 0, 2, -1, *free, True, -1)
    yield "no z", (a, b, None, None, None, None, 0, 0, 0, 0, -1, *free, False, 1)
    yield "mask", (a, b, c, d, seed, mask, 0, 0, 0, 0, -1, *free, True, 1)
    yield (
        "softplus std, clamped softly",
        (a, b, c, d, seed, mask, 0, 0, 0, 2, -1, 3 + 8, 0.1, -5.0, 5.0, True, 0),
    )
    half = [make(3, 4, 2, dtype=torch.bfloat16) for _ in range(2)]
    yield "bfloat16", (*half, None, None, seed, None, 0, 0, 0, 0, -1, *free, True, 1)
    image = make(2, 4, 3, 3).detach().contiguous(memory_format=torch.channels_last)
    image.requires_grad_(requires_grad)
    clamped = (0, 0.0, -1.0, 1.0)
    yield (
        "channels_last",
        (image, None, None, None, seed, None, 0, 0, 0, 0, 1, *clamped, True, 1),
    )


def likelihood_calls(device, requires_grad):
    def make(*shape, dtype=torch.float32):
        return leaf(*shape, dtype=dtype, device=device).requires_grad_(requires_grad)

    x, mean = make(3, 4, 2), make(3, 4, 2)
    mask = torch.tensor([True, False], device=device).expand(3, 4, 2)
    yield "unit variance", (x, mean, None)
    yield "number", (x, mean, None, None, -1.5, 2, 0)
    yield "one learned variance", (x, mean, make(), None, 0.0, 1, 3)
    yield "per channel", (x, mean, make(4, 1), None, 0.0, 1, 2)
    yield "full", (x, mean, make(3, 4, 2), None, 0.0, 2, 1)
    yield "mask", (x, mean, make(4, 1), mask, 0.0, 1, 1)
    yield "log std", (x, mean, make(3, 4, 2), mask, 0.0, 1, 3, 2, 0.1, -5.0, 5.0)
    half = make(3, 4, 2, dtype=torch.float16), make(3, 4, 2, dtype=torch.float16)
    yield "float16 beside float32", (*half, make(2), None, 0.0, 1, 1)


def elbo_calls(device, requires_grad):
    def make(*shape):
        return leaf(*shape, device=device).requires_grad_(requires_grad)

    recon_x, x, mean, logvar = make(3, 4, 2), make(3, 4, 2), make(3, 5), make(3, 5)
    beta = torch.tensor(0.5, device=device)
    yield "latent", (recon_x, x, None, 0.0, mean, logvar, None, None, 2.0, 3, requires_grad)
    yield "variance", (recon_x, x, make(4, 1), 0.0, mean, logvar, None, beta, 1.0, 2, requires_grad)
    yield "kl", (recon_x, x, None, 0.3, None, None, make(3), beta, 1.0, 1, requires_grad)
    mask = torch.tensor([True, False], device=device).expand(3, 4, 2)
    yield (
        "mask and log std",
        (
            *(recon_x, x, make(3, 4, 2), 0.0, mean, logvar, None, None, 1.0, 3, requires_grad),
            *(mask, 2, 0.1, -5.0, 5.0),
        ),
    )


def raw_calls(device):
    """(operation, case, arguments) of every raw operation."""
    for case, arguments in latent_calls(device, False):
        yield "latent_forward", case, arguments
        mean, logvar, prior_mean, prior_logvar, seed, mask, *params, want_z, reduction = arguments
        half = mean if logvar is not None else mean.chunk(2, 1)[0]
        z = half.expand(params[3], *half.shape) if params[3] else half
        nats = {0: half.shape, 1: half.shape[:1]}.get(reduction, ())
        yield (
            "latent_backward",
            case,
            (
                *(mean, logvar, prior_mean, prior_logvar),
                torch.randn_like(z) if want_z else None,
                torch.randn(nats, device=device) if reduction >= 0 else None,
                *(seed, mask, *params, reduction, prior_mean is not None),
            ),
        )
    for case, arguments in likelihood_calls(device, False):
        yield "likelihood_forward", case, arguments
        x, mean, logvar, *params = arguments
        batch_dims, reduction = params[2:4] if params else (1, 1)
        nats = {0: x.shape, 1: x.shape[:batch_dims]}.get(reduction, ())
        grad = torch.randn(nats, device=device)
        for wants in ((True, logvar is not None), (False, logvar is not None), (True, False)):
            backward = (x, mean, logvar, grad, *wants, *params)
            yield "likelihood_backward", f"{case} {wants}", backward
    for case, arguments in elbo_calls(device, False):
        yield "elbo_forward", case, arguments
        yield "elbo_forward", f"{case} with gradients", (*arguments[:10], True, *arguments[11:])
    seed = torch.tensor(-9, device=device)
    yield "fold_seed", "", (seed, 2**62)
    yield "noise_words", "", (seed, 1, 2, 3, 4)


NAMES = sorted({(name, case) for name, case, _ in raw_calls(torch.device("cpu"))})


def test_every_raw_operation_is_among_those_checked():
    assert {name for name, _ in NAMES} == set(SCHEMAS)


@pytest.mark.parametrize(("name", "case"), NAMES)
def test_raw_operations_are_what_they_claim(name, case, backend, device):
    arguments = next(a for n, c, a in raw_calls(device) if (n, c) == (name, case))
    opcheck(getattr(namespace(backend, device), name).default, arguments)


def differentiable_calls(device):
    calls = {"latent": latent_calls, "likelihood": likelihood_calls, "elbo": elbo_calls}
    return [(n, case, a) for n in DIFFERENTIABLE for case, a in calls[n](device, True)]


@pytest.mark.parametrize(
    ("name", "case"), [(n, case) for n, case, _ in differentiable_calls(torch.device("cpu"))]
)
def test_differentiable_operations_are_what_they_claim(name, case, backend, device):
    arguments = next(a for n, c, a in differentiable_calls(device) if (n, c) == (name, case))
    opcheck(getattr(namespace(backend, device), name).default, arguments)


def test_the_seed_that_compiled_code_draws_is_what_it_claims(device):
    opcheck(
        torch.ops.fused_elbo.draw_seed.default,
        (device,),
        # The fourth check wants the same numbers twice.
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_fake_tensors_have_the_shapes_dtypes_and_devices_of_real_ones(device_type, backend, device):
    """A model is laid out for a cuda device on a machine that has none."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    def fake(mode, value):
        if not isinstance(value, torch.Tensor):
            return torch.device(device_type) if isinstance(value, torch.device) else value
        strided = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
        return mode.fake_tensor_converter.from_meta_and_device(
            mode, strided, torch.device(device_type)
        )

    for name, case, arguments in raw_calls(device):
        operation = getattr(namespace(backend, device), name).default
        with FakeTensorMode() as mode:
            outputs = operation(*(fake(mode, a) for a in arguments))
        expected = operation(*arguments)
        pairs = (
            [(outputs, expected)] if isinstance(expected, torch.Tensor) else zip(outputs, expected)
        )
        for a, e in pairs:
            assert a.device.type == device_type, (name, case)
            assert (a.shape, a.dtype, a.stride()) == (e.shape, e.dtype, e.stride()), (name, case)
