"""Frechet distance during training, by number of network calls and EMA profile."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import torch

from cm_lightning.callbacks.ema import EMACallback, find_ema
from cm_lightning.callbacks.step import (
    StepCallback,
    check_data,
    check_interval,
    check_reach,
    due,
    log_metrics,
)
from cm_lightning.evaluation import (
    FeatureExtractor,
    Inception,
    count_nonfinite,
    load_statistics,
    reference_name,
    reference_statistics,
    to_uint8,
)
from cm_lightning.loggers import say
from cm_lightning.sampling import (
    DEFAULT_SAMPLERS,
    Sampler,
    check_samplers,
    draw_images,
    draw_labels,
    evaluating,
)
from cm_lightning.types import Denoiser, InputError

if TYPE_CHECKING:
    from cm_lightning.evaluation.frechet import FrechetDistance

__all__ = ["FIDCallback", "metric_name"]


def metric_name(base: str, n: int) -> str:
    """Name of a Frechet distance over ``n`` samples: ``fid`` is kept for 50,000, the convention.

    Fewer samples bias the distance upwards, so the number is part of the name: ``fid10k``.
    """
    if n == 50_000:
        return base
    return f"{base}{n // 1000}k" if n % 1000 == 0 else f"{base}{n}"


class FIDCallback(StepCallback):
    """Measure the Frechet distance of samples to the training images.

    Every rank draws its share of numbered images (noise by image number), quantises them to uint8
    as EDM does, and the sums of features are reduced over ranks in float64, so the value does not
    depend on the number of devices. All samplers and profiles see the same noise. The key
    ``fid10k/ema_0.9999/nfe1`` reads: Frechet distance over Inception features of 10,000 samples,
    profile, network calls; with other features it starts with their name instead of ``fid``.

    Args:
        features: Feature extractor; ``None`` for Inception, which gives FID as published.
        samplers: How to draw; their names, as ``nfe2``, must differ.
        every_kimg: Interval in thousands of images, ``None`` to measure at the end alone.
        n: Number of samples, >= 2.
        batch: Images per network call and per pass of the extractor.
        profiles: EMA profiles to measure (``"live"`` for the weights being trained), ``None`` for
            all tracked ones; an empty list switches the callback off.
        reference: ``"auto"`` for statistics of the training images, kept in the data's cache, or
            the path of an EDM/ADM ``.npz`` with ``mu`` and ``sigma`` or of an EDM2 ``.pkl``.
        accept_reference: Whether to take a reference file that says it was made from other images
            or features.
        seed: Seed of the noise, the same at every evaluation.
        required: Whether a missing feature extractor stops the run; otherwise training goes on
            without this metric, after a clear message.
        max_minutes: Bound on an evaluation: once it is passed, profiles and samplers still to come
            are left out this time, which is said and logged as missing values. ``None`` for none.
            What is measured then depends on the speed of the machine; the run itself does not.

    Raises:
        InputError: If an argument is outside its range.
    """

    def __init__(
        self,
        features: FeatureExtractor | None = None,
        samplers: Sequence[Sampler] = DEFAULT_SAMPLERS,
        every_kimg: float | None = 1000.0,
        n: int = 10_000,
        batch: int = 256,
        profiles: Sequence[str] | None = None,
        reference: str = "auto",
        seed: int = 0,
        required: bool = False,
        accept_reference: bool = False,
        max_minutes: float | None = None,
    ) -> None:
        check_samplers(samplers)
        check_interval("fid", every_kimg)
        if n < 2:
            raise InputError(f"fid.n must be 2 or more, got {n}.")
        if max_minutes is not None and not max_minutes > 0:
            raise InputError(f"fid.max_minutes must be positive or null, got {max_minutes}.")
        if batch < 1:
            raise InputError(f"fid.batch must be 1 or more, got {batch}.")
        self.features = Inception() if features is None else features
        self.samplers = list(samplers)
        self.every_kimg = every_kimg
        self.n = n
        self.batch = batch
        self.profiles = profiles
        self.reference = reference
        self.seed = seed
        self.required = required
        self.accept_reference = accept_reference
        self.max_minutes = max_minutes
        self.enabled = profiles is None or len(profiles) > 0
        self.best: dict[str, tuple[float, float]] = {}
        """Lowest value of each metric and the kimg at which it was reached."""
        self.last: dict[str, float] = {}
        """Values of the last evaluation."""
        self._aside: dict[str, Any] = {}
        self._metric: FrechetDistance | None = None
        self._trial = False

    @property
    def identity(self) -> dict[str, Any]:
        """What values depend on besides the model and the data; empty if nothing is measured."""
        if not self.enabled:
            return {}
        return {
            "features": self.features.name,
            "features_sha256": self.features.fingerprint,
            "n": self.n,
            "reference": reference_name(self.reference),
            "seed": self.seed,
        }

    @property
    def _measured(self) -> dict[str, Any]:
        return self.identity | {"samplers": [str(sampler) for sampler in self.samplers]}

    def make_trial(self) -> None:
        """Turn later evaluations into a test of the path: a few images, nothing cached."""
        self._trial = True
        self.n, self.every_kimg, self.samplers = min(self.n, 16), None, self.samplers[:1]

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """Check profiles and the reference, and load the extractor, before training starts."""
        if not self.enabled:
            return
        check_data("FIDCallback", trainer)
        check_reach("fid", self.samplers, pl_module)
        self._check_profiles(find_ema(trainer))
        if self.reference != "auto":
            load_statistics(self.reference, metric=self.features.metric)
        error = InputError("another process cannot load its weights")
        try:
            self.features.load()
            missing = False
        except InputError as found:
            error, missing = found, True
            if not trainer.is_global_zero:
                print(f"Process {trainer.global_rank}: {error}", file=sys.stderr, flush=True)
        if trainer.strategy.reduce_boolean_decision(missing, all=False):
            if self.required:
                raise error
            self.enabled = False
            say(f"No {self.features.metric} in this run: {error}")
            return
        if self.reference != "auto" and not self.accept_reference:
            data = trainer.datamodule  # type: ignore[attr-defined]
            load_statistics(
                self.reference,
                data=data.fingerprint,
                features=self.features.fingerprint,
                metric=self.features.metric,
            )

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Begin anew in another run than the callback or the checkpoint comes from."""
        self._metric = None
        if not trainer.ckpt_path and pl_module.nimg == 0:
            self.best, self.last = {}, {}
        if trainer.ckpt_path:
            run = Path(trainer.ckpt_path).absolute().parent.parent.resolve()
            if run != Path(trainer.default_root_dir).resolve():
                self.best, self.last = {}, {}

    def metrics(self, ema: EMACallback) -> list[str]:
        """Names of all values it measures."""
        base = metric_name(self.features.metric, self.n)
        names = ema.names if self.profiles is None else self.profiles
        return [f"{base}/{name}/{sampler.name}" for name in names for sampler in self.samplers]

    def _check_profiles(self, ema: EMACallback) -> None:
        for name in self.profiles or []:
            if name != "live" and name not in ema.names:
                raise InputError(
                    f"fid.profiles names '{name}', but the EMA callback tracks {ema.names}."
                )

    def on_step(self, trainer: L.Trainer, pl_module: Any, before: int, after: int) -> None:
        """Measure when it is due."""
        interval = self.every_kimg if self.every_kimg is not None else float("inf")
        measure = self.enabled and not self._trial
        if measure and due(before, after, interval, pl_module.total_nimg):
            with self.pause():
                self.evaluate(trainer, pl_module)

    def evaluate(self, trainer: L.Trainer, pl_module: Any) -> dict[str, float]:
        """Measure every profile and sampler now, log and return the values."""
        start = time.perf_counter()
        ema = find_ema(trainer)
        data = trainer.datamodule  # type: ignore[attr-defined]
        metric = self._prepare(trainer, pl_module.device)
        values: dict[str, float] = {}
        base = metric_name(self.features.metric, self.n)
        left_out = []
        for name in ema.names if self.profiles is None else self.profiles:
            with ema.lend(pl_module.denoiser, name), evaluating(pl_module.denoiser):
                for sampler in self.samplers:
                    key = f"{base}/{name}/{sampler.name}"
                    if values and self._too_late(trainer, start):
                        left_out.append(key)
                        continue
                    values[key] = self._distance(trainer, metric, pl_module.denoiser, sampler, data)
        if left_out:
            say(
                f"The evaluation took longer than fid.max_minutes {self.max_minutes:g}: left out "
                f"{', '.join(left_out)}. Fewer samples (fid.n), profiles or samplers take less."
            )
        kimg = pl_module.nimg / 1000
        for key, value in values.items():
            if value < self.best.get(key, (float("inf"), 0.0))[0]:
                self.best[key] = (value, kimg)
        self.last = values
        seconds = time.perf_counter() - start
        log_metrics(trainer, pl_module.nimg, {**values, f"time/{base}_seconds": seconds})
        trainer.callback_metrics.update({key: torch.tensor(value) for key, value in values.items()})
        return values

    def _too_late(self, trainer: L.Trainer, start: float) -> bool:
        """Whether the time is over on any rank; all of them get the same answer."""
        if self.max_minutes is None:
            return False
        late = time.perf_counter() - start > 60 * self.max_minutes
        return bool(trainer.strategy.reduce_boolean_decision(late, all=False))

    def _prepare(self, trainer: L.Trainer, device: torch.device) -> FrechetDistance:
        if self._metric is None:
            from cm_lightning.evaluation.frechet import FrechetDistance

            data = trainer.datamodule  # type: ignore[attr-defined]
            self.features.to(device)
            metric = FrechetDistance(self.features).to(device)
            if self.reference == "auto":
                mu, sigma, n = reference_statistics(
                    data.store.images[:64] if self._trial else data.store.images,
                    data.fingerprint,
                    self.features,
                    cache=None if self._trial else data.cache_dir,
                    device=device,
                    batch=self.batch,
                    rank=trainer.global_rank,
                    world=trainer.world_size,
                )
            else:
                mu, sigma = load_statistics(self.reference, metric=self.features.metric)
                n = 50_000
            metric.prime(mu, sigma, n)
            self._metric = metric
        return self._metric

    def _distance(
        self,
        trainer: L.Trainer,
        metric: FrechetDistance,
        denoiser: Denoiser,
        sampler: Sampler,
        data: Any,
    ) -> float:
        while True:
            metric.reset()
            try:
                self._update(trainer, metric, denoiser, sampler, data)
            except torch.OutOfMemoryError:
                if self.batch == 1:
                    raise
                self.batch //= 2  # numbered images do not depend on it
                say(f"Too little memory for an evaluation: fid.batch is {self.batch} from now on.")
            else:
                return float(metric.compute())

    def _update(
        self,
        trainer: L.Trainer,
        metric: FrechetDistance,
        denoiser: Denoiser,
        sampler: Sampler,
        data: Any,
    ) -> None:
        """Show the metric all samples of this process."""
        index = range(trainer.global_rank, self.n, trainer.world_size)
        labels = draw_labels(data.store.labels if data.num_classes else None, index)
        bad = 0
        for images in draw_images(
            denoiser,
            sampler,
            index,
            labels,
            seed=self.seed,
            shape=data.image_shape,
            batch=self.batch,
            device=next(denoiser.parameters()).device,
        ):
            bad += count_nonfinite(images)
            metric.update(to_uint8(images), real=False)
        bad = int(trainer.strategy.reduce(torch.tensor(bad, device=metric.device), reduce_op="sum"))
        if bad:
            say(f"{bad} of {self.n} samples ({sampler.name}) are not finite.")

    def state_dict(self) -> dict[str, Any]:
        """Last values, and the best so far."""
        if self._aside:
            return self._aside  # of starts that measured, for those that will again
        best = {key: list(value) for key, value in self.best.items()}
        return {"best": best, "last": self.last, "measured": self._measured}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore them, if they were measured as this callback measures."""
        if state_dict.get("measured") != self._measured:
            self._aside = {} if self.enabled else dict(state_dict)
            return
        self.last = dict(state_dict["last"])
        self.best = {key: (value[0], value[1]) for key, value in state_dict["best"].items()}
