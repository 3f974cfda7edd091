"""Images in the layouts labs hold them in, read one at a time."""

from __future__ import annotations

import io
import json
import os
import warnings
import zipfile
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cm_lightning.archives import check_members, read_npz
from cm_lightning.data.readers import IDX
from cm_lightning.data.store import LABELS
from cm_lightning.documents import complaint
from cm_lightning.files import read_pickled_arrays
from cm_lightning.types import InputError

__all__ = ["KINDS", "ImageFiles", "open_images"]

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".tif", ".tiff", ".gif")
FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "PPM", "TIFF", "GIF")
"""What is read; other formats have readers that start programs."""
Image = npt.NDArray[np.uint8]


class ImageFiles(ABC):
    """Numbered images with names and, perhaps, labels.

    Attributes:
        kind: Name of the layout.
        names: Name of each image, for messages.
        labels: Class indices ``(N,)`` int64 or ``None``.
        classes: Names of the classes in the order of their labels, ``None`` if they have none.
        note: What a user should know of this source, ``None`` for nothing.
    """

    kind: str
    names: Sequence[str]
    labels: npt.NDArray[np.int64] | None
    classes: Sequence[str] | None = None
    note: str | None = None

    def __len__(self) -> int:
        return len(self.names)

    @abstractmethod
    def load(self, number: int) -> Image:
        """One image as grey levels ``(H, W, C)``, C 1 or 3.

        Raises:
            Exception: Whatever a damaged file makes its reader raise.
        """


def _decode(data: bytes) -> Image:
    """Grey levels of a picture, of 16 bits the upper eight.

    Transparency is dropped and EXIF's orientation is not looked at, as in EDM's tool.
    """
    from PIL import Image as Pictures
    from PIL import UnidentifiedImageError

    with warnings.catch_warnings():
        warnings.simplefilter("error", Pictures.DecompressionBombWarning)
        try:
            picture = Pictures.open(io.BytesIO(data), formats=FORMATS)
        except UnidentifiedImageError as error:
            raise ValueError(f"no picture in any of {', '.join(FORMATS)}") from error
    with picture:
        deep = picture.mode.startswith("I;16") or (picture.mode, picture.format) == ("I", "PPM")
        if picture.mode in ("I", "F") and not deep:
            raise ValueError(f"its grey levels have no fixed range (Pillow's mode {picture.mode})")
        if deep:
            array = (np.asarray(picture) >> 8).astype(np.uint8)
        else:
            grey = picture.mode in ("L", "1", "LA")
            array = np.asarray(picture.convert("L" if grey else "RGB"))
    return array[..., None] if array.ndim == 2 else array


def _walk(root: Path) -> Iterator[Path]:
    """All files below a folder; links to folders are followed, but for those that lead back up.

    Raises:
        InputError: If links lead to one folder again and again.
    """
    visits: Counter[Path] = Counter()
    for folder, below, names in os.walk(root, followlinks=True):
        here = Path(folder).resolve()
        visits[here] += 1
        if visits[here] > 100:
            raise InputError(f"Links below {root} lead to {here} more than 100 times.")
        below[:] = [n for n in below if (here / n).resolve() not in (here, *here.parents)]
        yield from (Path(folder) / name for name in names)


class _Folder(ImageFiles):
    """Files below a folder: labels from ``dataset.json``, from one folder per class, or none."""

    def __init__(self, root: Path, kind: str) -> None:
        self.root, self.kind = root, kind
        found = [path for path in _walk(root) if path.suffix.lower() in PICTURES]
        names = sorted(path.relative_to(root).as_posix() for path in found)
        self.names, self.labels = names, None
        if kind == "edm":
            self.labels = _edm_labels((root / "dataset.json").read_bytes(), names, root)
        elif kind == "imagefolder":
            flat = [name for name in names if "/" not in name]
            if flat:
                raise InputError(f"{root} has images outside its class folders, as {flat[0]}.")
            self.classes = sorted({name.split("/")[0] for name in names})
            classes = {name: label for label, name in enumerate(self.classes)}
            self.labels = np.array([classes[name.split("/")[0]] for name in names], np.int64)

    def load(self, number: int) -> Image:
        """Decode a file."""
        return _decode((self.root / self.names[number]).read_bytes())


