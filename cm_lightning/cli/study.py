"""``cm-study``: arms, seeds and learning rates of one comparison, run, resumed and tabulated."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from cm_lightning.callbacks.run_record import write_text
from cm_lightning.cli import evaluate
from cm_lightning.cli.errors import CommandParser, fail, readable_errors
from cm_lightning.cli.fit import GROUPS, SCALARS
from cm_lightning.cli.keys import check_keys
from cm_lightning.cli.study_file import Arm, Study, Tuning, read_study, scaled
from cm_lightning.cli.study_report import RECORD, search_table, summary, table
from cm_lightning.documents import check_form, read_mapping
from cm_lightning.evaluation import read_metrics
from cm_lightning.types import InputError

__all__ = ["execute", "main", "option_words"]

COMMAND = "cm-study"


@dataclass(frozen=True)
class Run:
    """One training run of a study: where it lives, the options that make it and evaluate it.

    Args:
        name: Its folder inside the study's.
        config: Config file.
        options: Options of ``cm-fit``.
        evaluate: Options of ``cm-eval`` by name.
        share: Factor of the lengths among the options; it is measured, so it may differ when the
            study is called again.
    """

    name: str
    config: Path
    options: dict[str, Any]
    evaluate: dict[str, list[str]]
    share: float = 1.0

    def needs(self, name: str) -> bool:
        """Whether its options name another run of the study."""
        return f"{{study}}/{name}" in json.dumps(self.options, ensure_ascii=False)


class Abandoned(InputError):
    """A run that was not begun because another one failed."""


class Runner:
    """Trains and evaluates what is missing and reads what is there, several runs at a time.

    Args:
        out: Folder of the study.
        total: Number of runs, for the progress line.
        jobs: Processes at a time, >= 1; they share the cores.
        first: Runs that others need; those that need none are made beside them.
        lengths: Options that a run's share multiplies.
    """

    def __init__(
        self,
        out: Path,
        total: int,
        jobs: int,
        first: Sequence[Run] = (),
        lengths: Sequence[str] = (),
    ) -> None:
        self.out, self.total, self.jobs, self.lengths = out, total, jobs, list(lengths)
        self.number = self.trained = 0
        self._started = time.perf_counter()
        self._lock = threading.Lock()
        self._failed = threading.Event()
        self._pool = ThreadPoolExecutor(jobs)
        self._first: dict[str, Future[dict[str, float]]] = {}
        for run in first:
            self._first[run.name] = self._pool.submit(self._one, run, dict(self._first))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *args: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def first(self) -> dict[str, dict[str, float]]:
        """Results of the runs that others need."""
        return {name: future.result() for name, future in self._first.items()}

    def __call__(self, runs: Sequence[Run]) -> list[dict[str, float]]:
        """Results of runs, trained or continued if need be.

        Raises:
            InputError: If one fails.
        """
        waiting = [any(map(run.needs, self._first)) for run in runs]
        order = sorted(range(len(runs)), key=waiting.__getitem__)
        futures = {place: self._pool.submit(self._one, runs[place], self._first) for place in order}
        queued = [*self._first.values(), *futures.values()]
        ended, _ = wait(queued, return_when=FIRST_EXCEPTION)
        errors = [error for f in queued if f in ended and (error := f.exception())]
        for error in sorted(errors, key=lambda error: isinstance(error, Abandoned)):
            raise error
        return [futures[place].result() for place in range(len(runs))]

    def _one(self, run: Run, before: Mapping[str, Future[dict[str, float]]]) -> dict[str, float]:
        """Make a run after those before it that it needs; they were queued earlier."""
        for name, future in before.items():
            if run.needs(name):
                future.result()
        if self._failed.is_set():
            raise Abandoned(f"{run.name} was not begun, as another run failed.")
        try:
            return self._make(run)
        except BaseException:
            self._failed.set()
            raise

    def _make(self, run: Run) -> dict[str, float]:
        folder = self.out / run.name
        found = finished(folder)
        missing = found is None
        if found is not None:
            self._check_note(run, OPTIONS, describe(run))
            self._check_length(run)
        else:
            options = scaled(run.options, self.lengths, run.share) | {
                "run_dir": str(folder),
                "trainer.enable_progress_bar": False,
            }
            words = ["--config", str(run.config), *option_words(options, self.out)]
            self._command(run, ["cm_lightning.cli.fit", *words], OPTIONS, describe(run))
            found = finished(folder)
            if found is None:
                raise InputError(f"{folder} ended without results; see {folder}.log.")
        for name, words in run.evaluate.items():
            place, note = folder / f"eval-{name}", {"words": words}
            if (place / "eval.json").is_file():
                self._check_note(run, f"evaluation {name}: ", note)
            where = ["--out", str(place)]
            command = ["cm_lightning.cli.evaluate", str(folder), *where, *words]
            self._command(run, command, f"evaluation {name}: ", note)
            found |= evaluated(name, place)
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

    def _check_note(self, run: Run, start: str, note: dict[str, Any]) -> None:
        """Refuse results that the log beside a run says were made with other options."""
        log = self._log(run)
        text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
        lines = [line for line in text.splitlines() if line.startswith(start)]
        old = _mapping(lines[-1].removeprefix(start)) if lines else note
        keys = sorted(k for k in old.keys() | note.keys() if old.get(k) != note.get(k))
        if keys:
            raise InputError(
                f"{self.out / run.name} was made with other options than those of the study "
                f"({start.split(':')[0]}; {', '.join(keys)}): remove it, or choose another --out."
            )

    def _check_length(self, run: Run) -> None:
        """Refuse a finished run of an arm of equal time whose length is not about right."""
        wanted = scaled(run.options, self.lengths, run.share).get("model.total_kimg")
        length = read_mapping(self.out / run.name / "run.json")["total_kimg"]
        if run.share != 1 and wanted is not None and not 0.95 < length / wanted < 1.05:
            raise InputError(
                f"{self.out / run.name} was trained on {length:g} kimg, and {wanted:g} fit in the "
                "time of its arm now: remove it, or choose another --out."
            )

    def _log(self, run: Run) -> Path:
        folder = self.out / run.name
        return folder.with_name(f"{folder.name}.log")

    def _command(self, run: Run, words: list[str], start: str, note: dict[str, Any]) -> None:
        """Run a program of the package; what it prints goes to a file beside the run."""
        folder, log = self.out / run.name, self._log(run)
        made = [path for path in (log, *log.parents) if not path.exists()]
        log.parent.mkdir(parents=True, exist_ok=True)
        threads = str(max(1, (os.cpu_count() or 1) // self.jobs))
        environment = {"OMP_NUM_THREADS": threads} | os.environ if self.jobs > 1 else os.environ
        with log.open("a", encoding="utf-8") as stream:
            print(start + json.dumps(note, sort_keys=True), file=stream, flush=True)
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
            last = (done.stderr.strip().splitlines() or ["no reason was given"])[-1]
            if not folder.exists() and log in made:  # it never began: nothing of it is left
                log.unlink()
                for path in made[1:]:
                    with contextlib.suppress(OSError):  # another run is there
                        path.rmdir()
            raise InputError(f"The run {run.name} failed. {last.removeprefix('cm-fit: error: ')}")


OPTIONS = "options: "
"""Start of the line in a run's log that holds its options."""


