"""Compiled steps, and what is said of a step that went wrong."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_vae.data import Images
from fused_vae.errors import TrainingError, UserError
from fused_vae.train import Trainer
from tests.vae.support import train, trainer


@pytest.fixture
def once() -> Iterator[None]:
    """Compiling a second time is an error."""
    torch.compiler.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch.compiler.reset()


def bad_step(job: Trainer, x: Tensor, numbers: Tensor) -> str:
    """What is said of it; nothing may have changed."""
    before = {k: v.clone() for k, v in job.model.state_dict().items()}
    moments = {k: v.clone() for k, v in job.state()[0].items()}
    step = job.progress.step
    with pytest.raises(TrainingError) as caught:
        job.step(x, numbers)
    after = job.model.state_dict()
    assert all(torch.equal(before[k], v) for k, v in after.items())
    assert all(torch.equal(moments[k], v) for k, v in job.state()[0].items())
    assert job.progress.step == step
    return str(caught.value)


def test_compiled_training_is_eager_training_and_resumes(
    digits: tuple[Images, Images], once: None
) -> None:
    """The price of the rate changes with every step, and no step compiles again."""
    options: dict[str, Any] = {"warm_up": "linear", "beta": 0.5, "batch_size": 101}
    eager = trainer(digits, **options)
    train(eager)
    compiled = trainer(digits, **options, compile=True)
    calls = torch._dynamo.utils.counters
    calls.clear()
    expected = train(compiled)
    assert calls["stats"]["unique_graphs"] == 1
    rows = zip(eager.progress.history, compiled.progress.history, strict=True)
    for row, other in rows:
        assert {**other, "seconds": 0} == pytest.approx({**row, "seconds": 0}, rel=1e-5)

    torch.compiler.reset()
    stopped = trainer(digits, **options, compile=True)
    train(stopped, epochs=1)
    torch.compiler.reset()
    resumed = trainer(digits, **options, compile=True)
    resumed.restore(*stopped.state())
    result = train(resumed)
    assert all(torch.equal(expected[k], result[k]) for k in expected)

    x, numbers = next(resumed._batches(0))
    x[7] = math.nan
    said = bad_step(resumed, x, numbers)
    assert f"for 1 of 101 images of the batch (numbers {int(numbers[7])} of the data)" in said
    assert "the loss became nan, first in what layer encoder.0 was given" in said


def test_compiled_bfloat16_trains(digits: tuple[Images, Images], once: None) -> None:
    low = trainer(digits, precision="bfloat16", compile=True)
    exact = trainer(digits)
    before = exact.evaluate()["elbo"]
    train(low)
    train(exact)
    found, expected = (job.progress.history[-1]["elbo"] for job in (low, exact))
    assert found > before + 30
    assert found == pytest.approx(expected, rel=0.01)


def test_a_model_that_does_not_compile_is_an_error_in_one_line(
    digits: tuple[Images, Images], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = trainer(digits, compile=True)
    original = job.model.encode

    def encode(x: Tensor) -> Any:
        torch._dynamo.graph_break()
        return original(x)

    monkeypatch.setattr(job.model, "encode", encode)
    with pytest.raises(UserError, match=r"^--compile: torch cannot compile the model") as caught:
        train(job)
    assert "\n" not in str(caught.value)


def test_the_first_bad_layer_is_named(digits: tuple[Images, Images]) -> None:
    job = trainer(digits)
    x, numbers = next(job._batches(0))
    with torch.no_grad():
        job.model.encoder[3].bias[0] = math.inf
    before = {k: v.clone() for k, v in job.model.state_dict().items()}
    with pytest.raises(TrainingError, match=r"first in layer encoder\.3, for 100 of 100 images"):
        job.step(x, numbers)
    assert all(torch.equal(before[k], v) for k, v in job.model.state_dict().items())


def test_a_gradient_that_is_not_finite_is_not_applied(digits: tuple[Images, Images]) -> None:
    """The loss is finite, the gradient of one image is not: a square root at zero."""
    job = trainer(digits)
    x, numbers = next(job._batches(0))
    original = job.model.encoder

    class Root(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift = torch.nn.Parameter(torch.zeros(()))

        def forward(self, pixels: Tensor) -> Tensor:
            moments: Tensor = original(pixels)
            distance = (pixels[:, :, 0, 0] - x[5, :, 0, 0]).abs()  # 0 for image 5 alone
            return moments + (distance + self.shift).sqrt()

    job.model.encoder = Root()
    said = bad_step(job, x, numbers)
    assert "the gradient became inf, first in layer encoder, " in said
    assert f"for 1 of 100 images of the batch (numbers {int(numbers[5])} of the data)" in said
    assert "nothing was updated" in said


def test_an_update_that_ruins_the_parameters_is_not_saved(digits: tuple[Images, Images]) -> None:
    """After the last step of an epoch there is no loss to notice it."""
    job = trainer(digits)

    def ruin() -> None:
        for steps in job.epochs():
            for number, _ in enumerate(steps):
                if number == 15:
                    with torch.no_grad():
                        job.model.encoder[1].weight[0, 0] = math.nan

    with pytest.raises(TrainingError, match=r"step 15: the update made encoder\.1\.weight unusabl"):
        ruin()
    assert job.progress.history == []
