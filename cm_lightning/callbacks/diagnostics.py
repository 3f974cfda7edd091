"""Numbers that tell how training goes, averaged over windows on the clock in images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, cast

import lightning as L
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cm_lightning.callbacks.step import (
    StepCallback,
    check_interval,
    due,
    log_metrics,
    step_of,
    training_clock,
)
from cm_lightning.callbacks.teacher import TeacherDistance
from cm_lightning.evaluation import diagnostics_figure, read_metrics, save_figure
from cm_lightning.loggers import KimgWandbLogger, say, tolerated
from cm_lightning.objective import ReferenceMean
from cm_lightning.types import Batch, InputError, LossOutput, expand

__all__ = ["DiagnosticsCallback"]

HISTOGRAM_BINS, HISTOGRAM_RANGE = 48, (-6.0, 6.0)
"""Bins and range of log10 of the per-image loss; values outside go to the end bins."""


class DiagnosticsCallback(StepCallback):
    """Log means over windows of ``every_kimg``.

    Keys: ``loss`` and ``distance`` (over all images), ``loss/nonfinite`` (images of a window with
    a loss that is not finite; they count as 0 in the means), the same per bin of the noise level t
    (``loss_by_sigma/0.1-0.5``), ``ratio/r_over_t``, ``gradient/norm`` and ``gradient/nonfinite``
    (steps so far with a non-finite gradient), ``schedule/learning_rate``,
    ``schedule/stage``, ``schedule/levels`` (size of the grid), ``schedule/target_rate``,
    ``speed/images_per_second`` (evaluations, grids, checkpoints and these diagnostics left out) and
    ``memory/peak_gb`` (of the device, or of the process on CPU).
    Regimes may add values per bin: SCT the effective sample size of its weights (``ess``), the
    ``largest_weight``, the share of ``skipped`` rows and the ``discrepancy`` of target and sample;
    couplings other than Independent the ``transport_cost`` of their pairs, that of the pairs as
    they came (``independent_cost``) and, if they generate images, the share of ``generated`` rows.
    Once per window ``exact_rows`` images of the last batch are noised to levels spread over the
    bins, and the regime's estimate of E[x0 | x_t] is compared with the exact one of the training
    set (of the class): ``target_variance`` is its mean squared error per pixel (its variance,
    where the estimate is unbiased), ``sample_variance`` that of the image itself, CT's and ECT's.
    Under a coupling that is not ``independent`` both are left out.
    Runs with a teacher, or with a diffusion model they started from, log the distance of their map
    from the endpoint of its ODE on fixed noise, ``teacher/ode_distance/<profile>``
    (:class:`~cm_lightning.callbacks.teacher.TeacherDistance`).
    At the end of the run everything per bin is drawn into ``diagnostics.png``, for W&B too.
    W&B also gets a histogram of the per-image loss, ``loss_histogram`` over log10.
    Sums stay on the device until a window ends and are stored in checkpoints, so a resumed run
    logs what an uninterrupted one does (speed and memory apart). A window whose distance is far
    above those before it is told in one line.

    Args:
        every_kimg: Length of a window in thousands of images.
        edges: Increasing bin edges of the noise level; values outside go to the end bins.
        exact_rows: Images per window (over all devices) on which the target's variance is
            measured, 0 for none. It is left out for unconditional data beyond 2 GiB.
        teacher_rows: Noises for the distance from the teacher's ODE, 0 for none.
        teacher_steps: Noise levels >= 2 of Heun's method on that ODE.
        picture: Whether to draw ``diagnostics.png``.
        spike: How many times the median of the last ten windows a window's distance must be to be
            called a spike, > 1; ``None`` for no such line.

    Raises:
        InputError: If an argument is outside its range.
    """

    def __init__(
        self,
        every_kimg: float = 50.0,
        edges: Sequence[float] = (0.1, 0.5, 2.0, 10.0),
        exact_rows: int = 64,
        teacher_rows: int = 64,
        teacher_steps: int = 18,
        picture: bool = True,
        spike: float | None = 5.0,
    ) -> None:
        check_interval("diagnostics", every_kimg)
        if exact_rows < 0:
            raise InputError(f"diagnostics.exact_rows must be 0 or more, got {exact_rows}.")
        if list(edges) != sorted(set(edges)) or not edges:
            raise InputError(f"diagnostics.edges must increase, got {list(edges)}.")
        if spike is not None and not spike > 1:
            raise InputError(f"diagnostics.spike must be greater than 1 or null, got {spike}.")
        self.every_kimg = every_kimg
        self.spike = spike
        self._recent: list[float] = []
        self.loss: float | None = None
        """Mean loss of the last window, ``None`` before the first."""
        self.edges = list(edges)
        self.exact_rows = exact_rows
        self.teacher = TeacherDistance(teacher_rows, teacher_steps)
        self.picture = picture
        self._sums: Tensor | None = None
        self._strategy: Any = None
        self._histogram = torch.zeros(HISTOGRAM_BINS, dtype=torch.float64)
        self._notes: dict[str, Tensor] = {}
        self._edges = torch.tensor(self.edges, dtype=torch.float64)
        self._clock = 0.0
        self._counted = 0
        self._batch: Batch | None = None

    @property
    def bins(self) -> list[str]:
        """Names of the noise-level bins."""
        texts = [f"{edge:g}" for edge in self.edges]
        inner = [f"{a}-{b}" for a, b in pairwise(texts)]
        return [f"below_{texts[0]}", *inner, f"above_{texts[-1]}"]

    def on_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Start the clock; sums of a resumed window go back to the device."""
        if self._sums is None:
            self._sums = torch.zeros(len(self.bins) + 1, 5, dtype=torch.float64)
        self._strategy = trainer.strategy
        first = float(trainer.is_global_zero)  # it goes on with the sums of all ranks
        self._sums = self._sums.to(pl_module.device) * first
        self._histogram = self._histogram.to(pl_module.device) * first
        self._notes = {n: v.to(pl_module.device) * first for n, v in self._notes.items()}
        self._edges = torch.tensor(self.edges, dtype=torch.float64, device=pl_module.device)
        self._clock, self._counted = training_clock(trainer), pl_module.nimg

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep the batch in reach of :meth:`on_step`."""
        self._batch = batch
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self._batch = None

    def on_micro_batch(self, trainer: L.Trainer, pl_module: Any, outputs: Any) -> None:
        """Add a micro-batch: per bin, and in the last row gradient norm and its count."""
        output: LossOutput = outputs["output"]
        assert self._sums is not None
        bins = torch.bucketize(output.t, self._edges, right=True)
        ones = torch.ones_like(output.t)
        loss = output.loss.detach()
        finite = loss.isfinite()
        distance = torch.where(finite, output.distance, 0)
        columns = (ones, torch.where(finite, loss, 0), distance, output.r / output.t, ~finite)
        values = torch.stack([column.double() for column in columns], 1)
        self._sums.index_add_(0, bins, values.nan_to_num(posinf=0.0))
        low, high = HISTOGRAM_RANGE
        place = (loss.double().clamp_min(1e-30).log10() - low) / (high - low) * HISTOGRAM_BINS
        place = place.nan_to_num(HISTOGRAM_BINS - 1).clamp(0, HISTOGRAM_BINS - 1).long()
        self._histogram.index_add_(0, place, ones.double())
        for name, note in output.notes.items():
            if name not in self._notes:
                self._notes[name] = torch.zeros(len(self.bins), dtype=torch.float64)
            self._notes[name] = self._notes[name].to(note.device)
            self._notes[name].index_add_(0, bins, note.detach().double())

    def on_step(self, trainer: L.Trainer, pl_module: Any, before: int, after: int) -> None:
        """Add the gradient norm; at the end of a window log and start anew."""
        assert self._sums is not None
        if trainer.is_global_zero:  # the sums of all ranks are added, and a step is one
            self._sums[-1, 0] += 1
            self._sums[-1, 1] += pl_module.gradient_stats.norm.double().nan_to_num()
        if due(before, after, self.every_kimg, pl_module.total_nimg):
            self._log(trainer, pl_module)

    def _log(self, trainer: L.Trainer, pl_module: Any) -> None:
        assert self._sums is not None
        sums, histogram, totals = self._totals()
        now = training_clock(trainer)
        self._sums.zero_()
        self._histogram.zero_()
        counts, losses, distances, ratios, nonfinite = sums[:-1].T
        total = counts.sum().clamp_min(1)
        finite = counts - nonfinite  # means are over these, NaN where there are none
        metrics = {
            "loss": float(losses.sum() / finite.sum()),
            "distance": float(distances.sum() / finite.sum()),
            "loss/nonfinite": float(nonfinite.sum()),
            "ratio/r_over_t": float(ratios.sum() / total),
            "gradient/norm": float(sums[-1, 1] / sums[-1, 0].clamp_min(1)),
            "gradient/nonfinite": float(pl_module.gradient_stats.nonfinite_steps),
            "schedule/learning_rate": float(trainer.optimizers[0].param_groups[0]["lr"]),
        }
        metrics |= {f"schedule/{name}": value for name, value in pl_module.schedule.items()}
        for name, count, loss, distance in zip(self.bins, finite, losses, distances, strict=True):
            if count:
                metrics[f"loss_by_sigma/{name}"] = float(loss / count)
                metrics[f"distance_by_sigma/{name}"] = float(distance / count)
        for note, values in totals.items():
            self._notes[note].zero_()
            for name, count, value in zip(self.bins, counts, values, strict=True):
                if count:
                    metrics[f"{note}/{name}"] = float(value / count)
        with torch.compiler.set_stance("eager_on_recompile"):  # their batches have other sizes
            metrics |= self._target_variance(trainer, pl_module) | self.teacher(trainer, pl_module)
        images = pl_module.nimg - self._counted
        metrics["speed/images_per_second"] = images / max(now - self._clock, 1e-9)
        metrics["memory/peak_gb"] = peak_memory(pl_module.device) / 2**30
        self.loss = metrics["loss"]
        self._tell_spike(metrics["distance"], pl_module)
        log_metrics(trainer, pl_module.nimg, metrics)
        edges = torch.linspace(*HISTOGRAM_RANGE, HISTOGRAM_BINS + 1).tolist()
        for logger in trainer.loggers:
            if isinstance(logger, KimgWandbLogger):
                logger.log_histogram(
                    "loss_histogram", histogram.tolist(), edges, pl_module.nimg, step_of(trainer)
                )
        self._clock, self._counted = training_clock(trainer), pl_module.nimg

    def _totals(self) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Sums, histogram and notes of the window over all ranks, on the CPU."""
        assert self._sums is not None

        def total(values: Tensor) -> Tensor:
            if self._strategy is None:
                return values.cpu()
            return cast("Tensor", self._strategy.reduce(values.clone(), reduce_op="sum")).cpu()

        notes = {name: total(values) for name, values in sorted(self._notes.items())}
        return total(self._sums), total(self._histogram), notes

    def _tell_spike(self, distance: float, pl_module: Any) -> None:
        if self.spike is None or not math.isfinite(distance):
            return
        if len(self._recent) >= 3 and distance > self.spike * median(self._recent):
            say(
                f"Spike: the mean distance of the last window, {distance:.3g}, is "
                f"{distance / median(self._recent):.1f} times the median of the windows before "
                f"({pl_module.nimg / 1000:g} kimg)."
            )
        self._recent = [*self._recent[-9:], distance]

    def _target_variance(self, trainer: L.Trainer, pl_module: Any) -> dict[str, float]:
        """Errors of the estimate of E[x0 | x_t] and of x0 against the exact one, by bin."""
        objective = pl_module.objective
        if objective is None or not objective.coupling.independent:
            return {}
        posterior = getattr(objective.solver, "posterior", None)
        n = -(-self.exact_rows // trainer.world_size)
        data = getattr(trainer, "datamodule", None)
        if posterior is None or data is None or self._batch is None or not n:
            return {}
        batch = pl_module.complete(self._batch)._replace(notes=None)
        everything = data.all_references(batch)
        if everything is None:
            return {}
        words = (pl_module.seed, pl_module.nimg, trainer.global_rank, 3)
        generator = torch.Generator().manual_seed(
            int(np.random.SeedSequence(words).generate_state(1)[0])
        )
        batch = first_rows(batch, n)
        n = len(batch.x0)
        bins = torch.arange(n) % len(self.bins)
        limits = [self.edges[0] / 5, *self.edges, self.edges[-1] * 5]
        logs = torch.tensor(limits, dtype=torch.float64).log()
        u = torch.rand(n, dtype=torch.float64, generator=generator)
        t = (logs[bins] + u * (logs[bins + 1] - logs[bins])).exp().to(batch.x0.device)
        z = torch.randn(batch.x0.shape, generator=generator).to(batch.x0)
        x_t = batch.x0 + expand(t, batch.x0) * z
        with torch.no_grad():
            exact = ReferenceMean(skip=None)(x_t, t, batch._replace(references=everything))
            errors = [
                (mean - exact).flatten(1).square().mean(1).double()
                for mean in (posterior(x_t, t, batch), batch.x0)
            ]
        sums = torch.zeros(len(self.bins), 3, dtype=torch.float64, device=t.device)
        values = torch.stack([torch.ones_like(t), *errors], 1)
        sums.index_add_(0, bins.to(t.device), values)
        counts, target, sample = trainer.strategy.reduce(sums, reduce_op="sum").cpu().T
        found = {}
        for name, count, a, b in zip(self.bins, counts, target, sample, strict=True):
            if count:
                found[f"target_variance/{name}"] = float(a / count)
                found[f"sample_variance/{name}"] = float(b / count)
        return found

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Draw ``diagnostics.png``."""
        path = Path(trainer.default_root_dir) / "metrics.csv"
        if not self.picture or not trainer.is_global_zero or not path.is_file():
            return
        figure = diagnostics_figure(read_metrics(path), path.parent.name)
        if figure is not None:
            with tolerated("diagnostics.png"):
                save_figure(figure, path.with_name("diagnostics.png"))
                picture = np.asarray(Image.open(path.with_name("diagnostics.png")).convert("RGB"))
                for logger in trainer.loggers:
                    if isinstance(logger, KimgWandbLogger):
                        name, step = "diagnostics/over_training", step_of(trainer)
                        logger.log_picture(name, picture, pl_module.nimg, step)

    def state_dict(self) -> dict[str, Any]:
        """Sums of the window under way over all ranks, which save together."""
        sums, histogram, notes = self._totals()
        window = {"sums": sums, "histogram": histogram, "notes": notes, "recent": self._recent}
        return window | {"edges": list(self.edges)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the window under way; with other edges it begins anew."""
        if state_dict.get("edges") != list(self.edges):
            return
        self._sums, self._histogram = state_dict["sums"], state_dict["histogram"]
        self._notes, self._recent = dict(state_dict["notes"]), list(state_dict["recent"])


def first_rows(batch: Batch, n: int) -> Batch:
    """The first ``n`` rows of a batch, with all its references."""
    references = batch.references
    if references is not None:
        nearest = None if references.nearest is None else references.nearest[:n]
        references = references._replace(nearest=nearest, layout=None)
    labels = None if batch.labels is None else batch.labels[:n]
    return Batch(batch.x0[:n], labels, batch.index[:n], references)


def peak_memory(device: torch.device) -> float:
    """Peak memory in bytes: allocated on a CUDA device, resident for the process on CPU."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak if sys.platform == "darwin" else peak * 1024)
