"""Portable weights: ``model.safetensors`` beside a ``config.json`` that says how to build them.

Also reads the weights of a run directory. Nothing here is unpickled, and a config can only name
classes of this package and of those that ``allow_modules`` named.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cm_lightning.documents import build, check_form, read_mapping
from cm_lightning.ema import snapshot_nimg
from cm_lightning.files import (
    check_torch_file,
    is_intact,
    read_weights,
    save_tensors,
    write_json,
)
from cm_lightning.modules import check_class_paths
from cm_lightning.networks import ConsistencyPrecond
from cm_lightning.types import Denoiser, InputError
from cm_lightning.version import __version__

__all__ = [
    "Loaded",
    "Pretrained",
    "build_denoiser",
    "from_pretrained",
    "load_weights",
    "save_weights",
    "start_from",
]

UNKNOWN = "unknown"
"""Regime and EMA profile of weights that do not name theirs."""
_FORMAT = 1
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool)
_INFO = {
    "regime?": str,
    "ema?": str,
    "kimg?": float,
    "data_fingerprint?": str,
    "licence?": str,
    "phases?": [float],
    "origins?": {...: {"path?": str, "sha256?": str, "licence?": str, "origins?": dict}},
}
"""What is known of weights, in config.json and run.json."""
_CHECKPOINT = {
    "state_dict": {...: Tensor},
    "callbacks": {"EMACallback?": {"averages": {...: {...: Tensor}}, "total_nimg?": int}},
    "cm_lightning": {
        "nimg": int,
        "seed": int,
        "regime": str,
        "data": (str, type(None)),
        "skipped": int,
        "borrowed": {...: str},
        "nonfinite_steps": int,
        "streak": int,
        "optimizer?": [dict],
    },
}


class Loaded(NamedTuple):
    """A denoiser with its weights.

    Attributes:
        denoiser: In eval mode, on the CPU.
        info: ``regime`` and ``ema``, ``kimg`` and ``data_fingerprint``, ``None`` if unknown, and
            ``origins``, ``licence`` or the edges of ``phases`` where they are known.
        config: ``class_path`` and ``init_args`` that build the denoiser.
    """

    denoiser: Denoiser
    info: dict[str, Any]
    config: dict[str, Any]

    @property
    def is_diffusion(self) -> bool:
        """Whether it predicts means, as weights that name no regime do by their preconditioning."""
        named = self.info.get("regime", UNKNOWN) in (UNKNOWN, "Diffusion")
        return named and not isinstance(self.denoiser, ConsistencyPrecond)


@dataclass(frozen=True)
class Pretrained:
    """Where trained weights lie.

    Args:
        path: Run directory, checkpoint in one, weights folder or published file, see
            :func:`load_weights`.
        ema: EMA profile of a run, ``None`` for its first one.
    """

    path: str
    ema: str | None = None

    def load(self) -> Loaded:
        """Read the denoiser, see :func:`load_weights`."""
        return load_weights(self.path, self.ema)


def start_from(denoiser: Denoiser, weights: Denoiser, where: str) -> list[str]:
    """Copy trained weights into a denoiser that may have another preconditioning.

    Every tensor must fit by name and shape, with one exception: the layer of the augmentation
    label, which a network without augmentation does not have and whose label is zero there.

    Args:
        denoiser: The network to be trained.
        weights: The trained one.
        where: Where it comes from, for messages.

    Returns:
        Names of tensors that were left out.

    Raises:
        InputError: If image shape, classes, sigma_data, noise_scale or any tensor differ.
    """
    for what, ours, theirs in (
        ("images of shape (C, H, W)", denoiser.image_shape, weights.image_shape),
        ("a number of classes", denoiser.num_classes, weights.num_classes),
        ("a sigma_data", denoiser.sigma_data, weights.sigma_data),
        ("a noise_scale", *(getattr(model, "noise_scale", 1.0) for model in (denoiser, weights))),
    ):
        if ours != theirs:
            raise InputError(
                f"The weights of {where} cannot start this network: they are for {what} of "
                f"{theirs}, model.denoiser has {ours}."
            )
    target, source = denoiser, weights
    if type(denoiser) is not type(weights) and hasattr(denoiser, "backbone"):
        target, source = denoiser.backbone, getattr(weights, "backbone", weights)  # type: ignore[assignment]
    parts = [getattr(model, "backbone", None) for model in (weights, denoiser)]
    names = [type(part).__name__ for part in parts]
    if None not in parts and names[0] != names[1]:
        raise InputError(
            f"The weights of {where} cannot start this network: they are of a {names[0]}, "
            f"model.denoiser.backbone is a {names[1]}."
        )
    own, loaded = target.state_dict(), source.state_dict()
    left_out = [name for name in loaded if "map_augment." in name and name not in own]
    loaded = {name: value for name, value in loaded.items() if name not in left_out}
    check_weights(own, loaded, where)
    target.load_state_dict(loaded)
    return left_out


def build_denoiser(config: Mapping[str, Any], where: str) -> Denoiser:
    """Build a denoiser with random weights from its ``class_path`` and ``init_args``.

    Args:
        config: As in a run's ``config.yaml`` under ``model.init_args.denoiser``.
        where: The file it comes from, for messages.

    Raises:
        InputError: If it names a class outside this package or does not fit one.
    """
    import cm_lightning.networks  # noqa: F401  (short class names resolve to imported classes)

    check_class_paths(config, where)
    what = f"The network that {where} describes"
    form = {"class_path": str, "init_args?": dict}
    check_form(config, form, where, "denoiser")
    denoiser: Denoiser = build({"denoiser": Denoiser}, {"denoiser": dict(config)}, what)["denoiser"]
    return denoiser


def save_weights(
    folder: str | Path,
    denoiser: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    info: dict[str, Any],
) -> None:
    """Write ``model.safetensors`` and ``config.json``, each whole or not at all.

    Args:
        folder: Where to write; created if needed.
        denoiser: ``class_path`` and ``init_args`` of the denoiser.
        weights: State dict of the denoiser, fp32.
        info: What else to record: regime, EMA profile, kimg, data fingerprint.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in weights.items()}
    save_tensors(tensors, folder / "model.safetensors")
    config = {"format": _FORMAT, "version": __version__, "denoiser": denoiser, **info}
    write_json(folder / "config.json", config)


