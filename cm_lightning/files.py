"""Files: written whole or not at all; weights found, read and fingerprinted, executing nothing."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import uuid
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from filelock import FileLock
from torch import Tensor

from cm_lightning.archives import check_members
from cm_lightning.types import InputError

__all__ = [
    "FixedFunction",
    "find_weights",
    "hash_tensors",
    "is_intact",
    "read_pickled_arrays",
    "read_weights",
    "replacing",
    "save_tensors",
    "write_json",
    "write_text",
]


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a path beside ``path``; the file written there takes its place when the block ends.

    So ``path`` holds the old file or the whole new one, also after a crash and beside others that
    write it. Its folder is made if needed; after an exception nothing is left.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}.{uuid.uuid4().hex}{path.suffix}")
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)  # a full disk is told without a name
        raise
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8", newline="")


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file whole or not at all."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def save_tensors(
    tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file whole or not at all, readable for those who may read its folder.

    Args:
        tensors: Tensors by name, on the CPU.
        path: The file.
        metadata: Texts for its header.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with replacing(path) as partial:
        partial.touch()
        mode = partial.stat().st_mode  # safetensors' own files are for their owner alone
        try:
            save_file(tensors, partial, metadata)
        except SafetensorError as error:  # of a full disk, say
            found = re.search(r"os error (\d+)", str(error))
            if found is None:
                raise
            raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from error
        partial.chmod(mode)


def hash_file(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def offline() -> bool:
    """Whether the environment variable ``CM_OFFLINE`` forbids downloads."""
    return os.environ.get("CM_OFFLINE", "0") not in ("", "0")


def hash_tensors(tensors: Mapping[str, Tensor], head: str = "") -> str:
    """SHA-256 of named tensors: names, types, shapes and every byte, whatever file they lie in.

    Args:
        tensors: Named tensors; their order does not matter.
        head: Text hashed before them.
    """
    digest = hashlib.sha256(head.encode())
    for name, value in sorted(tensors.items()):
        digest.update(f"\n{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read named tensors from ``.safetensors`` or PyTorch files, executing nothing.

    Raises:
        InputError: If the file is missing, damaged, or holds anything but named tensors.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        check_torch_file(path)
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise InputError(f"The weights {path} do not exist.") from error
    except InputError:
        raise
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path} is not a file of tensors alone and is refused, as reading it could run code."
        ) from error
    except Exception as error:  # readers of damaged files raise whatever they stumble over
        raise InputError(f"The weights {path} cannot be read: {error}") from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise InputError(f"{path} must hold one dictionary of tensors by name (a state_dict).")
    return dict(state)


def check_torch_file(path: Path) -> None:
    """Refuse a file of torch that would fill the memory; torch itself packs nothing.

    Raises:
        InputError: If it would unpack to far more than its size.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            check_members(archive, path)


