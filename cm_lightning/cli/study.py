"""``cm-study``: arms, seeds and learning rates of one comparison, run, resumed and tabulated."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from cm_lightning.callbacks.run_record import write_text
from cm_lightning.cli.errors import CommandParser, fail, readable_errors
from cm_lightning.cli.study_file import Arm, Study, Tuning, read_study
from cm_lightning.types import InputError

__all__ = ["execute", "interval", "main", "option_words", "summary", "table"]

COMMAND = "cm-study"


@dataclass(frozen=True)
class Run:
    """One training run of a study: where it lives, the options that make it and evaluate it."""

    name: str
    config: Path
    options: dict[str, Any]
    evaluate: list[str]


class Runner:
    """Trains and evaluates what is missing and reads what is there, several runs at a time.

    Args:
        out: Folder of the study.
        total: Number of runs, for the progress line.
        jobs: Processes at a time, >= 1; they share the cores.
    """

    def __init__(self, out: Path, total: int, jobs: int) -> None:
        self.out, self.total, self.jobs = out, total, jobs
        self.number = self.trained = 0
        self._started = time.perf_counter()
        self._lock = threading.Lock()

    def __call__(self, runs: Sequence[Run]) -> list[dict[str, float]]:
        """Results of runs, trained or continued if need be.

        Raises:
            InputError: If one fails.
        """
        with ThreadPoolExecutor(self.jobs) as pool:
            futures = [pool.submit(self._one, run) for run in runs]
            try:
                return [future.result() for future in futures]
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def _one(self, run: Run) -> dict[str, float]:
        folder = self.out / run.name
        found = finished(folder)
        missing = found is None
        if found is None:
            options = {"run_dir": str(folder), "trainer.enable_progress_bar": False} | run.options
            words = ["--config", str(run.config), *option_words(options, self.out)]
            self._command(run, ["cm_lightning.cli.fit", *words])
            found = finished(folder)
            if found is None:
                raise InputError(f"{folder} ended without results; see {folder}.log.")
        if run.evaluate:
            self._command(run, ["cm_lightning.cli.evaluate", str(folder), *run.evaluate])
            found |= evaluated(folder)
        with self._lock:
            self.number += 1
            self.trained += missing
            shown = ", ".join(f"{key} {value:.4g}" for key, value in found.items())
            left = ""
            if self.trained:
                minutes = (time.perf_counter() - self._started) / self.trained / 60
                left = f" (about {minutes * (self.total - self.number):.0f} min to go)"
            print(f"[{self.number}/{self.total}] {run.name}: {shown}{left}", flush=True)
        return found

    def _command(self, run: Run, words: list[str]) -> None:
        """Run a program of the package; what it prints goes to a file beside the run."""
        folder = self.out / run.name
        log = folder.with_name(f"{folder.name}.log")
        log.parent.mkdir(parents=True, exist_ok=True)
        threads = str(max(1, (os.cpu_count() or 1) // self.jobs))
        environment = {"OMP_NUM_THREADS": threads} | os.environ if self.jobs > 1 else os.environ
        with log.open("a", encoding="utf-8") as stream:
            done = subprocess.run(  # noqa: S603
                [sys.executable, "-m", *words],
                stdout=stream,
                stderr=subprocess.PIPE,
                text=True,
                env=dict(environment),
                check=False,
            )
            stream.write(done.stderr)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise InputError(f"The run {run.name} failed; see {log}. Its last words: {last}")


def option_words(options: dict[str, Any], out: Path) -> list[str]:
    """Options as the words of a command line; ``{study}`` stands for the study's folder."""
    texts = {
        key: value.replace("{study}", str(out)) if isinstance(value, str) else json.dumps(value)
        for key, value in options.items()
    }
    return [f"--{key}={text}" for key, text in texts.items()]


def evaluated(folder: Path) -> dict[str, float]:
    """Mean Frechet distances of ``cm-eval`` over its seeds, by profile, sampling and guidance."""
    record = json.loads((folder / "eval" / "eval.json").read_text(encoding="utf-8"))
    found: dict[str, list[float]] = {}
    for row in record["results"]:
        guidance = "" if row["guidance"] == 1 else f", guidance {row['guidance']:g}"
        key = f"eval/{row['ema']}/{row['sampling']}{guidance}"
        found.setdefault(key, []).append(row["fd"])
    return {key: float(np.mean(values)) for key, values in found.items()}