def _mapping(text: str) -> dict[str, Any]:
    """A mapping in JSON, empty if it is none."""
    with contextlib.suppress(ValueError):
        found = json.loads(text)
        if isinstance(found, dict):
            return found
    return {}


def describe(run: Run) -> dict[str, Any]:
    """Options of a run, and a hash of what its config says."""
    config = json.dumps(read_mapping(run.config, "config"), sort_keys=True, default=str)
    digest = hashlib.sha256(config.encode()).hexdigest()[:16]
    return {"config": f"{run.config.name} {digest}"} | run.options


def option_words(options: dict[str, Any], out: Path) -> list[str]:
    """Options as the words of a command line; ``{study}`` stands for the study's folder."""
    texts = {
        key: (value if isinstance(value, str) else json.dumps(value)).replace("{study}", str(out))
        for key, value in options.items()
    }
    return [f"--{key}={text}" for key, text in texts.items()]


def evaluated(name: str, folder: Path) -> dict[str, float]:
    """Mean Frechet distances of ``cm-eval`` over its seeds, by profile, sampling and guidance.

    Args:
        name: Name of the evaluation, the first word of each key.
        folder: Where its results are.
    """
    record = json.loads((folder / "eval.json").read_text(encoding="utf-8"))
    found: dict[str, list[float]] = {}
    for row in record["results"]:
        guidance = "" if row["guidance"] == 1 else f", guidance {row['guidance']:g}"
        key = f"{name}/{row['ema']}/{row['sampling']}{guidance}"
        if "fd" in row:
            found.setdefault(key, []).append(row["fd"])
    return {key: float(np.mean(values)) for key, values in found.items()}


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
        return Run(f"{name}/seed{seed}", arm.config, options, arm.evaluate)
    chosen = options | {tune.key: value}
    return Run(f"{name}/{value}/seed{seed}", arm.config, chosen, arm.evaluate)


