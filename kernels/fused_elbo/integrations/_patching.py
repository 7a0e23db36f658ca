"""Replacing attributes of other libraries, and putting the very same objects back."""

from __future__ import annotations

import importlib
import inspect
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any, Generic, NamedTuple, TypeVar

import torch

__all__ = [
    "Attribute",
    "Item",
    "Patch",
    "PatchByOwner",
    "Replacement",
    "checked_modules",
    "expect_parameters",
    "function_replacements",
    "peer",
    "refuse_other_parameters",
]

_log = logging.getLogger("fused_elbo")
_ABSENT = object()
_lock = threading.RLock()

Options = TypeVar("Options")


class Attribute(NamedTuple):
    """An attribute of a class or a module, not one that it inherits."""

    owner: Any
    name: str

    def get(self) -> Any:
        return vars(self.owner).get(self.name, _ABSENT)

    def set(self, value: Any) -> None:
        if value is _ABSENT:
            delattr(self.owner, self.name)
        else:
            setattr(self.owner, self.name, value)


class Item(NamedTuple):
    """An entry of a registry; ``changed`` is called after it has been replaced."""

    registry: MutableMapping[Any, Any]
    key: Any
    changed: Callable[[], None]

    def get(self) -> Any:
        return self.registry.get(self.key, _ABSENT)

    def set(self, value: Any) -> None:
        if value is _ABSENT:
            del self.registry[self.key]
        else:
            self.registry[self.key] = value
        self.changed()


class Replacement(NamedTuple):
    place: Attribute | Item
    new: Any


class Patch(Generic[Options]):
    """Replacements that are made together while at least one request for them stands.

    `apply` makes or renews one request, `undo` withdraws it, and every `applied` block is one of
    its own; the options in force are those of the latest. A request holds for the whole process.

    Args:
        replacements: called when the first request is made; imports what it patches and refuses
            what it does not know, before anything is replaced.
        default: the options while nothing is applied.
    """

    def __init__(self, replacements: Callable[[], list[Replacement]], default: Options) -> None:
        self._replacements = replacements
        self._default = default
        self._requests: list[tuple[object, Options]] = []
        self._undo: list[tuple[Replacement, Any]] = []
        #: Read by the replacements at every call.
        self.options = default
        #: Called after everything has been put back.
        self.when_undone: Callable[[], None] = lambda: None

    def apply(self, options: Options) -> None:
        self._request(self, options)

    def undo(self) -> None:
        self._withdraw(self)

    @contextmanager
    def applied(self, options: Options) -> Iterator[None]:
        token = object()
        self._request(token, options)
        try:
            yield
        finally:
            self._withdraw(token)

    def _request(self, token: object, options: Options) -> None:
        with _lock:
            if not self._undo:
                replacements = self._replacements()
                self._undo = [(r, r.place.get()) for r in replacements]
                for replacement in replacements:
                    replacement.place.set(replacement.new)
            self._requests = [r for r in self._requests if r[0] is not token]
            self._requests.append((token, options))
            self.options = options

    def _withdraw(self, token: object) -> None:
        with _lock:
            self._requests = [r for r in self._requests if r[0] is not token]
            if self._requests:
                self.options = self._requests[-1][1]
                return
            for replacement, old in reversed(self._undo):
                if replacement.place.get() is replacement.new:
                    replacement.place.set(old)
                else:
                    _log.warning(
                        "fused_elbo: someone else has replaced %s since; it is left as it is",
                        replacement.place,
                    )
            if self._undo:
                self._undo = []
                self.when_undone()
            self.options = self._default


class PatchByOwner(Generic[Options]):
    """A `Patch` for each class or module that a user names.

    Args:
        replacements: as of `Patch`, called with the owner and its own patch.
        default: as of `Patch`.
    """

    def __init__(
        self,
        replacements: Callable[[Any, Patch[Options]], list[Replacement]],
        default: Options,
    ) -> None:
        self._replacements = replacements
        self._default = default
        self._patches: dict[Any, Patch[Options]] = {}

    def apply(self, owners: tuple[Any, ...], options: Options) -> None:
        done: list[Patch[Options]] = []
        for owner in owners:
            try:
                self._of(owner).apply(options)
            except BaseException:
                for patch in done:  # all of them or none
                    patch.undo()
                raise
            done.append(self._of(owner))

    def undo(self, owners: tuple[Any, ...]) -> None:
        with _lock:
            patches = [self._of(o) for o in owners] if owners else list(self._patches.values())
        for patch in patches:
            patch.undo()

    @contextmanager
    def applied(self, owners: tuple[Any, ...], options: Options) -> Iterator[None]:
        with ExitStack() as stack:
            for owner in owners:
                stack.enter_context(self._of(owner).applied(options))
            yield

    def _of(self, owner: Any) -> Patch[Options]:
        with _lock:
            if owner not in self._patches:
                patch: Patch[Options] = Patch(
                    lambda: self._replacements(owner, patch), self._default
                )
                self._patches[owner] = patch
            return self._patches[owner]


def peer(integration: str, distribution: str, module: str) -> ModuleType:
    """Imports a module of another library.

    Raises:
        ImportError: it is not installed, or has no such module.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"fused_elbo.integrations.{integration}: needs {distribution}, and importing {module} "
            f"failed: {error}. Install it with `pip install {distribution}`."
        ) from error


def expect_parameters(integration: str, owner: Any, name: str, *parameters: str) -> Any:
    """The attribute ``name`` of ``owner``, a function of just these parameters.

    Raises:
        RuntimeError: it is missing, or takes others: a version that this module does not know.
    """
    where = getattr(owner, "__qualname__", getattr(owner, "__name__", repr(owner)))
    function = vars(owner).get(name)
    refuse_other_parameters(integration, f"{where}.{name}", function, parameters)
    return function


def refuse_other_parameters(
    integration: str, what: str, function: Any, parameters: tuple[str, ...]
) -> None:
    """`expect_parameters` of a function in hand; None: there is none."""
    found = None if function is None else _parameters(function)
    if found != parameters:
        came = "nothing of that name" if found is None else f"({', '.join(found)})"
        raise RuntimeError(
            f"fused_elbo.integrations.{integration}: {what} must take ({', '.join(parameters)}), "
            f"got {came}: this version of it is not supported, and nothing has been replaced"
        )


def function_replacements(
    integration: str, module: ModuleType, functions: Mapping[str, tuple[Any, tuple[str, ...]]]
) -> list[Replacement]:
    """For those of ``functions`` (name: replacement and parameters) that a module has.

    Raises:
        RuntimeError: one takes other parameters, or the module has none of them.
    """
    present = [name for name in functions if name in vars(module)]
    if not present:
        raise RuntimeError(
            f"fused_elbo.integrations.{integration}: {module.__name__} has none of "
            f"{', '.join(functions)}: nothing has been replaced"
        )
    for name in present:
        expect_parameters(integration, module, name, *functions[name][1])
    return [Replacement(Attribute(module, name), functions[name][0]) for name in present]


def checked_modules(function: str, modules: tuple[Any, ...]) -> tuple[ModuleType, ...]:
    if not modules:
        raise TypeError(f"{function}: name the modules whose functions are to be replaced")
    for module in modules:
        if not isinstance(module, ModuleType):
            raise TypeError(f"{function}: expected modules, got {type(module).__name__}")
    return modules


def _parameters(function: Any) -> tuple[str, ...]:
    if isinstance(function, torch.jit.ScriptFunction):  # has a signature of *args, **kwargs
        schema: Any = function.schema
        return tuple(argument.name for argument in schema.arguments)
    return tuple(inspect.signature(function).parameters)
