"""The parts around a step: averages, batches, sampling, evaluation, start-up."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch

from cm_lightning.bench.common import (
    NETWORKS,
    Benchmark,
    add_device,
    alternate,
    build_network,
    image_shape,
    network_line,
    ratio,
    spread,
    wait,
)
from cm_lightning.bench.store import make_store
from cm_lightning.cli.data import build_features
from cm_lightning.cli.study_report import table
from cm_lightning.data import ImageDataModule, Store
from cm_lightning.ema import ConstantEMA, EMAProfile, HalfLifeEMA, PowerEMA, update_average
from cm_lightning.evaluation import to_uint8
from cm_lightning.evaluation.frechet import FrechetDistance
from cm_lightning.sampling import draw_images, evaluating
from cm_lightning.sampling.samplers import MultistepSampler

__all__ = ["BENCHMARKS"]

GRIDS = {1: [80.0], 2: [80.0, 0.821], 4: [80.0, 6.0, 0.821, 0.2]}
"""Noise levels by number of network calls."""


def ema(options: argparse.Namespace) -> str:
    """One step of one and of three averages, against a loop over tensors of the published kind.

    Args:
        options: ``network``, ``repeats``, ``device``, ``seed``.

    Returns:
        A Markdown table: milliseconds as median (smallest-largest).
    """
    device = torch.device(options.device)
    network = build_network(options.network).to(device)
    weights = list(network.parameters())
    profiles: list[EMAProfile] = [ConstantEMA(0.9999), HalfLifeEMA(), PowerEMA(0.1)]
    averages = [[p.detach().clone() for p in weights] for _ in profiles]

    def ours(count: int) -> None:
        for average, profile in zip(averages[:count], profiles, strict=False):
            update_average(average, weights, profile.beta(128_000, 128))

    def loop() -> None:
        with torch.no_grad():
            for kept, new in zip(averages[0], weights, strict=True):
                kept.copy_(new.detach().lerp(kept, 0.9999))

    sides = [loop, lambda: ours(1), lambda: ours(3)]
    published, one, three = alternate(sides, options.repeats, device)
    rows = [
        ["loop over tensors, 1 average", spread(published), "1"],
        ["ours, 1 average", spread(one), f"{ratio(published, one):.2f}"],
        ["ours, 3 averages", spread(three), f"{ratio(published, three):.2f}"],
    ]
    return f"{network_line(network, 1)}\n\n{table(['', 'ms', 'ratio'], rows)}"


def loader(options: argparse.Namespace) -> str:
    """Batches from the store to the device, by the loader and from a store kept on the device.

    Args:
        options: ``images``, ``resolution``, ``batch``, ``workers``, ``repeats``, ``device``,
            ``seed``.

    Returns:
        A Markdown table: milliseconds per batch as median (smallest-largest), images per second.
    """
    device = torch.device(options.device)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "store"
        make_store(folder, (options.images, 3, options.resolution, options.resolution), 10)
        ways = {"loader": {}, "resident": {"resident": True}}
        ways |= {f"{n} workers": {"num_workers": n} for n in options.workers}
        sides = []
        for settings in ways.values():
            data = ImageDataModule(Store(str(folder)), options.batch, flip=True, **settings)  # type: ignore[arg-type]
            data.trainer = SimpleNamespace(  # type: ignore[assignment]
                world_size=1,
                global_rank=0,
                accumulate_grad_batches=1,
                strategy=SimpleNamespace(root_device=device),
                lightning_module=SimpleNamespace(nimg=0, position=0),
            )
            data.setup()
            batches = iter(data.train_dataloader())

            def draw(batches: Any = batches, data: ImageDataModule = data) -> None:
                raw = data.transfer_batch_to_device(next(batches), device, 0)
                data.on_after_batch_transfer(raw, 0)

            sides.append(draw)
        found = alternate(sides, options.repeats, device)
    rows = [
        [way, spread(seconds), f"{options.batch / median(seconds):,.0f}"]
        for way, seconds in zip(ways, found, strict=True)
    ]
    size = f"{options.images:,} images 3x{options.resolution}x{options.resolution}"
    return f"{size}, batches of {options.batch}\n\n{table(['', 'ms', 'images/s'], rows)}"


def sampling(options: argparse.Namespace) -> str:
    """Images per second by number of network calls, in fp32 and under bf16 autocast.

    Args:
        options: ``network``, ``batch``, ``repeats``, ``device``, ``seed``.

    Returns:
        A Markdown table: milliseconds per batch as median (smallest-largest), images per second.
    """
    device = torch.device(options.device)
    torch.manual_seed(options.seed)
    network = build_network(options.network).to(device).eval()
    names, sides = [], []
    for calls, sigmas in GRIDS.items():
        for precision in ("float32", "bfloat16"):

            def draw(sigmas: list[float] = sigmas, precision: str = precision) -> None:
                low = torch.autocast(device.type, torch.bfloat16)
                with low if precision == "bfloat16" else nullcontext():
                    _draw(network, sigmas, options.batch, options.batch, device)

            names.append([str(calls), precision])
            sides.append(draw)
    found = alternate(sides, options.repeats, device)
    rows = [
        [*name, spread(seconds), f"{options.batch / median(seconds):,.1f}"]
        for name, seconds in zip(names, found, strict=True)
    ]
    head = ["network calls", "precision", "ms", "images/s"]
    return f"{network_line(network, options.batch, 'fp32 weights')}\n\n{table(head, rows)}"


def _draw(
    network: Any, sigmas: list[float], count: int, batch: int, device: torch.device
) -> list[torch.Tensor]:
    sampler, shape = MultistepSampler(sigmas), image_shape(network)
    with evaluating(network):
        return list(
            draw_images(
                network,
                sampler,
                range(count),
                None,
                seed=0,
                shape=shape,
                batch=batch,
                device=device,
            )
        )


def fid(options: argparse.Namespace) -> str:
    """A Frechet evaluation by stage: generation, features, sums of them, the distance itself.

    The features' weights are those of ``--weights``, or downloaded as in a run.

    Args:
        options: ``network``, ``images``, ``batch``, ``features``, ``weights``, ``repeats``,
            ``device``, ``seed``.

    Returns:
        A Markdown table: milliseconds of each stage as median (smallest-largest), and its share.
    """
    device = torch.device(options.device)
    torch.manual_seed(options.seed)
    network = build_network(options.network).to(device).eval()
    given = {} if options.weights is None else {"weights": options.weights}
    features = build_features({"class_path": options.features, "init_args": given}, "--features")
    features.to(device)
    metric = FrechetDistance(features).to(device)
    stages = ("generation", "features", "sums", "distance")
    turns: list[dict[str, float]] = []
    clock = [0.0]

    def lap(stage: str) -> None:
        wait(device)
        now = time.perf_counter()
        turns[-1][stage] += now - clock[0]
        clock[0] = now

    def evaluate(side: str) -> None:
        for start in range(0, options.images, options.batch):
            count = min(options.batch, options.images - start)
            (images,) = _draw(network, GRIDS[1], count, count, device)
            if side == "real":
                images = torch.rand_like(images) * 2 - 1
            lap("generation")
            found = features(to_uint8(images.nan_to_num())).double()
            lap("features")
            for name, value in (
                (f"{side}_features_sum", found.sum(0)),
                (f"{side}_features_cov_sum", found.T @ found),
                (f"{side}_features_num_samples", count),
            ):
                setattr(metric, name, getattr(metric, name) + value)
            lap("sums")

    metric.orig_dtype = torch.float64
    value = 0.0
    for turn in range(options.repeats + 2):  # the real side, one to warm up, and those that count
        metric.reset()
        turns.append(dict.fromkeys(stages, 0.0))
        wait(device)
        clock[0] = time.perf_counter()
        evaluate("fake" if turn else "real")
        if turn:
            metric._update_count = 1
            value = float(metric.compute())
            lap("distance")
    total = median(sum(found.values()) for found in turns[2:])
    rows = []
    for stage in stages:
        seconds = [found[stage] for found in turns[2:]]
        rows.append([stage, spread(seconds), f"{100 * median(seconds) / total:.0f} %"])
    title = f"{options.images:,} images, {features.name}, untrained network: distance {value:.4g}"
    return f"{title}\n\n{table(['stage', 'ms', 'share'], rows)}"


FIRST_STEP = """
import os
from cm_lightning.regimes import ConsistencyModule