def is_intact(path: Path) -> bool:
    """Whether a file that torch wrote is whole: every part has its noted checksum (CRC-32)."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except Exception:  # damaged archives raise whatever their reader stumbles over
        return False


def find_weights(network: str, given: str | None, variable: str, url: str) -> Path:
    """Path of public weights: given, named by the environment, cached, or downloaded now.

    Args:
        network: Name of the network, for messages.
        given: Path from the user's config, ``None`` if there is none.
        variable: Environment variable that may hold a path.
        url: Where the file is published. If its name ends in a dash and eight or more hexadecimal
            digits, a download must have a SHA-256 that starts with them.

    Raises:
        InputError: If it is nowhere and may not or cannot be downloaded.
    """
    how = f"give its path as `weights` or in the environment variable {variable}"
    given = given or os.environ.get(variable)
    if given:
        path = Path(given).expanduser()
        if not path.is_file():
            raise InputError(f"The {network} weights {path} do not exist; {how}.")
        return path
    path = Path(torch.hub.get_dir(), "checkpoints", url.rsplit("/", 1)[-1])
    if path.is_file():
        return path
    if offline():
        reason = "may not be downloaded, as CM_OFFLINE is set"
    else:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            found = re.search(r"-([0-9a-f]{8,})$", path.stem)
            prefix = found[1] if found else None
            with FileLock(f"{path}.lock"):  # one process downloads, the others wait for it
                if not path.is_file():
                    torch.hub.download_url_to_file(
                        url, str(path), hash_prefix=prefix, progress=False
                    )
            return path
        except (OSError, RuntimeError) as error:
            reason = f"could not be downloaded ({error})"
    raise InputError(
        f"The {network} weights {path} are missing and {reason}: fetch {url} and {how}."
    )


class FixedFunction:
    """A function that a pickle can call and cannot change."""

    __slots__ = ("_run",)
    _run: Callable[..., Any]

    def __init__(self, run: Callable[..., Any]) -> None:
        object.__setattr__(self, "_run", run)

    def __call__(self, *args: Any) -> Any:
        """Run it."""
        return self._run(*args)

    def __setattr__(self, name: str, value: Any) -> None:
        raise TypeError("functions have no state")

    def __setstate__(self, state: Any) -> None:
        raise TypeError("functions have no state")


class _Kind:
    """A type of numbers in a pickle."""

    def __init__(self, name: str, *_: Any) -> None:
        self.name, self.order = name, "="

    def __setstate__(self, state: Any) -> None:
        self.order = state[1]

    def dtype(self) -> np.dtype[Any]:
        """It as numpy's."""
        kind = np.dtype(self.name).newbyteorder(self.order)  # type: ignore[arg-type]
        if kind.kind not in "biuf":
            raise pickle.UnpicklingError(f"it holds an array of {self.name}")
        return kind


class _Array:
    """An array in a pickle, made from its bytes."""

    value: npt.NDArray[Any]

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, fortran, data = state
        data = data.encode("latin1") if isinstance(data, str) else data
        self.value = _from_bytes(data, kind, shape, "F" if fortran else "C").value


def _from_bytes(data: Any, kind: _Kind, shape: Any, order: Any) -> _Array:
    array = _Array()
    flat = np.frombuffer(bytes(data), kind.dtype())
    array.value = flat.reshape(shape, order="F" if order == "F" else "C")
    return array


def _encode(text: str, encoding: str = "latin1") -> bytes:
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"it encodes to {encoding}")
    return text.encode("latin1")


_ARRAYS: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): FixedFunction(lambda *_: _Array()),
    ("numpy.core.numeric", "_frombuffer"): FixedFunction(_from_bytes),
    ("numpy", "ndarray"): None,
    ("numpy", "dtype"): FixedFunction(_Kind),
    ("_codecs", "encode"): FixedFunction(_encode),
}


class _ArrayUnpickler(pickle._Unpickler):  # the one in C takes memory for memos a file claims
    """Reads numbers, texts, lists, dictionaries and arrays of numbers."""

    def find_class(self, module: str, name: str) -> Any:
        """Allow what an array is made of; all of it is this file's own."""
        module = module.replace("numpy._core", "numpy.core")
        if (module, name) not in _ARRAYS:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return _ARRAYS[module, name]


def read_pickled_arrays(path: Path) -> Any:
    """Read a pickle of plain values and arrays of numbers, executing nothing.

    Args:
        path: A batch of CIFAR, or EDM2's reference statistics.

    Raises:
        Exception: Whatever a damaged file makes the reader raise; ``pickle.UnpicklingError`` names
            what it does not know.
    """
    with path.open("rb") as file:
        return _plain(_ArrayUnpickler(file, encoding="latin1").load(), {})


def _plain(node: Any, seen: dict[int, Any]) -> Any:
    """The arrays themselves in the place of what was read for them; shared parts stay shared."""
    if isinstance(node, _Array):
        return node.value
    if not isinstance(node, (dict, list)):
        return node
    if id(node) not in seen:
        seen[id(node)] = None  # a list that holds itself ends here
        if isinstance(node, dict):
            seen[id(node)] = {key: _plain(value, seen) for key, value in node.items()}
        else:
            seen[id(node)] = [_plain(value, seen) for value in node]
    return seen[id(node)]
