"""The rest of torch: autocast, checkpointing, fake tensors, DDP, hooks, inference mode."""

import pytest
import torch
import torch.distributed
from torch import nn
from torch.utils.checkpoint import checkpoint

from fused_elbo import (
    DiagonalGaussian,
    ELBOLoss,
    NoiseKey,
    Reparameterize,
    elbo_loss,
    gaussian_log_likelihood,
    reparameterize_kl,
)
from tests.ops.support import leaf

KEY = NoiseKey(seed=16)


class VAE(nn.Module):
    """Small enough to differentiate, and with every operation of a step."""

    def __init__(self, key=None):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(6, 4), nn.Linear(2, 6)
        self.sample, self.loss = Reparameterize(), ELBOLoss()
        self.key = key

    def forward(self, x):
        z, kl = self.sample(*self.encoder(x).chunk(2, 1), key=self.key)
        return self.loss(self.decoder(z), x, kl=kl)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_gives_half_precision_samples_and_float32_nats(dtype, device):
    model, x = VAE(KEY).to(device), torch.randn(8, 6, device=device)
    with torch.autocast(device.type, dtype):
        moments = model.encoder(x)
        z, kl = reparameterize_kl(*moments.chunk(2, 1), key=KEY)
        out = elbo_loss(model.decoder(z), x, kl=kl)
    assert moments.dtype == z.dtype == dtype
    assert {kl.dtype, *(t.dtype for t in out)} == {torch.float32}
    out.loss.backward()
    exact = model(x).loss
    assert out.loss.item() == pytest.approx(exact.item(), rel=2e-2)
    for p in model.parameters():
        assert p.grad.dtype == torch.float32
        assert p.grad.isfinite().all()


def test_autocast_promotes_mixed_dtypes_as_torch_does(device):
    """An encoder in half precision beside a float32 parameter."""
    mean = leaf(5, 3, dtype=torch.bfloat16, device=device)
    logvar = leaf(5, 3, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        z, kl = reparameterize_kl(mean, logvar, key=KEY)
        ll = gaussian_log_likelihood(mean, logvar, leaf(device=device))
        out = elbo_loss(mean, logvar, logvar, mean)
        q = DiagonalGaussian(mean, logvar)
        assert q.kl().dtype == torch.float32
    assert z.dtype == kl.dtype == ll.dtype == out.loss.dtype == torch.float32
    assert torch.equal(z, reparameterize_kl(mean.float(), logvar, key=KEY)[0])
    (z.sum() + kl.sum() + ll.sum() + out.loss).backward()
    assert (mean.grad.dtype, logvar.grad.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("key", [None, KEY], ids=["drawn seed", "key"])
def test_a_checkpointed_forward_draws_the_same_noise_again(key, reentrant, device):
    inputs = [leaf(5, 3, device=device) for _ in range(2)]

    def block(mean, logvar):
        z, kl = reparameterize_kl(mean, logvar, key=key)
        return z.sin().sum(1) * kl

    torch.manual_seed(8)
    expected = block(*inputs)
    grads = torch.autograd.grad(expected.sum(), inputs)
    torch.manual_seed(8)
    actual = checkpoint(block, *inputs, use_reentrant=reentrant)
    torch.rand(3)  # other draws before backward must not matter
    assert torch.equal(actual, expected)
    actual.sum().backward()
    for t, g in zip(inputs, grads):
        assert torch.equal(t.grad, g)


def test_a_checkpointed_and_compiled_step_has_the_gradients_of_the_plain_one(device):
    torch._dynamo.reset()
    model, x = VAE(KEY).to(device), torch.randn(8, 6, device=device)
    expected = torch.autograd.grad(model(x).loss, list(model.parameters()))
    compiled = torch.compile(
        lambda x: checkpoint(lambda x: model(x).loss, x, use_reentrant=False),
        fullgraph=True,
        backend="aot_eager",
    )
    actual = torch.autograd.grad(compiled(x), list(model.parameters()))
    for a, e in zip(actual, expected):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-6)


def test_a_checkpointed_vae_step_has_the_gradients_of_the_plain_one(device):
    model, x = VAE().to(device), torch.randn(8, 6, device=device)
    torch.manual_seed(8)
    expected = torch.autograd.grad(model(x).loss, list(model.parameters()))
    torch.manual_seed(8)
    loss = checkpoint(lambda x: model(x).loss, x, use_reentrant=False)
    actual = torch.autograd.grad(loss, list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(actual, expected))


@pytest.mark.parametrize("fake_device", ["cpu", "cuda"])
def test_fake_tensors_pass_through_the_public_functions(fake_device):
    """Shape propagation, for a device that need not be here. (Without gradients: a fake cuda tensor
    that requires one aborts a torch that has no cuda.)"""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), torch.no_grad():
        image = torch.empty(4, 8, 6, 6, device=fake_device, dtype=torch.bfloat16)
        mean, logvar = image.chunk(2, 1)
        z, kl = reparameterize_kl(mean, logvar, num_samples=3)
        sample = DiagonalGaussian.from_moments(image).rsample(key=KEY)
        ll = gaussian_log_likelihood(image, image, 0.5, reduction="none")
        out = elbo_loss(image, image, mean, logvar)
    for t, shape, dtype in (
        (z, (3, 4, 4, 6, 6), torch.bfloat16),
        (kl, (4,), torch.float32),
        (sample, (4, 4, 6, 6), torch.bfloat16),
        (ll, (4, 8, 6, 6), torch.float32),
        (out.loss, (), torch.float32),
        (out.kl, (4,), torch.float32),
        (out.log_likelihood, (4,), torch.float32),
    ):
        assert (tuple(t.shape), t.dtype, t.device.type) == (shape, dtype, fake_device)


