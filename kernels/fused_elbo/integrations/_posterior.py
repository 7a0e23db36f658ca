"""The methods of `DiagonalGaussianDistribution` as latent-diffusion code knows it, on the kernels.

CompVis' latent-diffusion introduced the class, diffusers and generative-models took it over: a
posterior made of ``parameters = [mean, logvar]`` along dimension 1, logvar clamped to (-30, 20).
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..functional import gaussian_log_likelihood
from ..gaussian import DiagonalGaussian
from ..noise import NoiseKey
from ..reference import accumulate_dtype
from ._patching import Attribute, Patch, Replacement, expect_parameters

__all__ = ["DEFAULT", "Options", "checked_options", "posterior_replacements"]

# Posteriors that may outlive the patch. Not those of compiled code, which are seldom handed out.
_alive: weakref.WeakSet[Any] = weakref.WeakSet()
_patches: list[Patch[Options]] = []
_NAMES = ("mean", "logvar", "std", "var")


class Options(NamedTuple):
    """noise: of samples, drawn by the kernels or as the library does; compat: its nats, too."""

    noise: str = "fused"
    compat: bool = False


DEFAULT = Options()


def checked_options(function: str, noise: object, compat: object) -> Options:
    if noise not in ("fused", "upstream"):
        raise ValueError(f'{function}: noise must be "fused" or "upstream", got {noise!r}')
    if not isinstance(compat, bool):
        raise TypeError(f"{function}: compat must be a bool, got {type(compat).__name__}")
    return Options(str(noise), compat)


def posterior_replacements(
    integration: str, cls: Any, patch: Patch[Options], *, takes_generator: bool
) -> list[Replacement]:
    """What to replace on the class.

    Raises:
        RuntimeError: its methods do not take the parameters that they are known to take.
    """
    check = functools.partial(expect_parameters, integration, cls)
    check("__init__", "self", "parameters", "deterministic")
    upstream_sample = check("sample", "self", *(("generator",) if takes_generator else ()))
    upstream_kl = check("kl", "self", "other")
    upstream_nll = check("nll", "self", "sample", "dims")
    check("mode", "self")

    # Dynamo takes numbers and functions from a closure, and objects only from a module.
    if patch not in _patches:
        _patches.append(patch)
    slot = _patches.index(patch)

    def init(self: Any, parameters: Tensor, deterministic: bool = False) -> None:
        self.parameters = parameters
        self.deterministic = deterministic
        self._fused_elbo_lazy = True
        self._fused_elbo_kl = None
        if not torch.compiler.is_compiling():
            _alive.add(self)

    def sample(self: Any, generator: Any = None) -> Tensor:
        if _patches[slot].options.noise == "upstream" or not _is_lazy(self):
            return upstream_sample(self, generator)  # type: ignore[no-any-return]
        return _sample(self, generator)

    def sample_without_generator(self: Any) -> Tensor:
        if _patches[slot].options.noise == "upstream" or not _is_lazy(self):
            return upstream_sample(self)  # type: ignore[no-any-return]
        return _sample(self, None)

    def kl(self: Any, other: Any = None) -> Tensor:
        if _needs_upstream(self, other, _patches[slot].options.compat):
            return upstream_kl(self, other)  # type: ignore[no-any-return]
        if self.deterministic:
            return _no_nats(self.parameters)
        if other is not None:
            return _gaussian(self).kl(_gaussian(other))
        known = self._fused_elbo_kl if torch.is_grad_enabled() else None
        return _gaussian(self).kl() if known is None else known

    def nll(self: Any, sample: Tensor, dims: Sequence[int] | None = None) -> Tensor:
        if _needs_upstream(self, None, _patches[slot].options.compat):
            arguments = (self, sample) if dims is None else (self, sample, dims)
            return upstream_nll(*arguments)  # type: ignore[no-any-return]
        if self.deterministic:
            return _no_nats(self.parameters)
        return _nll(_gaussian(self), sample, dims)

    def mode(self: Any) -> Tensor:
        return self.mean  # type: ignore[no-any-return]

    def getstate(self: Any) -> dict[str, Any]:
        _complete(self)  # whoever unpickles it may not have these methods
        return dict(self.__dict__)

    methods: dict[str, Any] = {
        "__init__": init,
        "sample": sample if takes_generator else sample_without_generator,
        "kl": kl,
        "nll": nll,
        "mode": mode,
        "__getstate__": getstate,
    }
    for name, method in methods.items():
        if name in vars(cls):
            functools.update_wrapper(method, vars(cls)[name])
            del method.__wrapped__  # the new function is what a signature is asked of
    properties = {name: _lazy_property(name) for name in _NAMES}
    replacements = [
        Replacement(Attribute(cls, n), new) for n, new in (methods | properties).items()
    ]

    def complete_all() -> None:
        for posterior in list(_alive):
            if isinstance(posterior, cls):
                _complete(posterior)

    patch.when_undone = complete_all
    return replacements


# attributes: computed when they are asked for


def _lazy_property(name: str) -> property:
    def get(self: Any) -> Tensor:
        values = self.__dict__
        if name not in values:
            if not _is_lazy(self):
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            values[name] = _COMPUTE[name](self)
        return values[name]  # type: ignore[no-any-return]

    def put(self: Any, value: Any) -> None:
        # From here on the parameters no longer tell everything: the library's own formulas run.
        _complete(self)
        self.__dict__[name] = value

    return property(get, put)


def _mean(self: Any) -> Tensor:
    return self.parameters.chunk(2, dim=1)[0]  # type: ignore[no-any-return]


def _logvar(self: Any) -> Tensor:
    return self.parameters.chunk(2, dim=1)[1].clamp(-30.0, 20.0)  # type: ignore[no-any-return]


def _std(self: Any) -> Tensor:
    return torch.zeros_like(self.mean) if self.deterministic else torch.exp(0.5 * self.logvar)


def _var(self: Any) -> Tensor:
    return torch.zeros_like(self.mean) if self.deterministic else torch.exp(self.logvar)


_COMPUTE: dict[str, Callable[[Any], Tensor]] = {
    "mean": _mean,
    "logvar": _logvar,
    "std": _std,
    "var": _var,
}


def _is_lazy(self: Any) -> bool:
    """Whether it was made by the replaced constructor, and is still what its parameters say."""
    return getattr(self, "_fused_elbo_lazy", False)


def _complete(self: Any) -> None:
    """Gives a posterior every attribute that the library's own methods expect."""
    if _is_lazy(self):
        with torch.enable_grad():
            for name in _NAMES:  # in this order: the last two are made of the first two
                if name not in self.__dict__:
                    self.__dict__[name] = _COMPUTE[name](self)
        self._fused_elbo_lazy = False
        self._fused_elbo_kl = None