class _Zip(ImageFiles):
    """A zip of NVIDIA's dataset_tool: pictures and ``dataset.json``."""

    kind = "edm"

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: zipfile.ZipFile | None = None
        content = self._open().namelist()
        self.names = sorted(n for n in content if Path(n).suffix.lower() in PICTURES)
        self.labels = None
        if "dataset.json" in content:
            self.labels = _edm_labels(self._open().read("dataset.json"), self.names, path)
        elif len({name.rpartition("/")[0] for name in self.names}) > 1:
            raise InputError(
                f"{path} has folders and no dataset.json, as NVIDIA's have: unpack it, so that its "
                "folders become classes (--kind imagefolder) or not (--kind flat)."
            )

    def _open(self) -> zipfile.ZipFile:
        if self._file is None:
            try:
                self._file = zipfile.ZipFile(self.path)
                check_members(self._file, self.path)
            except zipfile.BadZipFile as error:
                raise InputError(f"{self.path} is no whole zip file.") from error
        return self._file

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_file": None}

    def load(self, number: int) -> Image:
        """Decode a member."""
        return _decode(self._open().read(self.names[number]))


def _edm_labels(text: bytes, names: Sequence[str], where: Path) -> npt.NDArray[np.int64] | None:
    """Labels by name from ``dataset.json``: ``{"labels": [[name, class], ...]}`` or null."""
    try:
        pairs = json.loads(text)["labels"]
        if pairs is None:
            return None
        labels = {str(name).replace("\\", "/"): _label(label) for name, label in pairs}
    except Exception as error:  # readers of damaged files raise whatever they stumble over
        raise InputError(
            f"dataset.json of {where} does not list pairs of name and class."
        ) from error
    for name in names:
        if name not in labels:
            raise InputError(f"dataset.json of {where} has no label for {name}.")
    return np.array([labels[name] for name in names], np.int64)


def _label(value: Any) -> int:
    if not isinstance(value, int) or abs(value) >= LABELS:
        raise ValueError(f"a label is {value}")
    return value


class _Arrays(ImageFiles):
    """Images that are in memory already."""

    def __init__(
        self,
        kind: str,
        images: npt.NDArray[np.uint8],
        labels: npt.NDArray[np.int64] | None,
        note: str | None = None,
    ) -> None:
        if images.ndim != 4 or not images.size or images.shape[3] not in (1, 3):
            raise InputError(
                f"Images must be of shape (N, H, W, 1 or 3), none of them 0, got {images.shape}."
            )
        if labels is not None and labels.shape != (len(images),):
            raise InputError(f"There are {len(images)} images and labels of shape {labels.shape}.")
        self.kind, self.images, self.labels, self.note = kind, images, labels, note
        self.names = [f"image {i}" for i in range(len(images))]

    def load(self, number: int) -> Image:
        """The image."""
        image: Image = self.images[number]
        return image