def load_weights(path: str | Path, ema: str | None = None) -> Loaded:
    """Load a denoiser from a run directory, a checkpoint in one, a weights folder or a public file.

    Args:
        path: A directory with ``model.safetensors`` and ``config.json``; a run directory, whose
            newest checkpoint is taken; one ``.ckpt`` file of a run directory; or what
            :func:`~cm_lightning.weights.public.load_public` takes, as a diffusion model.
        ema: EMA profile of a run, ``"live"`` for the trained weights themselves, ``None`` for the
            run's first profile. A weights folder holds one set only.

    Raises:
        InputError: If nothing usable is there, or there is no such profile.
    """
    from cm_lightning.weights.public import is_public, load_public

    path = Path(path)
    if (path / "model.safetensors").is_file():
        return _load_folder(path, ema)
    if path.is_dir() and (path / "config.yaml").is_file():
        return _load_checkpoint(newest_of(path), path / "config.yaml", ema)
    if path.is_file() and path.suffix == ".ckpt":
        config = path.parent.parent / "config.yaml"
        if not config.is_file():
            raise InputError(f"{path} is not inside a run directory: {config} is missing.")
        return _load_checkpoint(path, config, ema)
    if path.exists() and is_public(path):
        if ema is not None:
            raise InputError(f"{path} holds one set of weights, no '{ema}'.")
        return load_public(path)
    if not path.exists():
        raise InputError(f"There is no run directory, checkpoint or weights folder at {path}.")
    if path.name == "model.safetensors":
        raise InputError(f"{path} has its description beside it: give the folder, {path.parent}.")
    raise InputError(
        f"{path} is neither a run directory (with config.yaml) nor a weights folder (with "
        "model.safetensors and config.json) nor a .ckpt file nor a published file."
    )


def newest_of(source: Path) -> Path:
    """The newest checkpoint of a run directory; a checkpoint itself is returned as it is.

    Raises:
        InputError: If there is none.
    """
    if source.is_file():
        return source
    if (source / "model.safetensors").is_file() or (source / "model_index.json").is_file():
        raise InputError(
            f"{source} holds weights and no run: start from them with --model.init.path {source}."
        )
    found = sorted((source / "checkpoints").glob("nimg*.ckpt"), key=lambda file: file.name)
    if not found:
        raise InputError(f"The run directory {source} holds no checkpoint yet.")
    return found[-1]


def from_pretrained(path: str | Path, ema: str | None = None) -> Denoiser:
    """The denoiser alone, in eval mode; see :func:`load_weights`."""
    return load_weights(path, ema).denoiser


def _load_folder(folder: Path, ema: str | None) -> Loaded:
    path = folder / "config.json"
    try:
        config = read_mapping(path)
        check_form(config, {"denoiser": dict, "format?": int, **_INFO}, str(path))
    except InputError as error:
        raise InputError(f"{path} is missing or does not describe a network: {error}") from error
    if config.pop("format", _FORMAT) != _FORMAT:
        raise InputError(f"{path} has another format than {_FORMAT}, which this version reads.")
    config.pop("version", None)
    description = config.pop("denoiser")
    if ema is not None and ema != config.get("ema"):
        raise InputError(f"{folder} holds the weights '{config.get('ema')}', not '{ema}'.")
    check_class_paths(description, str(path))
    weights = read_weights(folder / "model.safetensors")
    denoiser = filled(description, str(path), weights, str(folder))
    info: dict[str, Any] = {"regime": UNKNOWN, "ema": UNKNOWN, "kimg": None}
    info |= {"data_fingerprint": None} | {k: v for k, v in config.items() if v is not None}
    return Loaded(denoiser.eval(), info, description)


