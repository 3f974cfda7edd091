"""Training steps as ``cm-fit`` takes them, against a step of the published kind."""

from __future__ import annotations

import argparse
import copy
import gc
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import lightning as L
import torch

from cm_lightning.bench.common import (
    NETWORKS,
    Benchmark,
    add_device,
    build_network,
    forward_flops,
    image_shape,
    matmul_rate,
    network_line,
    ratio,
    spread,
    wait,
)
from cm_lightning.bench.published import PublishedStep
from cm_lightning.bench.store import make_store
from cm_lightning.callbacks import DiagnosticsCallback, EMACallback, PerformanceCallback
from cm_lightning.cli.fit import quiet
from cm_lightning.cli.study_report import table
from cm_lightning.data import ImageDataModule, Store
from cm_lightning.networks import ConsistencyPrecond, Precond
from cm_lightning.objective import L2, ECTMapping
from cm_lightning.regimes import CD, CT, ECT, GC, ICT, SCT, ConsistencyModule, Diffusion
from cm_lightning.regimes.base import radam
from cm_lightning.types import Denoiser
from cm_lightning.weights import Pretrained
from cm_lightning.weights.portable import Loaded

__all__ = ["BENCHMARKS", "Settings", "time_steps"]

KIMG = 10_000.0
"""Where ECT's schedule stands: stage 3 of 8, where targets are evaluated for nearly all pairs."""

PASSES = {"diffusion": 3, "ect": 4, "sct": 4, "cd": 6, "ict": 4, "ct": 4, "gc": 5}
"""Forward passes' worth of operations per step; a backward pass counts as two."""


@dataclass(frozen=True)
class Settings:
    """How our side runs.

    Attributes:
        regime: A key of :data:`PASSES`.
        precision: The trainer's.
        compile: Whether the backbone is compiled.
        channels_last: As in :class:`~cm_lightning.callbacks.PerformanceCallback`.
        tf32: Likewise.
        checkpointing: Likewise.
    """

    regime: str = "ect"
    precision: str = "32-true"
    compile: bool = False
    channels_last: bool | None = None
    tf32: bool = False
    checkpointing: bool = False


@dataclass(frozen=True)
class GivenTeacher(Pretrained):
    """A teacher that is there already, of random weights: its steps take as long as others."""

    network: Denoiser | None = None

    def load(self) -> Loaded:
        """The network."""
        assert self.network is not None
        return Loaded(self.network, {"regime": "Diffusion"}, {})


def build_regime(name: str, network: Denoiser, batch: int) -> ConsistencyModule:
    """A regime around a network, in the middle of its schedule.

    Args:
        name: A key of :data:`PASSES`.
        network: The network.
        batch: Images per step, which divide where the schedule stands.
    """
    given = network
    if name in ("cd", "ct", "ict", "gc"):
        assert isinstance(network, Precond)
        network = ConsistencyPrecond(network.backbone)
    makers: dict[str, Callable[[Denoiser], ConsistencyModule]] = {
        "diffusion": lambda n: Diffusion(n, 25600, optimizer=radam),
        "ect": lambda n: ECT(n, 25600, discretization=ECTMapping()),
        "sct": lambda n: SCT(n, 25600, discretization=ECTMapping(), distance=L2()),
        "cd": lambda n: CD(
            n, GivenTeacher(".", network=copy.deepcopy(given)), 25600, distance=L2()
        ),
        "ict": lambda n: ICT(n, 25600),
        "ct": lambda n: CT(n, 25600, distance=L2()),
        "gc": lambda n: GC(n, 25600),
    }
    module = makers[name](network)
    module.nimg = round(1000 * KIMG) // batch * batch
    return module


