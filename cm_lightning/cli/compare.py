"""``cm-compare``: runs side by side: a table, curves and grids, in Markdown and one HTML page."""

from __future__ import annotations

import base64
import html
import io
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import numpy as np

from cm_lightning.callbacks.run_record import write_text
from cm_lightning.cli.errors import CommandParser, readable_errors
from cm_lightning.cli.evaluate import RESULTS
from cm_lightning.cli.study import RECORD, table
from cm_lightning.documents import check_form, read_mapping
from cm_lightning.evaluation import diagnostics_figure, read_metrics
from cm_lightning.types import InputError

__all__ = ["Entry", "curves", "differing", "main", "read_entry"]

COMMAND = "cm-compare"

SAME = {
    "features_sha256": "features",
    "n": "number of samples",
    "reference": "reference statistics",
    "data_fingerprint": "training images",
}
"""What must agree for distances to be ranked, in words."""


@dataclass(frozen=True)
class Entry:
    """A run, or its evaluation.

    Args:
        name: Name of the run directory.
        path: Where it is.
        record: ``run.json``.
        rows: ``metrics.csv``.
        identity: What its distances were measured with, by the keys of :data:`SAME`.
        distances: Per way of sampling: distances of one or more seeds.
    """

    name: str
    path: Path
    record: dict[str, Any]
    rows: list[dict[str, float]]
    identity: dict[str, Any]
    distances: dict[str, list[float]]


def read_entry(path: Path) -> Entry:
    """Read a run directory; the results of ``cm-eval`` in it take the place of those of training.

    Raises:
        InputError: If it is not a run, or has no results yet.
    """
    try:
        record = read_mapping(path / "run.json")
        check_form(record, RECORD, str(path / "run.json"))
    except InputError as error:
        raise InputError(
            f"{path} is not a run directory: run.json cannot be read. {error}"
        ) from error
    rows = read_metrics(path / "metrics.csv")
    found = path / "eval" / "eval.json"
    if found.is_file():
        content = read_mapping(found)
        check_form(content, RESULTS, str(found))
        distances: dict[str, list[float]] = {}
        for row in content["results"]:
            if "fd" in row:
                guidance = "" if row["guidance"] == 1 else f", guidance {row['guidance']:g}"
                key = f"{row['ema']}, {row['sampling']}{guidance}, NFE {row['nfe']}"
                distances.setdefault(key, []).append(row["fd"])
        identity = {key: content.get(key) for key in SAME}
    else:
        results = record.get("results")
        if not results:
            raise InputError(f"{path} has no results yet: let it finish, or run cm-eval on it.")
        distances = {key: [value] for key, value in results["last"].items()}
        identity = {key: (results.get("measured_with") or {}).get(key) for key in SAME}
        identity["data_fingerprint"] = record.get("data_fingerprint")
    return Entry(path.name, path, record, rows, identity, distances)


def differing(entries: list[Entry]) -> list[str]:
    """What forbids to rank the entries' distances, in words; empty if nothing does."""
    found = []
    for key, words in SAME.items():
        values = {json.dumps(entry.identity.get(key)) for entry in entries}
        if len(values) > 1:
            shown = ", ".join(
                f"{entry.name}: {str(entry.identity.get(key))[:16]}" for entry in entries
            )
            found.append(f"{words} ({shown})")
    return found


def nfe_of(key: str) -> str:
    """Columns of the table: the number of network calls in a metric's name."""
    match = re.search(r"nfe ?(\d+)", key, re.IGNORECASE)
    return "?" if match is None else match[1]


def best_by_nfe(entry: Entry) -> dict[str, tuple[float, str]]:
    """Lowest mean distance per number of network calls, and it in words with its spread."""
    best: dict[str, tuple[float, str]] = {}
    for key, values in entry.distances.items():
        mean = fmean(values)
        text = f"{mean:.4g}" + (f" ± {stdev(values):.2g}" if len(values) > 1 else "")
        if mean < best.get(nfe_of(key), (float("inf"), ""))[0]:
            best[nfe_of(key)] = (mean, text)
    return best


