"""``cm-study``: arms, seeds and learning rates of one comparison, run, resumed and tabulated."""

from __future__ import annotations

import contextlib
import io
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from cm_lightning.callbacks.run_record import write_text
from cm_lightning.cli import fit
from cm_lightning.cli.errors import CommandParser, fail, readable_errors
from cm_lightning.cli.keys import check_keys
from cm_lightning.documents import check_form, read_mapping
from cm_lightning.types import InputError

__all__ = ["Arm", "Study", "Tuning", "interval", "main", "option_words", "read_study", "summary"]

COMMAND = "cm-study"


RECORD = {
    "regime": str,
    "parameters": int,
    "total_kimg": float,
    "starts": [{"seconds?": float}],
    "data_fingerprint?": str,
    "results?": {"kimg": float, "last": {...: float}, "measured_with?": dict},
}
"""Form of ``run.json``."""
FORM = {
    "config?": str,
    "options?": dict,
    "arms": {...: (dict, type(None))},
    "seeds": [int],
    "tune?": dict,
    "compare?": [[str]],
}
"""Form of a study."""


@dataclass(frozen=True)
class Tuning:
    """Search of one option per arm, on seeds of its own.

    Args:
        key: The option, as ``model.optimizer.init_args.lr``.
        values: Values to try.
        seeds: Seeds of the search; none of them may be a seed of the study.
        metric: Result whose mean over the seeds is minimised.
    """

    key: str
    values: list[Any]
    seeds: list[int]
    metric: str


@dataclass(frozen=True)
class Arm:
    """One side of a comparison.

    Args:
        config: Config file, relative to the study's file.
        options: Options of ``cm-fit`` on top of it.
        tuned_as: Take the tuned value of this arm instead of searching.
    """

    config: Path
    options: dict[str, Any]
    tuned_as: str | None = None


@dataclass(frozen=True)
class Study:
    """A comparison.

    Args:
        arms: Arms by name.
        seeds: Seeds of the reported runs.
        tune: Search per arm, ``None`` for none.
        compare: Pairs (arm, baseline) whose difference is taken seed by seed.
    """

    arms: dict[str, Arm]
    seeds: list[int]
    tune: Tuning | None
    compare: list[tuple[str, str]]


@dataclass(frozen=True)
class Run:
    """One training run of a study: where it lives and the options that make it."""

    name: str
    config: Path
    options: dict[str, Any]


def read_study(path: Path) -> Study:
    """Read a study's file.

    Args:
        path: YAML with ``config``, ``options`` (both for all arms), ``arms``, ``seeds`` and, as
            wanted, ``tune`` and ``compare``.

    Raises:
        InputError: If a key is unknown or missing, or does not fit the others.
    """
    content = read_mapping(path, "study")
    allowed = {"config", "options", "arms", "seeds", "tune", "compare"}
    _check_keys(content, allowed, {"arms", "seeds"}, str(path))
    check_form(content, FORM, str(path))
    arms: dict[str, Arm] = {}
    for name, given in content["arms"].items():
        given = given or {}
        _check_keys(given, {"config", "options", "tuned_as"}, set(), f"{path}: arms.{name}")
        form = {"config?": str, "options?": dict, "tuned_as?": str}
        check_form(given, form, str(path), f"arms.{name}")
        config = given.get("config", content.get("config"))
        if config is None or not (path.parent / config).is_file():
            raise InputError(f"{path}: arms.{name} has no config file ({config}).")
        options = (content.get("options") or {}) | (given.get("options") or {})
        arms[name] = Arm(path.parent / config, options, given.get("tuned_as"))
    tune = None
    if content.get("tune") is not None:
        names = {field.name for field in fields(Tuning)}
        _check_keys(content["tune"], names, names, f"{path}: tune")
        tuning = {"key": str, "values": list, "seeds": [int], "metric": str}
        check_form(content["tune"], tuning, f"{path}: tune")
        if not content["tune"]["values"] or not content["tune"]["seeds"]:
            raise InputError(f"{path}: tune needs one value and one seed at least.")
        tune = Tuning(**content["tune"])
    pairs = [tuple(pair) for pair in content.get("compare") or []]
    if any(len(pair) != 2 for pair in pairs):
        raise InputError(f"{path}: compare must list pairs of an arm and its baseline.")
    study = Study(arms, list(content["seeds"]), tune, pairs)
    _check(study, path)
    return study


def _check_keys(given: Any, allowed: set[str], needed: set[str], where: str) -> None:
    if not isinstance(given, dict):
        raise InputError(f"{where} must be a mapping of {', '.join(sorted(allowed))}.")
    for key in given.keys() - allowed:
        raise InputError(f"{where} knows no '{key}', only {', '.join(sorted(allowed))}.")
    for key in needed - given.keys():
        raise InputError(f"{where} lacks '{key}'.")