def _cifar(root: Path) -> ImageFiles:
    batches = sorted(root.glob("data_batch_*")) or [root / "train"]
    images, labels = [], []
    for path in batches:
        try:
            content = read_pickled_arrays(path)
            pixels = np.asarray(content["data"])
            named = content["labels" if "labels" in content else "fine_labels"]
            labels += [_label(int(label)) for label in named]
        except FileNotFoundError:
            raise
        except Exception as error:  # readers of damaged files raise whatever they stumble over
            raise InputError(f"{path} is no python batch of CIFAR ({error}).") from error
        if pixels.dtype != np.uint8 or pixels.ndim != 2 or pixels.shape[1] != 3072:
            raise InputError(f"{path} holds {pixels.dtype} {pixels.shape}, not rows of 3072 bytes.")
        images.append(pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    return _Arrays("cifar", np.concatenate(images), np.asarray(labels, np.int64))


def _whole(labels: npt.NDArray[Any], path: Path) -> npt.NDArray[np.int64]:
    if labels.dtype.kind not in "iu":
        raise InputError(f"The labels of {path} must be whole numbers, got {labels.dtype}.")
    return labels.astype(np.int64)


def _adm(path: Path) -> ImageFiles:
    arrays = read_npz(path)
    images, labels = arrays["arr_0"], arrays.get("arr_1")
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
        raise InputError(
            f"arr_0 of {path} must be uint8 (N, H, W, 1 or 3), got {images.dtype} {images.shape}."
        )
    return _Arrays("adm", images, None if labels is None else _whole(labels, path))


def _sorted_classes() -> npt.NDArray[np.int64]:
    """Place of ILSVRC's classes 1 to 1000 in the order of their WordNet ids, ``(1000,)``.

    Folders of classes, EDM, ADM and every published class-conditional network count in that order.
    """
    return np.loadtxt(Path(__file__).with_name("ilsvrc_classes.txt"), np.int64).ravel()


def _downsampled(paths: Sequence[Path]) -> ImageFiles:
    images, labels = [], []
    if not paths:
        raise FileNotFoundError("there is no train_data_batch_1.npz")
    for path in paths:
        arrays = read_npz(path)
        pixels = arrays["data"]
        side = round((pixels.shape[1] / 3) ** 0.5) if pixels.ndim == 2 else 0
        if pixels.dtype != np.uint8 or pixels.ndim != 2 or 3 * side * side != pixels.shape[1]:
            raise InputError(
                f"`data` of {path} is {pixels.dtype} {pixels.shape}, not square images."
            )
        images.append(pixels.reshape(-1, 3, side, side).transpose(0, 2, 3, 1))
        numbers = _whole(arrays["labels"], path)
        if numbers.size and not 1 <= numbers.min() <= numbers.max() <= 1000:
            raise InputError(f"The labels of {path} must lie in 1 to 1000, as ILSVRC numbers them.")
        labels.append(_sorted_classes()[numbers - 1])
    note = (
        "Chrabaszcz et al. squash whole images to a square: another distribution than the centre "
        "crops that EDM, ECT and SCT use. Frechet distances of the two cannot be compared."
    )
    return _Arrays("downsampled", np.concatenate(images), np.concatenate(labels), note)


KINDS = {
    "edm": "zip or folder of NVIDIA's dataset_tool, with dataset.json",
    "imagefolder": "one folder of pictures per class; flat ignores such folders",
    "cifar": "CIFAR's python batches",
    "downsampled": "downsampled ImageNet of Chrabaszcz et al.: train_data_batch_*.npz",
    "adm": ".npz with arr_0 and perhaps arr_1",
    "idx": "the MNIST family: train-images-idx3-ubyte, gzipped or not",
    "flat": "any folder of pictures, without labels",
}


def open_images(source: str | Path, kind: str | None = None) -> ImageFiles:
    """Open a source of images.

    Args:
        source: File or folder.
        kind: One of :data:`KINDS`, ``None`` to find out.

    Raises:
        InputError: If it is none of the layouts, empty, or damaged.
    """
    path = Path(source).expanduser()
    if not path.exists():
        raise InputError(f"There are no images at {path}: it does not exist.")
    kind = kind or _guess(path)
    try:
        found = _open(path, kind)
    except (KeyError, FileNotFoundError) as error:
        raise InputError(f"{path} is not laid out as {kind}: {KINDS[kind]} ({error}).") from error
    except InputError:
        raise
    except Exception as error:  # readers of damaged files raise whatever they stumble over
        raise InputError(
            f"{path} cannot be read as {kind}, {KINDS[kind]}: {complaint(error)}."
        ) from error
    if not len(found):
        raise InputError(f"{path} holds no images ({KINDS[kind]}).")
    if found.labels is not None and not 0 <= found.labels.min() <= found.labels.max() < LABELS:
        raise InputError(
            f"{path} has labels from {found.labels.min()} to {found.labels.max()}; they must lie "
            f"in 0 to {LABELS - 1}."
        )
    return found


def _open(path: Path, kind: str) -> ImageFiles:
    if path.is_file() and kind in ("imagefolder", "flat", "cifar", "idx"):
        raise InputError(f"{path} is a file, and the layout {kind} is a folder: unpack it.")
    if kind == "edm":
        return _Folder(path, kind) if path.is_dir() else _Zip(path)
    if kind == "cifar":
        return _cifar(path)
    if kind == "adm":
        return _adm(path)
    if kind == "downsampled":
        return _downsampled(
            sorted(path.glob("train_data_batch_*.npz")) if path.is_dir() else [path]
        )
    if kind == "idx":
        return _Arrays("idx", *IDX(str(path)).read())
    return _Folder(path, kind)


def _guess(path: Path) -> str:
    if path.is_file():
        if path.suffix == ".zip":
            return "edm"
        if path.suffix == ".npz":
            return "adm" if "arr_0" in read_npz(path) else "downsampled"
        raise InputError(f"{path} is neither a folder nor a .zip or .npz file.")
    names = {item.name for item in path.iterdir()}
    if "dataset.json" in names:
        return "edm"
    if any(name.startswith("train-images-idx3-ubyte") for name in names):
        return "idx"
    if "data_batch_1" in names or ({"train", "meta"} <= names and (path / "train").is_file()):
        return "cifar"
    if any(name.endswith(".npz") for name in names):
        return "downsampled"
    folders = [item for item in path.iterdir() if item.is_dir()]
    pictures = any(Path(name).suffix.lower() in PICTURES for name in names)
    return "imagefolder" if folders and not pictures else "flat"
