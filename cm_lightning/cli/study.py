"""``cm-study``: arms, seeds and learning rates of one comparison, run, resumed and tabulated."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from cm_lightning.callbacks.checkpoints import INTERRUPTED
from cm_lightning.cli import evaluate
from cm_lightning.cli.errors import CommandParser, fail, readable_errors, whole
from cm_lightning.cli.fit import GROUPS, SCALARS
from cm_lightning.cli.keys import check_keys, plain
from cm_lightning.cli.study_file import Arm, Study, Tuning, merged, read_study
from cm_lightning.cli.study_report import search_table, summary, table
from cm_lightning.cli.study_runs import Run, Runner, option_words
from cm_lightning.documents import read_mapping
from cm_lightning.evaluation import read_metrics
from cm_lightning.files import write_json, write_text
from cm_lightning.types import InputError

__all__ = ["execute", "main"]

COMMAND = "cm-study"


def make_run(name: str, arm: Arm, seed: int, tune: Tuning | None, value: Any) -> Run:
    """One run of an arm.

    Args:
        name: The arm's name.
        arm: The arm.
        seed: Seed of the run.
        tune: The search, whose option gets ``value``.
        value: Value of that option.
    """
    options = merged(arm.options, {"seed_everything": seed})
    if tune is None:
        return Run(f"{name}/seed{seed}", arm.config, options, arm.evaluate, length(arm))
    chosen = merged(options, {tune.key: value})
    return Run(f"{name}/{value}/seed{seed}", arm.config, chosen, arm.evaluate, length(arm))


def length(arm: Arm) -> float:
    """Length of an arm's runs in thousands of images, by its options or its config; 1 without."""
    config = read_mapping(arm.config, "config").get("model")
    init = config.get("init_args") if isinstance(config, dict) else None
    value = init.get("total_kimg") if isinstance(init, dict) else None
    given = [arm.options[key] for key in arm.options if plain(key) == "model.total_kimg"]
    for found in (*given, value):
        if isinstance(found, (int, float)) and found > 0:
            return float(found)
    return 1.0


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
    study: Study,
    out: Path,
    only: Sequence[str] = (),
    jobs: int = 1,
    search: bool = False,
    modules: str | None = None,
) -> dict[str, Any]:
    """Run a study.

    Args:
        study: The study.
        out: Folder of its runs.
        only: Arms to run, all if empty.
        jobs: Runs at a time.
        search: Search the values of all arms that are not tuned as another one, those known too,
            and stop there.
        modules: Packages whose classes its configs may name, separated by commas.

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
    plan = [(arm, 1) for arm in study.first.values()]
    plan += [(arms[name], cells) for name in searched]
    plan += [] if search else [(arm, len(study.seeds)) for arm in arms.values()]
    total, kimg = sum(n for _, n in plan), sum(n * length(arm) for arm, n in plan)
    first = [
        Run(name, arm.config, arm.options, {} if search else arm.evaluate, length(arm))
        for name, arm in study.first.items()
    ]
    with Runner(out, (total, kimg), jobs, first, study.lengths, modules) as runner:
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
        found = parser.parse_args(["run", *options])
        if found.out is not None or found.allow_modules is not None:
            raise InputError(
                f"An evaluation of a study may not say --out or --allow_modules, got {options}: it "
                "has a folder of its own, and packages are allowed on the command line of cm-study."
            )


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


@contextmanager
def interruptible() -> Iterator[None]:
    """Let other signals do what Ctrl-C does, and leave with a sentence and exit code 75."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    old = {}
    if threading.current_thread() is threading.main_thread():
        for name in ("SIGTERM", "SIGUSR1", "SIGHUP"):
            number = getattr(signal, name)
            if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
                old[number] = signal.signal(number, interrupt)
    try:
        yield
    except KeyboardInterrupt:
        sys.stderr.write(f"{COMMAND}: stopped; the same command continues.\n")
        sys.exit(INTERRUPTED)
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


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
    parser.add_argument("--jobs", type=whole(), default=1, help="runs at a time [1]")
    parser.add_allow_modules()
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
        if options.search and study.tune is None:
            fail(COMMAND, f"--search: {path} has no `tune`.")
        with interruptible():
            outcome = execute(
                study, out, options.only, options.jobs, options.search, options.allow_modules
            )
        if options.search:
            print(f"\n{table(*search_table(outcome))}")
            return
        text = summary(outcome, out)
        print(f"\n{text}")
        if options.only and (out / "study.json").is_file():
            print(f"{out / 'study.json'} is left as it is; without --only it is written anew.")
            return
        write_json(out / "study.json", outcome)
        write_text(out / "study.md", text)
        print(f"Written to {out / 'study.md'} and {out / 'study.json'}.")


if __name__ == "__main__":
    main(sys.argv[1:])