def training_minutes(folders: Sequence[Path]) -> float:
    """Minutes that training takes without evaluations: images by the median speed of all windows.

    Args:
        folders: Finished runs of one length.
    """
    speeds = [
        row["speed/images_per_second"]
        for folder in folders
        for row in read_metrics(folder / "metrics.csv")
        if 0 < row.get("speed/images_per_second", 0) < float("inf")
    ]
    if not speeds:
        raise InputError(f"{folders[0]} logged no speed; time_of needs diagnostics.")
    record = read_mapping(folders[0] / "run.json")
    return float(1000 * record["total_kimg"] / np.median(speeds) / 60)


def execute(
    study: Study, out: Path, only: Sequence[str] = (), jobs: int = 1, search: bool = False
) -> dict[str, Any]:
    """Run a study.

    Args:
        study: The study.
        out: Folder of its runs.
        only: Arms to run, all if empty.
        jobs: Runs at a time.
        search: Search the values of all arms that are not tuned as another one, those known too,
            and stop there.

    Returns:
        What :data:`~cm_lightning.cli.study_report.OUTCOME` describes; after a search alone its
        table as ``search``.

    Raises:
        InputError: If a run fails, or an arm needs one that does not run.
    """
    arms = {name: arm for name, arm in study.arms.items() if not only or name in only}
    tune = study.tune
    known = {} if tune is None or search else tune.chosen
    searched = [name for name, arm in arms.items() if tune and not (arm.tuned_as or name in known)]
    tried = {} if tune is None else {tune.key: tune.values[0]}
    for arm in study.first.values():  # a mistake in the last arm is found before the first
        check_arm(arm, {}, out)
    for arm in arms.values():
        check_arm(arm, tried, out)
    for name, arm in arms.items():
        tuned_as = arm.tuned_as if tune else None
        if tuned_as and tuned_as not in searched and tuned_as not in known:
            raise InputError(f"arms.{name} is tuned as {tuned_as}, which is not searched.")
        for other in (arm.of, arm.time_of) if arm.time_of else ():
            if other not in arms:
                raise InputError(f"arms.{name} needs the time of {other}, which does not run.")
    cells = 0 if tune is None else len(tune.values) * len(tune.seeds)
    total = len(study.first) + len(searched) * cells + len(arms) * len(study.seeds) * (not search)
    first = [
        Run(name, arm.config, arm.options, {} if search else arm.evaluate)
        for name, arm in study.first.items()
    ]
    with Runner(out, total, jobs, first, study.lengths) as runner:
        if search:
            assert tune is not None
            means = _search({name: arms[name] for name in searched}, tune, runner)
            return {"key": tune.key, "search": means}
        return _arms(study, arms, searched, known, runner)


