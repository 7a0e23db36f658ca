"""Compile jobs: in parallel, and only what changed."""

from __future__ import annotations

import os
import shlex
import subprocess
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from setuptools.errors import CompileError


class JobFailed(CompileError):
    def __init__(self, job: Job, output: str) -> None:
        super().__init__(f"compiling {job.source} failed:\n{shlex.join(job.command)}\n{output}")
        self.job = job
        self.output = output


@dataclass(frozen=True)
class Job:
    """One source compiled once.

    `toolchain` names what the command line does not show: the versions of the compiler and torch.
    """

    source: Path
    object: Path
    compiler: Sequence[str]
    toolchain: str
    depfile: Path = field(init=False)
    stamp: Path = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "depfile", self.object.with_suffix(".d"))
        object.__setattr__(self, "stamp", self.object.with_suffix(".cmd"))

    @property
    def command(self) -> list[str]:
        return [
            *self.compiler,
            "-MMD",
            "-MF",
            str(self.depfile),
            "-c",
            str(self.source),
            "-o",
            str(self.object),
        ]

    def _identity(self) -> str:
        return f"{self.toolchain}\n{shlex.join(self.command)}\n"

    def is_current(self) -> bool:
        """Whether the object is what this command would make from the files as they are now."""
        try:
            same = self.stamp.read_text() == self._identity()
            return same and is_newer_than_its_sources(self.object)
        except OSError:
            return False

    def run(self) -> None:
        self.object.parent.mkdir(parents=True, exist_ok=True)
        self.stamp.unlink(missing_ok=True)
        started = time.time_ns()
        done = subprocess.run(
            self.command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        if done.returncode != 0:
            raise JobFailed(self, done.stdout)
        # An edit made while the compiler was reading must make the object count as outdated.
        os.utime(self.object, ns=(started, started))
        self.stamp.write_text(self._identity())
        print(f"  {self.object.name:34} {(time.time_ns() - started) / 1e9:5.1f} s", flush=True)
        if done.stdout.strip():
            print(done.stdout, end="", flush=True)


def is_newer_than_its_sources(object: Path) -> bool:
    """Whether nothing that the compiler read has changed since.

    Raises:
        OSError: a file is missing.
    """
    text = object.with_suffix(".d").read_text()
    prerequisites = text.replace("\\\n", " ").split(": ", 1)[1]
    built = object.stat().st_mtime_ns
    return all(Path(name).stat().st_mtime_ns < built for name in shlex.split(prerequisites))


def default_workers() -> int:
    requested = os.environ.get("FUSED_ELBO_BUILD_JOBS", "")
    return max(1, int(requested)) if requested.isdecimal() else os.cpu_count() or 1


def compile_all(jobs: Sequence[Job], workers: int | None = None) -> None:
    """Runs the jobs that are not current, in the order given; starts none after a failure.

    Raises:
        JobFailed: of the first job that failed, with the compiler's output.
    """
    failed = threading.Event()

    def run(job: Job) -> None:
        if failed.is_set():
            return
        try:
            job.run()
        except BaseException:
            failed.set()
            raise

    pending = [job for job in jobs if not job.is_current()]
    with ThreadPoolExecutor(workers or default_workers()) as pool:
        for future in [pool.submit(run, job) for job in pending]:
            future.result()