class _Turns(L.Callback):
    """Times a training loop from one batch's end to the next, the other side in between."""

    def __init__(self, other: Callable[[], object], warmup: int) -> None:
        self.other, self.warmup = other, warmup
        self.ours: list[float] = []
        self.theirs: list[float] = []
        self.peak = 0
        self._start = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        device = pl_module.device
        wait(device)
        ended = time.perf_counter()
        if device.type == "cuda":
            self.peak = torch.cuda.max_memory_allocated(device)
        self.other()
        wait(device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        now = time.perf_counter()
        if batch_idx >= self.warmup:
            self.ours.append(ended - self._start)
            self.theirs.append(now - ended)
        self._start = now


def time_steps(
    settings: Settings, network: Denoiser, options: argparse.Namespace, folder: Path
) -> tuple[list[float], list[float], int]:
    """Alternate a training loop with steps of the published kind.

    Args:
        settings: Our side.
        network: The network; each side trains its own copy.
        options: ``batch``, ``repeats``, ``device``, ``seed``, ``images``.
        folder: Folder of a store of images.

    Returns:
        Seconds of our steps, of the other side's, and the device's peak memory in bytes during one
        of ours (the other side's weights and optimizer included; 0 on a CPU).
    """
    device = torch.device(options.device)
    data = ImageDataModule(
        Store(str(folder)), options.batch, conditional=False, resident=True, seed=options.seed
    )
    module = build_regime(settings.regime, network, options.batch)
    published = PublishedStep(network.to(device), radam, ECTMapping().stage(module.nimg))
    generator = torch.Generator().manual_seed(options.seed)
    shape = (options.batch, *image_shape(network))
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    turns = _Turns(lambda: published(images), warmup=3)
    speed = PerformanceCallback(
        settings.compile, settings.channels_last, settings.tf32, settings.checkpointing
    )
    trainer = L.Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=1,
        precision=settings.precision,  # type: ignore[arg-type]
        max_epochs=-1,
        max_steps=options.repeats + turns.warmup,
        callbacks=[EMACallback(), DiagnosticsCallback(every_kimg=1e6), speed, turns],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(module, data)
    return turns.ours, turns.theirs, turns.peak


def step(options: argparse.Namespace) -> str:
    """Our training step, all of the loop included, against a step of the published kind.

    Both sides train the same network on the same number of images; ours draws batches from a
    resident store, logs, and keeps one average, the other is
    :class:`~cm_lightning.bench.published.PublishedStep` in fp32, always ECT.

    Args:
        options: ``network``, ``regimes``, ``precisions``, ``compile``, ``channels_last``,
            ``checkpointing``, ``tf32``, ``batch``, ``images``, ``repeats``, ``device``, ``seed``.

    Returns:
        A Markdown table: milliseconds as median (smallest-largest), the median ratio of
        neighbouring turns, images and operations per second, and their share of a matrix product's.
        Each row goes to the standard error as soon as it is known: compiling may take minutes.
    """
    device = torch.device(options.device)
    kinds = {"32-true": torch.float32, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
    rows = []
    quiet()
    with tempfile.TemporaryDirectory() as place:
        torch.manual_seed(options.seed)
        network = build_network(options.network)
        flops, line = forward_flops(network), network_line(network, options.batch, "fp32 weights")
        folder, shape = Path(place) / "store", image_shape(network)
        make_store(folder, (max(options.images, options.batch), *shape), 10)
        for precision in options.precisions:
            rate = matmul_rate(device, kinds[precision], tf32=options.tf32)
            for compile in sorted({word == "yes" for word in options.compile}):
                for regime in options.regimes:
                    settings = Settings(
                        regime,
                        precision,
                        compile,
                        options.channels_last,
                        options.tf32,
                        options.checkpointing,
                    )
                    network = build_network(options.network)
                    gc.collect()  # what a row without memory left behind is no part of the next
                    torch.cuda.empty_cache()
                    try:
                        ours, theirs, peak = time_steps(settings, network, options, folder)
                    except torch.OutOfMemoryError:
                        row = [regime, precision, "yes" if compile else "no", "out of memory"]
                        rows.append(row + [""] * 6)
                        print(" | ".join(row), file=sys.stderr, flush=True)
                        continue
                    done = flops * PASSES[regime] * options.batch / median(ours)
                    rows.append(
                        [
                            regime,
                            precision,
                            "yes" if compile else "no",
                            spread(ours),
                            spread(theirs),
                            f"{ratio(theirs, ours):.3f}",
                            f"{options.batch / median(ours):,.1f}",
                            f"{peak / 2**30:.1f} GiB" if peak else "",
                            f"{done / 1e12:.3g}",
                            f"{100 * done / rate:.0f} %",
                        ]
                    )
                    print(" | ".join(rows[-1]), file=sys.stderr, flush=True)
    head = [
        "regime",
        "precision",
        "compiled",
        "ours, ms",
        "published kind, ms",
        "ratio",
        "images/s",
        "peak memory",
        "TFLOP/s",
        "of a matrix product",
    ]
    title = f"{options.network}: {line}, {flops / 1e9:.3g} GFLOP per image and forward pass"
    return f"{title}\n\n{table(head, rows)}"


def _options(add: Callable[..., Any]) -> None:
    add("--network", choices=NETWORKS, default="small")
    add("--batch", type=int, default=64)
    add("--regimes", nargs="+", choices=list(PASSES), default=["ect", "sct"])
    add(
        "--precisions",
        nargs="+",
        choices=("32-true", "bf16-mixed", "16-mixed"),
        default=["32-true"],
    )
    add("--compile", nargs="+", choices=("no", "yes"), default=["no"])
    add("--channels_last", action=argparse.BooleanOptionalAction, help="[on a GPU]")
    add("--tf32", action="store_true")
    add("--checkpointing", action="store_true")
    add("--images", type=int, default=1797, help="images of the store, and references of SCT")
    add_device(add, repeats=20)


BENCHMARKS = [Benchmark("step", "a training step against the published kind", _options, step)]
