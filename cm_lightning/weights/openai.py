"""Weights of OpenAI's U-Net (guided-diffusion, consistency_models) for ADMUNet."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cm_lightning.files import read_weights
from cm_lightning.types import InputError

__all__ = ["OPENAI_LICENCE", "check_groups", "is_openai", "read_openai"]

OPENAI_LICENCE = "MIT (OpenAI consistency_models, guided-diffusion)"

HEAD_CHANNELS = 64
_SIZES = {(1, 2, 3, 4): 64, (1, 1, 2, 3, 4): 128, (1, 1, 2, 2, 4, 4): 256}
"""Image side of the published models, by channel multiples; the file does not hold it."""

_RESIDUAL = {
    "in_layers.0": "norm0",
    "in_layers.2": "conv0",
    "emb_layers.1": "affine",
    "out_layers.0": "norm1",
    "out_layers.3": "conv1",
    "skip_connection": "skip",
}
_ATTENTION = {"norm": "norm2", "proj_out": "proj"}
_OUTSIDE = {
    "time_embed.0": "map_layer0",
    "time_embed.2": "map_layer1",
    "out.0": "out_norm",
    "out.2": "out_conv",
}


def is_openai(state: Mapping[str, Tensor]) -> bool:
    """Whether named tensors look like OpenAI's U-Net."""
    return {"time_embed.0.weight", "input_blocks.0.0.weight", "out.2.weight"} <= state.keys()


