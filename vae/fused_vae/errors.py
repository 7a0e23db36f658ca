"""The exceptions that the command line turns into one line and an exit status."""

from __future__ import annotations


class UserError(Exception):
    """A bad input or a missing package, said in one line that tells what to do. The command line
    exits with status 2.
    """


def missing_package(package: str, purpose: str) -> UserError:
    """`package` is the name that pip knows."""
    return UserError(
        f"{purpose} needs {package}: pip install 'fused-elbo[vae]' (or pip install {package})"
    )


class TrainingError(RuntimeError):
    """Training cannot go on; the message says at which step and where. Exit status 1."""
