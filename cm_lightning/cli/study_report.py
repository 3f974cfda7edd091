"""What a study found: tables of arms and answers to its questions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from cm_lightning.cli.words import WORDS, part_words, piece_words, pieces, result_words
from cm_lightning.documents import check_form, printable, read_mapping
from cm_lightning.types import InputError

__all__ = [
    "OUTCOME",
    "RECORD",
    "Answer",
    "answers",
    "arms_table",
    "calls",
    "interval",
    "label",
    "main_results",
    "measured_over",
    "other_results",
    "read_outcome",
    "search_table",
    "summary",
    "table",
    "unanswered",
    "verdicts",
]

RECORD = {
    "regime": str,
    "parameters": int,
    "total_kimg": float,
    "starts": [{"seconds?": float}],
    "data_fingerprint?": str,
    "results?": {"kimg": float, "last": {...: float}, "measured_with?": dict},
}
"""Form of ``run.json``."""

OUTCOME = {
    "title": str,
    "seeds": [int],
    "arms": {
        ...: {
            "about?": str,
            "runs": [str],
            "share?": float,
            "of?": str,
            "time_of?": str,
            "tuned?": (object, bool),
        }
    },
    "first": {...: {...: float}},
    "key": str,
    "search": {...: {...: float}},
    "results": {...: {...: [float]}},
    "questions": {...: [[str]]},
}
"""Form of ``study.json``: by arm its runs, seed by seed, and every result in the same order."""


class Answer(NamedTuple):
    """One comparison of a study.

    Attributes:
        arm: The arm, with what tells its result from the other if the question names them.
        baseline: What it is compared with.
        result: The result, or what is common to the two that are named, in words.
        ours: Values of the arm, seed by seed.
        theirs: Values of the baseline.
    """

    arm: str
    baseline: str
    result: str
    ours: list[float]
    theirs: list[float]

    @property
    def difference(self) -> tuple[float, float]:
        """Mean and half width of the 95 % interval of arm - baseline, seed by seed."""
        return interval(np.subtract(self.ours, self.theirs))

    @property
    def verdict(self) -> str:
        """``better``, ``worse``, or ``undecided`` where the interval holds zero."""
        mean, width = self.difference
        if abs(mean) <= width or not np.isfinite(width):
            return "undecided"
        return "better" if mean < 0 else "worse"


def interval(values: Sequence[float] | np.ndarray[Any, Any]) -> tuple[float, float]:
    """Mean and half width of its 95 % confidence interval by Student's t.

    Args:
        values: Two or more independent results.
    """
    array = np.asarray(values, dtype=np.float64)
    width = stats.t.ppf(0.975, len(array) - 1) * array.std(ddof=1) / np.sqrt(len(array))
    return float(array.mean()), float(width)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [
        [cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in [head, *rows]
    ]
    lines.insert(1, ["---"] * len(head))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def calls(nfe: str) -> str:
    """A number of network calls in words."""
    return f"{nfe} network call{'s' if nfe != '1' else ''}"


def read_outcome(folder: Path) -> dict[str, Any]:
    """``study.json`` of a study's folder.

    Raises:
        InputError: If it is not what ``cm-study`` writes, or its arms and questions do not fit.
    """
    path = folder / "study.json"
    outcome = read_mapping(path)
    check_form(outcome, OUTCOME, str(path))
    arms, results = outcome["arms"], outcome["results"]
    whole = list(arms) == list(results) and len(outcome["seeds"]) > 1 and arms
    lengths = {len(arm["runs"]) for arm in arms.values()}
    lengths |= {len(values) for found in results.values() for values in found.values()}
    pairs = [pair for pairs in outcome["questions"].values() for pair in pairs]
    if not whole or lengths != {len(outcome["seeds"])} or any(len(pair) != 2 for pair in pairs):
        raise InputError(
            f"{path} does not hold a result of every arm and seed: run cm-study again."
        )
    return outcome


def main_results(outcome: Mapping[str, Any]) -> list[str]:
    """Names of the results that more than half of the arms have: the columns of the table."""
    found: list[dict[str, Any]] = list(outcome["results"].values())
    names = dict.fromkeys(key for results in found for key in results)
    return [key for key in names if 2 * sum(key in results for results in found) > len(found)]


def label(key: str, among: Sequence[str]) -> str:
    """A result in words: number of network calls, and what else tells it from others.

    Args:
        key: Its name, as ``fd_digits2k/ema_0.993/nfe1``.
        among: The others.
    """
    parts = key.split("/")
    others = [other.split("/") for other in among]
    kept = [
        part
        for i, part in enumerate(parts[:-1])
        if len({tuple(other[i : i + 1]) for other in others}) > 1
    ]
    return result_words("/".join([*kept, parts[-1]]))


def measured_over(keys: Sequence[str]) -> str:
    """Features and numbers of samples of results in words."""
    return " and ".join(dict.fromkeys(part_words(key.partition("/")[0]) for key in keys))


def answers(outcome: Mapping[str, Any]) -> Iterator[tuple[str, list[Answer]]]:
    """Questions with the comparisons that answer them; those without results are left out."""
    results, main = outcome["results"], main_results(outcome)
    for question, pairs in outcome["questions"].items():
        found = []
        for pair in pairs:
            (arm, _, ours), (baseline, _, theirs) = (side.partition(" | ") for side in pair)
            for key in [None] if ours or theirs else main:
                left = results.get(arm, {}).get(key or ours)
                right = results.get(baseline, {}).get(key or theirs)
                if left is None or right is None:
                    continue
                if key is None:
                    a, b, shared = _sides(ours, theirs)
                    found.append(Answer(arm + a, baseline + b, shared, left, right))
                else:
                    found.append(Answer(arm, baseline, label(key, main), left, right))
        if found:
            yield question, found


def _sides(*keys: str) -> tuple[str, str, str]:
    """What tells two results apart, in words after the names of their arms, and what they share."""
    left, right = (pieces(key.partition("/")[2] or key) for key in keys)
    shared = [piece for piece in left if piece in right]
    own = [
        ", ".join(piece_words(piece) for piece in pieces if piece not in shared)
        for pieces in (left, right)
    ]
    a, b = (f" ({words or 'without'})" if any(own) else "" for words in own)
    return a, b, ", ".join(map(piece_words, shared))


def shown(values: Sequence[float]) -> str:
    """Mean and interval."""
    mean, width = interval(values)
    return f"{mean:.3f} ± {width:.3f}"


def arms_table(outcome: Mapping[str, Any], out: Path) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table of arms.

    Args:
        outcome: The study.
        out: Its folder, whose runs say how long they took.
    """
    main = main_results(outcome)
    tuned = [outcome["key"].rpartition(".")[2]] if outcome["key"] else []
    about = ["what it is"] if any(arm.get("about") for arm in outcome["arms"].values()) else []
    head = ["arm", *about, *(label(key, main) for key in main), "kimg", "minutes", *tuned]
    rows = []
    for name, arm in outcome["arms"].items():
        records = [read_mapping(out / run / "run.json") for run in arm["runs"]]
        for record in records:
            check_form(record, RECORD, f"run.json of {name}")
        minutes = [sum(s.get("seconds") or 0 for s in record["starts"]) / 60 for record in records]
        found = outcome["results"][name]
        row = [name, *[arm.get("about") or ""] * len(about)]
        row += [shown(found[key]) if key in found else "" for key in main]
        row += [f"{records[0]['total_kimg']:g}", f"{np.mean(minutes):.1f}"]
        row += [f"{arm.get('tuned', '')}"] * len(tuned)
        rows.append(row)
    return head, rows


