"""Figures of a run: its diagnostics, and the law of the pairs it trains on."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cm_lightning.families import families_in
from cm_lightning.files import replacing
from cm_lightning.objective import Discretization
from cm_lightning.types import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["diagnostics_figure", "read_metrics", "save_figure", "schedules_figure", "shade"]


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Rows of a ``metrics.csv``, empty cells left out, without what is left of a torn last row.

    Args:
        path: The file.

    Raises:
        InputError: If it is not there or not such a file.
    """
    if not path.is_file():
        raise InputError(f"There is no {path}.")
    try:
        with path.open(encoding="utf-8", newline="") as file:
            text = file.read()
        rows = list(csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1], newline="")))
        found = [
            {key: float(value) for key, value in row.items() if value not in ("", None)}
            for row in rows
        ]
        if any(None in row or not math.isfinite(row.get("kimg", math.inf)) for row in found):
            raise ValueError("a row has no kimg, or more cells than the first line")
        return found
    except (OSError, TypeError, ValueError, csv.Error) as error:
        raise InputError(f"{path} is not a metrics.csv of a run.") from error


def diagnostics_figure(rows: list[dict[str, float]], title: str = "") -> Figure | None:
    """One panel per family that was logged, one line per noise-level bin.

    Args:
        rows: Rows of ``metrics.csv``.
        title: Title of the figure.

    Returns:
        The figure, or ``None`` if no family was logged.
    """
    families = families_in(key for row in rows for key in row)
    if not families:
        return None
    columns = min(len(families), 4)
    lines = -(-len(families) // columns)
    figure, axes = _figure(lines, columns)
    for (name, (family, bins)), axis in zip(families.items(), axes, strict=False):
        keys = [f"{name}/{bin}" for bin in bins]
        for number, (key, bin) in enumerate(zip(keys, bins, strict=True)):
            points = [(row["kimg"], row[key]) for row in rows if key in row]
            label = bin.replace("_", " ")
            axis.plot(*zip(*points, strict=True), color=shade(number, len(keys)), label=label)
        axis.set_title(family.title, fontsize=9, parse_math=False)
        axis.set_xlabel("kimg")
        values = [row[key] for row in rows for key in keys if key in row]
        if family.scale == "log" and all(value >= 0 for value in values) and any(values):
            axis.set_yscale("log", nonpositive="clip")
        axis.grid(alpha=0.3)
    for axis in axes[len(families) :]:
        axis.set_axis_off()
    axes[0].legend(title="noise level t", fontsize=7, title_fontsize=7)
    figure.suptitle(title, fontsize=10)
    return figure


def schedules_figure(
    schedules: Mapping[str, Discretization], total_kimg: float, n: int = 2048
) -> Figure:
    """How the gap between t and r closes: over the run, and over noise levels at its quarters.

    Args:
        schedules: Discretizations by the name in the legend.
        total_kimg: Length of the run in thousands of images, > 0.
        n: Pairs drawn for each point.

    Raises:
        InputError: If ``total_kimg`` is not positive.
    """
    if not total_kimg > 0:
        raise InputError(f"schedules_figure: total_kimg must be positive, got {total_kimg}.")
    figure, axes = _figure(1, 1 + len(schedules))
    device = torch.device("cpu")
    for name, schedule in schedules.items():
        law = schedule.spanning(total_kimg)
        clock = torch.linspace(0, 1000 * total_kimg, 257).round().long().tolist()
        medians = []
        for nimg in clock:
            t, r = law.sample(n, nimg, device, torch.Generator().manual_seed(0))
            medians.append(float((1 - r / t).median()))
        axes[0].plot([nimg / 1000 for nimg in clock], medians, label=name)
    axes[0].set_title("median of (t − r) / t", fontsize=9)
    axes[0].set_xlabel("kimg")
    axes[0].set_yscale("log")
    axes[0].legend(fontsize=7)
    axes[0].grid(alpha=0.3)
    for axis, (name, schedule) in zip(axes[1:], schedules.items(), strict=True):
        law = schedule.spanning(total_kimg)
        for number, share in enumerate((0.0, 0.25, 0.5, 0.75, 0.9999)):
            nimg = int(1000 * total_kimg * share)
            t, r = law.sample(n, nimg, device, torch.Generator().manual_seed(0))
            order = t.argsort()
            gap = (1 - r / t)[order]
            axis.plot(t[order], gap, color=shade(number, 5), label=f"{nimg / 1000:.4g} kimg")
        axis.set_title(f"(t − r) / t over t: {name}", fontsize=9)
        axis.set_xlabel("t")
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.legend(fontsize=7)
        axis.grid(alpha=0.3)
    return figure


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a figure as PNG.

    Args:
        figure: The figure.
        path: File to write; its folder is made.
    """
    with replacing(path) as partial:
        figure.savefig(partial, dpi=110, format="png")


def _figure(lines: int, columns: int) -> tuple[Figure, list[Any]]:
    """An empty figure without pyplot, which would keep it alive and look for a display."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.4 * columns, 2.7 * lines), layout="constrained")
    return figure, list(figure.subplots(lines, columns, squeeze=False).flat)


def shade(number: int, count: int) -> Any:
    """Colour of a line by its place among ordered ones."""
    from matplotlib import colormaps

    return colormaps["viridis"](number / max(count - 1, 1) * 0.9)
