"""Flows: the log-determinant is that of the map, the map is invertible, x may change it."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fused_vae import InverseAutoregressiveFlow, PlanarFlow
from fused_vae.flows import Flow
from fused_vae.iaf import MaskedNetwork

LATENT, PIXELS, BATCH = 3, 6, 5


def scrambled(flow: Flow) -> Flow:
    """float64, far from where training starts."""
    g = torch.Generator().manual_seed(3)
    flow.double()
    for parameter in flow.parameters():
        parameter.data = 0.6 * torch.randn(parameter.shape, generator=g, dtype=torch.float64)
    return flow


def planar() -> Flow:
    return scrambled(PlanarFlow(LATENT, 3))


def amortized_planar() -> Flow:
    return scrambled(PlanarFlow(LATENT, 3, nn.Linear(PIXELS, 3 * (2 * LATENT + 1))))


def iaf() -> Flow:
    return scrambled(InverseAutoregressiveFlow(LATENT, 3, 8))


def iaf_with_context() -> Flow:
    return scrambled(InverseAutoregressiveFlow(LATENT, 3, 8, nn.Linear(PIXELS, 3 * 8)))


FLOWS = [planar, amortized_planar, iaf, iaf_with_context]


@pytest.fixture(params=FLOWS, ids=lambda build: build.__name__)
def flow(request: pytest.FixtureRequest) -> Flow:
    build: Callable[[], Flow] = request.param
    return build()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(
        BATCH, PIXELS, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )


@pytest.fixture
def z_0() -> Tensor:
    return torch.randn(
        BATCH, LATENT, generator=torch.Generator().manual_seed(2), dtype=torch.float64
    )


def test_log_determinant_is_that_of_the_jacobian(flow: Flow, x: Tensor, z_0: Tensor) -> None:
    _, log_det = flow(z_0, x)
    for row in range(BATCH):
        jacobian = torch.autograd.functional.jacobian(
            lambda z, row=row: flow(z[None], x[row : row + 1])[0][0], z_0[row]
        )
        assert jacobian.det() > 0  # a connected family that contains the identity
        torch.testing.assert_close(log_det[row], jacobian.logdet())
    assert float(log_det.detach().abs().min()) > 1e-3  # there is something to get wrong


def test_leading_samples_see_the_context_of_their_own_row(
    flow: Flow, x: Tensor, z_0: Tensor
) -> None:
    several = torch.stack([z_0, z_0.flip(0), -z_0])
    z, log_det = flow(several, x)
    assert z.shape == several.shape
    assert log_det.shape == several.shape[:2]
    for k in range(3):
        alone, alone_log_det = flow(several[k], x)
        torch.testing.assert_close(z[k], alone)
        torch.testing.assert_close(log_det[k], alone_log_det)


def test_only_a_flow_with_context_depends_on_x(x: Tensor, z_0: Tensor) -> None:
    for build in FLOWS:
        flow = build()
        same = torch.equal(flow(z_0, x)[0], flow(z_0, x + 1)[0])
        assert same == (build in (planar, iaf))


def test_gradients(flow: Flow, x: Tensor, z_0: Tensor) -> None:
    for tensor in (z_0, x):
        tensor.requires_grad_()
    parameters = tuple(flow.parameters())

    def run(z: Tensor, x: Tensor, *values: Tensor) -> tuple[Tensor, Tensor]:
        names = (name for name, _ in flow.named_parameters())
        out: tuple[Tensor, Tensor] = torch.func.functional_call(
            flow, dict(zip(names, values)), (z, x)
        )
        return out

    assert torch.autograd.gradcheck(run, (z_0, x, *parameters))
    assert torch.autograd.gradgradcheck(lambda z: run(z, x, *parameters), z_0)


@pytest.mark.parametrize("strength", [-30.0, -3.0, 0.0, 3.0])
def test_planar_layer_stays_invertible_however_hard_u_pulls_against_w(strength: float) -> None:
    """Along w a layer is monotone, and strictly so where the mathematics allows float64 to tell."""
    flow = PlanarFlow(2, 1).double()
    w = torch.tensor([1.0, 2.0], dtype=torch.float64)
    flow.layers.data = torch.cat([strength * w, w, torch.zeros(1, dtype=torch.float64)])[None]
    line = torch.linspace(-3, 3, 201, dtype=torch.float64)[:, None] * w
    z, log_det = flow(line, line)
    assert ((z @ w).diff() > 0).all()
    assert log_det.isfinite().all()


def test_planar_flow_starts_as_the_identity(x: Tensor, z_0: Tensor) -> None:
    z, log_det = PlanarFlow(LATENT, 5).double()(z_0, x)
    torch.testing.assert_close(z, z_0, rtol=0, atol=1e-15)
    torch.testing.assert_close(log_det, torch.zeros_like(log_det), rtol=0, atol=1e-15)


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("latent", [1, 2, 5])
def test_masked_network_sees_exactly_the_dimensions_before(latent: int, backwards: bool) -> None:
    torch.manual_seed(0)
    network = MaskedNetwork(latent, 16, backwards=backwards).double()
    z = torch.randn(latent, dtype=torch.float64)
    order = range(latent - 1, -1, -1) if backwards else range(latent)
    position = {dimension: place for place, dimension in enumerate(order)}
    for part in (0, 1):
        jacobian = torch.autograd.functional.jacobian(lambda z, p=part: network(z, None)[p], z)
        for i in range(latent):
            for j in range(latent):
                assert (jacobian[i, j] != 0) == (position[j] < position[i])


def test_every_output_of_a_masked_network_sees_the_context() -> None:
    torch.manual_seed(0)
    network = MaskedNetwork(4, 16, backwards=False)
    z, h = torch.randn(1, 4), torch.randn(1, 16)
    m, s = network(z, h)
    other_m, other_s = network(z, h + 1)
    assert (m != other_m).all()
    assert (s != other_s).all()


def test_half_precision_is_widened_before_anything_is_summed() -> None:
    for flow in (PlanarFlow(64, 2), InverseAutoregressiveFlow(64, 2, 64)):
        z = torch.randn(4, 64)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out, log_det = flow(z.bfloat16(), z)
        assert out.dtype == log_det.dtype == torch.float32


@pytest.mark.parametrize("sizes", [(0, 1), (2, 0), (2.5, 1)])
def test_bad_sizes_are_refused(sizes: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"PlanarFlow: .* must be a positive whole number, got"):
        PlanarFlow(*sizes)
    with pytest.raises(ValueError, match=r"InverseAutoregressiveFlow: .* must be a positive"):
        InverseAutoregressiveFlow(*sizes)


def test_latents_of_another_size_are_refused(flow: Flow, x: Tensor) -> None:
    with pytest.raises(ValueError, match=r"z must have shape \[\.\.\., 3\], got \(5, 1\)"):
        flow(torch.zeros(5, 1, dtype=torch.float64), x)


def test_iaf_step_is_the_gate_of_the_paper() -> None:
    """Equation 14 with one step, by hand: z = sigmoid(s) z + (1 - sigmoid(s)) m."""
    flow = InverseAutoregressiveFlow(2, 1, 4).double()
    step = flow.steps[0]
    assert isinstance(step, MaskedNetwork)
    step.outputs.weight.data.zero_()
    step.outputs.bias.data = torch.tensor([3.0, -1.0, 0.5, 0.0], dtype=torch.float64)
    z, log_det = flow(torch.tensor([[1.0, 2.0]], dtype=torch.float64), torch.zeros(1, 1))
    gate = 1 / (1 + math.exp(-0.5))
    expected = torch.tensor([[gate + (1 - gate) * 3.0, 0.5 * 2.0 - 0.5]], dtype=torch.float64)
    torch.testing.assert_close(z, expected)
    assert float(log_det.detach()) == pytest.approx(math.log(gate) + math.log(0.5))


def test_order_of_the_dimensions_alternates() -> None:
    """One step is triangular; after two, even the first dimension depends on the last."""
    z = torch.randn(LATENT, dtype=torch.float64)
    depends = []
    for steps in (1, 2):
        flow = scrambled(InverseAutoregressiveFlow(LATENT, steps, 8))
        jacobian = torch.autograd.functional.jacobian(
            lambda z, flow=flow: flow(z[None], torch.zeros(1, 1))[0][0], z
        )
        depends.append(bool(jacobian[0, -1] != 0))
    assert depends == [False, True]


def test_inverse_undoes_the_flow_at_every_x(flow: Flow, x: Tensor) -> None:
    """Also from far away, and for samples [K, B, latent]."""
    g = torch.Generator().manual_seed(7)
    z_0 = 3 * torch.randn(4, BATCH, LATENT, generator=g, dtype=torch.float64)
    z, _ = flow(z_0, x)
    assert not torch.allclose(z, z_0, atol=0.1)
    torch.testing.assert_close(flow.inverse(z, x), z_0, rtol=1e-9, atol=1e-9)
