"""torch.compile(fullgraph=True): the values of eager, and no recompiles for new sizes or seeds."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from fused_elbo import (
    DiagonalGaussian,
    NoiseKey,
    Reparameterize,
    elbo_loss,
    gaussian_kl,
    gaussian_log_likelihood,
    reparameterize,
    reparameterize_kl,
)
from tests.ops.support import leaf

KEY = NoiseKey(seed=12)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def inputs(batch, device):
    return [leaf(batch, 3, 4, device=device) for _ in range(4)]


def functions(device):
    """Every operation as a function of four tensors [B, 3, 4] to tensors."""
    beta, seed = torch.tensor(0.5, device=device), torch.tensor(5, device=device)
    channel = leaf(3, 1, device=device)
    return {
        "reparameterize": lambda a, b, c, d: (reparameterize(a, b, key=KEY),),
        "reparameterize_kl": lambda a, b, c, d: reparameterize_kl(a, b, key=KEY),
        "with a prior": lambda a, b, c, d: reparameterize_kl(a, b, c, d, key=KEY, reduction="none"),
        "seed tensor and samples": lambda a, b, c, d: reparameterize_kl(
            a, b, key=NoiseKey(seed), num_samples=2
        ),
        "gaussian_kl": lambda a, b, c, d: (gaussian_kl(a, b, c[:1], d[:1], reduction="batchmean"),),
        "from_moments": lambda a, b, c, d: DiagonalGaussian.from_moments(a, dim=2).sample_kl(
            key=KEY
        ),
        "from_moments of logstd": lambda a, b, c, d: DiagonalGaussian.from_moments(
            a, dim=2, param="logstd"
        ).sample_kl(key=KEY),
        "kl of moments": lambda a, b, c, d: (
            DiagonalGaussian.from_moments(a, 2).kl(DiagonalGaussian.from_moments(b, 2)),
        ),
        "unit variance": lambda a, b, c, d: (gaussian_log_likelihood(a, b),),
        "channel variance": lambda a, b, c, d: (
            gaussian_log_likelihood(a, b, channel, reduction="sum"),
        ),
        "full variance": lambda a, b, c, d: (gaussian_log_likelihood(a, b, c),),
        "elbo_loss": lambda a, b, c, d: elbo_loss(a, b, c, d, beta=beta, recon_logvar=channel),
        "elbo_loss per sample": lambda a, b, c, d: elbo_loss(a, b, c, d, reduction="sample"),
        "vae step": lambda a, b, c, d: step(a, b, c),
        "module": lambda a, b, c, d: Reparameterize()(a, b, key=KEY),
    }


def step(mean, logvar, x):
    z, kl = reparameterize_kl(mean, logvar, key=KEY)
    return elbo_loss(torch.tanh(z), x, kl=kl)


NAMES = list(functions(torch.device("cpu")))


def run(function, tensors):
    """Outputs, and the gradients of every input for fixed upstream gradients."""
    outputs = function(*tensors)
    wanted = [t for t in outputs if t.requires_grad]
    upstream = [torch.linspace(-1, 2, t.numel(), device=t.device).view(t.shape) for t in wanted]
    return *outputs, *torch.autograd.grad(wanted, tensors, upstream, allow_unused=True)


@pytest.mark.parametrize("name", NAMES)
def test_compiled_values_and_gradients_are_those_of_eager_without_recompiles(name, device):
    function = functions(device)[name]
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for batch in (4, 6, 9, 2, 33):  # the second size makes the graph dynamic
        tensors = inputs(batch, device)
        for a, e in zip(run(compiled, tensors), run(function, tensors), strict=True):
            assert (a is None) == (e is None)
            if a is not None:
                torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)
    assert counter.frame_count <= 2


@pytest.mark.kernels
@pytest.mark.parametrize("name", ["with a prior", "from_moments", "vae step"])
def test_inductor_runs_the_kernels(name, backend, device):
    """The default compiler, once for each operation."""
    function = functions(device)[name]
    compiled = torch.compile(function, fullgraph=True, dynamic=True)
    for batch in (4, 7):
        tensors = inputs(batch, device)
        for a, e in zip(run(compiled, tensors), run(function, tensors), strict=True):
            if e is not None:
                torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)


def operations_in_the_graph(function, *arguments):
    seen = []

    def spy(graph, _):
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    torch.compile(function, fullgraph=True, backend=spy)(*arguments)
    return seen


@pytest.mark.kernels
def test_a_call_is_one_node_of_the_graph(device):
    tensors = inputs(4, device)
    for name, count in (
        ("reparameterize_kl", 1),
        ("unit variance", 1),
        ("elbo_loss", 1),
        ("vae step", 2),
    ):
        torch._dynamo.reset()
        nodes = operations_in_the_graph(functions(device)[name], *tensors)
        assert sum("fused_elbo" in node for node in nodes) == count, nodes


def test_without_a_key_every_call_draws_afresh_and_manual_seed_reproduces(device):
    compiled = torch.compile(
        lambda a, b: reparameterize_kl(a, b)[0], fullgraph=True, backend="aot_eager"
    )
    a, b = inputs(4, device)[:2]
    torch.manual_seed(5)
    first, second = compiled(a, b), compiled(a, b)
    assert not torch.equal(first, second)
    torch.manual_seed(5)
    assert torch.equal(compiled(a, b), first)
    torch.manual_seed(5)
    assert torch.equal(reparameterize_kl(a, b)[0], first)


def test_backward_of_a_compiled_call_without_a_key_uses_the_noise_of_forward(device):
    compiled = torch.compile(lambda a, b: reparameterize(a, b), fullgraph=True, backend="aot_eager")
    mean, logvar = (torch.zeros(4, 9, device=device, requires_grad=True) for _ in range(2))
    z = compiled(mean, logvar)
    (grad,) = torch.autograd.grad(z, logvar, torch.ones_like(z))
    torch.testing.assert_close(2 * grad, z, rtol=1e-6, atol=1e-6)


def test_a_new_seed_does_not_recompile(device):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda a, b, seed: reparameterize(a, b, key=NoiseKey(seed).fold_in(3)),
        fullgraph=True,
        backend=counter,
    )
    a, b = inputs(4, device)[:2]
    for seed in (1, -5, 2**40):
        z = compiled(a, b, torch.tensor(seed, device=device))
        assert torch.equal(z, reparameterize(a, b, key=NoiseKey(seed).fold_in(3)))
    assert counter.frame_count == 1


@pytest.mark.kernels
def test_a_new_row_offset_or_number_of_samples_does_not_recompile_forever(device):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda a, b, seed, start, k: reparameterize(
            a, b, key=NoiseKey(seed).rows(start), num_samples=k
        ),
        fullgraph=True,
        backend=counter,
    )
    a, b = inputs(4, device)[:2]
    seed = torch.tensor(3, device=device)
    for start, k in ((2, 2), (3, 3), (7, 4), (100, 5), (2**33, 7)):
        z = compiled(a, b, seed, start, k)
        assert torch.equal(z, reparameterize(a, b, key=NoiseKey(seed).rows(start), num_samples=k))
    assert counter.frame_count <= 3


@pytest.mark.kernels
def test_a_new_step_folded_into_a_seed_tensor_does_not_recompile_forever(device):
    """What a training loop does: NoiseKey(seed).fold_in(step)."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda a, b, seed, i: reparameterize(a, b, key=NoiseKey(seed).fold_in(i)),
        fullgraph=True,
        backend=counter,
    )
    a, b = inputs(4, device)[:2]
    seed = torch.tensor(3, device=device)
    for i in (10, 11, 12, 13, 14):
        assert torch.equal(
            compiled(a, b, seed, i), reparameterize(a, b, key=NoiseKey(seed).fold_in(i))
        )
    assert counter.frame_count <= 2