def read_openai(
    path: str | Path, resolution: int | None = None, consistency: bool = False
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a state dict of OpenAI's U-Net as weights of ADMUNet.

    Shapes tell widths, blocks, attention and classes; heads have 64 channels, as in all published
    image models. Times are embedded as diffusion steps: ``noise_scale`` is 1000.

    Args:
        path: A ``.pt`` file of named tensors.
        resolution: Height and width of the images, ``None`` for what published models with these
            channel multiples have.
        consistency: Whether it is a consistency model (boundary-condition preconditioning) rather
            than a diffusion model.

    Returns:
        ``class_path`` and ``init_args`` of the denoiser, and its state dict, fp32.

    Raises:
        InputError: If the file is missing, unsafe, of another network, or its resolution unknown.
    """
    path = Path(path)
    state = read_weights(path)
    if not is_openai(state):
        raise InputError(f"{path} does not hold OpenAI's U-Net (no input_blocks and time_embed).")
    try:
        arguments = _arguments(state, path, resolution)
        weights = {f"model.{name}": value for name, value in _rename(state, arguments)}
    except InputError:
        raise
    except (KeyError, IndexError, RuntimeError, ValueError, ArithmeticError) as error:
        raise InputError(
            f"{path} holds a U-Net of another form than the published ones ({error})."
        ) from error
    name = "ConsistencyPrecond" if consistency else "EDMPrecond"
    backbone = {"class_path": "cm_lightning.networks.ADMUNet", "init_args": arguments}
    init = {"sigma_data": 0.5, "noise_scale": 1000.0, "backbone": backbone}
    return {"class_path": f"cm_lightning.networks.{name}", "init_args": init}, weights


def _count(state: Mapping[str, Tensor], group: str) -> int:
    return 1 + max(int(name.split(".")[1]) for name in state if name.startswith(f"{group}."))


def _has_attention(state: Mapping[str, Tensor], block: str) -> bool:
    return f"{block}.1.qkv.weight" in state


def _arguments(state: Mapping[str, Tensor], path: Path, resolution: int | None) -> dict[str, Any]:
    channels = state["time_embed.0.weight"].shape[1]
    blocks = _count(state, "input_blocks")
    # L levels of n blocks: 1 + L n + (L - 1) input blocks, L (n + 1) output blocks, equally many
    if blocks != _count(state, "output_blocks"):
        raise KeyError("numbers of input and output blocks differ")
    # output blocks mirror input blocks: the one with an up block belongs to a down block
    downs = [i for i in range(1, blocks) if _last(state, blocks - 1 - i)]
    levels = [list(range(a + 1, b)) for a, b in pairwise([0, *downs, blocks])]
    multiples = [
        state[f"input_blocks.{level[0]}.0.in_layers.2.weight"].shape[0] // channels
        for level in levels
    ]
    size = resolution or _SIZES.get(tuple(multiples))
    if size is None:
        raise InputError(
            f"{path} does not say the resolution of its images and is none of the published "
            f"models (channel multiples {multiples}): give --resolution, or first import it with "
            "cm-weights import --resolution N."
        )
    check_groups(channels, multiples, path)
    incoming, outgoing = state["input_blocks.0.0.weight"].shape[1], state["out.2.weight"].shape[0]
    if outgoing == 2 * incoming:
        raise InputError(
            f"{path} holds a model that learned variances ({outgoing} channels out for {incoming} "
            "in): such models are not read."
        )
    block = "input_blocks.1.0"
    scales = state[f"{block}.emb_layers.1.weight"].shape[0]
    label = state.get("label_emb.weight")
    return {
        "img_resolution": size,
        "in_channels": incoming,
        "out_channels": outgoing,
        "label_dim": 0 if label is None else label.shape[0],
        "model_channels": channels,
        "channel_mult": multiples,
        "num_blocks": len(levels[0]),
        "attn_resolutions": [
            size >> i
            for i, level in enumerate(levels)
            if _has_attention(state, f"input_blocks.{level[0]}")
        ],
        "dropout": 0.0,
        "adaptive": scales == 2 * state[f"{block}.out_layers.0.weight"].shape[0],
    }


def check_groups(channels: int, multiples: Sequence[int], path: Path) -> None:
    """Check that norms of ADMUNet have the 32 groups that they have in other projects.

    Raises:
        InputError: If a level is narrower than 128 channels, where ADMUNet's have fewer.
    """
    least = channels * min(multiples)
    if least < 128:
        raise InputError(
            f"{path} has a level of {least} channels: its norms have 32 groups there, ADMUNet's as "
            "in NVIDIA's code a group per 4 channels. Networks of 128 channels or more can be read."
        )


def _last(state: Mapping[str, Tensor], number: int) -> int:
    """Place of the up block within an output block, 0 if it has none."""
    place = 2 if _has_attention(state, f"output_blocks.{number}") else 1
    return place if f"output_blocks.{number}.{place}.in_layers.0.weight" in state else 0


def _rename(
    state: Mapping[str, Tensor], arguments: Mapping[str, Any]
) -> Iterator[tuple[str, Tensor]]:
    for old, new in _OUTSIDE.items():
        for kind in ("weight", "bias"):
            yield f"{new}.{kind}", state[f"{old}.{kind}"].float()
    if arguments["label_dim"]:
        yield "map_label.weight", state["label_emb.weight"].float().T.contiguous()
    per_level, sizes = arguments["num_blocks"], len(arguments["channel_mult"])
    side = arguments["img_resolution"]
    for kind in ("weight", "bias"):
        yield f"enc.{side}x{side}_conv.{kind}", state[f"input_blocks.0.0.{kind}"].float()
    number = 1
    for level in range(sizes):
        width = side >> level
        if level:
            yield from _block(state, f"input_blocks.{number}", f"enc.{width}x{width}_down")
            number += 1
        for i in range(per_level):
            yield from _block(state, f"input_blocks.{number}", f"enc.{width}x{width}_block{i}")
            number += 1
    low = side >> (sizes - 1)
    yield from _residual(state, "middle_block.0", f"dec.{low}x{low}_in0")
    yield from _attention(state, "middle_block.1", f"dec.{low}x{low}_in0")
    yield from _residual(state, "middle_block.2", f"dec.{low}x{low}_in1")
    number = 0
    for level in reversed(range(sizes)):
        width = side >> level
        for i in range(per_level + 1):
            old = f"output_blocks.{number}"
            yield from _block(state, old, f"dec.{width}x{width}_block{i}")
            if level and i == per_level:
                last = 2 if _has_attention(state, old) else 1
                above = side >> (level - 1)
                yield from _residual(state, f"{old}.{last}", f"dec.{above}x{above}_up")
            number += 1


def _block(state: Mapping[str, Tensor], old: str, new: str) -> Iterator[tuple[str, Tensor]]:
    yield from _residual(state, f"{old}.0", new)
    if _has_attention(state, old):
        yield from _attention(state, f"{old}.1", new)


def _residual(state: Mapping[str, Tensor], old: str, new: str) -> Iterator[tuple[str, Tensor]]:
    for theirs, ours in _RESIDUAL.items():
        for kind in ("weight", "bias"):
            name = f"{old}.{theirs}.{kind}"
            if name in state:
                yield f"{new}.{ours}.{kind}", state[name].float()
            elif ours != "skip":
                raise KeyError(name)
    if new.endswith(("_down", "_up")):
        for ours in ("conv0", "skip"):
            yield f"{new}.{ours}.resample_filter", torch.full((1, 1, 2, 2), 0.25)


def _attention(state: Mapping[str, Tensor], old: str, new: str) -> Iterator[tuple[str, Tensor]]:
    for theirs, ours in _ATTENTION.items():
        for kind in ("weight", "bias"):
            value = state[f"{old}.{theirs}.{kind}"].float()
            square = ours == "proj" and kind == "weight"
            yield f"{new}.{ours}.{kind}", value.reshape(*value.shape[:2], 1, 1) if square else value
    weight = state[f"{old}.qkv.weight"]
    size = HEAD_CHANNELS
    heads = weight.shape[0] // (3 * size)
    # consistency_models: 2-D convolutions, rows (q|k|v, head, channel);
    # guided-diffusion: 1-D convolutions, rows (head, q|k|v, channel); here: (head, channel, q|k|v)
    order = (1, 2, 0) if weight.ndim == 4 else (0, 2, 1)
    shape = (3, heads, size) if weight.ndim == 4 else (heads, 3, size)
    rows = torch.arange(weight.shape[0]).reshape(shape).permute(order).flatten()
    width = weight.shape[1]
    yield f"{new}.qkv.weight", weight.float()[rows].reshape(-1, width, 1, 1)
    yield f"{new}.qkv.bias", state[f"{old}.qkv.bias"].float()[rows]
