"""What ``cm-eval`` compares: samples of a model with statistics of real images."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor

from cm_lightning.cli.drawing import image_shape
from cm_lightning.cli.evaluate_results import Cell, describe
from cm_lightning.data import ImageDataModule
from cm_lightning.documents import build, read_mapping
from cm_lightning.evaluation import (
    FeatureExtractor,
    count_nonfinite,
    load_statistics,
    reference_statistics,
    to_uint8,
)
from cm_lightning.evaluation.reference import Statistics
from cm_lightning.evaluation.scores import Outputs, extract
from cm_lightning.sampling import GuidedDenoiser, Sampler, draw_images, draw_labels, evaluating
from cm_lightning.types import Denoiser, InputError

__all__ = [
    "Against",
    "Reference",
    "draw",
    "eval_labels",
    "prepare_reference",
    "read_against",
    "read_config",
]


class Against(NamedTuple):
    """What samples are compared with.

    Attributes:
        data: The data set, ``None`` if only statistics are known.
        extractor: Computes features.
        reference: ``"auto"`` or a file of statistics.
        samplers: Samplers of the config.
    """

    data: ImageDataModule | None
    extractor: FeatureExtractor
    reference: str
    samplers: list[Sampler]


def read_config(source: Path, given: str | None) -> tuple[dict[str, Any], str]:
    """The config that names data and features, and where it lies.

    Raises:
        InputError: If there is none, or it is not a YAML mapping.
    """
    folder = source.parent.parent if source.suffix == ".ckpt" else source
    path = folder / "config.yaml" if given is None else Path(given)
    if given is None and not path.is_file():
        raise InputError(
            f"{source} is not a run, so nothing says which data and features to compare with: "
            "give --config, a YAML file with `data` and `fid`."
        )
    config = read_mapping(path, "config")
    if not isinstance(config.get("fid"), dict):
        raise InputError(
            f"{path} must be a mapping with `fid` and, unless it names a reference file, `data`."
        )
    return config, str(path)


def read_against(config: Mapping[str, Any], where: str) -> Against:
    """Build data, extractor and samplers from a config.

    Raises:
        InputError: If it names classes of other packages or does not fit.
    """
    types: dict[str, Any] = {
        "features": FeatureExtractor,
        "samplers": list[Sampler],
        "reference": str,
        "data": ImageDataModule,
    }
    fid = config["fid"]
    parts = {key: fid[key] for key in ("features", "samplers", "reference") if key in fid}
    if parts.get("features") is None:  # as in cm-fit
        parts["features"] = {"class_path": "cm_lightning.evaluation.Inception"}
    if config.get("data") is None:
        del types["data"]
    else:
        parts["data"] = config["data"]
    built = build(types, parts, f"`fid` or `data` of {where}")
    extractor, data = built["features"], built.get("data")
    reference = "auto" if built["reference"] is None else built["reference"]
    if data is None and reference == "auto":
        raise InputError(f"{where} has neither `data` nor `fid.reference`: give one of them.")
    return Against(data, extractor, reference, built["samplers"] or [])


class Reference(NamedTuple):
    """Statistics of the real images, and their features if a score needs them.

    Attributes:
        statistics: Mean and covariance.
        real: Features ``(M, D)``, or ``None``.
        real_n: Number of real images at hand, ``None`` if there are only statistics.
    """

    statistics: Statistics
    real: Tensor | None
    real_n: int | None


def prepare_reference(against: Against, options: argparse.Namespace, fabric: L.Fabric) -> Reference:
    """Open the data and compute or read what samples are compared with."""
    data, extractor = against.data, against.extractor.to(fabric.device)
    if data is not None:
        if fabric.is_global_zero:
            data.prepare_data()
        fabric.barrier()
        data.setup()
    if against.reference != "auto":
        known = None if data is None or options.accept_reference else data.fingerprint
        features = None if options.accept_reference else extractor.fingerprint
        mu, sigma = load_statistics(
            against.reference, data=known, features=features, metric=extractor.metric
        )
        statistics = Statistics(mu, sigma, 0)
    else:
        assert data is not None
        statistics = reference_statistics(
            data.store.images,
            data.fingerprint,
            extractor,
            cache=data.cache_dir,
            device=fabric.device,
            batch=options.batch,
            rank=fabric.global_rank,
            world=fabric.world_size,
        )
    real = None
    if {"kid", "prc"} & set(options.scores) and data is not None and fabric.is_global_zero:
        images = data.store.images  # mapped for reading alone
        parts = (images[i : i + options.batch] for i in range(0, len(images), options.batch))
        real = torch.cat(
            [
                extract(extractor, torch.from_numpy(part.copy()).to(fabric.device)).features
                for part in parts
            ]
        )
    return Reference(statistics, real, None if data is None else len(data.store))


def eval_labels(against: Against, model: Denoiser, index: Sequence[int]) -> Tensor | None:
    """Labels of numbered samples: those of the data in a fixed order, or 0, 1, 2, ... without."""
    if not model.num_classes:
        return None
    if against.data is None or against.data.store.labels is None:
        return torch.as_tensor(list(index)) % model.num_classes
    return draw_labels(against.data.store.labels, index)


def draw(
    model: GuidedDenoiser,
    cell: Cell,
    against: Against,
    options: argparse.Namespace,
    fabric: L.Fabric,
) -> tuple[Outputs, Tensor | None]:
    """Outputs of all samples, in order, on every device; images if they are to be kept.

    Raises:
        InputError: If samples are not finite.
    """
    world = fabric.world_size
    share = -(-options.n // world)
    index = [(fabric.global_rank + world * i) % options.n for i in range(share)]
    model.to(fabric.device)
    keep = options.npz and cell.seed == options.seeds[0]
    parts: list[tuple[Tensor, ...]] = []
    bad = 0
    with evaluating(model):
        for batch in draw_images(
            model,
            cell.sampler,
            index,
            eval_labels(against, model, index),
            seed=cell.seed,
            shape=image_shape(model),
            batch=options.batch,
            device=fabric.device,
        ):
            bad += count_nonfinite(batch)
            images = to_uint8(batch)
            outputs = extract(against.extractor, images)
            logits = torch.empty(len(images), 0) if outputs.logits is None else outputs.logits
            kept = images.cpu() if keep else torch.empty(len(images), 0, dtype=torch.uint8)
            parts.append((outputs.features, logits, kept))
    everywhere = fabric.all_reduce(torch.tensor(bad, device=fabric.device), reduce_op="sum")
    assert isinstance(everywhere, Tensor)
    bad = int(everywhere)
    if bad:
        raise InputError(f"{bad} of {options.n} samples of {describe(cell)} are not finite.")
    columns = [
        gather(torch.cat(list(column)), fabric, options.n) for column in zip(*parts, strict=True)
    ]
    scored = columns[1] if columns[1].shape[1] else None
    return Outputs(columns[0], scored), columns[2] if keep else None


def gather(values: Tensor, fabric: L.Fabric, n: int) -> Tensor:
    """Rows of all devices in the order of their numbers, on the CPU."""
    if fabric.world_size == 1:
        return values[:n]
    everything = fabric.all_gather(values)
    assert isinstance(everything, Tensor)
    return everything.transpose(0, 1).flatten(0, 1)[:n].cpu()