def check_arm(arm: Arm, tried: dict[str, Any], out: Path) -> None:
    """Check the names of an arm's options, and its evaluations as ``cm-eval`` would.

    Args:
        arm: The arm.
        tried: The tuned option.
        out: Folder of the study.

    Raises:
        InputError: If one is not known.
    """
    words = option_words(arm.options | tried, out)
    check_keys(["--config", str(arm.config), *words], GROUPS, SCALARS)
    for options in arm.evaluate.values():
        if {"-h", "--help"} & set(options):
            raise InputError(f"An evaluation takes options of cm-eval that score, got {options}.")
        parser = evaluate.build_parser()
        parser.prog = COMMAND  # in its messages
        parser.parse_args(["run", *options])


def _arms(
    study: Study, arms: dict[str, Arm], searched: list[str], known: dict[str, Any], runner: Runner
) -> dict[str, Any]:
    """Search what is to be searched, then all runs: those of equal time last."""
    tune = study.tune
    means = {} if tune is None else _search({name: arms[name] for name in searched}, tune, runner)
    best = {name: min(row, key=row.__getitem__) for name, row in means.items()}
    chosen: dict[str, Any] = {}
    for name, arm in arms.items():
        if tune is not None:
            source = name if name in known else arm.tuned_as or name
            values = {str(value): value for value in tune.values}
            chosen[name] = known[source] if source in known else values[best[source]]

    def runs_of(name: str) -> list[Run]:
        return [make_run(name, arms[name], seed, tune, chosen.get(name)) for seed in study.seeds]

    runs = {name: runs_of(name) for name, arm in arms.items() if not arm.time_of}
    found = iter(runner([run for group in runs.values() for run in group]))
    results = {name: [next(found) for _ in group] for name, group in runs.items()}
    shares: dict[str, float] = {}
    for name, arm in arms.items():
        if arm.of and arm.time_of:
            theirs, ours = (
                training_minutes([runner.out / run.name for run in runs[other]])
                for other in (arm.time_of, arm.of)
            )
            shares[name] = float(f"{theirs / ours:.3g}")
            runs[name] = [replace(run, share=shares[name]) for run in runs_of(name)]
    found = iter(runner([run for name in shares for run in runs[name]]))
    results |= {name: [next(found) for _ in runs[name]] for name in shares}
    return {
        "title": study.title,
        "seeds": study.seeds,
        "arms": {
            name: {"about": arm.about, "runs": [run.name for run in runs[name]]}
            | (
                {"share": shares[name], "of": arm.of, "time_of": arm.time_of}
                if name in shares
                else {}
            )
            | ({"tuned": chosen[name]} if name in chosen else {})
            for name, arm in arms.items()
        },
        "first": runner.first(),
        "key": tune.key if tune else "",
        "search": means,
        "results": {
            name: {
                key: [row[key] for row in results[name]]
                for key in results[name][0]
                if all(key in row for row in results[name])
            }
            for name in arms
        },
        "questions": study.questions,
    }


def _search(arms: dict[str, Arm], tune: Tuning, runner: Runner) -> dict[str, dict[str, float]]:
    """Mean result of every arm and value over the seeds of the search."""
    keys = [(name, value) for name in arms for value in tune.values]
    runs = [
        replace(make_run(name, arms[name], seed, tune, value), evaluate={})
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
    parser.add_argument(
        "--search",
        action="store_true",
        help="search the tuned option, where tune.chosen names its value too, and stop there",
    )
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
        if options.search and study.tune is None:
            fail(COMMAND, f"--search: {path} has no `tune`.")
        outcome = execute(study, out, options.only, options.jobs, options.search)
        if options.search:
            print(f"\n{table(*search_table(outcome))}")
            return
        text = summary(outcome, out)
        print(f"\n{text}")
        if options.only and (out / "study.json").is_file():
            print(f"{out / 'study.json'} is left as it is; without --only it is written anew.")
            return
        write_text(out / "study.json", json.dumps(outcome, indent=2) + "\n")
        write_text(out / "study.md", text)
        print(f"Written to {out / 'study.md'} and {out / 'study.json'}.")


if __name__ == "__main__":
    main(sys.argv[1:])