def overview(entries: list[Entry], ranked: bool) -> str:
    """The table: one row per run; the lowest distance of a column is bold if ranks make sense."""
    bests = [best_by_nfe(entry) for entry in entries]
    columns = sorted({nfe for best in bests for nfe in best}, key=lambda nfe: (len(nfe), nfe))
    head = ["run", "regime", "kimg", "parameters", "images/s", "minutes"]
    head += [f"FD, {nfe} call{'s' if nfe != '1' else ''}" for nfe in columns]
    lines = []
    for entry, best in zip(entries, bests, strict=True):
        speeds = [
            row["speed/images_per_second"] for row in entry.rows if "speed/images_per_second" in row
        ]
        seconds = [start["seconds"] for start in entry.record["starts"] if "seconds" in start]
        kimg = (entry.record.get("results") or {}).get("kimg")
        line = [
            entry.name,
            entry.record["regime"],
            "?" if kimg is None else f"{kimg:g}",
            f"{entry.record['parameters']:,}",
            f"{median(speeds):.0f}" if speeds else "?",
            f"{sum(seconds) / 60:.1f}" if seconds else "?",
        ]
        for nfe in columns:
            mean, text = best.get(nfe, (float("inf"), ""))
            lowest = min(other[nfe][0] for other in bests if nfe in other)
            line.append(f"**{text}**" if ranked and text and mean == lowest else text)
        lines.append(line)
    return table(head, lines)


def curves(entry: Entry) -> dict[str, list[tuple[float, float, float]]]:
    """Distances in training: kimg, minutes and value, by metric.

    Minutes are those of the training windows, from their images per second.
    """
    ends, minutes = [0.0], [0.0]
    for row in entry.rows:
        if row.get("speed/images_per_second"):
            images = (row["kimg"] - ends[-1]) * 1000
            minutes.append(minutes[-1] + images / row["speed/images_per_second"] / 60)
            ends.append(row["kimg"])
    found: dict[str, list[tuple[float, float, float]]] = {}
    for key in (entry.record.get("results") or {}).get("last", {}):
        for row in entry.rows:
            if key in row:
                time = float(np.interp(row["kimg"], ends, minutes))
                found.setdefault(key, []).append((row["kimg"], time, row[key]))
    return found


def curves_figure(entries: list[Entry]) -> bytes | None:
    """Distance against images and against time, one panel each per number of calls, as PNG."""
    from matplotlib.figure import Figure

    found = {entry.name: curves(entry) for entry in entries}
    names = sorted(
        {nfe_of(key) for lines in found.values() for key in lines}, key=lambda n: (len(n), n)
    )
    if not names:
        return None
    figure = Figure(figsize=(8.5, 2.9 * len(names)), layout="constrained")
    axes = figure.subplots(len(names), 2, squeeze=False)
    for row, nfe in zip(axes, names, strict=True):
        for name, lines in found.items():
            chosen = [(key, points) for key, points in lines.items() if nfe_of(key) == nfe]
            if not chosen:
                continue
            key, points = min(chosen, key=lambda item: item[1][-1][2])
            kimg, minutes, values = zip(*points, strict=True)
            label = f"{name}: {key.split('/')[1]}"
            for axis, x in zip(row, (kimg, minutes), strict=True):
                axis.plot(x, values, marker=".", label=label)
        for axis, unit in zip(row, ("kimg", "minutes of training"), strict=True):
            axis.set_xlabel(unit)
            axis.set_yscale("log")
            axis.set_ylabel(f"Frechet distance, {nfe} call{'s' if nfe != '1' else ''}")
            axis.grid(alpha=0.3)
        if row[0].lines:
            row[0].legend(fontsize=7)
    return as_png(figure)


