"""Files of weights: finding, reading and fingerprinting them, executing nothing."""

from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cm_lightning.types import InputError

__all__ = ["find_weights", "hash_tensors", "read_weights"]


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
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise InputError(f"The weights {path} do not exist.") from error
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path} is not a file of tensors alone and is refused, as reading it could run code."
        ) from error
    except Exception as error:  # readers of damaged files raise whatever they stumble over
        raise InputError(f"The weights {path} cannot be read: {error}") from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise InputError(f"{path} must hold one dictionary of tensors by name (a state_dict).")
    return dict(state)


def find_weights(network: str, given: str | None, variable: str, url: str) -> Path:
    """Path of public weights: given, named by the environment, cached, or downloaded now.

    Args:
        network: Name of the network, for messages.
        given: Path from the user's config, ``None`` if there is none.
        variable: Environment variable that may hold a path.
        url: Where the file is published; its name ends in the start of its SHA-256.

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
    if os.environ.get("CM_OFFLINE", "0") not in ("", "0"):
        reason = "may not be downloaded, as CM_OFFLINE is set"
    else:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            prefix = path.stem.rsplit("-", 1)[-1]
            torch.hub.download_url_to_file(url, str(path), hash_prefix=prefix, progress=False)
            return path
        except (OSError, RuntimeError) as error:
            reason = f"could not be downloaded ({error})"
    raise InputError(
        f"The {network} weights {path} are missing and {reason}: fetch {url} and {how}."
    )
