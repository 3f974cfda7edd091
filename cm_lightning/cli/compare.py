"""``cm-compare``: runs, or the arms of a study, side by side, in Markdown and one HTML page."""

from __future__ import annotations

import contextlib
import json
import shlex
import sys
from dataclasses import replace
from itertools import chain
from pathlib import Path
from statistics import fmean, median, stdev

from cm_lightning.cli.compare_figures import (
    Panel,
    all_panels,
    arm_panels,
    at_the_end,
    names_of,
)
from cm_lightning.cli.compare_page import page, study_page
from cm_lightning.cli.compare_runs import (
    SAME,
    Entry,
    curves,
    distinct,
    made,
    nfe_of,
    origin,
    read_entry,
    read_record,
)
from cm_lightning.cli.errors import CommandParser, readable_errors
from cm_lightning.cli.study_report import read_outcome, table
from cm_lightning.cli.study_report import summary as study_summary
from cm_lightning.documents import printable
from cm_lightning.files import replacing, write_text
from cm_lightning.types import InputError

__all__ = ["Entry", "curves", "differing", "main", "read_entry"]

COMMAND = "cm-compare"
DESCRIPTION = "Runs, or the arms of a study, side by side, in Markdown and on one HTML page."


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


def best_by_nfe(entry: Entry, everywhere: set[str]) -> dict[str, tuple[float, str]]:
    """Lowest mean distance per number of network calls, and it in words with its spread.

    Args:
        entry: The run.
        everywhere: What was measured in all runs; where there is any, nothing else competes.
    """
    best: dict[str, tuple[float, str]] = {}
    shared = {nfe_of(key) for key in everywhere}
    for key, values in entry.distances.items():
        if nfe_of(key) in shared and key not in everywhere:
            continue
        mean = fmean(values)
        text = f"{mean:.4g}" + (f" ± {stdev(values):.2g}" if len(values) > 1 else "")
        if mean < best.get(nfe_of(key), (float("inf"), ""))[0]:
            best[nfe_of(key)] = (mean, text)
    return best


