"""Averages of any width after training, from the power-function averages a run has kept."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cm_lightning.documents import check_form, read_mapping
from cm_lightning.ema import PowerEMA, posthoc_coefficients, power_exponent, snapshot_nimg
from cm_lightning.types import InputError
from cm_lightning.weights.portable import (
    Loaded,
    averages_of,
    load_weights,
    newest_of,
    read_checkpoint,
)

__all__ = ["load_posthoc"]

_NAME = re.compile(r"ema_std(\d+\.\d+)(?:@([\d.]+))?")


def load_posthoc(source: str | Path, std: float) -> Loaded:
    r"""Reconstruct a power-function average of another width (EDM2, arXiv:2312.02696, 3.2).

    The sum :math:`\sum_i X_i\, \theta_i` of all averages with a PowerEMA profile that the newest
    checkpoint holds, at its end and at the shares of ``ema.snapshots``, with the coefficients of
    :func:`~cm_lightning.ema.posthoc_coefficients`. More snapshots make it more exact: EDM2 keeps
    two widths at every 1/128 of the run.

    Args:
        source: Run directory, or a checkpoint in one.
        std: Relative width to reconstruct, in (0, 0.289).

    Returns:
        The denoiser with these weights.

    Raises:
        InputError: If the run has kept fewer than two such averages, or the width is out of range.
    """
    gamma = power_exponent(std)
    path = newest_of(Path(source))
    loaded = load_weights(path, "live")
    checkpoint = read_checkpoint(path)
    kept = averages_of(checkpoint)
    nimg = checkpoint["cm_lightning"]["nimg"]
    record = _record(path.parent.parent)
    if nimg == 0:
        raise InputError(f"{path} has seen no images yet: there is nothing to average.")
    snapshots: list[tuple[float, float]] = []
    averages: list[dict[str, Tensor]] = []
    for name, average in kept.items():
        match = _NAME.fullmatch(name)
        if match is None:
            continue
        time = float(nimg)
        if match[2] is not None:
            total = round(1000 * record["total_kimg"])
            time = float(snapshot_nimg(name, total, record["global_batch"]) or nimg)
        snapshots.append((time / nimg, power_exponent(float(match[1]))))
        averages.append(average)
    if len(averages) < 2:
        raise InputError(
            f"{path} keeps {len(averages)} averages with a PowerEMA profile and at least two are "
            "needed: train with two widths in ema.profiles, and with ema.snapshots."
        )
    if len(set(snapshots)) < len(snapshots):
        raise InputError(f"{path} keeps two averages of the same width and time.")
    coefficients = posthoc_coefficients(snapshots, (1.0, gamma)).tolist()
    weights: dict[str, Any] = dict(loaded.denoiser.state_dict())
    for name in averages[0]:
        parts = zip(coefficients, averages, strict=True)
        summed = sum((x * average[name].double() for x, average in parts), torch.zeros(()))
        weights[name] = summed.float()
    loaded.denoiser.load_state_dict(weights)
    info = loaded.info | {"ema": f"{PowerEMA(std).name}_posthoc"}
    return Loaded(loaded.denoiser, info, loaded.config)


def _record(run: Path) -> dict[str, Any]:
    record = read_mapping(run / "run.json")
    check_form(record, {"global_batch": int, "total_kimg": float}, str(run / "run.json"))
    return record
