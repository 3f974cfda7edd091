"""The figures of ``cm-compare``: one small panel each, one colour per run."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from cm_lightning.cli.compare_runs import Entry, curves, grids, nfe_of
from cm_lightning.cli.study_report import (
    calls,
    interval,
    label,
    main_results,
    measured_over,
)
from cm_lightning.cli.words import result_words
from cm_lightning.documents import printable
from cm_lightning.evaluation.figures import shade
from cm_lightning.families import FAMILIES, Family, level, own_figures
from cm_lightning.types import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "Panel",
    "all_panels",
    "arm_panels",
    "at_the_end",
    "colour",
    "course",
    "names_of",
    "sentence",
]


class Panel(NamedTuple):
    """A figure of the page.

    Attributes:
        name: Name of its file.
        title: What it shows.
        caption: How to read it, in a sentence or two.
        picture: PNG.
        colour: Colour of the run that it is of, empty if it is of several.
    """

    name: str
    title: str
    caption: str
    picture: bytes
    colour: str = ""


OVER_TRAINING = {
    "teacher/ode_distance": (
        "Distance from the teacher's ODE",
        "root mean square per pixel",
        "Difference per pixel of images in [-1, 1], on fixed noise, between what the model makes "
        "of it and where the ODE of its teacher (or of the diffusion model it started from) goes. "
        "Lower is closer to that teacher, which is not the same as better images.",
    ),
    "gradient/norm": (
        "Gradient",
        "norm of the gradient",
        "Mean size of the gradient before the optimizer. Jumps tell of unstable training.",
    ),
    "speed/images_per_second": (
        "Speed",
        "images per second",
        "Training speed of each window, evaluations and checkpoints left out.",
    ),
}
"""Metrics drawn over training: title, label of the axis, caption."""


def colour(number: int) -> str:
    """Colour of a run by its place in the comparison, as ``#rrggbb``."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    # the ten strong colours first, then their light neighbours
    return to_hex(colormaps["tab20"](number % 10 * 2 + number // 10 % 2))


def all_panels(entries: Sequence[Entry]) -> dict[str, list[Panel]]:
    """All figures with every run in them, by the section of the page.

    Args:
        entries: The runs.
    """
    return {
        "distance": distance_panels(entries),
        "samples": sample_panels(entries),
        "training": over_training(entries),
        "levels": by_level(entries),
    }


def arm_panels(outcome: Mapping[str, Any]) -> list[Panel]:
    """Results of all arms of a study with their intervals, one panel per result.

    Args:
        outcome: What ``cm-study`` found.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    main, panels = main_results(outcome), []
    for key in main:
        results = outcome["results"]
        values = {name: found[key] for name, found in results.items() if key in found}
        figure, axis = _axes(height=1.2 + 0.27 * len(values))
        plain = [name for name, arm in outcome["arms"].items() if "time_of" not in arm]
        for place, (name, found) in enumerate(values.items()):
            mean, width = interval(found)
            source = outcome["arms"][name].get("of", name)
            own = colour(plain.index(source)) if source in plain else "black"
            axis.errorbar(mean, -place, xerr=width, color=own, marker="o", ms=5, capsize=3, lw=1.8)
            axis.plot(found, [-place] * len(found), "|", color=own, ms=9, alpha=0.6)
        names = [_plain(name, 24) for name in values]
        axis.set_yticks([-place for place in range(len(values))], names, fontsize=9)
        points = [value for found in values.values() for value in found]
        if max(points) > 4 * min(points) > 0:
            axis.set_xscale("log")
            axis.set_xlim(min(points) / 1.4, max(points) * 1.4)
            axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.xaxis.set_minor_formatter(NullFormatter())
        axis.grid(alpha=0.3)
        axis.set_xlabel("Frechet distance, lower is better")
        title = label(key, main)
        caption = "Dot: mean over training seeds; bar: its 95 % interval; ticks: the seeds."
        panels.append(Panel(_file(f"arms_{key}"), sentence(title), caption, png(figure)))
    return panels


def sample_panels(entries: Sequence[Entry]) -> list[Panel]:
    """One picture of all runs' newest grids for each number of network calls.

    Args:
        entries: The runs.
    """
    from matplotlib.figure import Figure
    from PIL import Image

    found: dict[str, list[tuple[str, Any]]] = {}
    for entry in entries:
        for (_, sampler), path in grids(entry).items():
            try:
                with Image.open(path, formats=("PNG",)) as picture:
                    pixels = np.asarray(picture.convert("RGB"))
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
                raise InputError(f"{path} is no picture that can be read: {error}.") from error
            found.setdefault(nfe_of(sampler), []).append((entry.name, pixels))
    panels = []
    for nfe, pictures in found.items():
        columns = min(len(pictures), 4)
        rows = -(-len(pictures) // columns)
        figure = Figure(figsize=(2.4 * columns, 2.65 * rows), layout="constrained")
        for place, axis in enumerate(np.ravel(figure.subplots(rows, columns, squeeze=False))):
            axis.set_axis_off()
            if place < len(pictures):
                axis.set_title(_plain(pictures[place][0], 30), fontsize=10)
                axis.imshow(pictures[place][1], interpolation="none")
        panels.append(Panel(_file(f"samples_nfe{nfe}"), f"Samples, {calls(nfe)}", "", png(figure)))
    return panels


def distance_panels(entries: Sequence[Entry]) -> list[Panel]:
    """Frechet distance against images and against time, for each number of network calls.

    All lines are of one average of the weights and way of sampling where there is one that all runs
    have. Where no run was evaluated before its end there is nothing to draw.

    Args:
        entries: The runs.
    """
    found = [curves(entry) for entry in entries]
    names = {nfe_of(key) for lines in found for key in lines}
    panels = []
    for nfe in sorted(names, key=lambda n: (len(n), n)):
        options = [{key: x for key, x in lines.items() if nfe_of(key) == nfe} for lines in found]
        chosen = {number: _best([lines]) for number, lines in enumerate(options) if lines}
        shared = _best([lines for lines in options if lines])
        if shared is not None:
            chosen = dict.fromkeys(chosen, shared)
        lines = {number: options[number][key] for number, key in chosen.items() if key}
        if all(len(points) < 2 for points in lines.values()):
            continue
        keys = [key for key in chosen.values() if key]
        caption = "Lower is better; the line that falls first learns fastest."
        if shared is not None:
            caption = f"Frechet distance over {_measured(shared)}. {caption}"
        elif len({key.partition("/")[0] for key in keys}) > 1:
            caption = "These lines were measured differently and cannot be compared."
        elif len(set(keys)) > 1:
            caption = f"The runs share no average: the legend says what each line is of. {caption}"
        for column, unit, axis_words in (
            (0, "thousands of images (kimg)", "images seen"),
            (1, "minutes of training", "time spent"),
        ):
            figure, axis = _axes()
            for number, points in lines.items():
                x, y = [point[column] for point in points], [point[2] for point in points]
                words = entries[number].name
                if shared is None:
                    words += f": {_measured(chosen[number] or '')}"
                axis.plot(x, y, marker="o", ms=4, color=colour(number), label=_plain(words))
            values = (point[2] for points in lines.values() for point in points)
            _finish(figure, axis, unit, "Frechet distance", "log", values)
            name = _file(f"fd_nfe{nfe}_{('kimg', 'minutes')[column]}")
            title = f"{sentence(calls(nfe))}, by {axis_words}"
            panels.append(Panel(name, title, caption, png(figure)))
    return panels


def _best(options: Sequence[Mapping[str, Sequence[tuple[float, float, float]]]]) -> str | None:
    """The metric that all of these have whose last values have the lowest mean."""
    shared = [key for key in options[0] if all(key in lines for lines in options)]
    if not shared:
        return None
    return min(shared, key=lambda key: sum(lines[key][-1][2] for lines in options))


def _measured(key: str) -> str:
    """A metric in words: features and samples, average, way of sampling."""
    over, _, rest = key.partition("/")
    return f"{measured_over([over])}, {result_words(rest)}"


def over_training(entries: Sequence[Entry]) -> list[Panel]:
    """Numbers of the whole run over images seen, all runs in one panel.

    Args:
        entries: The runs.
    """
    panels = []
    for name, (title, unit, caption) in OVER_TRAINING.items():
        lines = {}
        for number, entry in enumerate(entries):
            points = [
                (row["kimg"], value)
                for row in entry.rows
                for key, value in row.items()
                if key == name or key.startswith(f"{name}/")
            ]
            if points:
                lines[number] = points
        if lines:
            figure, axis = _axes()
            for number, points in lines.items():
                x, y = zip(*points, strict=True)
                axis.plot(x, y, color=colour(number), label=_plain(entries[number].name))
            values = (value for points in lines.values() for _, value in points)
            _finish(figure, axis, "thousands of images (kimg)", unit, "log", values)
            panels.append(Panel(_file(name), title, caption, png(figure)))
    return panels


def at_the_end(rows: Sequence[Mapping[str, float]], family: str) -> dict[str, float]:
    """Means of a family over the last quarter of a run, by bin of the noise level.

    Args:
        rows: Rows of ``metrics.csv``.
        family: Name of the family.
    """
    last = max((row["kimg"] for row in rows), default=0.0)
    values: dict[str, list[float]] = {}
    for row in rows:
        for key, value in row.items():
            name, _, bin = key.rpartition("/")
            if name == family and level(bin) is not None and row["kimg"] >= 0.75 * last:
                values.setdefault(bin, []).append(value)
    return {bin: float(np.mean(values[bin])) for bin in sorted(values, key=_place)}


def names_of(entries: Sequence[Entry]) -> dict[str, Family]:
    """Families that some run has and that have a figure of their own.

    Args:
        entries: The runs.
    """
    files = [own_figures(key for row in entry.rows for key in row) for entry in entries]
    found = {name: family for families in files for name, (family, _) in families.items()}
    return {name: found[name] for name in dict.fromkeys([*FAMILIES, *found]) if name in found}


def by_level(entries: Sequence[Entry]) -> list[Panel]:
    """Each family at the end of training over the noise level, all runs in one panel.

    Args:
        entries: The runs.
    """
    panels = []
    for name, family in names_of(entries).items():
        lines = {n: at_the_end(entry.rows, name) for n, entry in enumerate(entries)}
        lines = {number: found for number, found in lines.items() if found}
        if not lines:  # only early in the runs
            continue
        figure, axis = _axes()
        values: list[float] = []
        for number, found in lines.items():
            width = 1.5 + 3 * (1 - (number + 1) / len(entries))  # covered lines stay visible
            x, y = list(map(_place, found)), list(found.values())
            if family.scale == "log":
                y = [value if value > 0 else float("nan") for value in y]
            label, own = _plain(entries[number].name), colour(number)
            axis.plot(x, y, marker="o", ms=4, lw=width, alpha=0.85, color=own, label=label)
            values += y
            if family.beside is not None:
                other = at_the_end(entries[number].rows, family.beside[0])
                x = list(map(_place, other))
                axis.plot(x, other.values(), ":", color="black", zorder=5)
                values += other.values()
        if family.beside is not None:
            axis.plot([], [], ":", color="black", label=family.beside[1])
        ticks = list(dict.fromkeys(chain.from_iterable(lines.values())))
        axis.set_xscale("log")
        axis.set_xticks(list(map(_place, ticks)), list(map(_words, ticks)))
        axis.minorticks_off()
        _finish(figure, axis, "noise level t", family.axis, family.scale, values)
        panels.append(Panel(_file(name), family.title, family.caption, png(figure)))
    return panels


def course(entries: Sequence[Entry], name: str, family: Family) -> list[Panel]:
    """A family over training: one panel per run, equal axes, one line per noise-level bin.

    Args:
        entries: The runs.
        name: Name of the family.
        family: Its texts.
    """
    chosen: list[tuple[Entry, dict[str, list[tuple[float, float]]]]] = []
    for entry in entries:
        lines: dict[str, list[tuple[float, float]]] = {}
        for row in entry.rows:
            for key in row:
                first, _, bin = key.rpartition("/")
                if first == name and level(bin) is not None:
                    lines.setdefault(bin, []).append((row["kimg"], row[key]))
        if lines:
            chosen.append((entry, {bin: lines[bin] for bin in sorted(lines, key=_place)}))
    values = [y for _, lines in chosen for points in lines.values() for _, y in points]
    end = max((x for _, lines in chosen for points in lines.values() for x, _ in points), default=1)
    panels = []
    for entry, lines in chosen:
        figure, axis = _axes()
        for number, (bin, points) in enumerate(lines.items()):
            own = shade(number, len(lines))
            axis.plot(*zip(*points, strict=True), color=own, label=f"t {_words(bin)}")
        axis.set_xlim(0, end)
        _finish(figure, axis, "thousands of images (kimg)", family.axis, family.scale, values)
        panels.append(Panel(f"{name}, {entry.name}", entry.name, "", png(figure)))
    return panels


def _place(bin: str) -> float:
    return level(bin) or 0.0


def _words(bin: str) -> str:
    return bin.replace("below_", "< ").replace("above_", "> ").replace("-", "–")


def _plain(text: str, width: int = 44) -> str:
    """A name as matplotlib draws it as it is, on as many lines as it needs."""
    lines = textwrap.wrap(printable(text), width) or [""]
    return "\n".join(lines).replace("$", r"\$")


def sentence(text: str) -> str:
    """It with a capital; the rest as it is."""
    return text[:1].upper() + text[1:]


def _file(name: str) -> str:
    """Name of a figure's file."""
    return "".join(c if (c.isascii() and c.isalnum()) or c in ".-_" else "_" for c in name)[:100]


def _axes(height: float = 3.6) -> tuple[Figure, Any]:
    """One panel, without pyplot; drawn so that it can be read on a phone."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.8, height), layout="constrained")
    return figure, figure.subplots()


def _finish(figure: Figure, axis: Any, x: str, y: str, scale: str, values: Iterable[float]) -> None:
    """Labels, scale, limits, and the legend below, for which the figure grows."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    found = np.array([value for value in values if abs(value) < 1e100])
    axis.set_xlabel(x)
    axis.set_ylabel(_plain(y, 36))
    positive = found[found > 1e-100]
    if scale == "log" and len(positive):
        low, high = positive.min(), positive.max()
        axis.set_yscale("log", nonpositive="clip")
        axis.set_ylim(low / (high / low) ** 0.05 / 1.05, high * (high / low) ** 0.05 * 1.05)
        plain = FuncFormatter(lambda value, _: f"{value:g}")
        narrow = high / low < 30
        axis.yaxis.set_major_formatter(plain)
        axis.yaxis.set_minor_locator(LogLocator(subs=(2, 5) if narrow else "auto"))
        axis.yaxis.set_minor_formatter(plain if narrow else NullFormatter())
    elif len(found):
        room = 0.05 * max(found.max() - min(found.min(), 0), 1e-12)
        axis.set_ylim(min(found.min(), 0) - room, found.max() + room)
    axis.grid(alpha=0.3)
    labels = [str(text) for text in axis.get_legend_handles_labels()[1]]
    longest = max((len(line) for text in labels for line in text.split("\n")), default=0)
    columns = max(1, min(3, int(4.7 / (0.55 + 0.085 * longest))))  # inches of a line and a letter
    rows = -(-len(labels) // columns) * max((text.count("\n") + 1 for text in labels), default=0)
    figure.set_figheight(figure.get_figheight() + 0.19 * rows)
    figure.legend(loc="outside lower center", ncols=columns, fontsize=9, frameon=False)


def png(figure: Figure) -> bytes:
    """A figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=150, format="png")
    return buffer.getvalue()
