"""Consistency models in the layout of the diffusers library, read and written without it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cm_lightning.documents import check_form, read_mapping
from cm_lightning.files import read_weights, save_tensors, write_json
from cm_lightning.types import InputError
from cm_lightning.weights.openai import check_groups

__all__ = ["is_diffusers", "read_diffusers", "write_diffusers"]

HEAD_CHANNELS = 64
_VERSION = "0.30.0"
"""Version of diffusers whose layout is written."""

_OUTSIDE = {
    "map_layer0": "time_embedding.linear_1",
    "map_layer1": "time_embedding.linear_2",
    "out_norm": "conv_norm_out",
    "out_conv": "conv_out",
}
_RESIDUAL = {
    "norm0": "norm1",
    "conv0": "conv1",
    "affine": "time_emb_proj",
    "norm1": "norm2",
    "conv1": "conv2",
    "skip": "conv_shortcut",
}
_FIXED = {
    "downsample_type": "resnet",
    "upsample_type": "resnet",
    "attention_head_dim": HEAD_CHANNELS,
    "attn_norm_num_groups": 32,
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "act_fn": "silu",
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "time_embedding_type": "positional",
    "center_input_sample": False,
    "add_attention": True,
    "mid_block_scale_factor": 1,
    "class_embed_type": None,
}
"""Settings under which UNet2DModel computes what ADMUNet does."""

_SHIFTS = {"scale_shift": True, "default": False}
"""Values of ``resnet_time_scale_shift``, and of ``adaptive``."""

_DEFAULTS = {
    "resnet_time_scale_shift": "default",
    "downsample_type": "conv",
    "upsample_type": "conv",
    "attention_head_dim": 8,
    "attn_norm_num_groups": None,
}
"""UNet2DModel's own values for those that a file may leave out and that differ."""


_FORM = {
    "block_out_channels": [int],
    "sample_size": int,
    "down_block_types": [str],
    "up_block_types": [str],
    "in_channels": int,
    "out_channels": int,
    "num_class_embeds?": int,
    "layers_per_block": int,
    "dropout?": float,
}


