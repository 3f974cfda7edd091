"""Where numbers go: a CSV file always, Weights & Biases on request."""

from __future__ import annotations

import configparser
import contextlib
import csv
import io
import netrc
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import numpy as np
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from cm_lightning.dashboard import panel
from cm_lightning.files import write_text
from cm_lightning.types import InputError

__all__ = ["KimgWandbLogger", "MetricsCSV", "WandbOptions", "say", "tolerated", "wandb_logger"]


class MetricsCSV(Logger):
    """One ``metrics.csv`` per run directory, also across restarts.

    Lightning's own CSV logger deletes the earlier rows when a run is resumed. Each row holds the
    numbers logged together; the first two columns are ``kimg`` and ``step``. A resumed run drops
    the rows after the checkpoint it continues from, so no row is missing or doubled. Numbers that
    come without ``kimg``, from callbacks of Lightning, get that of the module.

    Args:
        run_dir: Directory of the run.
    """

    def __init__(self, run_dir: str | Path) -> None:
        super().__init__()
        self.path = Path(run_dir) / "metrics.csv"
        self._clock: Callable[[], int] = int
        self._columns: list[str] = []
        self._waiting: list[dict[str, str]] = []

    @property
    def name(self) -> str:
        """Name of the run directory."""
        return self.path.parent.name

    @property
    def version(self) -> str:
        """Empty: there is one file per run."""
        return ""

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the run directory holds the config."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append a row; new columns are added at the right.

        A row that cannot be written, on a full disk, waits for the next one.
        """
        kimg = metrics.get("kimg", self._clock() / 1000)
        row = {"kimg": f"{kimg:.12g}", "step": str(step)}
        row |= {key: f"{value:.8g}" for key, value in metrics.items() if key != "kimg"}
        self._waiting.append(row)
        with tolerated(str(self.path)):
            self._columns = self._columns or self._read()[0]
            new = [key for row in self._waiting for key in row if key not in self._columns]
            if new:
                rows = self._read()[1]
                self._columns += dict.fromkeys(new)
                self._write([*rows, *self._waiting])
            else:
                self._append(self._waiting)
            self._waiting = []

    def follow(self, clock: Callable[[], int]) -> None:
        """Go on where a training is: drop the rows after it.

        Args:
            clock: Gives the images it has seen.
        """
        self._clock = clock
        self.resume_at(clock())

    @rank_zero_only
    def resume_at(self, nimg: int) -> None:
        """Drop the rows logged after ``nimg`` images, and what is left of a torn last one."""
        self._columns, rows = self._read()
        self._waiting = []
        if self.path.exists():
            self._write([row for row in rows if float(row["kimg"]) <= nimg / 1000])

    def last_step(self) -> int:
        """Number of the last optimizer step that was logged, -1 if there is none."""
        return max((int(row["step"]) for row in self._read()[1]), default=-1)

    def _read(self) -> tuple[list[str], list[dict[str, str]]]:
        """Columns, and the rows that were written whole."""
        if not self.path.exists():
            return [], []
        with self.path.open(encoding="utf-8", newline="") as file:
            text = file.read()
        reader = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1], newline=""))
        rows = list(reader)
        return list(reader.fieldnames or []), rows

    def _text(self, rows: list[dict[str, str]], header: bool) -> str:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self._columns, restval="")
        if header:
            writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()

    def _append(self, rows: list[dict[str, str]]) -> None:
        """Append rows, whole or not at all."""
        size = self.path.stat().st_size
        try:
            with self.path.open("a", encoding="utf-8", newline="") as file:
                file.write(self._text(rows, header=False))
        except OSError:
            os.truncate(self.path, size)
            raise

    def _write(self, rows: list[dict[str, str]]) -> None:
        write_text(self.path, self._text(rows, header=True))


@dataclass(frozen=True)
class WandbOptions:
    """Logging to Weights & Biases; off unless a project is named.

    Without an API key, or when the server does not answer, it works offline, says so in one line
    and never asks. Rows are numbered by optimizer step; W&B drops those it has from a start before.

    Args:
        project: Project name, ``None`` for no logging to W&B.
        entity: User or team.
        name: Display name, by default the name of the run directory.
        group: Group of runs that belong together.
        job_type: Kind of the run within its group.
        tags: Tags.
        timeout: Seconds to wait for the server, at the start and at the end of a run, > 0.

    Raises:
        InputError: If the timeout is not positive, or the project has a character that W&B
            refuses.
    """

    project: str | None = None
    entity: str | None = None
    name: str | None = None
    group: str | None = None
    job_type: str | None = None
    tags: tuple[str, ...] = ()
    timeout: float = 60.0

    def __post_init__(self) -> None:
        if not self.timeout > 0:
            raise InputError(f"wandb.timeout must be positive, got {self.timeout}.")
        refused = sorted(set("/\\#?%:").intersection(self.project or ""))
        if refused:
            raise InputError(
                f"wandb.project cannot contain {' '.join(refused)}, got {self.project}; a team is "
                "wandb.entity."
            )


_PUBLIC = ("api.wandb.ai", "api.forge.coreweave.com")
"""Names of W&B's own server; `wandb login` writes the second since version 0.31."""


