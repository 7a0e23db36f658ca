"""What ``--objective`` chooses, by name, with its options."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from . import recipes
from .architecture import Architecture
from .errors import UserError
from .recipe import Recipe, flag

OBJECTIVES: dict[str, type[Recipe]] = {
    "elbo": recipes.ELBO,
    "free-bits": recipes.FreeBits,
    "soft-free-bits": recipes.SoftFreeBits,
    "capacity": recipes.Capacity,
    "geco": recipes.GECO,
    "iwae": recipes.IWAE,
    "stl": recipes.STL,
    "dreg": recipes.DReG,
    "beta-tc": recipes.BetaTC,
    "infovae": recipes.InfoVAE,
    "optimal-sigma": recipes.OptimalSigma,
    "beta-nll": recipes.BetaNLL,
    "balanced": recipes.Balanced,
}


@dataclass
class Option:
    """One option of the command line, of one or several objectives."""

    type: Any  # float, int or str
    help: str
    defaults: dict[str, Any]  # by objective

    @property
    def owners(self) -> str:
        """The objectives it belongs to."""
        return ", ".join(self.defaults)


def options() -> dict[str, Option]:
    """Every option of every objective, by name."""
    found: dict[str, Option] = {}
    for objective, recipe in OBJECTIVES.items():
        types = get_type_hints(recipe)
        for field in fields(recipe):
            kind = str if get_origin(types[field.name]) is Literal else types[field.name]
            option = found.setdefault(field.name, Option(kind, field.metadata["help"], {}))
            option.defaults[objective] = field.default
    return found


def build(objective: str, chosen: dict[str, Any], model: Architecture) -> Recipe:
    """The objective of this name with these options, for a model.

    Raises:
        UserError: no such objective, an option that is not its own, a bad value, or a model that
            it is not for.
    """
    if objective not in OBJECTIVES:
        raise UserError(f"--objective must be one of {', '.join(OBJECTIVES)}, got {objective}")
    recipe = OBJECTIVES[objective]
    types = get_type_hints(recipe)
    known = {field.name for field in fields(recipe)}
    for name, value in chosen.items():
        if name not in known:
            every = options()
            owners = every[name].owners if name in every else "no objective"
            raise UserError(f"{flag(name)} belongs to --objective {owners}, not {objective}")
        if get_origin(types[name]) is Literal and value not in get_args(types[name]):
            raise UserError(
                f"{flag(name)} must be one of {', '.join(get_args(types[name]))}, got {value}"
            )
    made = recipe(**chosen)
    made.fit(model)
    made.check(model)
    return made
