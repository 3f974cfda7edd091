"""Reading NVIDIA's EDM, EDM2 and ECT pickles without executing anything in them.

Such a file holds networks as calls of a function that would execute the Python source stored in
the file. Here the calls are recorded instead: only a fixed list of names is known, tensors are
rebuilt from their bytes, and everything else is refused by name.
"""

from __future__ import annotations

import io
import pickle
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cm_lightning.files import FixedFunction
from cm_lightning.types import InputError

__all__ = ["LICENCE", "EDMNetwork", "read_edm_pickle"]

LICENCE = "CC BY-NC-SA 4.0 (NVIDIA EDM and EDM2; ECT derives from EDM)"


class EDMNetwork(NamedTuple):
    """A network as its pickle describes it.

    Attributes:
        denoiser: ``class_path`` and ``init_args`` of the equivalent class here.
        weights: Its state dict, fp32.
        class_name: Name of the class in the file.
    """

    denoiser: dict[str, Any]
    weights: dict[str, Tensor]
    class_name: str


class _Inert:
    """What objects of the file become: their state and nothing else."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.state: Any = {}

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Dict(dict[str, Any]):
    def __setstate__(self, state: Any) -> None:
        pass


class _Persistent(_Inert):
    """A recorded call of ``_reconstruct_persistent_obj``."""

    def __init__(self, meta: Mapping[str, Any]) -> None:
        super().__init__()
        self.class_name = str(meta["class_name"])
        self.state = meta["state"]


def _storage(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _tensor(storage: Any, offset: int, size: Any, stride: Any, *_: Any) -> Tensor:
    """A view of a storage, which is never enlarged for it."""
    reach = offset + 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    sound = offset >= 0 and all(n >= 1 for n in size) and all(step >= 0 for step in stride)
    if not sound or reach > storage.size():
        raise ValueError(f"a tensor of size {tuple(size)} does not fit its storage")
    tensor: Tensor = torch.tensor([], dtype=storage.dtype)
    return tensor.set_(storage, offset, tuple(size), tuple(stride))


def _parameter(data: Tensor, *_: Any) -> Tensor:
    return data


def _nothing(*_: Any) -> _Inert:
    return _Inert()


def _known() -> dict[tuple[str, str], Any]:
    inert = {
        ("numpy", "dtype"),
        ("numpy.core.multiarray", "scalar"),
        ("numpy._core.multiarray", "scalar"),
        ("numpy", "ndarray"),
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "_reconstruct"),
    }
    names: dict[tuple[str, str], Any] = dict.fromkeys(inert, _Inert)
    return names | {
        ("collections", "OrderedDict"): OrderedDict,
        ("builtins", "set"): set,
        ("__builtin__", "set"): set,
        ("builtins", "getattr"): FixedFunction(_nothing),  # a method that ECT's loss keeps
        ("__builtin__", "getattr"): FixedFunction(_nothing),
        ("dnnlib.util", "EasyDict"): _Dict,
        ("torch._utils", "_rebuild_tensor_v2"): FixedFunction(_tensor),
        ("torch._utils", "_rebuild_parameter"): FixedFunction(_parameter),
        ("torch.storage", "_load_from_bytes"): FixedFunction(_storage),
        ("torch_utils.persistence", "_reconstruct_persistent_obj"): _Persistent,
    }


class _Reader(pickle._Unpickler):  # the one in C takes memory for memos a file claims
    """An unpickler that knows a fixed list of names."""

    def __init__(self, file: Any) -> None:
        super().__init__(file)
        self.names = _known()

    def find_class(self, module: str, name: str) -> Callable[..., Any]:
        if (module, name) in self.names:
            found: Callable[..., Any] = self.names[module, name]
            return found
        if module.startswith("torch.nn.modules.") and name.isidentifier():
            return _Inert
        raise InputError(f"it names {module}.{name}, which no EDM file needs")


def read_edm_pickle(path: str | Path) -> EDMNetwork:
    """Read the averaged network of an EDM, EDM2 or ECT pickle; nothing in the file is executed.

    Args:
        path: A ``.pkl`` file as published, or as written by those code bases.

    Returns:
        The network, ready for :func:`~cm_lightning.weights.save_weights`.

    Raises:
        InputError: If the file is missing, damaged, holds anything an EDM file does not need, or
            a network this package does not have.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"There is no file {path}.")
    try:
        with path.open("rb") as file, warnings.catch_warnings(action="ignore"):
            content = _Reader(file).load()  # torch warns of the storages of its own files
    except InputError as error:
        raise InputError(f"{path} is refused, as reading it could run code: {error}.") from error
    except Exception as error:  # a damaged pickle raises whatever it stumbles over
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{path} cannot be read as an EDM pickle ({type(error).__name__}: {reason})."
        ) from error
    network = content.get("ema") if isinstance(content, dict) else content
    if not isinstance(network, _Persistent):
        raise InputError(f"{path} holds no network under 'ema'.")
    try:
        weights = {name: value.float() for name, value in _tensors(network, set())}
        described = _describe(network, path)
    except InputError:
        raise
    except (AttributeError, TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{path} holds a network of another form ({error}).") from error
    return EDMNetwork(described, weights, network.class_name)


def _tensors(module: Any, seen: set[int], prefix: str = "") -> list[tuple[str, Tensor]]:
    """Parameters and persistent buffers in the order of the modules."""
    if id(module) in seen:
        raise ValueError(f"the module {prefix.rstrip('.')} is in two places")
    seen.add(id(module))
    state = module.state
    hidden = state.get("_non_persistent_buffers_set") or ()
    found = [
        (prefix + name, value)
        for kind in ("_parameters", "_buffers")
        for name, value in state.get(kind, {}).items()
        if value is not None and not (kind == "_buffers" and name in hidden)
    ]
    for name, child in state.get("_modules", {}).items():
        if child is not None:
            found += _tensors(child, seen, f"{prefix}{name}.")
    return found


_EDM = {"EDMPrecond", "ECMPrecond"}
_BACKBONES = {"SongUNet": "SongUNet", "DhariwalUNet": "ADMUNet"}
_IGNORED = {"use_fp16", "sigma_min", "sigma_max"}


def _describe(network: _Persistent, path: Path) -> dict[str, Any]:
    """Constructor arguments of the file as a config of this package."""
    given = dict(network.state.get("_init_kwargs") or {})
    given = {key: value for key, value in given.items() if key not in _IGNORED}
    channels = given.pop("img_channels", 3)
    sigma_data = float(given.pop("sigma_data", 0.5))
    precond: dict[str, Any] = {"sigma_data": sigma_data}
    if network.class_name in _EDM:
        kind = given.pop("model_type", "DhariwalUNet")
        if kind not in _BACKBONES:
            raise InputError(f"{path} holds a {kind}; {' and '.join(_BACKBONES)} are known.")
        outer, inner = "EDMPrecond", _BACKBONES[kind]
    elif network.class_name == "Precond":
        outer, inner = "EDM2Precond", "EDM2UNet"
        if "logvar_channels" in given:
            precond["logvar_channels"] = int(given.pop("logvar_channels"))
    else:
        raise InputError(
            f"{path} holds a {network.class_name}; EDMPrecond, ECMPrecond and EDM2's Precond are "
            "known."
        )
    arguments = {
        key: list(value) if isinstance(value, (tuple, list)) else value
        for key, value in given.items()
        if value is not None
    }
    for key, value in arguments.items():
        if not isinstance(value, (int, float, str, bool, list)):
            raise InputError(f"{path}: the argument {key} of the network is no plain value.")
    arguments |= {"in_channels": channels, "out_channels": channels}
    backbone = {"class_path": f"cm_lightning.networks.{inner}", "init_args": arguments}
    init = precond | {"backbone": backbone}
    return {"class_path": f"cm_lightning.networks.{outer}", "init_args": init}
