"""Tensors beyond the caches, whose gradients the CPU kernels store past them."""

import pytest
import torch

from fused_elbo import elbo_loss, gaussian_log_likelihood, use_backend
from tests.ops.support import leaf, nats_dtype

#: 32 MB of x, mean and gradient together, in three rows of odd length: a kernel finds the first
#: row's gradient on a boundary of lines of the cache, and the second's on none.
EVENT = {torch.float64: 500_009, torch.float32: 1_000_003, torch.bfloat16: 1_900_001}
EVENT[torch.float16] = EVENT[torch.bfloat16]


def likelihood(variance):
    """Outputs and gradients; variance: unit, shared (one learned number) or full."""

    def call(x, mean, logvar):
        wanted = (mean,) if variance == "unit" else (mean, logvar)
        given = {"unit": None, "shared": logvar[0, 0], "full": logvar}[variance]
        ll = gaussian_log_likelihood(x, mean, given)
        grads = torch.autograd.grad(ll, wanted, torch.full_like(ll, 0.7))
        # That of a shared number is a sum over the batch.
        return ll, *(grads[:1] if variance == "shared" else grads)

    return call


def loss(x, mean, logvar):
    kl = logvar[:, 0].to(nats_dtype(x.dtype))
    out = elbo_loss(mean, x, kl=kl, recon_logvar=0.3, reduction="sample")
    return out.loss, out.log_likelihood, *torch.autograd.grad(out.loss.sum(), mean)


CALLS = {
    "unit": likelihood("unit"),
    "shared": likelihood("shared"),
    "full": likelihood("full"),
    "elbo": loss,
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("dtype", EVENT, ids=str)
def test_a_row_of_a_batch_beyond_the_caches_is_the_row_alone(dtype, call):
    run = CALLS[call]
    tensors = [leaf(3, EVENT[dtype], dtype=dtype, device="cpu") for _ in range(3)]
    with use_backend("cpu"):
        whole = run(*tensors)
        for row in range(3):
            # The shared logvar is the first row's.
            alone = [t.detach()[row : row + 1].clone() for t in tensors]
            alone[2][0, 0] = tensors[2].detach()[0 if call == "shared" else row, 0]
            for i, (a, e) in enumerate(
                zip(run(*(t.requires_grad_() for t in alone)), whole, strict=True)
            ):
                assert torch.equal(a[0], e[row]), f"{i}: row {row}"
