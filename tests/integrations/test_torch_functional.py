"""torch.nn.functional.gaussian_nll_loss: the same values, gradients and errors."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from fused_elbo.integrations import torch_functional
from fused_elbo.integrations.torch_functional import gaussian_nll_loss

UPSTREAM = functional.gaussian_nll_loss
VARIANCES = {
    "full": lambda: torch.rand(4, 3, 5),
    "below eps": lambda: torch.rand(4, 3, 5) * 2e-6,
    "one for the last dimension": lambda: torch.rand(4, 3) + 0.1,
    "the same, kept as 1": lambda: torch.rand(4, 3, 1) + 0.1,
    "one for a middle dimension": lambda: torch.rand(4, 1, 5) + 0.1,
    "a number": lambda: 0.3,
    "a number below eps": lambda: 1e-9,
}


def leaves(*tensors, dtype=None):
    return [
        t.detach().to(dtype or t.dtype).requires_grad_() if isinstance(t, torch.Tensor) else t
        for t in tensors
    ]


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("variance", VARIANCES)
def test_values_and_gradients_are_those_of_torch_in_float64(variance, full, reduction):
    arguments = leaves(torch.randn(4, 3, 5), torch.randn(4, 3, 5), VARIANCES[variance]())
    loss = gaussian_nll_loss(*arguments, full, reduction=reduction)
    exact = leaves(*arguments, dtype=torch.float64)
    expected = UPSTREAM(*exact, full, reduction=reduction)
    assert loss.dtype == torch.float32 and loss.shape == expected.shape
    torch.testing.assert_close(loss.double(), expected, rtol=3e-6, atol=1e-6)
    upstream = torch.randn_like(loss)
    wanted = [t for t in arguments if isinstance(t, torch.Tensor)]
    gradients = torch.autograd.grad(loss, wanted, upstream)
    exact = [t for t in exact if isinstance(t, torch.Tensor)]
    for a, b in zip(gradients, torch.autograd.grad(expected, exact, upstream.double())):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6 * b.abs().max().item())


@pytest.mark.parametrize(
    ("input", "target", "var"),
    [((), (), ()), ((5,), (5,), (5,)), ((4, 3), (1, 3), (4, 3)), ((0, 3), (0, 3), (0, 3))],
)
def test_shapes_are_those_of_torch(input, target, var):
    arguments = torch.randn(input), torch.randn(target), torch.rand(var) + 0.1
    for reduction in ("none", "mean", "sum"):
        actual = gaussian_nll_loss(*arguments, reduction=reduction)
        expected = UPSTREAM(*arguments, reduction=reduction)
        torch.testing.assert_close(actual, expected, equal_nan=True)


@pytest.mark.parametrize(
    ("input", "target", "var"),
    [
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float32, torch.float16),
        (torch.float32, torch.float32, torch.float64),
        (torch.int64, torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16, float),
    ],
)
def test_the_result_has_the_dtype_that_torch_gives(input, target, var):
    arguments = [
        0.7 if dtype is float else torch.ones(4, 3, dtype=dtype) for dtype in (input, target, var)
    ]
    expected = UPSTREAM(*arguments)
    actual = gaussian_nll_loss(*arguments)
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(
    "arguments",
    [
        (torch.randn(4, 3), torch.randn(4, 3), -torch.ones(4, 3)),
        (torch.randn(4, 3), torch.randn(4, 3), -1.0),
        (torch.randn(4, 3), torch.randn(4, 3), torch.ones(2, 3)),
        (torch.randn(4, 3), torch.randn(4, 3), torch.ones(4, 3), False, 1e-6, "batchmean"),
        (torch.randn(4, 3), torch.randn(4, 3), 1),
    ],
    ids=["negative", "negative number", "size", "reduction", "integer"],
)
def test_errors_are_those_of_torch(arguments):
    with pytest.raises((ValueError, TypeError)) as expected:
        UPSTREAM(*arguments)
    with pytest.raises(expected.type) as actual:
        gaussian_nll_loss(*arguments)
    assert str(actual.value) == str(expected.value)


def test_it_compiles_into_one_graph_where_torch_does_not_and_still_checks():
    arguments = leaves(torch.randn(4, 3), torch.randn(4, 3), torch.rand(4, 3))
    torch._dynamo.reset()
    with pytest.raises((torch._dynamo.exc.Unsupported, torch._dynamo.exc.UserError)):
        torch.compile(UPSTREAM, fullgraph=True, backend="eager")(*arguments)
    torch._dynamo.reset()
    compiled = torch.compile(gaussian_nll_loss, fullgraph=True, backend="aot_eager")
    loss = compiled(*arguments)
    torch.testing.assert_close(loss, UPSTREAM(*arguments))
    loss.backward()
    assert all(t.grad is not None for t in arguments)
    with pytest.raises(RuntimeError, match="var has negative"):
        compiled(*arguments[:2], -arguments[2])


def test_apply_reaches_the_module_also_when_compiled():
    arguments = torch.randn(4, 3), torch.randn(4, 3), torch.rand(4, 3)
    expected = nn.GaussianNLLLoss()(*arguments)
    torch._dynamo.reset()
    with torch_functional.applied():
        assert functional.gaussian_nll_loss is gaussian_nll_loss
        compiled = torch.compile(nn.GaussianNLLLoss(), fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(*arguments), expected)
    assert functional.gaussian_nll_loss is UPSTREAM


def test_tensor_subclasses_go_through_their_own_dispatch():
    calls = []

    class Recorder(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            calls.append(function)
            return super().__torch_function__(function, types, args, kwargs or {})

    x = torch.randn(4, 3).as_subclass(Recorder)
    loss = gaussian_nll_loss(x, torch.randn(4, 3), torch.rand(4, 3))
    assert calls[0] is UPSTREAM and isinstance(loss, Recorder)
