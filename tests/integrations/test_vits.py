"""VITS: the masked KL term, against float64 of its formula."""

import types

import pytest
import torch

from fused_elbo.integrations import vits
from tests.integrations import eager

LENGTHS = torch.tensor([7, 3, 11])


def inputs(dtype=torch.float32):
    mask = (torch.arange(11) < LENGTHS[:, None])[:, None].to(dtype)
    return [torch.randn(3, 6, 11).to(dtype).requires_grad_() for _ in range(4)], mask


def test_value_and_gradients_are_those_of_the_formula():
    tensors, mask = inputs()
    loss = vits.kl_loss(*tensors, mask)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    expected = eager.kl_loss(*exact, mask.double())
    torch.testing.assert_close(loss.double(), expected, rtol=2e-6, atol=0)
    for a, b in zip(torch.autograd.grad(loss, tensors), torch.autograd.grad(expected, exact)):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6)


def test_padding_may_hold_nan_and_gets_no_gradient():
    tensors, mask = inputs()
    clean = vits.kl_loss(*tensors, mask)
    padded = (mask == 0).expand(3, 6, 11)
    dirty = [t.detach().masked_fill(padded, float("nan")).requires_grad_() for t in tensors]
    loss = vits.kl_loss(*dirty, mask)
    assert torch.equal(loss, clean)
    for gradient in torch.autograd.grad(loss, dirty):
        assert gradient.isfinite().all() and not gradient[padded].any()


def test_half_precision_inputs_give_float32():
    tensors, mask = inputs(torch.bfloat16)
    loss = vits.kl_loss(*tensors, mask)
    expected = eager.kl_loss(*(t.double() for t in tensors), mask.double())
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=2e-6, atol=0)


def test_a_named_module_is_replaced_and_restored():
    losses = types.ModuleType("losses")
    losses.kl_loss = eager.kl_loss
    vits.apply(losses)
    assert losses.kl_loss is vits.kl_loss
    vits.undo()
    assert losses.kl_loss is eager.kl_loss
    losses.kl_loss = lambda z_p, logs_q: None
    with pytest.raises(RuntimeError, match=r"must take \(z_p, logs_q, m_p, logs_p, z_mask\)"):
        vits.apply(losses)
