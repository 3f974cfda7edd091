"""What ``cm-eval`` has measured: the rows of ``eval.json`` and their table and figure."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cm_lightning.callbacks.processor import device_name
from cm_lightning.callbacks.run_record import versions
from cm_lightning.cli.study_report import table
from cm_lightning.documents import check_form, read_mapping
from cm_lightning.files import write_json, write_text
from cm_lightning.sampling import Sampler
from cm_lightning.types import InputError

__all__ = [
    "COLUMNS",
    "KEY",
    "RESULTS",
    "Book",
    "Cell",
    "describe",
    "guidance_words",
    "mid_figure",
    "slug",
]


class Cell(NamedTuple):
    """One model, one way to draw from it and one seed.

    Attributes:
        ema: EMA profile.
        guidance: Guidance scale.
        worse: Hash of the guiding weights, ``None`` without.
        by: Name of the guiding weights, ``None`` without.
        sampling: The sampler in words.
        sampler: The sampler.
        seed: Seed of the noise.
    """

    ema: str
    guidance: float
    worse: str | None
    by: str | None
    sampling: str
    sampler: Sampler
    seed: int

    @property
    def key(self) -> tuple[str, float, str | None, str, int]:
        """What identifies the cell in ``eval.json``, in the order of :data:`KEY`."""
        return (self.ema, self.guidance, self.worse, self.sampling, self.seed)


COLUMNS = ("fd", "kid", "is", "precision", "recall")
KEY = ("ema", "guidance", "worse", "sampling", "seed")
RESULTS = {
    "results": [
        {
            "ema": str,
            "guidance": float,
            "worse": (str, type(None)),
            "by?": (str, type(None)),
            "sampling": str,
            "seed": int,
            "nfe": int,
            **dict.fromkeys(("fd?", "kid?", "is?", "precision?", "recall?"), float),
        }
    ]
}
"""Form of ``eval.json``."""


def guidance_words(row: Mapping[str, Any]) -> str:
    """Guidance in words: its scale and by what; empty without.

    Args:
        row: A row of ``eval.json``.
    """
    if row["guidance"] == 1:
        return ""
    return f", guidance {row['guidance']:g}" + (f" by {row['by']}" if row.get("by") else "")


def describe(cell: Cell) -> str:
    """A cell without its seed in words."""
    return f"{cell.ema}, {cell.sampling}{guidance_words(cell._asdict())}"


def slug(cell: Cell) -> str:
    """A cell without its seed as a file name."""
    return describe(cell).replace(",", "").replace(" ", "-").replace("/", "_")


class Book:
    """``eval.json``: what was measured, under which identity.

    Args:
        out: Folder of the results.
        identity: What must be equal for results to stand together.

    Raises:
        InputError: If the folder holds results of something else.
    """

    def __init__(self, out: Path, identity: dict[str, Any]) -> None:
        self.path, self.identity = out / "eval.json", identity
        self.results: list[dict[str, Any]] = []
        if not self.path.is_file():
            return
        try:
            old = read_mapping(self.path)
            check_form(old, RESULTS | dict.fromkeys(identity, object), str(self.path))
            self.results, weights = old["results"], old["weights"]
            check_form(weights, {...: str}, str(self.path), "weights")
        except InputError as error:
            raise InputError(f"{self.path} is not a result of cm-eval: {error}") from error
        compared = {key: old[key] for key in identity if key not in ("source", "weights", "kimg")}
        known = identity["weights"]
        if not any("@" in name for name in (*weights, *identity["weights"])):
            compared["kimg"] = old["kimg"]  # a snapshot's is its own
        compared["weights"] = {name: weights.get(name, digest) for name, digest in known.items()}
        for key, value in compared.items():
            if value != identity[key]:
                raise InputError(
                    f"{self.path} was measured with another {key} ({value}, now {identity[key]}): "
                    "choose another --out."
                )
        self.identity["weights"] = weights | known

    def found(self, cell: Cell) -> dict[str, Any]:
        """The row of a cell, empty if it is not there."""
        for row in self.results:
            if tuple(row[name] for name in KEY) == cell.key:
                return row
        return {}

    def missing(self, cell: Cell, names: Sequence[str]) -> bool:
        """Whether a score of a cell is not there yet."""
        row = self.found(cell)
        return any(("precision" if name == "prc" else name) not in row for name in names)

    def add(
        self, cell: Cell, nfe: int, found: dict[str, float], seconds: float, device: torch.device
    ) -> None:
        """Add scores of a cell and write the file."""
        row = self.found(cell)
        if not row:
            row |= dict(zip(KEY, cell.key, strict=True)) | {"nfe": nfe, "by": cell.by}
            self.results.append(row)
        row |= found | {
            "seconds": round(seconds, 1),
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "device": device_name(device),
            "host": platform.node(),
        }
        content = self.identity | {"versions": versions(), "results": self.results}
        write_json(self.path, content)

    def rows(self) -> Iterator[list[dict[str, Any]]]:
        """Results that differ in their seed alone."""
        groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
        for row in self.results:
            groups.setdefault(tuple(row[key] for key in KEY if key != "seed"), []).append(row)
        yield from groups.values()

    def table(self) -> str:
        """Mean and standard deviation over seeds as Markdown."""
        columns = [name for name in COLUMNS if any(name in row for row in self.results)]
        lines = []
        for rows in self.rows():
            one = rows[0]
            guidance = guidance_words(one).removeprefix(", guidance ") or "1"
            cells = [one["ema"], one["sampling"], guidance, str(one["nfe"]), str(len(rows))]
            for name in columns:
                values = torch.tensor([r[name] for r in rows if name in r], dtype=torch.float64)
                if not len(values):
                    cells.append("")
                elif len(values) == 1:
                    cells.append(f"{float(values[0]):.4g}")
                else:
                    cells.append(f"{float(values.mean()):.4g} ± {float(values.std()):.2g}")
            lines.append(cells)
        head = ["EMA", "sampling", "guidance", "NFE", "seeds", *columns]
        return table(head, lines)

    def write_table(self) -> None:
        """Write ``eval.md``."""
        identity = self.identity
        text = (
            f"{identity['regime']} at {identity['kimg']} kimg from {identity['source']}; "
            f"{identity['n']:,} samples per seed, features {identity['features']} "
            f"({identity['features_sha256'][:16]}), data "
            f"{(identity['data_fingerprint'] or identity['reference'])[:16]}. Mean ± standard "
            "deviation over seeds; NFE counts every network call, two per guided step."
        )
        write_text(self.path.with_name("eval.md"), f"{text}\n\n{self.table()}\n")


def mid_figure(book: Book, path: Path) -> None:
    """Draw the Frechet distance over the second level of two-step sampling."""
    from matplotlib.figure import Figure

    from cm_lightning.evaluation import save_figure

    figure = Figure(figsize=(4.5, 3.2), layout="constrained")
    axis = figure.subplots()
    curves: dict[str, list[tuple[float, float]]] = {}
    for rows in book.rows():
        sampling = rows[0]["sampling"]
        levels = sampling.removeprefix("sigmas ").split()
        if sampling.startswith("sigmas ") and len(levels) == 2 and levels[0] == "80":
            found = [row["fd"] for row in rows if "fd" in row]
            label = f"{rows[0]['ema']}{guidance_words(rows[0])}"
            if found:
                curves.setdefault(label, []).append((float(levels[1]), sum(found) / len(found)))
    for label, points in curves.items():
        axis.plot(*zip(*sorted(points), strict=True), marker="o", label=label)
    axis.set_xscale("log")
    axis.set_xlabel("second noise level")
    axis.set_ylabel(f"FD, {book.identity['features']}, n = {book.identity['n']:,}")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
    save_figure(figure, path)