def after(module, *arguments):
    if module.nimg:
        os._exit(0)

ConsistencyModule.on_train_batch_end = after  # called after the callbacks
from cm_lightning.cli.help import main
main()
"""
"""``cm-fit``, whose process ends with the first step."""


def startup(options: argparse.Namespace) -> str:
    """Time from the shell to ``cm-fit``'s help, to the end of a first step, and of a check.

    Args:
        options: ``config``, ``repeats``.

    Returns:
        A Markdown table: milliseconds as median (smallest-largest).
    """
    program = [sys.executable, "-c", "from cm_lightning.cli.help import main; main()"]
    base = [sys.executable, "-c", "import torch, lightning.pytorch.cli"]
    given = ["--config", options.config, "--trainer.accelerator", "cpu"]
    ways: dict[str, Callable[[], object]] = {
        "torch and lightning alone": lambda: _run(base),
        "cm-fit --help": lambda: _run([*program, "--help"]),
        "cm-fit to the end of its first step": lambda: first_step(given),
        "cm-fit --check, its evaluation included": lambda: _run([*program, *given, "--check"]),
    }
    found = alternate(list(ways.values()), options.repeats, torch.device("cpu"))
    rows = [[way, spread(seconds)] for way, seconds in zip(ways, found, strict=True)]
    return f"{options.config}\n\n{table(['', 'ms'], rows)}"


def first_step(words: list[str]) -> None:
    """Run ``cm-fit`` in a directory of its own until its first step is over.

    Args:
        words: Its command line, without ``--run_dir``.
    """
    with tempfile.TemporaryDirectory() as place:
        _run([sys.executable, "-c", FIRST_STEP, *words, "--run_dir", f"{place}/run"])


def _run(words: list[str]) -> None:
    subprocess.run(words, check=True, capture_output=True)  # noqa: S603


def _ema_options(add: Callable[..., Any]) -> None:
    add("--network", choices=NETWORKS, default="small")
    add_device(add, repeats=20)


def _loader_options(add: Callable[..., Any]) -> None:
    add("--images", type=int, default=50_000, help="[50000]")
    add("--resolution", type=int, default=32)
    add("--batch", type=int, default=512)
    add("--workers", type=int, nargs="+", default=[1, 2], help="loader processes")
    add_device(add, repeats=20)


def _sampling_options(add: Callable[..., Any]) -> None:
    add("--network", choices=NETWORKS, default="small")
    add("--batch", type=int, default=64)
    add_device(add, repeats=5)


def _fid_options(add: Callable[..., Any]) -> None:
    add("--network", choices=NETWORKS, default="small")
    add("--images", type=int, default=2000)
    add("--batch", type=int, default=256)
    add("--features", default="DigitsFeatures", help="[DigitsFeatures]")
    add("--weights", help="file with the weights of the features")
    add_device(add, repeats=3)


def _startup_options(add: Callable[..., Any]) -> None:
    add("--config", default="configs/ect_digits.yaml")
    add("--repeats", type=int, default=3)


BENCHMARKS = [
    Benchmark("ema", "averages of the weights", _ema_options, ema),
    Benchmark("loader", "batches from the store to the device", _loader_options, loader),
    Benchmark("sampling", "images per second by network calls", _sampling_options, sampling),
    Benchmark("fid", "an evaluation by stage", _fid_options, fid),
    Benchmark(
        "startup", "from the shell to the first step, and of a check", _startup_options, startup
    ),
]