@pytest.mark.kernels
@pytest.mark.parametrize("kind", ["number", "tensor"])
def test_an_annealed_beta_does_not_recompile_forever(kind, device):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda a, b, c, d, beta: elbo_loss(a, b, c, d, beta=beta).loss,
        fullgraph=True,
        backend=counter,
    )
    tensors = inputs(4, device)
    for value in (0.1, 0.2, 0.3, 0.4, 0.5):
        beta = torch.tensor(value, device=device) if kind == "tensor" else value
        torch.testing.assert_close(
            compiled(*tensors, beta), elbo_loss(*tensors, beta=value).loss, rtol=1e-6, atol=1e-6
        )
    assert counter.frame_count <= 2


def test_a_compiled_vae_trains_as_the_eager_one(device):
    def train(compile_it):
        torch.manual_seed(0)
        model = torch.nn.ModuleDict({"e": torch.nn.Linear(6, 4), "d": torch.nn.Linear(2, 6)}).to(
            device
        )
        x = torch.randn(16, 6, device=device)

        def loss(x, seed):
            mean, logvar = model["e"](x).chunk(2, 1)
            z, kl = reparameterize_kl(mean, logvar, key=NoiseKey(seed))
            return elbo_loss(model["d"](z), x, kl=kl).loss

        if compile_it:
            loss = torch.compile(loss, fullgraph=True, backend="aot_eager")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        values = []
        for i in range(5):
            optimizer.zero_grad()
            value = loss(x, torch.tensor(i, device=device))
            value.backward()
            optimizer.step()
            values.append(value.item())
        return values

    eager = train(False)
    assert eager[-1] < eager[0]
    assert train(True) == pytest.approx(eager, rel=1e-5)