def finished(folder: Path) -> dict[str, float] | None:
    """Results of a run that came to its end, ``None`` otherwise."""
    path = folder / "run.json"
    if not path.is_file():
        return None
    record = json.loads(path.read_text(encoding="utf-8"))
    if record.get("results", {}).get("kimg", -1) < record["total_kimg"]:
        return None
    last: dict[str, float] = record["results"]["last"]
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
        return Run(f"{name}/seed{seed}", arm.config, options, arm.evaluate)
    chosen = options | {tune.key: value}
    return Run(f"{name}/{value}/seed{seed}", arm.config, chosen, arm.evaluate)


def execute(study: Study, out: Path, only: Sequence[str] = (), jobs: int = 1) -> dict[str, Any]:
    """Run a study.

    Args:
        study: The study.
        out: Folder of its runs.
        only: Arms to run, all if empty.
        jobs: Runs at a time.

    Returns:
        Chosen values, mean results of the search, and results by arm, metric and seed.

    Raises:
        InputError: If a run fails, or an arm is tuned as one that does not run.
    """
    arms = {name: arm for name, arm in study.arms.items() if not only or name in only}
    tune = study.tune
    searched = [name for name, arm in arms.items() if tune and not arm.tuned_as]
    for name, arm in arms.items():
        if tune is not None and arm.tuned_as and arm.tuned_as not in searched:
            raise InputError(f"arms.{name} is tuned as {arm.tuned_as}, which is not searched.")
    tries = 0 if tune is None else len(tune.values) * len(tune.seeds)
    total = len(study.first) + len(searched) * tries + len(arms) * len(study.seeds)
    runner = Runner(out, total, jobs)
    runner([Run(name, arm.config, arm.options, arm.evaluate) for name, arm in study.first.items()])
    search = {} if tune is None else _search({name: arms[name] for name in searched}, tune, runner)
    chosen: dict[str, Any] = {}
    for name, arm in arms.items():
        if tune is not None:
            means = search[arm.tuned_as or name]
            best = min(means, key=means.__getitem__)
            chosen[name] = next(value for value in tune.values if str(value) == best)
    runs = [
        make_run(name, arm, seed, tune, chosen.get(name))
        for name, arm in arms.items()
        for seed in study.seeds
    ]
    found = iter(runner(runs))
    results: dict[str, dict[str, list[float]]] = {}
    for name in arms:
        rows = [next(found) for _ in study.seeds]
        results[name] = {key: [row[key] for row in rows] for key in rows[0]}
    return {"seeds": study.seeds, "chosen": chosen, "search": search, "results": results}


def _search(arms: dict[str, Arm], tune: Tuning, runner: Runner) -> dict[str, dict[str, float]]:
    """Mean result of every arm and value over the seeds of the search."""
    keys = [(name, value) for name in arms for value in tune.values]
    runs = [
        replace(make_run(name, arms[name], seed, tune, value), evaluate=[])
        for name, value in keys
        for seed in tune.seeds
    ]
    found = iter(runner(runs))
    means: dict[str, dict[str, float]] = {name: {} for name in arms}
    for name, value in keys:
        rows = [next(found) for _ in tune.seeds]
        for row in rows:
            if tune.metric not in row:
                raise InputError(
                    f"tune.metric is '{tune.metric}', but a run gives {', '.join(row)}."
                )
        means[name][str(value)] = float(np.mean([row[tune.metric] for row in rows]))
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
    metrics = list(dict.fromkeys(key for found in results.values() for key in found))
    tuned = [] if study.tune is None else [study.tune.key]
    head = ["arm", *tuned, *metrics]
    rows = []
    for name, found in results.items():
        cells = [f"{outcome['chosen'][name]}"] if tuned else []
        for metric in metrics:
            known = metric in found
            cells.append("{:.3f} ± {:.3f}".format(*interval(found[metric])) if known else "")
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
                if metric not in results[arm] or metric not in results[base]:
                    cells.append("")
                    continue
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
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time [1]")
    parser.add_argument("--only", nargs="+", default=[], metavar="ARM", help="arms to run [all]")
    options = parser.parse_args(args)
    with readable_errors(COMMAND):
        path = Path(options.study)
        study = read_study(path)
        for name in options.only:
            if name not in study.arms:
                fail(COMMAND, f"--only {name}: the arms are {', '.join(study.arms)}.")
        out = Path(options.out or Path("runs") / path.stem)
        if options.jobs < 1:
            fail(COMMAND, f"--jobs must be 1 or more, got {options.jobs}.")
        outcome = execute(study, out, options.only, options.jobs)
        write_text(out / "study.json", json.dumps(outcome, indent=2) + "\n")
        text = summary(study, outcome)
        write_text(out / "study.md", text)
        print(f"\n{text}\nWritten to {out / 'study.md'} and {out / 'study.json'}.")


if __name__ == "__main__":
    main(sys.argv[1:])