def _check(study: Study, path: Path) -> None:
    named = [arm for pair in study.compare for arm in pair]
    named += [arm.tuned_as for arm in study.arms.values() if arm.tuned_as]
    for name in named:
        if name not in study.arms:
            raise InputError(f"{path} names '{name}', but its arms are {', '.join(study.arms)}.")
    if len(set(study.seeds)) < len(study.seeds) or len(study.seeds) < 2:
        raise InputError(f"{path}: seeds must be two or more, each once, got {study.seeds}.")
    if study.tune is not None and set(study.tune.seeds) & set(study.seeds):
        both = sorted(set(study.tune.seeds) & set(study.seeds))
        raise InputError(f"{path}: tune.seeds and seeds share {both}: results would be chosen.")


class Runner:
    """Trains what is missing and reads what is there.

    Args:
        out: Folder of the study.
        total: Number of runs, for the progress line.
    """

    def __init__(self, out: Path, total: int) -> None:
        self.out, self.total = out, total
        self.number = 0
        self._seconds: list[float] = []

    def __call__(self, run: Run) -> dict[str, float]:
        """Results of a run, trained or continued if need be.

        Raises:
            InputError: If it fails.
        """
        self.number += 1
        folder = self.out / run.name
        found = finished(folder)
        if found is None:
            started = time.perf_counter()
            self._say(run, "...")
            self._train(run, folder)
            self._seconds.append(time.perf_counter() - started)
            found = finished(folder)
            if found is None:
                raise InputError(f"{folder} ended without results; see {folder}.log.")
        self._say(run, ", ".join(f"{key} {value:.4g}" for key, value in found.items()))
        return found

    def _say(self, run: Run, what: str) -> None:
        left = ""
        if self._seconds:
            minutes = float(np.mean(self._seconds)) * (self.total - self.number) / 60
            left = f" (about {minutes:.0f} min to go)"
        print(f"[{self.number}/{self.total}] {run.name}: {what}{left}", flush=True)

    def _train(self, run: Run, folder: Path) -> None:
        options = {"run_dir": str(folder), "trainer.enable_progress_bar": False} | run.options
        words = option_words(options)
        log = folder.with_name(f"{folder.name}.log")
        made = [path for path in (log, *log.parents) if not path.exists()]
        folder.parent.mkdir(parents=True, exist_ok=True)
        argv, said, code = sys.argv, io.StringIO(), 0
        sys.argv = ["cm-fit", "--config", str(run.config), *words]
        try:
            with (
                log.open("a", encoding="utf-8") as stream,
                contextlib.redirect_stdout(stream),
                contextlib.redirect_stderr(said),
            ):
                fit.main()
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else int(error.code is not None)
        finally:
            sys.argv = argv
            if said.getvalue():
                with log.open("a", encoding="utf-8") as stream:
                    stream.write(said.getvalue())
        if code:
            last = (said.getvalue().strip().splitlines() or ["no reason was given"])[-1]
            if not folder.exists():  # it never began: nothing of it is left
                for path in made:
                    path.unlink() if path == log else path.rmdir()
            fail(
                COMMAND, f"The run {run.name} failed. {last.removeprefix('cm-fit: error: ')}", code
            )


def option_words(options: dict[str, Any]) -> list[str]:
    """Options as the words of a command line."""
    return [
        f"--{key}={value if isinstance(value, str) else json.dumps(value)}"
        for key, value in options.items()
    ]


def finished(folder: Path) -> dict[str, float] | None:
    """Results of a run that came to its end, ``None`` otherwise."""
    path = folder / "run.json"
    if not path.is_file():
        return None
    record = read_mapping(path)
    check_form(record, RECORD, str(path))
    results = record.get("results")
    if not results or results["kimg"] < record["total_kimg"]:
        return None
    last: dict[str, float] = results["last"]
    return last


def make_run(name: str, arm: Arm, seed: int, tune: Tuning | None, value: Any) -> Run:
    """One run of an arm.

    Args:
        name: The arm's name.
        arm: The arm.
        seed: Seed of the run.
        tune: The search, whose option gets ``value``.
        value: Value of that option.
    """
    options = arm.options | {"seed_everything": seed}
    if tune is None:
        return Run(f"{name}/seed{seed}", arm.config, options)
    return Run(f"{name}/{value}/seed{seed}", arm.config, options | {tune.key: value})


