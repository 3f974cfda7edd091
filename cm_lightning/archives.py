"""Compressed files of users, read within bounds: a small file must not fill the memory."""

from __future__ import annotations

import gzip
import os
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cm_lightning.types import InputError

__all__ = ["check_members", "read_gzip", "read_npz"]

_SMALL, _RATIO = 16 << 20, 100
"""A file that unpacks to more bytes than the first and this many times its own size is refused."""


def _check(name: str, unpacked: int, packed: int) -> None:
    if unpacked > max(_SMALL, _RATIO * packed):
        raise InputError(
            f"{name} would unpack to {unpacked >> 20:,} MiB, more than {_RATIO} times its size: no "
            "such file is read."
        )


def check_members(archive: zipfile.ZipFile, where: object) -> None:
    """Refuse archives that would fill the memory.

    Raises:
        InputError: If a member, or all of them, unpack to far more than their size.
    """
    assert archive.fp is not None
    size, total = archive.fp.seek(0, os.SEEK_END), 0
    for member in archive.infolist():
        total += member.file_size
        packed = min(member.compress_size, size)  # it is what the archive says
        _check(f"{member.filename} in {where}", member.file_size, packed)
    _check(str(where), total, size)


def read_npz(path: Path) -> dict[str, npt.NDArray[Any]]:
    """Every array of an ``.npz``; objects, which could run code, are none.

    Raises:
        InputError: If the file is damaged, or holds anything but plain arrays.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            check_members(archive, path)
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
    except InputError:
        raise
    except Exception as error:  # readers of damaged files raise whatever they stumble over
        raise InputError(f"{path} is no .npz of plain arrays.") from error
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray):
            raise InputError(f"{path} is no .npz of plain arrays: {name} is none.")
    return arrays


def read_gzip(path: Path, size: int) -> bytes:
    """The first bytes of a file, unpacked if its name ends in ``.gz``.

    Args:
        path: The file.
        size: Number of bytes that are wanted at most.

    Raises:
        InputError: If it is damaged, or would unpack to far more than its size.
    """
    try:
        if path.suffix != ".gz":
            with path.open("rb") as file:
                return file.read(min(size, path.stat().st_size))
        _check(str(path), size, path.stat().st_size)
        with gzip.open(path) as unpacked:
            return unpacked.read(size)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path} cannot be read: {error}.") from error