def overview(entries: list[Entry], ranked: bool) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table: one row per run.

    The lowest distance of a column is bold if ranks make sense.
    """
    everywhere = set.intersection(*(set(entry.distances) for entry in entries))
    bests = [best_by_nfe(entry, everywhere) for entry in entries]
    columns = sorted({nfe for best in bests for nfe in best}, key=lambda nfe: (len(nfe), nfe))
    head = ["run", "regime"]
    head += [f"FD, {nfe} call{'s' if nfe != '1' else ''}" for nfe in columns]
    head += ["kimg", "minutes", "images/s", "parameters"]
    lines = []
    for entry, best in zip(entries, bests, strict=True):
        speeds = [
            row["speed/images_per_second"] for row in entry.rows if "speed/images_per_second" in row
        ]
        seconds = [s["seconds"] for s in entry.record["starts"] if s.get("seconds") is not None]
        kimg = (entry.record.get("results") or {}).get("kimg")
        line = [entry.name, entry.record["regime"]]
        for nfe in columns:
            mean, text = best.get(nfe, (float("inf"), ""))
            lowest = min(other[nfe][0] for other in bests if nfe in other)
            line.append(f"**{text}**" if ranked and text and mean == lowest else text)
        line += [
            "?" if kimg is None else f"{kimg:g}",
            f"{sum(seconds) / 60:.1f}" if seconds else "?",
            f"{median(speeds):.0f}" if speeds else "?",
            f"{entry.record['parameters']:,}",
        ]
        lines.append(line)
    return head, lines


def summary(entries: list[Entry], reasons: list[str]) -> list[str]:
    """What was compared and how to read the table, in paragraphs.

    Args:
        entries: The runs.
        reasons: What forbids to rank them.
    """
    names = ", ".join(f"{entry.name} ({entry.record['regime']})" for entry in entries)
    lines = [f"Image generators trained by cm_lightning: {names}."]
    first = entries[0].identity
    features, n = first.get("features"), first.get("n")
    over = f" over {features} features of {n:,} samples" if features and n and not reasons else ""
    lines.append(
        f"FD is the Frechet distance between generated and training images{over}: 0 is perfect, "
        "lower is better. Each column is for a number of network calls per image; where several "
        "averages of the weights or ways of sampling were measured, the best that all runs have is "
        "given" + ("." if reasons or len(entries) < 2 else ". The lowest of a column is bold.")
    )
    if any(len(values) > 1 for entry in entries for values in entry.distances.values()):
        lines.append("± is the standard deviation over seeds of the noise, not of training.")
    if reasons:
        lines.append("These distances cannot be ranked; they differ in " + "; ".join(reasons) + ".")
    seeds = {entry.record.get("seed") for entry in entries}
    if len(entries) > 1 and len(seeds) == 1 and not reasons:
        lines.append(
            "One training run each: a difference this shows need not show with another seed."
        )
    lines.append(
        "1 kimg is 1,000 images seen in training; minutes are those of the whole command, "
        "evaluation included."
    )
    return lines


def report(
    entries: list[Entry], notes: list[str], overview_table: str, panels: dict[str, list[Panel]]
) -> str:
    """The comparison in Markdown, ready to be pasted into a W&B report or a pull request.

    Args:
        entries: The runs.
        notes: Paragraphs of the summary.
        overview_table: The table.
        panels: The figures.
    """
    parts = [f"# {', '.join(entry.name for entry in entries)}", *notes, overview_table, "## Runs"]
    parts.append("\n".join(f"- {line}" for line in origins(entries)))
    parts.append(figure_list(panels))
    parts.append("## By noise level, mean over the last quarter of each run")
    for name, family in names_of(entries).items():
        found = {entry.name: at_the_end(entry.rows, name) for entry in entries}
        found = {run: values for run, values in found.items() if values}
        if found:
            bins = list(dict.fromkeys(bin for values in found.values() for bin in values))
            rows = [
                [run, *(f"{values[bin]:.4g}" if bin in values else "" for bin in bins)]
                for run, values in found.items()
            ]
            parts += [f"### {family.title}", family.caption]
            parts.append(table(["t", *(bin.replace("_", " ") for bin in bins)], rows))
    return "\n\n".join(parts) + "\n"


def origins(entries: list[Entry]) -> list[str]:
    """Where each run was made and how to make it again, a line each."""
    return [f"**{entry.name}**: {origin(entry.record, entry.path)}" for entry in entries]


def write_study(folder: Path, out: Path) -> None:
    """Write the comparison of a study: its tables and answers, and its arms' first runs.

    Args:
        folder: Folder of the study.
        out: Where to write.
    """
    outcome = read_outcome(folder)
    plain = {name: arm for name, arm in outcome["arms"].items() if "time_of" not in arm}
    entries = [
        replace(read_entry(folder / arm["runs"][0]), name=name) for name, arm in plain.items()
    ]
    panels = {"arms": arm_panels(outcome)} | all_panels(entries)
    text = study_summary(outcome, folder)
    names = [name for arm in outcome["arms"].values() for name in arm["runs"]]
    records = {name: read_record(folder / name) for name in names}
    lines = [f"**{name}**: {origin(record, folder / name)}" for name, record in records.items()]
    how = [
        made(list(records.values())),
        f"Folder of the study: {folder}; `cm-study STUDY.yaml --out {shlex.quote(str(folder))}` "
        "checks it, makes what is missing and writes its report anew.",
    ]
    whole = [text.rstrip(), "## How this study was made", *how]
    whole += ["\n".join(f"- {line}" for line in lines), figure_list(panels)]
    html = study_page(outcome, folder, entries, panels, how, lines)
    write_text(out / "comparison.md", printable("\n\n".join(whole) + "\n"))
    write_text(out / "comparison.html", printable(html))
    write_figures(panels, out)
    print(text)


def figure_list(panels: dict[str, list[Panel]]) -> str:
    """All figures in Markdown with their captions."""
    shown = [
        f"![{panel.title}](figures/{panel.name}.png)\n\n**{panel.title}.** {panel.caption}"
        for panel in chain.from_iterable(panels.values())
    ]
    return "\n\n".join(["## Figures", *shown])


def write_figures(panels: dict[str, list[Panel]], out: Path) -> None:
    """Write the figures as PNG files."""
    for panel in chain.from_iterable(panels.values()):
        with replacing(out / "figures" / f"{panel.name}.png") as path:
            path.write_bytes(panel.picture)


def main(args: list[str] | None = None) -> None:
    """Entry point of ``cm-compare``."""
    parser = CommandParser(prog=COMMAND, allow_abbrev=False, description=DESCRIPTION)
    parser.add_argument(
        "runs",
        nargs="+",
        help="run directories; cm-eval's results in them count. Or the folder of one study",
    )
    parser.add_argument("--out", default="comparison", help="folder to write [comparison]")
    options = parser.parse_args(args)
    with readable_errors(COMMAND):
        out, paths = Path(options.out), [Path(run) for run in options.runs]
        studies = [path for path in paths if (path / "study.json").is_file()]
        if studies:
            if len(paths) > 1:
                raise InputError(f"{studies[0]} is a study: it is shown alone, or give its runs.")
            write_study(studies[0], out)
        else:
            check_finished(paths)
            write_runs(paths, out)
        print(f"\nWritten to {out / 'comparison.html'} and {out / 'comparison.md'}.")


def check_finished(paths: list[Path]) -> None:
    """Check that no path is the folder of a study that has no results yet.

    Args:
        paths: Run directories.

    Raises:
        InputError: If one is.
    """
    places = ("*/run.json", "*/seed*/run.json", "*/*/seed*/run.json")
    for path in paths:
        below = any(any(path.glob(place)) for place in places)
        if below and not (path / "run.json").exists():
            raise InputError(
                f"{path} is not a run directory, but runs lie below it and there is no "
                "study.json: a study that is not finished goes on with cm-study STUDY.yaml --out "
                f"{shlex.quote(str(path))}; else name its runs."
            )


def write_runs(paths: list[Path], out: Path) -> None:
    """Write the comparison of runs.

    Args:
        paths: Run directories.
        out: Where to write.
    """
    entries = distinct([read_entry(path) for path in paths])
    if len({entry.path.resolve() for entry in entries}) < len(entries):
        raise InputError("A run is named twice.")
    reasons, left = differing(entries), ""
    if reasons:
        with contextlib.suppress(InputError):  # a run without results of its own training
            trained = distinct([read_entry(path, evaluated=False) for path in paths])
            if not differing(trained):
                left = f"Evaluations are left out, as they differ in {'; '.join(reasons)}."
                entries, reasons = trained, []
    notes = [*summary(entries, reasons), *([left] if left else [])]
    head, rows = overview(entries, ranked=not reasons and len(entries) > 1)
    panels = all_panels(entries)
    text = report(entries, notes, table(head, rows), panels)
    html = page(entries, notes, head, rows, panels, origins(entries))
    write_text(out / "comparison.md", printable(text))
    write_text(out / "comparison.html", printable(html))
    write_figures(panels, out)
    print(printable("\n\n".join([*notes, table(head, rows)])))


if __name__ == "__main__":
    main(sys.argv[1:])
