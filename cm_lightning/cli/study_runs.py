"""The runs of a study: trained, continued and evaluated in processes of their own."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from cm_lightning.cli.evaluate_results import RESULTS, guidance_words
from cm_lightning.cli.launcher import Launcher
from cm_lightning.cli.study_file import scaled
from cm_lightning.cli.study_report import RECORD
from cm_lightning.documents import check_form, read_mapping
from cm_lightning.types import InputError

__all__ = ["Run", "Runner", "option_words"]


@dataclass(frozen=True)
class Run:
    """One training run of a study: where it lives, the options that make it and evaluate it.

    Args:
        name: Its folder inside the study's.
        config: Config file.
        options: Options of ``cm-fit``.
        evaluate: Options of ``cm-eval`` by name.
        kimg: About how long it is, for the time that is left.
        share: Factor of the lengths among the options; it is measured, so it may differ when the
            study is called again.
    """

    name: str
    config: Path
    options: dict[str, Any]
    evaluate: dict[str, list[str]]
    kimg: float = 1.0
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
        total: Number of runs and of thousands of images, for the progress line.
        jobs: Processes at a time, >= 1; they share the cores.
        first: Runs that others need; those that need none are made beside them.
        lengths: Options that a run's share multiplies.
        modules: Packages whose classes the configs may name, separated by commas.
    """

    def __init__(
        self,
        out: Path,
        total: tuple[int, float],
        jobs: int,
        first: Sequence[Run] = (),
        lengths: Sequence[str] = (),
        modules: str | None = None,
    ) -> None:
        self.out, self.total, self.jobs, self.lengths = out, total, jobs, list(lengths)
        self._allow = [] if modules is None else ["--allow_modules", modules]
        self.number, self.kimg, self.trained = 0, 0.0, 0.0
        self._started = time.perf_counter()
        self._lock = threading.Lock()
        self._failed = threading.Event()
        self._stopped = False
        self._live: set[int] = set()
        threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))}
        self._environment = dict(os.environ) if jobs == 1 else threads | os.environ
        self._idle: list[Launcher] = []
        self._pool = ThreadPoolExecutor(jobs)
        self._first: dict[str, Future[dict[str, float]]] = {}
        self._before = list(first)
        print(
            f"{total[0]} runs of {total[1]:,.4g} kimg in all, {jobs} at a time, in {out}; what a "
            "run prints is in its .log there.",
            flush=True,
        )
        for run in first:
            self._first[run.name] = self._pool.submit(self._one, run, dict(self._first))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *args: object) -> None:
        """Wait for what runs; once interrupted, after asking it to stop."""
        if kind is KeyboardInterrupt:
            self._stop(signal.SIGTERM)
        try:
            self._pool.shutdown(cancel_futures=True)
        except KeyboardInterrupt:
            self._stop(signal.SIGKILL)
            raise
        finally:
            for launcher in self._idle:
                launcher.close()

    def _stop(self, number: signal.Signals) -> None:
        self._failed.set()
        with self._lock:
            self._stopped = True
            for process in self._live:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, number)

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
            self._check_note(run, OPTIONS, self._note(run))
            self._check_length(run)
        else:
            options = scaled(run.options, self.lengths, run.share) | {
                "run_dir": str(folder),
                "trainer.enable_progress_bar": False,
            }
            if options.get("wandb.project"):
                arm = run.name.split("/")[0]
                known = {"wandb.name": run.name, "wandb.group": self.out.name, "wandb.tags": [arm]}
                options = known | options
            words = ["--config", str(run.config), *option_words(options, self.out), *self._allow]
            self._command(run, ["cm_lightning.cli.fit", *words], OPTIONS, self._note(run))
            found = finished(folder)
            if found is None:
                raise InputError(f"{folder} ended without results; see {folder}.log.")
        for name, words in run.evaluate.items():
            place, note = folder / f"eval-{name}", {"words": words}
            start = f"evaluation {name}: "
            if (place / "eval.json").is_file():
                self._check_note(run, start, note)
            ended = f"Written to {place / 'eval.md'}" in self._logged(run, start)[1]
            if missing or not ended or not (place / "eval.json").is_file():
                where = ["--out", str(place), *self._allow]
                command = ["cm_lightning.cli.evaluate", str(folder), *words, *where]
                self._command(run, command, start, note)
            found |= evaluated(name, place)
        with self._lock:
            self.number += 1
            self.kimg += run.kimg
            self.trained += run.kimg * missing
            shown = ", ".join(f"{key} {value:.4g}" for key, value in found.items())
            left = ""
            if self.trained:
                minutes = (time.perf_counter() - self._started) / self.trained / 60
                left = f" (about {minutes * max(self.total[1] - self.kimg, 0):.0f} min to go)"
            print(f"[{self.number}/{self.total[0]}] {run.name}: {shown}{left}", flush=True)
        return found

    def _note(self, run: Run) -> dict[str, Any]:
        """What a run was made of: its options, and those of the runs it needs."""
        needed = [other for other in self._before if run.needs(other.name)]
        return describe(run) | {f"after {other.name}": self._note(other) for other in needed}

    def _check_note(self, run: Run, start: str, note: dict[str, Any]) -> None:
        """Refuse results that the log beside a run says were made with other options."""
        line, _ = self._logged(run, start)
        old = note if line is None else _mapping(line)
        keys = sorted(k for k in old.keys() | note.keys() if old.get(k) != note.get(k))
        if keys:
            raise InputError(
                f"{self.out / run.name} was made with other options than those of the study "
                f"({start.split(':')[0]}; {', '.join(keys)}): remove it, or choose another --out."
            )

    def _logged(self, run: Run, start: str) -> tuple[str | None, str]:
        """The last line of a run's log with this start, without it, and what follows the line."""
        log = self._log(run)
        text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
        _, found, rest = f"\n{text}".rpartition(f"\n{start}")
        line, _, after = rest.partition("\n")
        return (line, after) if found else (None, "")

    def _check_length(self, run: Run) -> None:
        """Refuse a finished run of an arm of equal time whose length is not about right."""
        wanted = scaled(run.options, self.lengths, run.share).get("model.total_kimg")
        length = read_mapping(self.out / run.name / "run.json")["total_kimg"]
        if wanted is not None and not 0.95 < length / wanted < 1.05:
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
        with log.open("a", encoding="utf-8") as stream:
            print(start + json.dumps(note, sort_keys=True), file=stream)
        written = log.stat().st_size
        code = self._launch(words, log, run.name)
        if code:
            with log.open("rb") as stream:
                stream.seek(written)
                text = stream.read().decode("utf-8", errors="replace")
            last = (text.strip().splitlines() or ["no reason was given"])[-1]
            if not folder.exists() and log in made:  # it never began: nothing of it is left
                log.unlink()
                for path in made[1:]:
                    with contextlib.suppress(OSError):  # another run is there
                        path.rmdir()
            raise InputError(f"The run {run.name} failed. {last.removeprefix('cm-fit: error: ')}")

    def _launch(self, words: list[str], log: Path, name: str) -> int:
        """Run a program to its end, from a launcher that is idle; its exit code."""
        launcher = self._idle.pop() if self._idle else Launcher(self._environment)
        with self._lock:
            if self._stopped:
                self._idle.append(launcher)
                raise Abandoned(f"{name} goes on when the study is called again.")
            process = launcher.start(words, log)
            self._live.add(process)
        code = launcher.wait()
        with self._lock:
            self._live.remove(process)
        self._idle.append(launcher)
        return code


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
    """Options of a run but for those of W&B, and a hash of what its config says."""
    config = json.dumps(read_mapping(run.config, "config"), sort_keys=True, default=str)
    digest = hashlib.sha256(config.encode()).hexdigest()[:16]
    options = {key: run.options[key] for key in run.options if not key.startswith("wandb.")}
    return {"config": f"{run.config.name} {digest}"} | options


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

    Raises:
        InputError: If ``eval.json`` there is damaged.
    """
    path = folder / "eval.json"
    record = read_mapping(path)
    check_form(record, RESULTS, str(path))
    found: dict[str, list[float]] = {}
    for row in record["results"]:
        key = f"{name}/{row['ema']}/{row['sampling']}{guidance_words(row)}"
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
