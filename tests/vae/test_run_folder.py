"""Nothing that a run folder holds can be lost."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch

from fused_vae.errors import UserError
from fused_vae.run_folder import RunFolder, read_checkpoint


def complete_run(path: Path, content: str = "old") -> RunFolder:
    run = RunFolder(path)
    run.create(overwrite=False)
    run.write_json("config.json", {"content": content})
    run.finish()
    return run


def test_a_run_has_its_name_only_when_complete(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "a")
    run.create(overwrite=False)
    run.write_json("config.json", {})
    assert [p.name for p in tmp_path.iterdir()] == ["a.partial"]
    run.finish()
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_complete_run_is_not_replaced_unasked(tmp_path: Path) -> None:
    complete_run(tmp_path / "a")
    with pytest.raises(UserError, match="already holds a run; --overwrite replaces it"):
        RunFolder(tmp_path / "a").create(overwrite=False)


def test_overwriting_keeps_the_older_run_until_the_new_one_is_complete(tmp_path: Path) -> None:
    complete_run(tmp_path / "a")
    run = RunFolder(tmp_path / "a")
    run.create(overwrite=True)
    run.write_json("config.json", {"content": "new"})
    assert "old" in (tmp_path / "a" / "config.json").read_text()
    run.finish()
    assert "new" in (tmp_path / "a" / "config.json").read_text()
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_an_unfinished_run_is_not_discarded_unasked(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "a")
    run.create(overwrite=False)
    run.write_json("config.json", {})
    with pytest.raises(UserError, match="unfinished run; --resume continues it"):
        RunFolder(tmp_path / "a").create(overwrite=False)
    RunFolder(tmp_path / "a").create(overwrite=True)
    assert not (run.folder / "config.json").exists()


def test_a_folder_of_other_files_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="holds files that are not a run"):
        RunFolder(tmp_path).create(overwrite=True)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_partial_folder_of_other_files_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "a.partial").mkdir()
    (tmp_path / "a.partial" / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="holds files that are not a run"):
        RunFolder(tmp_path / "a").create(overwrite=True)
    assert (tmp_path / "a.partial" / "thesis.tex").exists()


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device")])
def test_a_full_disk_leaves_the_last_checkpoint(tmp_path: Path, error: OSError) -> None:
    run = RunFolder(tmp_path / "a")
    run.create(overwrite=False)
    run.save_tensors("checkpoint.safetensors", {"w": torch.ones(3)}, {"step": 1})

    def half_written(path: Path) -> None:
        path.write_bytes(b"half")
        raise error

    with pytest.raises(UserError, match=r"cannot be written \(No space left on device\)"):
        run.write("checkpoint.safetensors", half_written)
    tensors, state = read_checkpoint(run.folder)
    assert torch.equal(tensors["w"], torch.ones(3))
    assert state == {"step": 1}
    assert [p.name for p in run.folder.iterdir()] == ["checkpoint.safetensors"]


def test_a_run_that_died_while_taking_its_name_can_be_finished(tmp_path: Path) -> None:
    """Between the renames of `finish` the older run has lost its name, the new one has none."""
    complete_run(tmp_path / "a")
    run = RunFolder(tmp_path / "a")
    run.create(overwrite=True)
    run.write_json("config.json", {"content": "new"})
    (tmp_path / "a").rename(tmp_path / "a.replaced")
    assert RunFolder(tmp_path / "a").read_config() == {"content": "new"}
    RunFolder(tmp_path / "a").finish()
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("content", [b"", b"text", b"\x08\0\0\0\0\0\0\0{}      "])
def test_a_damaged_checkpoint_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "checkpoint.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="not a checkpoint of this program"):
        read_checkpoint(tmp_path)
