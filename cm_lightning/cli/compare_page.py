"""The page of ``cm-compare``: one HTML file without links to others, for a desk and for a phone."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cm_lightning.cli.compare_figures import Panel, colour, course, names_of, sentence
from cm_lightning.cli.compare_runs import Entry, grids, nfe_of, settings
from cm_lightning.cli.study_report import (
    HOW,
    answer_rows,
    answers,
    arms_table,
    calls,
    explanation,
    other_results,
    search_table,
    unanswered,
    verdicts,
)
from cm_lightning.cli.words import WORDS, result_words

__all__ = ["page", "study_page"]

STYLE = """
:root{color-scheme:light}
body{font:16px/1.5 system-ui,sans-serif;color:#222;margin:0 auto;max-width:1180px;padding:1rem}
h1{font-size:1.6rem;line-height:1.25;margin:.5rem 0}
h2{font-size:1.25rem;margin:2.2rem 0 .3rem;border-top:1px solid #ddd;padding-top:1.2rem}
h3{font-size:1rem;margin:1.2rem 0 .4rem}
p{margin:.4rem 0;max-width:75ch}
.scroll{overflow-x:auto}
table{border-collapse:separate;border-spacing:0;font-size:.92rem;margin:.6rem 0}
th,td{border-bottom:1px solid #ddd;padding:.35rem .8rem .35rem 0;text-align:left;
vertical-align:top}
th{font-weight:600;vertical-align:bottom}
.numbers td:nth-child(n+3),.numbers th:nth-child(n+3){text-align:right}
.numbers td:first-child,.arms td:first-child,.answers td:nth-child(n+5){white-space:nowrap}
.answers td:nth-child(4){min-width:7rem}
.scroll td:first-child,.scroll th:first-child{position:sticky;left:0;background:#fff}
.arms td:nth-child(n+2),.arms th:nth-child(n+2){text-align:right;white-space:nowrap}
.arms th:nth-child(n+2){white-space:normal}
.arms.about td:nth-child(2),.arms.about th:nth-child(2){text-align:left;white-space:normal;
min-width:10rem}
.answers td:nth-child(2){font-weight:600}
.settings td{overflow-wrap:anywhere;min-width:7rem}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,330px),1fr));gap:1.2rem}
.pairs{grid-template-columns:repeat(auto-fit,minmax(min(100%,400px),1fr));max-width:960px}
.samples{grid-template-columns:repeat(auto-fill,minmax(min(45%,250px),1fr))}
figure{margin:0;min-width:0}
figcaption{font-size:.88rem;color:#444}
img{display:block;width:100%;height:auto}
.samples img{image-rendering:pixelated;max-width:380px}
.chip{display:inline-block;width:.7em;height:.7em;border-radius:50%;margin-right:.45em}
li,dd{overflow-wrap:anywhere}
dt{font-weight:600}
dd{margin:0 0 .4rem}
code{font-size:.88rem}
.answer{font-weight:600}
details{margin:.8rem 0}
summary{cursor:pointer;color:#1a5fb4}
@media(max-width:600px){
table{font-size:.82rem}
th,td{padding-right:.5rem}
.arms.about td:nth-child(2){min-width:8rem}
}
"""


def page(
    entries: Sequence[Entry],
    summary: Sequence[str],
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    panels: Mapping[str, Sequence[Panel]],
    origins: Sequence[str],
) -> str:
    """The comparison as one HTML file.

    Args:
        entries: The runs.
        summary: Paragraphs on what was compared and how to read the table.
        head: Heads of the table.
        rows: Its rows, one per run; ``**`` around a cell marks the best.
        panels: Figures of all runs by section.
        origins: A line on each run: where it was made and how to make it again.
    """
    title = f"{len(entries)} runs compared" if len(entries) > 1 else f"The run {entries[0].name}"
    parts = [*(f"<p>{html.escape(line)}</p>" for line in summary)]
    parts.append(as_table(head, rows, "numbers", [chip(number) for number in range(len(rows))]))
    parts.append(glossary())
    parts += run_sections(entries, panels)
    return document(title, [*parts, "<h2>How these runs were made</h2>", as_list(origins)])


def study_page(
    outcome: Mapping[str, Any],
    folder: Path,
    entries: Sequence[Entry],
    panels: Mapping[str, Sequence[Panel]],
    made: Sequence[str],
    origins: Sequence[str],
) -> str:
    """A study as one HTML file: its arms, its questions, and the first run of every arm.

    Args:
        outcome: What ``cm-study`` found.
        folder: Folder of the study.
        entries: The first runs, named as their arms.
        panels: Figures of the arms, and of these runs by the section of the page.
        made: When, where and by which command the study was made, in paragraphs.
        origins: The same of each of its runs, a line each.
    """
    head, rows = arms_table(outcome, folder)
    colours = {entry.name: chip(number) for number, entry in enumerate(entries)}
    chips = [colours.get(arm.get("of") or name, "") for name, arm in outcome["arms"].items()]
    parts = [*(f"<p>{html.escape(line)}</p>" for line in explanation(outcome))]
    kind = "arms about" if "what it is" in head else "arms"
    parts += [glossary(), figures(panels["arms"], "pairs"), as_table(head, rows, kind, chips)]
    answered = list(answers(outcome))
    if answered:
        parts.append(f"<h2>Questions and answers</h2><p>{html.escape(HOW)}</p>")
    for question, pairs in answered:
        parts.append(f"<h3>{html.escape(question)}</h3>")
        found = "<br>".join(html.escape(line) for line in verdicts(pairs))
        parts.append(f"<p class=answer>{found}</p>")
        parts.append(as_table(*answer_rows(pairs), "answers"))
    missing = unanswered(outcome)
    if missing:
        words = html.escape("; ".join(missing))
        parts.append(f"<p>No such results, so no answer: {words}.</p>")
    others = other_results(outcome)
    if others:
        lines = [[name, result_words(key), value] for name, key, value in others]
        shown = as_table(["run", "measure", "FD"], lines, "settings")
        parts.append(f"<details><summary>Further results</summary>{shown}</details>")
    if outcome["search"]:
        shown = as_table(*search_table(outcome), "settings")
        parts.append(
            "<details><summary>Search of the tuned option</summary><p>Means over the seeds of the "
            f"search; the lowest of a row is bold.</p>{shown}</details>"
        )
    parts.append(
        f"<h2>The runs of seed {outcome['seeds'][0]}</h2><p>What follows shows one run of every "
        f"arm but those of equal time. {html.escape(lengths(entries))}</p>"
    )
    parts += run_sections(entries, panels)
    parts.append("<h2>How this study was made</h2>")
    parts += [f"<p>{as_code(line)}</p>" for line in made]
    parts.append(f"<details><summary>All runs</summary>{as_list(origins)}</details>")
    return document(outcome["title"], parts)


def lengths(entries: Sequence[Entry]) -> str:
    """How many images runs have seen, in a sentence."""
    names: dict[str, list[str]] = {}
    for entry in entries:
        names.setdefault(f"{entry.record['total_kimg']:g} kimg", []).append(entry.name)
    if len(names) == 1:
        return f"All were trained on {next(iter(names))}."
    found = "; ".join(f"{', '.join(group)}: {kimg}" for kimg, group in names.items())
    return f"They were trained on different numbers of images ({found})."


def glossary() -> str:
    """What names and short forms mean, folded."""
    found = "".join(f"<dt>{word}</dt><dd>{html.escape(WORDS[word])}</dd>" for word in WORDS)
    return f"<details><summary>What the words mean</summary><dl>{found}</dl></details>"


def as_code(line: str) -> str:
    """A line of Markdown whose only marks are names between ``**`` and commands between `` ` ``."""
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(line))
    return re.sub(r"\*\*([^*]+)\*\*", r"<b>\1</b>", text)


def as_list(lines: Sequence[str]) -> str:
    """Lines of Markdown as a list."""
    return "<ul>" + "".join(f"<li>{as_code(line)}</li>" for line in lines) + "</ul>"


def chip(number: int) -> str:
    """A dot in the colour of a run."""
    return dot(colour(number))


def dot(shade: str) -> str:
    """A dot of a colour; nothing without one."""
    return f'<span class=chip style="background:{shade}"></span>' if shade else ""


def document(title: str, parts: Sequence[str]) -> str:
    """A page around its parts."""
    body = "\n".join(part for part in [f"<h1>{html.escape(title)}</h1>", *parts] if part)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head>\n"
        f"<body>\n{body}\n</body></html>\n"
    )


def run_sections(entries: Sequence[Entry], panels: Mapping[str, Sequence[Panel]]) -> list[str]:
    """Settings, distances, samples and diagnostics of runs."""
    parts = [different_settings(entries)]
    parts += section(
        "Frechet distance during training",
        "One line per run, in the colour of the table. Each pair shows the same distances twice: "
        "against the images seen, and against the minutes that took on the machine of the run.",
        panels["distance"],
        "pairs",
    )
    parts += sample_grids(entries)
    parts += section(
        "Over training",
        "Numbers of the whole run, against the images it has seen.",
        panels["training"],
    )
    parts += section(
        "By noise level",
        "A consistency model learns at all noise levels t at once (t is the standard deviation of "
        "the noise, for images in [-1, 1]): from almost clean images at the left to almost pure "
        "noise at the right, where one-call samples begin. Each point is the mean over the last "
        "quarter of a run.",
        panels["levels"],
    )
    return parts + courses(entries)


def as_table(
    head: Sequence[str], rows: Sequence[Sequence[str]], kind: str, chips: Sequence[str] = ()
) -> str:
    """A table that scrolls inside the page."""
    lines = ["<tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in head) + "</tr>"]
    for number, row in enumerate(rows):
        cells = [re.sub(r"\*\*(.+)\*\*", r"<b>\1</b>", html.escape(cell)) for cell in row]
        if chips:
            cells[0] = chips[number] + cells[0]
        lines.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return f'<div class=scroll><table class="{kind}">' + "\n".join(lines) + "</table></div>"


def section(title: str, text: str, panels: Sequence[Panel], kind: str = "") -> list[str]:
    """A heading, how to read what follows, and its figures; nothing without figures."""
    if not panels:
        return []
    return [f"<h2>{title}</h2><p>{text}</p>", figures(panels, kind)]


def figures(panels: Sequence[Panel], kind: str = "") -> str:
    """Figures with captions, as many in a row as fit."""
    shown = "\n".join(
        f"<figure>{embed(panel.picture, panel.name)}<figcaption>{dot(panel.colour)}"
        f"<b>{html.escape(panel.title)}</b>{'. ' if panel.caption else ''}"
        f"{html.escape(panel.caption)}</figcaption></figure>"
        for panel in panels
    )
    return f'<div class="grid {kind}">{shown}</div>'


def embed(picture: bytes, alt: str) -> str:
    """An image inside the page."""
    data = base64.b64encode(picture).decode()
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{data}">'


def different_settings(entries: Sequence[Entry]) -> str:
    """The settings in which the runs differ, folded."""
    found = settings(entries)
    if not found:
        return ""
    rows = [[key, *values] for key, values in found.items()]
    return (
        "<details><summary>Settings in which the runs differ</summary><p>As in their config.yaml; "
        "– where a run has no such setting.</p>"
        + as_table(["setting", *(entry.name for entry in entries)], rows, "settings")
        + "</details>"
    )


def sample_grids(entries: Sequence[Entry]) -> list[str]:
    """The newest sample grid of every run, side by side for each number of network calls."""
    found: dict[str, list[Panel]] = {}
    for number, entry in enumerate(entries):
        for (profile, sampler), path in grids(entry).items():
            kimg = float(path.stem.removeprefix("kimg"))
            caption = f"{sentence(result_words(profile))}, {kimg:g} kimg"
            alt = f"{entry.name}, {sampler}"
            panel = Panel(alt, entry.name, caption, path.read_bytes(), colour(number))
            found.setdefault(nfe_of(sampler), []).append(panel)
    if not found:
        return []
    seeds = sorted({(entry.config.get("samples") or {}).get("seed") or 0 for entry in entries})
    noise = (
        "All grids start from the same noise and classes, so equal places compare."
        if len(seeds) == 1
        else f"The grids start from different noise (samples.seed {', '.join(map(str, seeds))})."
    )
    parts = [f"<h2>Samples</h2><p>{noise}</p>"]
    for nfe, panels in sorted(found.items(), key=lambda item: (len(item[0]), item[0])):
        parts.append(f"<h3>With {calls(nfe)} per image</h3>" + figures(panels, "samples"))
    return parts


def courses(entries: Sequence[Entry]) -> list[str]:
    """Every family over training, run by run, folded."""
    parts = []
    for name, family in names_of(entries).items():
        panels = course(entries, name, family)
        if panels:
            parts.append(
                f"<details><summary>{html.escape(family.title)} over training, run by run"
                "</summary><p>One line per range of the noise level t, equal axes; read like the "
                f"figure of this name above.</p>{figures(panels)}</details>"
            )
    return parts