def as_png(figure: Any) -> bytes:
    """A figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=100, format="png")
    return buffer.getvalue()


def grids(entry: Entry) -> dict[str, Path]:
    """The newest sample grid of each sampler."""
    found = {}
    for folder in sorted((entry.path / "samples").glob("*/*")):
        pictures = sorted(folder.glob("kimg*.png"))
        if pictures:
            found[f"{folder.parent.name}, {folder.name}"] = pictures[-1]
    return found


def embed(picture: bytes, alt: str, width: int) -> str:
    """An image inside an HTML page."""
    data = base64.b64encode(picture).decode()
    return f'<img alt="{html.escape(alt)}" width="{width}" src="data:image/png;base64,{data}">'


def page(entries: list[Entry], notes: list[str], markdown: str, picture: bytes | None) -> str:
    """The comparison as one HTML file without links to others."""
    parts = [f"<p>{html.escape(note)}</p>" for note in notes]
    parts.append(as_html_table(markdown))
    if picture is not None:
        parts += ["<h2>Frechet distance in training</h2>", embed(picture, "curves", 850)]
    parts.append("<h2>Samples from the same noise</h2><div class=row>")
    for entry in entries:
        for name, path in grids(entry).items():
            image = embed(path.read_bytes(), f"{entry.name}, {name}", 300)
            title = html.escape(f"{entry.name}: {name}, {path.stem}")
            parts.append(f"<figure>{image}<figcaption>{title}</figcaption></figure>")
    parts.append("</div><h2>Diagnostics</h2>")
    for entry in entries:
        figure = diagnostics_figure(entry.rows, entry.name)
        if figure is not None:
            parts.append(embed(as_png(figure), f"diagnostics of {entry.name}", 1000))
    style = (
        "body{font-family:sans-serif;margin:2em;max-width:1100px}table{border-collapse:collapse}"
        "td,th{border:1px solid #ccc;padding:.3em .6em;text-align:left}.row{display:flex;"
        "flex-wrap:wrap;gap:1em}figure{margin:0}img{max-width:100%;image-rendering:pixelated}"
    )
    title = "Comparison of " + ", ".join(html.escape(entry.name) for entry in entries)
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{title}</title>'
        f"<style>{style}</style>\n<h1>{title}</h1>\n{body}\n</html>\n"
    )


def as_html_table(markdown: str) -> str:
    """A Markdown table as HTML."""
    rows = [line.strip("| ").split(" | ") for line in markdown.splitlines()]
    out = []
    for number, cells in enumerate(rows):
        if number == 1:
            continue
        tag = "th" if number == 0 else "td"
        texts = [re.sub(r"\*\*(.+)\*\*", r"<b>\1</b>", html.escape(cell)) for cell in cells]
        out.append("<tr>" + "".join(f"<{tag}>{text}</{tag}>" for text in texts) + "</tr>")
    return "<table>" + "\n".join(out) + "</table>"


def main(args: list[str] | None = None) -> None:
    """Entry point of ``cm-compare``."""
    parser = CommandParser(prog=COMMAND, allow_abbrev=False, description=__doc__)
    parser.add_argument("runs", nargs="+", help="run directories; cm-eval's results in them count")
    parser.add_argument("--out", default="comparison", help="folder to write [comparison]")
    options = parser.parse_args(args)
    with readable_errors(COMMAND):
        entries = [read_entry(Path(run)) for run in options.runs]
        if len({entry.path.resolve() for entry in entries}) < len(entries):
            raise InputError("A run is named twice.")
        reasons = differing(entries)
        notes = ["Lowest Frechet distance (FD) per number of network calls over averages."]
        if reasons:
            notes.append(
                "These distances cannot be ranked; they differ in " + "; ".join(reasons) + "."
            )
        out = Path(options.out)
        text = overview(entries, ranked=not reasons and len(entries) > 1)
        picture = curves_figure(entries)
        write_text(out / "comparison.md", "\n\n".join([*notes, text]) + "\n")
        if picture is not None:
            (out / "curves.png").write_bytes(picture)
        write_text(out / "comparison.html", page(entries, notes, text, picture))
        print("\n\n".join([*notes, text]))
        print(f"\nWritten to {out / 'comparison.html'} and {out / 'comparison.md'}.")


if __name__ == "__main__":
    main(sys.argv[1:])