# the kernels


def _gaussian(self: Any) -> DiagonalGaussian:
    return DiagonalGaussian.from_moments(self.parameters)


def _needs_upstream(self: Any, other: Any, compat: bool) -> bool:
    """Whether the library's own formula is to run: where attributes were assigned or the other has
    no variance, and where it gives another number and just that is wanted."""
    if not _is_lazy(self):
        return True
    if other is not None and (
        not _is_lazy(other) or (other.deterministic and not self.deterministic)
    ):
        return True
    parameters = self.parameters
    exact = parameters.dim() == 4 and parameters.dtype in (torch.float32, torch.float64)
    return compat and (self.deterministic or not exact)


def _no_nats(parameters: Tensor) -> Tensor:
    return parameters.new_zeros(parameters.shape[:1], dtype=accumulate_dtype(parameters.dtype))


def _sample(self: Any, generator: Any) -> Tensor:
    if self.deterministic:
        return self.mean.clone()  # type: ignore[no-any-return]
    parameters = self.parameters
    if isinstance(generator, (list, tuple)) and len(generator) == 1:
        generator = generator[0]
    if not isinstance(generator, (list, tuple)):
        key, generator = _noise(generator, parameters)
        gaussian = _gaussian(self)
        if not (torch.is_grad_enabled() and parameters.requires_grad):
            return gaussian.rsample(key=key, generator=generator)
        # In training the KL is asked for next: from the same pass, and with one backward for both.
        z, self._fused_elbo_kl = gaussian.sample_kl(key=key, generator=generator)
        return z
    if len(generator) != parameters.shape[0]:
        raise ValueError(
            f"DiagonalGaussianDistribution.sample: generator must be one, or a list of one for "
            f"each of the {parameters.shape[0]} rows, got a list of {len(generator)}"
        )
    rows = []
    for row, of_row in zip(parameters.split(1), generator):
        key, of_row = _noise(of_row, row)
        rows.append(DiagonalGaussian.from_moments(row).rsample(key=key, generator=of_row))
    return torch.cat(rows)


def _noise(generator: Any, like: Tensor) -> tuple[NoiseKey | None, torch.Generator | None]:
    """A generator as arguments ``key, generator``; one of another device as a seed drawn there."""
    if generator is None:
        return None, None
    if not isinstance(generator, torch.Generator):
        raise TypeError(
            "DiagonalGaussianDistribution.sample: generator must be a torch.Generator, a list of "
            f"them or None, got {type(generator).__name__}"
        )
    if generator.device == like.device:
        return None, generator
    return NoiseKey(ops.draw_seed(generator.device, generator).to(like.device)), None


def _nll(gaussian: DiagonalGaussian, sample: Tensor, dims: Sequence[int] | None) -> Tensor:
    mean = gaussian.mean
    if sample.dim() <= mean.dim():
        sample = sample.expand(mean.shape)
    event = set(range(1, mean.dim()))
    wanted = event if dims is None else {d % mean.dim() for d in dims}
    if wanted == event:
        return -gaussian.log_prob(sample)
    elementwise = gaussian_log_likelihood(sample, mean, gaussian.logvar, reduction="none")
    return -elementwise.sum(dim=sorted(wanted))
