"""What SCT's estimate of the posterior mean costs."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from torch import Tensor

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
)
from cm_lightning.bench.store import add_store, make_store
from cm_lightning.cli.study_report import table
from cm_lightning.data import ImageStore, ReferenceBank, ReferenceSet, to_float
from cm_lightning.data.references import class_layout, prepare
from cm_lightning.objective import (
    Draw,
    ECTMapping,
    Euler,
    Independent,
    InverseStep,
    Objective,
    PseudoHuber,
    ReferenceMean,
    SampleMean,
)
from cm_lightning.types import Batch, Denoiser, References

__all__ = ["BENCHMARKS"]


def references(options: argparse.Namespace) -> str:
    """What SCT's posterior mean costs against the rest of a training step.

    By layout (references of all classes, or of the row's own), batch and number of references.

    Args:
        options: ``network``, ``batch``, ``sizes``, ``labels``, ``repeats``, ``device``, ``seed``.

    Returns:
        A Markdown table: milliseconds as median (smallest-largest), and the median ratio of
        neighbouring turns.
    """
    device = torch.device(options.device)
    titles, rows = [], []
    for classes in options.labels:
        torch.manual_seed(options.seed)
        network = build_network(options.network, classes).to(device)
        layout = f"{classes} classes" if classes else "no classes"
        batches = ", ".join(map(str, options.batch))
        titles.append(f"{layout}: {network_line(network, batches)}")
        for batch in options.batch:
            found = _by_size(network, batch, classes, options)
            rows += [[layout, str(batch), *row] for row in found]
    head = [
        "layout",
        "batch",
        "references",
        "ECT step, ms",
        "SCT step, ms",
        "ratio",
        "mean alone, ms",
        "share of step",
    ]
    return "\n".join([*titles, "", table(head, rows)])


def _by_size(
    network: Denoiser, n: int, classes: int, options: argparse.Namespace
) -> list[list[str]]:
    """Rows for one batch size and layout, one for each number of references."""
    device, shape = torch.device(options.device), image_shape(network)
    x0 = torch.randint(0, 256, (n, *shape), dtype=torch.uint8, device=device) / 127.5 - 1
    optimizer = torch.optim.RAdam(network.parameters(), lr=1e-4)
    mapping = ECTMapping()
    device_index = torch.arange(n, device=device)

    def objective(mean: SampleMean | ReferenceMean) -> Objective:
        return Objective(mapping, Independent(), Euler(mean), PseudoHuber(), InverseStep())

    def step(mean: SampleMean | ReferenceMean, batch: Batch) -> None:
        draw = Draw(options.seed, 0, 0, n, device)
        objective(mean)(network, network, batch, draw).loss.mean().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()

    rows = []
    labels = torch.arange(n, device=device) % classes if classes else None
    plain = Batch(x0, labels, device_index)
    for size in options.sizes:
        images = torch.randint(0, 256, (size, *shape), dtype=torch.uint8, device=device)
        its = layout = None
        if labels is not None:
            found = np.arange(size) * classes // size  # class by class, as in the bank
            its = torch.from_numpy(found).to(device)
            counts = np.bincount(found, minlength=classes)
            layout = class_layout(labels.cpu().numpy(), dict(enumerate(counts.tolist())))
            layout = move_data_to_device(layout, device)
        index = torch.arange(size, device=device) + n
        bank = prepare(References(images, its, index, layout=layout))
        batch = plain._replace(references=bank)
        t, _ = mapping.sample(n, 0, device, torch.Generator(device).manual_seed(0))
        x_t = x0 + t.to(x0.dtype)[:, None, None, None] * torch.randn_like(x0)

        def estimate(x_t: Tensor = x_t, t: Tensor = t, batch: Batch = batch) -> None:
            ReferenceMean(skip=None)(x_t, t, batch)

        ect, sct, alone = alternate(
            [
                lambda: step(SampleMean(), plain),
                lambda batch=batch: step(ReferenceMean(skip=None), batch),  # type: ignore[misc]
                estimate,
            ],
            options.repeats,
            device,
        )
        rows.append(
            [
                f"{size:,}",
                spread(ect),
                spread(sct),
                f"{ratio(ect, sct):.3f}",
                spread(alone),
                f"{100 * ratio(ect, alone):.2f} %",
            ]
        )
    return rows


def classes(options: argparse.Namespace) -> str:
    """What references of the row's class cost per micro-batch, from a store of ImageNet's size.

    ``fetch`` is what a loader process does ahead of the step; ``mean`` is part of the step. The
    store is that of :func:`cm_lightning.bench.store.store`, made if it is not there.

    Args:
        options: ``images``, ``resolution``, ``classes``, ``batch``, ``sizes``, ``repeats``,
            ``device``, ``folder``.

    Returns:
        A Markdown table: milliseconds as median (smallest-largest).
    """
    device, path = torch.device(options.device), Path(options.folder)
    make_store(path, (options.images, 3, options.resolution, options.resolution), options.classes)
    opened = ImageStore(path)
    assert opened.labels is not None
    rng = np.random.default_rng(0)
    t, _ = ECTMapping().sample(options.batch, 0, device, torch.Generator(device).manual_seed(0))
    rows = []
    for n in options.sizes:
        bank = ReferenceBank(opened, ReferenceSet(n=n), conditional=True, flip=False, seed=0)
        fetched: list[tuple[Batch, Tensor]] = []

        def fetch(
            bank: ReferenceBank = bank, fetched: list[tuple[Batch, Tensor]] = fetched
        ) -> None:
            index = rng.integers(0, len(opened), options.batch)
            images, labels = opened[index]
            assert labels is not None
            references = bank(labels, int(index[0]), torch.device("cpu"))
            x0 = to_float(images).to(device)
            x_t = x0 + t.to(x0.dtype)[:, None, None, None] * torch.randn_like(x0)
            there = move_data_to_device(
                references._replace(layout=bank.layout(labels.numpy())), device
            )
            index = torch.from_numpy(index).to(device)
            fetched[:] = [(Batch(x0, labels.to(device), index, there), x_t)]

        def mean(fetched: list[tuple[Batch, Tensor]] = fetched) -> None:
            batch, x_t = fetched[0]
            ReferenceMean(skip=None)(x_t, t, batch)

        fetching, estimating = alternate([fetch, mean], options.repeats, device)
        rows.append([str(n), spread(fetching), spread(estimating)])
    head = ["references per row", "fetch, ms", "mean, ms"]
    size = f"{len(opened):,} images {opened.image_shape}, {opened.num_classes:,} classes"
    return f"{size}; micro-batches of {options.batch}\n\n{table(head, rows)}"


def _references_options(add: Callable[..., Any]) -> None:
    add("--network", choices=NETWORKS, default="small")
    add("--sizes", type=int, nargs="+", default=[64, 256, 1024, 4096])
    add("--batch", type=int, nargs="+", default=[64], help="[64]")
    add(
        "--labels",
        type=int,
        nargs="+",
        default=[0],
        help="classes, of which each row uses its own; 0 for none [0]",
    )
    add_device(add, repeats=20)


def _classes_options(add: Callable[..., Any]) -> None:
    add_store(add)
    add("--batch", type=int, default=32, help="[32]")
    add("--sizes", type=int, nargs="+", default=[64, 256, 1024], help="references per row")
    add_device(add, repeats=20)


BENCHMARKS = [
    Benchmark("references", "SCT's posterior mean against a step", _references_options, references),
    Benchmark("classes", "references of a class from a store", _classes_options, classes),
]