def has_wandb_key(settings: Any) -> bool:
    """Whether W&B could log in without asking: a key in its settings or in the netrc file.

    Args:
        settings: W&B's, from the environment and its own files.
    """
    if settings.api_key or settings.identity_token_file:
        return True
    host = urlparse(settings.base_url).hostname or _PUBLIC[0]
    hosts = _PUBLIC if host in _PUBLIC else (host,)
    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        found = netrc.netrc(path)
        return any(found.authenticators(host) is not None for host in hosts)
    except (OSError, netrc.NetrcParseError):
        return False


@rank_zero_only
def say(message: str) -> None:
    """Print one line, on rank 0 alone."""
    print(message, flush=True)


@contextmanager
def tolerated(what: str) -> Iterator[None]:
    """Turn a failure to write something that training does not need into a line of output."""
    try:
        yield
    except OSError as error:
        say(f"{what} could not be written ({error.strerror or error}); training goes on.")


class KimgWandbLogger(WandbLogger):
    """Lightning's W&B logger: kimg as the x-axis of every chart, sections, pictures, histograms.

    Names are those of :func:`cm_lightning.dashboard.panel`.

    Args:
        sent: Last optimizer step whose rows W&B got before, -1 for none; up to it an offline run
            leaves them out. (A server drops them itself.)
        timeout: Seconds to wait for the server at the end.
        options: Arguments of Lightning's logger.
    """

    def __init__(self, sent: int = -1, timeout: float = 60.0, **options: Any) -> None:
        super().__init__(**options)
        self.sent, self.first_step, self.timeout = sent, 0, timeout
        self._clock: Callable[[], int] = int

    @property
    def experiment(self) -> Any:
        """The W&B run, started at the first use."""
        first = self._experiment is None
        run = super().experiment
        if first and hasattr(run, "define_metric"):
            run.define_metric("kimg")
            run.define_metric("*", step_metric="kimg")
            self.first_step = self.sent + 1 if run.offline else 0
        return run

    def follow(self, clock: Callable[[], int]) -> None:
        """Take ``kimg`` from a training where numbers come without.

        Args:
            clock: Gives the images it has seen.
        """
        self._clock = clock

    @rank_zero_only
    def log_best(self, best: Mapping[str, float]) -> None:
        """Add the lowest Frechet distances to the run's summary, as ``best/<panel>``."""
        self.experiment.summary.update({f"best/{panel(key)}": best[key] for key in best})

    def finish(self, code: int = 0) -> bool:
        """Close the W&B run, if one was started; returns whether the server took it in time.

        Args:
            code: Exit code of the program; W&B calls runs with another than 0 failed.
        """
        if self._experiment is None:
            return True
        closing = threading.Thread(target=self._experiment.finish, args=(code,), daemon=True)
        closing.start()
        closing.join(self.timeout)
        if closing.is_alive():
            say(
                f"W&B: the server did not answer within {self.timeout:g} s; `wandb sync --include-"
                f"online {Path(self.save_dir or '.', 'wandb')}/*run-*` sends what it did not take."
            )
        return not closing.is_alive()

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log a row under the number of its optimizer step."""
        self._log(dict(metrics), step)

    def _log(self, row: dict[str, Any], step: int | None) -> None:
        if step is None or step >= self.first_step:
            row.setdefault("kimg", self._clock() / 1000)
            self.experiment.log({panel(key): value for key, value in row.items()}, step=step)

    @rank_zero_only
    def log_picture(self, key: str, picture: np.ndarray, nimg: int, step: int) -> None:
        """Log one uint8 picture ``(H, W, C)``."""
        import wandb

        image = wandb.Image(picture.squeeze(-1) if picture.shape[-1] == 1 else picture)
        self._log({key: image, "kimg": nimg / 1000}, step)

    @rank_zero_only
    def log_histogram(
        self, key: str, counts: Sequence[float], edges: Sequence[float], nimg: int, step: int
    ) -> None:
        """Log a histogram of ``len(edges) - 1`` counts."""
        import wandb

        histogram = wandb.Histogram(np_histogram=(np.asarray(counts), np.asarray(edges)))
        self._log({key: histogram, "kimg": nimg / 1000}, step)


def check_server() -> None:
    """Check that no file of the current folder says where the user's key is sent.

    Raises:
        InputError: If W&B's settings there name a server, and the environment none.
    """
    for name in ("wandb", ".wandb"):
        path = Path(os.environ.get("WANDB_DIR") or ".", name, "settings")
        found = configparser.ConfigParser(interpolation=None)
        with contextlib.suppress(configparser.Error, OSError, UnicodeDecodeError):
            found.read(path, encoding="utf-8")
        url = found.get("default", "base_url", fallback=None)
        if url is not None and os.environ.get("WANDB_BASE_URL", "").rstrip("/") != url.rstrip("/"):
            raise InputError(
                f"{path} sends W&B's rows, and your key, to {url}: set WANDB_BASE_URL to that, or "
                "remove the line."
            )


def wandb_logger(
    options: WandbOptions, run_dir: Path, run_id: str | None, sent: int = -1
) -> KimgWandbLogger | None:
    """A W&B logger whose run has begun, or ``None`` if it is off.

    Args:
        options: The user's options.
        run_dir: Directory of the run; W&B's files go below it.
        run_id: Identity of the W&B run to continue, ``None`` for a new one.
        sent: Last optimizer step whose rows it got in the starts before the last one, -1 for none.
    """
    if options.project is None:
        return None
    import wandb

    settings = wandb.setup().settings
    mode = settings.mode
    if mode not in ("offline", "dryrun", "disabled"):
        check_server()
    later = f"`wandb sync --yes {run_dir}/wandb/offline-run-*` sends the run later"
    if mode not in ("offline", "dryrun", "disabled") and not has_wandb_key(settings):
        say(
            "W&B: no API key found (`wandb login` or WANDB_API_KEY gives one), logging offline; "
            f"{later}."
        )
        mode = "offline"
    if run_id is not None:
        sent = max(sent, MetricsCSV(run_dir).last_step())
    run_dir.mkdir(parents=True, exist_ok=True)
    while True:
        logger = KimgWandbLogger(
            sent=sent,
            timeout=options.timeout,
            project=options.project,
            entity=options.entity,
            name=options.name or run_dir.name,
            group=options.group,
            job_type=options.job_type,
            tags=list(options.tags),
            save_dir=str(run_dir),
            id=run_id,
            resume="allow",
            mode=mode,
            settings=wandb.Settings(init_timeout=options.timeout),
        )
        try:
            _ = logger.experiment  # starts it, and with it its identity
        except wandb.Error as error:
            if mode == "offline":
                raise
            reason = str(error).splitlines()[0]
            say(f"W&B: {reason}; logging offline, {later}.")
            mode = "offline"
        else:
            return logger