def execute(study: Study, out: Path, only: Sequence[str] = ()) -> dict[str, Any]:
    """Run a study.

    Args:
        study: The study.
        out: Folder of its runs.
        only: Arms to run, all if empty.

    Returns:
        Chosen values, mean results of the search, and results by arm, metric and seed.
    """
    arms = {name: arm for name, arm in study.arms.items() if not only or name in only}
    for arm in arms.values():  # a mistake in the last arm is found before the first one trains
        words = ["--config", str(arm.config), *option_words(arm.options)]
        check_keys(words, fit.GROUPS, fit.SCALARS)
    searched = {name for name, arm in arms.items() if study.tune and not arm.tuned_as}
    tries = 0 if study.tune is None else len(study.tune.values) * len(study.tune.seeds)
    runner = Runner(out, len(searched) * tries + len(arms) * len(study.seeds))
    chosen: dict[str, Any] = {}
    search: dict[str, dict[str, float]] = {}
    results: dict[str, dict[str, list[float]]] = {}
    for name, arm in arms.items():
        if study.tune is not None:
            if name in searched:
                search[name] = _search(name, arm, study.tune, runner)
                best = min(search[name], key=search[name].__getitem__)
                chosen[name] = next(v for v in study.tune.values if str(v) == best)
            elif arm.tuned_as in chosen:
                chosen[name] = chosen[arm.tuned_as]
            else:
                raise InputError(f"arms.{name} is tuned as {arm.tuned_as}, which did not run yet.")
        found = [
            runner(make_run(name, arm, seed, study.tune, chosen.get(name))) for seed in study.seeds
        ]
        results[name] = {key: [result[key] for result in found] for key in found[0]}
    return {"seeds": study.seeds, "chosen": chosen, "search": search, "results": results}


def _search(name: str, arm: Arm, tune: Tuning, runner: Runner) -> dict[str, float]:
    means = {}
    for value in tune.values:
        found = [runner(make_run(name, arm, seed, tune, value)) for seed in tune.seeds]
        for result in found:
            if tune.metric not in result:
                raise InputError(
                    f"tune.metric is '{tune.metric}', but a run gives {', '.join(result)}."
                )
        means[str(value)] = float(np.mean([result[tune.metric] for result in found]))
    return means


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half width of its 95 % confidence interval by Student's t.

    Args:
        values: Two or more independent results.
    """
    array = np.asarray(values, dtype=np.float64)
    width = stats.t.ppf(0.975, len(array) - 1) * array.std(ddof=1) / np.sqrt(len(array))
    return float(array.mean()), float(width)


def summary(study: Study, outcome: dict[str, Any]) -> str:
    """The outcome as Markdown: one table of arms, one of paired differences.

    Args:
        study: The study.
        outcome: What :func:`execute` returned.
    """
    results: dict[str, dict[str, list[float]]] = outcome["results"]
    metrics = list(next(iter(results.values())))
    tuned = [] if study.tune is None else [study.tune.key]
    head = ["arm", *tuned, *metrics]
    rows = []
    for name, found in results.items():
        cells = [f"{outcome['chosen'][name]}"] if tuned else []
        cells += ["{:.3f} ± {:.3f}".format(*interval(found[metric])) for metric in metrics]
        rows.append([name, *cells])
    text = [
        f"Mean ± 95 % interval (Student's t) over seeds {', '.join(map(str, study.seeds))}.",
        table(head, rows),
    ]
    rows = []
    for arm, base in study.compare:
        if arm in results and base in results:
            cells = []
            for metric in metrics:
                a, b = np.array(results[arm][metric]), np.array(results[base][metric])
                mean, width = interval(a - b)
                cells.append(f"{mean:+.3f} ± {width:.3f} ({100 * mean / b.mean():+.1f} %)")
            rows.append([f"{arm} − {base}", *cells])
    if rows:
        text += ["Differences seed by seed.", table(["pair", *metrics], rows)]
    if study.tune is not None:
        rows = [
            [name, *(f"{means[str(value)]:.3f}" for value in study.tune.values)]
            for name, means in outcome["search"].items()
        ]
        seeds = ", ".join(map(str, study.tune.seeds))
        text += [
            f"Search: mean of {study.tune.metric} over seeds {seeds}.",
            table([study.tune.key, *map(str, study.tune.values)], rows),
        ]
    return "\n\n".join(text) + "\n"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(args: list[str] | None = None) -> None:
    """Entry point of ``cm-study``."""
    parser = CommandParser(
        prog=COMMAND,
        allow_abbrev=False,
        description="Run every arm of a study over its seeds, after tuning one option per arm on "
        "other seeds, and write study.json and study.md. Called again, it continues.",
    )
    parser.add_argument("study", help="YAML file, as in configs/studies")
    parser.add_argument("--out", help="folder of the runs [runs/<name of the file>]")
    parser.add_argument("--only", nargs="+", default=[], metavar="ARM", help="arms to run [all]")
    options = parser.parse_args(args)
    with readable_errors(COMMAND):
        path = Path(options.study)
        study = read_study(path)
        for name in options.only:
            if name not in study.arms:
                fail(COMMAND, f"--only {name}: the arms are {', '.join(study.arms)}.")
        out = Path(options.out or Path("runs") / path.stem)
        outcome = execute(study, out, options.only)
        write_text(out / "study.json", json.dumps(outcome, indent=2) + "\n")
        text = summary(study, outcome)
        write_text(out / "study.md", text)
        print(f"\n{text}\nWritten to {out / 'study.md'} and {out / 'study.json'}.")


if __name__ == "__main__":
    main(sys.argv[1:])