def other_results(outcome: Mapping[str, Any]) -> list[list[str]]:
    """Arm, name and value of what few arms have, and of what was made first."""
    main = main_results(outcome)
    rows = [
        [name, key, f"{value:.3f}"]
        for name, found in outcome["first"].items()
        for key, value in found.items()
    ]
    rows += [
        [name, key, shown(values)]
        for name, found in outcome["results"].items()
        for key, values in found.items()
        if key not in main
    ]
    return rows


def search_table(outcome: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the search, the lowest of a row in bold."""
    values = list(dict.fromkeys(value for row in outcome["search"].values() for value in row))
    rows = []
    for name, row in outcome["search"].items():
        cells = [f"{row[value]:.3f}" if value in row else "" for value in values]
        low = f"{min(row.values(), default=0):.3f}"
        rows.append([name, *(f"**{cell}**" if cell == low else cell for cell in cells)])
    return [outcome["key"], *values], rows


def unanswered(outcome: Mapping[str, Any]) -> list[str]:
    """Sides of questions that name a result which its arm does not have, and pairs without any."""
    results, main, found = outcome["results"], main_results(outcome), []
    for pair in (pair for pairs in outcome["questions"].values() for pair in pairs):
        sides = [side.partition(" | ") for side in pair]
        found += [
            f"{arm} | {key}" for arm, _, key in sides if key and key not in results.get(arm, [key])
        ]
        arms = [arm for arm, _, _ in sides]
        plain = not any(key for _, _, key in sides) and all(arm in results for arm in arms)
        if plain and not any(all(key in results[arm] for arm in arms) for key in main):
            found.append(f"{arms[0]} against {arms[1]} in any one measure")
    return list(dict.fromkeys(found))


def explanation(outcome: Mapping[str, Any]) -> list[str]:
    """How to read the tables, in paragraphs."""
    main, seeds = main_results(outcome), ", ".join(map(str, outcome["seeds"]))
    timed = {
        name: (arm["time_of"], arm["share"])
        for name, arm in outcome["arms"].items()
        if arm.get("time_of") is not None and arm.get("share") is not None
    }
    lines = [
        "Values are Frechet distances (FD) between generated and training images"
        + (f", over {measured_over(main)}" if main else "")
        + ": 0 is perfect, lower is better. Each is for one moving average of the weights (EMA; "
        "live: the weights themselves) and a number of network calls per image. Mean ± 95 % "
        f"interval (Student's t) over training seeds {seeds}. kimg: thousands of images seen in "
        "training; minutes: of one run, its evaluation included."
    ]
    if timed:
        times = ", ".join(f"{name} {share:g} ({other})" for name, (other, share) in timed.items())
        lines.append(
            "Arms of equal time are trained on the share of their images that takes as long as "
            f"another arm's training, by the speeds measured in this study: {times}."
        )
    return lines


HOW = (
    "Differences are taken seed by seed; an answer is undecided where the 95 % interval holds "
    "zero. With several comparisons, one in twenty intervals misses by chance."
)
"""How to read the answers."""


def verdicts(found: Sequence[Answer]) -> list[str]:
    """The answer to a question: a sentence for each pair of arms.

    Pairs of one measure that have a baseline and a verdict in common share theirs.

    Args:
        found: Its comparisons.
    """
    pairs: dict[tuple[str, str], list[str]] = {}
    for answer in found:
        pairs.setdefault((answer.arm, answer.baseline), []).append(answer.verdict)
    single: dict[tuple[str, str], list[str]] = {}
    sentences = []
    for (arm, baseline), words in pairs.items():
        if len(words) == 1:
            single.setdefault((words[0], baseline), []).append(arm)
            continue
        (first, most), *others = Counter(words).most_common()
        share = f"{most} of {len(words)}"
        if not others:
            share = "both" if most == 2 else f"all {most}"
        rest = "".join(f", {word} in {number}" for word, number in others)
        sentences.append(f"{arm} against {baseline}: {first} in {share} measures{rest}.")
    links = {"better": "better than", "worse": "worse than", "undecided": "undecided against"}
    for (word, baseline), arms in single.items():
        sentences.append(f"{links[word].capitalize()} {baseline}: {'; '.join(arms)}.")
    return sentences


def answer_rows(found: Sequence[Answer]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table of one question."""
    rows, measures = [], any(answer.result for answer in found)
    for answer in found:
        mean, width = answer.difference
        difference, base = f"{mean:+.3f} ± {width:.3f}", np.mean(answer.theirs)
        if base > 0:
            difference += f" ({100 * mean / base:+.1f} %)"
        names = [answer.arm, answer.verdict, answer.baseline, *[answer.result] * measures]
        rows.append([*names, difference, shown(answer.ours), shown(answer.theirs)])
    head = ["arm", "is", "than", *["measure"] * measures, "difference"]
    return [*head, "arm's FD", "the other's FD"], rows


def summary(outcome: Mapping[str, Any], out: Path) -> str:
    """The study in Markdown.

    Args:
        outcome: What ``cm-study`` found, as :data:`OUTCOME` describes.
        out: Folder of the study.
    """
    text = [f"# {outcome['title']}", *explanation(outcome), table(*arms_table(outcome, out))]
    found = list(answers(outcome))
    if found:
        text += ["## Questions", HOW]
    for question, pairs in found:
        text += [f"### {question}", f"**{' '.join(verdicts(pairs))}**", table(*answer_rows(pairs))]
    missing = unanswered(outcome)
    if missing:
        text.append(f"No such results, so no answer: {'; '.join(missing)}.")
    others = other_results(outcome)
    if others:
        text += ["## Further results", table(["run", "result", "value"], others)]
    if outcome["search"]:
        text += ["## Search", "Means over the seeds of the search.", table(*search_table(outcome))]
    text += ["## Words", "\n".join(f"- **{word}**: {meaning}." for word, meaning in WORDS.items())]
    return printable("\n\n".join(text) + "\n")