def is_diffusers(path: Path) -> bool:
    """Whether a folder holds a diffusers pipeline or U-Net."""
    return (path / "model_index.json").is_file() or (
        (path / "config.json").is_file()
        and _json(path / "config.json").get("_class_name") == "UNet2DModel"
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        return read_mapping(path)
    except InputError as error:
        raise InputError(f"{path} does not describe a model: {error}") from error


def read_diffusers(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a ``ConsistencyModelPipeline``, or the ``UNet2DModel`` of one, as ADMUNet.

    Args:
        path: Folder with ``model_index.json``, ``unet/`` and ``scheduler/``, or a U-Net's folder.

    Returns:
        ``class_path`` and ``init_args`` of the denoiser (boundary-condition preconditioning with
        the scheduler's constants, ``noise_scale`` 1000), and its state dict, fp32.

    Raises:
        InputError: If a file is missing or unsafe, or the network has another form than ADMUNet.
    """
    path = Path(path)
    scheduler: dict[str, Any] = {}
    if (path / "model_index.json").is_file():
        name = _json(path / "model_index.json").get("_class_name")
        if name != "ConsistencyModelPipeline":
            raise InputError(f"{path} is a {name}; only ConsistencyModelPipeline can be imported.")
        scheduler = _json(path / "scheduler" / "scheduler_config.json")
        path = path / "unet"
    config = _DEFAULTS | _json(path / "config.json")
    for key, value in _FIXED.items():
        if config.get(key, value) != value:
            raise InputError(
                f"{path / 'config.json'} has {key} {config[key]}; ADMUNet computes what "
                f"UNet2DModel does with {value}."
            )
    check_form(config, _FORM, str(path / "config.json"))
    check_form(scheduler, {"sigma_data?": float, "sigma_min?": float}, str(path))
    try:
        arguments = _arguments(config)
        state = _state(path)
        weights = dict(_ours(state, arguments))
        check_groups(arguments["model_channels"], arguments["channel_mult"], path)
    except InputError:
        raise
    except (KeyError, RuntimeError, TypeError, ValueError, ArithmeticError, IndexError) as error:
        raise InputError(f"{path} holds a U-Net of another form than ADMUNet ({error}).") from error
    left = state.keys() - {theirs for _, theirs, _ in _names(arguments)}
    if left:
        raise InputError(f"{path} holds '{min(left)}', which ADMUNet has no place for.")
    init = {
        "sigma_data": float(scheduler.get("sigma_data", 0.5)),
        "sigma_min": float(scheduler.get("sigma_min", 0.002)),
        "noise_scale": 1000.0,
        "backbone": {"class_path": "cm_lightning.networks.ADMUNet", "init_args": arguments},
    }
    return {"class_path": "cm_lightning.networks.ConsistencyPrecond", "init_args": init}, weights


def _state(path: Path) -> dict[str, Tensor]:
    for name in ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"):
        if (path / name).is_file():
            return read_weights(path / name)
    others = sorted(file.name for file in path.glob("diffusion_pytorch_model*"))
    raise InputError(
        f"{path} holds no diffusion_pytorch_model.safetensors or .bin"
        f"{f', only {others[0]}: variants and parts are not read' if others else ''}."
    )


def _arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    widths, size = config["block_out_channels"], config["sample_size"]
    kinds = config["down_block_types"]
    known = {"ResnetDownsampleBlock2D": False, "AttnDownBlock2D": True}
    attention = [known[kind] for kind in kinds]
    mirrored = ["AttnUpBlock2D" if has else "ResnetUpsampleBlock2D" for has in attention[::-1]]
    if list(config["up_block_types"]) != mirrored:
        raise KeyError(f"up_block_types {config['up_block_types']}")
    return {
        "img_resolution": size,
        "in_channels": config["in_channels"],
        "out_channels": config["out_channels"],
        "label_dim": config.get("num_class_embeds") or 0,
        "model_channels": widths[0],
        "channel_mult": [width // widths[0] for width in widths],
        "num_blocks": config["layers_per_block"],
        "attn_resolutions": [size >> i for i, has in enumerate(attention) if has],
        "dropout": config.get("dropout", 0.0),
        "adaptive": _SHIFTS[config["resnet_time_scale_shift"]],
    }


def _blocks(arguments: Mapping[str, Any]) -> Iterator[tuple[str, str, str | None]]:
    """Every residual block: its name here, in diffusers, and its attention's name there."""
    size, levels = arguments["img_resolution"], len(arguments["channel_mult"])
    for level in range(levels):
        width = size >> level
        attends = width in arguments["attn_resolutions"]
        there = f"down_blocks.{level}"
        for i in range(arguments["num_blocks"]):
            attention = f"{there}.attentions.{i}" if attends else None
            yield f"enc.{width}x{width}_block{i}", f"{there}.resnets.{i}", attention
        if level < levels - 1:
            yield f"enc.{width // 2}x{width // 2}_down", f"{there}.downsamplers.0", None
    low = size >> (levels - 1)
    yield f"dec.{low}x{low}_in0", "mid_block.resnets.0", "mid_block.attentions.0"
    yield f"dec.{low}x{low}_in1", "mid_block.resnets.1", None
    for number, level in enumerate(reversed(range(levels))):
        width = size >> level
        attends = width in arguments["attn_resolutions"]
        there = f"up_blocks.{number}"
        for i in range(arguments["num_blocks"] + 1):
            attention = f"{there}.attentions.{i}" if attends else None
            yield f"dec.{width}x{width}_block{i}", f"{there}.resnets.{i}", attention
        if level:
            yield f"dec.{width * 2}x{width * 2}_up", f"{there}.upsamplers.0", None


def _names(arguments: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Every tensor: its name here, in diffusers, and how one becomes the other.

    Kinds: ``same``; ``transposed``; ``square`` (a matrix there, a 1x1 convolution here); ``q``,
    ``k``, ``v`` (a third of the rows here, interleaved by head).
    """
    size = arguments["img_resolution"]
    for kind in ("weight", "bias"):
        for ours, theirs in {f"enc.{size}x{size}_conv": "conv_in", **_OUTSIDE}.items():
            yield f"{ours}.{kind}", f"{theirs}.{kind}", "same"
    if arguments["label_dim"]:
        yield "map_label.weight", "class_embedding.weight", "transposed"
    for ours, theirs, attention in _blocks(arguments):
        for inner, outer in _RESIDUAL.items():
            for kind in ("weight", "bias"):
                yield f"{ours}.{inner}.{kind}", f"{theirs}.{outer}.{kind}", "same"
        if attention is not None:
            for kind in ("weight", "bias"):
                yield f"{ours}.norm2.{kind}", f"{attention}.group_norm.{kind}", "same"
                for part in "qkv":
                    yield f"{ours}.qkv.{kind}", f"{attention}.to_{part}.{kind}", part
                square = "square" if kind == "weight" else "same"
                yield f"{ours}.proj.{kind}", f"{attention}.to_out.0.{kind}", square


def _ours(
    state: Mapping[str, Tensor], arguments: Mapping[str, Any]
) -> Iterator[tuple[str, Tensor]]:
    """The denoiser's tensors from a U-Net's."""
    parts: dict[str, list[Tensor]] = {}
    for ours, theirs, kind in _names(arguments):
        if ".skip." in ours and theirs not in state:
            continue
        value = state[theirs].float()
        if kind in "qkv":
            heads = value.reshape(-1, HEAD_CHANNELS, *value.shape[1:])
            parts.setdefault(ours, []).append(heads)
        elif kind == "transposed":
            yield f"model.{ours}", value.T.contiguous()
        else:
            yield f"model.{ours}", value[..., None, None] if kind == "square" else value
    for name, thirds in parts.items():  # (heads, 64, q | k | v)
        rows = torch.stack(thirds, 2).flatten(0, 2)
        yield f"model.{name}", rows[..., None, None] if rows.ndim == 2 else rows
    for ours, _, _ in _blocks(arguments):
        if ours.endswith(("_down", "_up")):
            for inner in ("conv0", "skip"):
                yield f"model.{ours}.{inner}.resample_filter", torch.full((1, 1, 2, 2), 0.25)


def write_diffusers(folder: Path, config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    """Write a consistency model as a ``ConsistencyModelPipeline``.

    The scheduler has the model's sigma_min, 0 under EDM's preconditioning (whose formulas the
    scheduler's are at 0), and does not clip, so that it computes what the model does.

    Args:
        folder: Folder to make.
        config: ``class_path`` and ``init_args`` of the denoiser.
        weights: Its state dict.

    Raises:
        InputError: If UNet2DModel cannot compute what the network does.
    """
    arguments, scheduler = _exportable(config)
    state = {}
    for ours, theirs, kind in _names(arguments):
        name = f"model.{ours}"
        if ".skip." in ours and name not in weights:
            continue
        value = weights[name].float()
        if kind in "qkv":
            rows = value.flatten(1) if value.ndim == 4 else value
            thirds = rows.reshape(-1, HEAD_CHANNELS, 3, *rows.shape[1:])
            value = thirds[:, :, "qkv".index(kind)].flatten(0, 1)
        elif kind == "transposed":
            value = value.T
        elif kind == "square":
            value = value.flatten(1)
        state[theirs] = value.contiguous().clone()
    widths = [arguments["model_channels"] * multiple for multiple in arguments["channel_mult"]]
    attends = [
        arguments["img_resolution"] >> i in arguments["attn_resolutions"]
        for i in range(len(widths))
    ]
    unet = {
        "_class_name": "UNet2DModel",
        "_diffusers_version": _VERSION,
        "sample_size": arguments["img_resolution"],
        "in_channels": arguments["in_channels"],
        "out_channels": arguments["out_channels"],
        "layers_per_block": arguments["num_blocks"],
        "num_class_embeds": arguments["label_dim"] or None,
        "block_out_channels": widths,
        "down_block_types": [
            "AttnDownBlock2D" if has else "ResnetDownsampleBlock2D" for has in attends
        ],
        "up_block_types": [
            "AttnUpBlock2D" if has else "ResnetUpsampleBlock2D" for has in attends[::-1]
        ],
        "dropout": arguments["dropout"],
        "resnet_time_scale_shift": "scale_shift" if arguments["adaptive"] else "default",
        **_FIXED,
    }
    index = {
        "_class_name": "ConsistencyModelPipeline",
        "_diffusers_version": _VERSION,
        "scheduler": ["diffusers", "CMStochasticIterativeScheduler"],
        "unet": ["diffusers", "UNet2DModel"],
    }
    for place, content in (
        ("unet/config.json", unet),
        ("scheduler/scheduler_config.json", scheduler),
        ("model_index.json", index),
    ):
        write_json(folder / place, content)
    save_tensors(state, folder / "unet" / "diffusion_pytorch_model.safetensors", {"format": "pt"})


def _exportable(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of ADMUNet, and the scheduler's config."""
    name, init = str(config["class_path"]).rsplit(".", 1)[-1], config["init_args"]
    backbone = str(init["backbone"]["class_path"]).rsplit(".", 1)[-1]
    if backbone != "ADMUNet" or name not in ("EDMPrecond", "ConsistencyPrecond"):
        raise InputError(
            f"diffusers has no network that computes {name}({backbone}); its UNet2DModel does for "
            "ADMUNet under EDMPrecond or ConsistencyPrecond. Use --format safetensors."
        )
    given = {"noise_scale": 1.0, "sigma_data": 0.5, "sigma_min": 0.002, **init}
    if given["noise_scale"] != 1000:
        raise InputError(
            f"diffusers feeds 250 ln(sigma) to its networks, this one was trained on "
            f"{given['noise_scale'] / 4:g} ln(sigma) (noise_scale {given['noise_scale']:g}, not "
            "1000). Use --format safetensors."
        )
    arguments: dict[str, Any] = {
        "in_channels": 3,
        "out_channels": 3,
        "label_dim": 0,
        "augment_dim": 0,
        "model_channels": 192,
        "channel_mult": [1, 2, 3, 4],
        "channel_mult_emb": 4,
        "num_blocks": 3,
        "attn_resolutions": [32, 16, 8],
        "dropout": 0.1,
        "adaptive": True,
        **init["backbone"]["init_args"],
    }
    narrow = arguments["model_channels"] * min(arguments["channel_mult"]) < 128
    if narrow or arguments["channel_mult_emb"] != 4 or arguments["augment_dim"]:
        raise InputError(
            "diffusers' UNet2DModel has 32 groups in every norm, an embedding four times as wide "
            "as the first level and no augmentation: it needs model_channels of 128 or more, "
            "channel_mult_emb 4 and augment_dim 0. Use --format safetensors."
        )
    scheduler = {
        "_class_name": "CMStochasticIterativeScheduler",
        "_diffusers_version": _VERSION,
        "num_train_timesteps": 40,
        "sigma_min": given["sigma_min"] if name == "ConsistencyPrecond" else 0.0,
        "sigma_max": 80.0,
        "sigma_data": given["sigma_data"],
        "rho": 7.0,
        "s_noise": 1.0,
        "clip_denoised": False,
    }
    return arguments, scheduler