@pytest.fixture
def process_group(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_ddp_has_the_gradients_of_the_model(process_group, device):
    torch.manual_seed(1)
    model, x = VAE(KEY).to(device), torch.randn(8, 6, device=device)
    expected = torch.autograd.grad(model(x).loss, list(model.parameters()))
    parallel = nn.parallel.DistributedDataParallel(model)
    for _ in range(2):
        model.zero_grad()
        parallel(x).loss.backward()
        for p, e in zip(model.parameters(), expected):
            torch.testing.assert_close(p.grad, e, rtol=1e-6, atol=1e-7)


def test_inference_mode_and_no_grad_give_the_same_values(device):
    a, b, c, d = (leaf(5, 3, device=device) for _ in range(4))

    def everything():
        return (
            *reparameterize_kl(a, b, c, d, key=KEY),
            gaussian_log_likelihood(a, b, c),
            *elbo_loss(a, b, c, d),
        )

    expected = everything()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            for x, e in zip(everything(), expected):
                assert not x.requires_grad
                assert torch.equal(x, e)


def test_tensor_hooks_see_the_gradients(device):
    mean, logvar = (leaf(5, 3, device=device) for _ in range(2))
    seen = []
    z, _ = reparameterize_kl(mean * 1, logvar, key=KEY)
    z.register_hook(lambda g: g * 2)
    mean.register_hook(lambda g: seen.append(g.clone()))
    z.sum().backward()
    assert torch.equal(seen[0], torch.full_like(mean, 2.0))


def test_anomaly_mode_finds_nothing_to_complain_about(device):
    model, x = VAE(KEY).to(device), torch.randn(8, 6, device=device)
    with torch.autograd.detect_anomaly(check_nan=True):
        model(x).loss.backward()


def test_saved_tensors_may_live_elsewhere_until_backward(device):
    """Offloading hooks pack and unpack what is saved."""
    inputs = [leaf(5, 3, device=device) for _ in range(4)]

    def total():
        z, kl = reparameterize_kl(*inputs, key=KEY)
        return (z.sum(1) * kl).sum() + elbo_loss(*inputs).loss

    expected = torch.autograd.grad(total(), inputs)
    with torch.autograd.graph.save_on_cpu():
        actual = torch.autograd.grad(total(), inputs)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected))


def test_gradients_accumulate_over_micro_batches(device):
    """Shards of a batch with key.rows sum to the gradients of the whole."""
    mean, logvar = (leaf(8, 3, device=device) for _ in range(2))
    z, kl = reparameterize_kl(mean, logvar, key=KEY)
    expected = torch.autograd.grad((z.square().sum(1) + kl).mean(), (mean, logvar))
    for start in (0, 2, 4, 6):
        part = slice(start, start + 2)
        z, kl = reparameterize_kl(mean[part], logvar[part], key=KEY.rows(start))
        ((z.square().sum(1) + kl).sum() / 8).backward()
    for t, e in zip((mean, logvar), expected):
        torch.testing.assert_close(t.grad, e, rtol=1e-6, atol=1e-7)
