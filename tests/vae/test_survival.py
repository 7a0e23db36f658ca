"""A run outlives whatever ends it: a full disk, an interrupt, a kill in the middle of a write."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from fused_vae import run_folder
from fused_vae.cli import main
from fused_vae.run_folder import CHECKPOINT, RunFolder, read_checkpoint

RUN = ["digits", "--network", "mlp", "--latent", "2", "--epochs", "3", "--threads", "1", "--quiet"]


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """An unfinished run with its first checkpoint."""
    run = RunFolder(tmp_path / "run")
    run.create(overwrite=False)
    run.save_tensors(CHECKPOINT, {"w": torch.zeros(1000)}, {"step": 1})
    return run


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_in_the_middle(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content[: len(content) // 2])
        file.flush()
        die()


def renamed(source: Path, target: Path) -> None:
    os.rename(source, target)
    die()


MOMENTS: dict[str, tuple[object, str, Callable[..., None], int]] = {
    "half written": (Path, "write_bytes", lambda p, c: die_in_the_middle(p, c), 1),
    "written, not flushed": (run_folder.os, "fsync", die, 1),
    "flushed, not renamed": (run_folder.os, "replace", die, 1),
    "renamed": (run_folder.os, "replace", renamed, 2),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_kill_while_a_checkpoint_is_written_leaves_a_whole_one(
    moment: str, folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, name, deadly, expected = MOMENTS[moment]
    child = os.fork()
    if child == 0:
        try:
            setattr(place, name, deadly)
            folder.save_tensors(CHECKPOINT, {"w": torch.ones(1000)}, {"step": 2})
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL
    tensors, state = read_checkpoint(folder.folder)
    assert state == {"step": expected}
    assert torch.equal(tensors["w"], torch.full((1000,), float(expected - 1)))
    folder.save_tensors(CHECKPOINT, {"w": torch.ones(1000)}, {"step": 2})  # what resuming does
    assert [file.name for file in folder.folder.iterdir()] == [CHECKPOINT]


def test_an_interrupt_while_a_checkpoint_is_written_leaves_the_last(folder: RunFolder) -> None:
    def interrupted(path: Path) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        folder.write(CHECKPOINT, interrupted)
    assert read_checkpoint(folder.folder)[1] == {"step": 1}
    assert [file.name for file in folder.folder.iterdir()] == [CHECKPOINT]


@pytest.fixture
def file_size() -> Iterator[Callable[[int], None]]:
    """Sets the largest file that this process may write, until the test ends."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_ends_in_one_line_and_the_run_continues_from_its_last_checkpoint(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    file_size: Callable[[int], None],
) -> None:
    save = RunFolder.save_tensors
    saved: list[str] = []

    def save_until_full(self: RunFolder, name: str, *content: object) -> None:
        if saved.count(CHECKPOINT) == 2:
            file_size(100_000)
        saved.append(name)
        save(self, name, *content)  # type: ignore[arg-type]

    monkeypatch.setattr(RunFolder, "save_tensors", save_until_full)
    run, whole = tmp_path / "run", tmp_path / "whole"
    assert main(["train", *RUN, "--run", str(run)]) == 2
    error = capsys.readouterr().err
    assert error == (
        f"fused-vae: {tmp_path}/run.partial/{CHECKPOINT}: cannot be written (File too large)\n"
    )
    monkeypatch.undo()
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    assert read_checkpoint(tmp_path / "run.partial")[1]["epoch"] == 2
    assert main(["train", *RUN, "--run", str(run), "--resume"]) == 0
    assert main(["train", *RUN, "--run", str(whole)]) == 0
    found, expected = read_checkpoint(run)[0], read_checkpoint(whole)[0]
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