def _load_checkpoint(path: Path, config_path: Path, ema: str | None) -> Loaded:
    config = read_mapping(config_path, "config")
    form = {"denoiser": dict, "phases?": {"edges": [float]}}
    check_form(config, {"model": {"init_args": form}}, str(config_path))
    description = config["model"]["init_args"]["denoiser"]
    phases = config["model"]["init_args"].get("phases")
    check_class_paths(description, str(config_path))
    checkpoint = read_checkpoint(path)
    prefix = "denoiser."
    weights = {
        name.removeprefix(prefix): value
        for name, value in checkpoint["state_dict"].items()
        if name.startswith(prefix)
    }
    averages = averages_of(checkpoint)
    name = ema or next(iter(averages), "live")
    if name != "live":
        if name not in averages:
            raise InputError(f"{path} has no EMA profile '{name}': it has {['live', *averages]}.")
        weights |= averages[name]
    denoiser = filled(description, str(config_path), weights, str(path))
    state = checkpoint["cm_lightning"]
    record = _record(path.parent.parent)
    total = checkpoint["callbacks"].get("EMACallback", {}).get("total_nimg", 0)
    taken = snapshot_nimg(name, total, max(record.get("global_batch") or 1, 1))
    info = {
        "regime": state["regime"],
        "ema": name,
        "kimg": (state["nimg"] if taken is None else taken) / 1000,
        "data_fingerprint": state["data"],
        "origins": dict(record.get("origins") or {}),
    }
    if phases is not None:
        info["phases"] = phases["edges"]
    return Loaded(denoiser.eval(), info, description)


def _record(run: Path) -> dict[str, Any]:
    """What ``run.json`` tells of a run: the weights it was made from, its batch."""
    path = run / "run.json"
    if not path.is_file():
        return {}
    record = read_mapping(path)
    check_form(record, _INFO | {"global_batch?": int}, str(path))
    return record


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint as plain data (``weights_only``), memory-mapped.

    Raises:
        InputError: If the file is missing, damaged or not a checkpoint of this package.
    """
    if not Path(path).is_file():
        raise InputError(f"There is no checkpoint at {path}.")
    if Path(path).suffix != ".ckpt":
        raise InputError(
            f"{path} is no checkpoint of a run: weights are started from by --model.init.path."
        )
    if not is_intact(path):
        raise InputError(
            f"{path} cannot be read as a checkpoint: it is damaged (a checksum inside differs)."
        )
    check_torch_file(path)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise InputError(
            f"{path} cannot be read as a checkpoint: it is damaged, or not plain data "
            f"({type(error).__name__})."
        ) from error
    if not isinstance(checkpoint, dict) or "cm_lightning" not in checkpoint:
        raise InputError(f"{path} was not written by cm_lightning.")
    check_form(checkpoint, _CHECKPOINT, str(path))
    if checkpoint["cm_lightning"]["nimg"] < 0:
        raise InputError(f"{path} has seen {checkpoint['cm_lightning']['nimg']} images.")
    return checkpoint


def averages_of(checkpoint: dict[str, Any]) -> dict[str, dict[str, Tensor]]:
    """The averaged weights in a checkpoint, by profile."""
    found: dict[str, dict[str, Tensor]] = (
        checkpoint["callbacks"].get("EMACallback", {}).get("averages", {})
    )
    return found


def check_weights(own: Mapping[str, Tensor], loaded: Mapping[str, Tensor], where: str) -> None:
    """Check that a state dict has the names and shapes of a network.

    Args:
        own: The network's state dict.
        loaded: The state dict to be loaded.
        where: The file it comes from.

    Raises:
        InputError: If they differ; the first difference is named.
    """
    for name in own:
        if name not in loaded:
            raise InputError(
                f"{where} is of another network: it lacks '{name}', which the config's has."
            )
        if loaded[name].layout is not torch.strided or loaded[name].dtype not in _DTYPES:
            raise InputError(f"{where}: '{name}' is no plain tensor.")
        if own[name].shape != loaded[name].shape:
            raise InputError(
                f"{where} is of another network: '{name}' has shape {tuple(loaded[name].shape)} "
                f"there and {tuple(own[name].shape)} in the config's network."
            )
        if loaded[name].nbytes > loaded[name].untyped_storage().nbytes():
            raise InputError(f"{where}: '{name}' has more values than are stored.")
        if not loaded[name].isfinite().all():
            raise InputError(f"{where} is damaged: '{name}' holds NaN or infinite values.")
    for name in loaded:
        if name not in own:
            raise InputError(
                f"{where} is of another network: it holds '{name}', which the config's lacks."
            )


def filled(
    config: Mapping[str, Any], described: str, tensors: Mapping[str, Tensor], where: str
) -> Denoiser:
    """Build a denoiser and give it its weights, after a look at their shapes.

    Args:
        config: ``class_path`` and ``init_args``.
        described: The file that they come from, for messages.
        tensors: The weights.
        where: The file that these come from, for messages.

    Raises:
        InputError: If they do not fit, before a network takes memory that no weights are for.
    """
    with torch.device("meta"):
        shapes = build_denoiser(config, described).state_dict()
    check_weights(shapes, tensors, where)
    denoiser = build_denoiser(config, described)
    denoiser.load_state_dict(dict(tensors))
    return denoiser
