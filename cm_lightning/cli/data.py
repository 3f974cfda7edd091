"""``cm-data``: turn images of any layout into a store, look into stores, fetch downloads early."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cm_lightning.cli.errors import CommandParser, readable_errors, whole
from cm_lightning.data import (
    KINDS,
    TRANSFORMS,
    ImageDataModule,
    ImageStore,
    Transform,
    convert,
    open_images,
)
from cm_lightning.documents import build, check_form, printable, read_mapping
from cm_lightning.evaluation import FeatureExtractor, image_grid, reference_statistics, save_png
from cm_lightning.files import offline, replacing
from cm_lightning.types import InputError

__all__ = ["main"]

COMMAND = "cm-data"
DESCRIPTION = "Turn images of any layout into a store, look into stores, fetch downloads early."


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = CommandParser(prog=COMMAND, allow_abbrev=False, description=DESCRIPTION)
    actions = parser.add_subparsers(dest="action", required=True, parser_class=CommandParser)
    bring = actions.add_parser(
        "convert",
        help="make a store, for `data.source: Store`",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="kinds:\n" + _table(KINDS) + "\ntransforms:\n" + _table(TRANSFORMS),
    )
    add = bring.add_argument
    add("source", help="file or folder")
    add("--out", required=True, help="folder to make; must not exist")
    add("--kind", choices=tuple(KINDS), help="layout [found out]")
    add(
        "--transform",
        choices=tuple(TRANSFORMS),
        default="none",
        help="how images get their size [none]",
    )
    add("--resolution", type=whole(16384), help="height and width of the stored images")
    add("--channels", type=int, choices=(1, 3), help="[those of the first image]")
    add(
        "--workers",
        type=whole(1024, least=0),
        default=0,
        help="that decode; 0 for this process [0]",
    )
    add("--skip_corrupt", action="store_true", help="leave out images that cannot be read")
    inspect = actions.add_parser("inspect", help="say what a store holds")
    inspect.add_argument("store", help="folder of a store")
    inspect.add_argument("--grid", metavar="FILE", help="draw 100 of its images into a PNG file")
    inspect.add_argument("--verify", action="store_true", help="read it all and compare")
    stats = actions.add_parser("stats", help="reference statistics of a store, as EDM and ADM use")
    stats.add_argument("store", help="folder of a store")
    stats.add_argument("--features", default="Inception", help="Inception, Timm, ... [Inception]")
    stats.add_argument("--weights", help="file with the weights of the features")
    stats.add_argument("--out", required=True, help=".npz to write: mu, sigma and where from")
    stats.add_argument("--batch", type=whole(), default=256, help="images per pass [256]")
    fetch = actions.add_parser("prefetch", help="every download a config will need")
    fetch.add_argument("--config", required=True, nargs="+", help="YAML files, as in cm-fit")
    return parser


def _table(texts: Mapping[str, str]) -> str:
    return "".join(f"  {name:<22}{text}\n" for name, text in texts.items())


def main(args: list[str] | None = None) -> None:
    """Entry point of ``cm-data``."""
    options = build_parser().parse_args(args)
    os.environ.setdefault("PYTHONSAFEPATH", "1")  # workers import nothing of the current folder
    with readable_errors(COMMAND):
        actions = {"convert": bring, "inspect": inspect, "stats": stats, "prefetch": prefetch}
        actions[options.action](options)


def bring(options: argparse.Namespace) -> None:
    """Convert a source."""
    if options.transform != "none" and options.resolution is None:
        raise InputError(f"--transform {options.transform} needs --resolution.")
    if options.transform == "none" and options.resolution is not None:
        raise InputError("--resolution needs a --transform: " + ", ".join([*TRANSFORMS][1:]) + ".")
    files = open_images(options.source, options.kind)
    print(f"{options.source}: {len(files):,} images, {KINDS[files.kind]}", flush=True)
    if files.note:
        print(files.note, flush=True)
    transform = Transform(options.transform, options.resolution, options.channels)
    store = convert(
        files,
        options.out,
        transform,
        workers=options.workers,
        skip_corrupt=options.skip_corrupt,
    )
    print(describe(store))


def describe(store: ImageStore) -> str:
    """Size, classes, grey levels and identity of a store."""
    size = store.images.nbytes / 2**20
    lines = [
        f"{store.path}",
        f"  images       {len(store):,} of {store.image_shape} (channels, height, width), "
        f"{size:,.1f} MiB",
        f"  fingerprint  {store.fingerprint}",
    ]
    if store.labels is not None:
        counts = np.bincount(store.labels, minlength=store.num_classes)
        lines.append(
            f"  classes      {store.num_classes}, {counts.min():,} to {counts.max():,} images each"
        )
        if names := store.info.get("classes"):
            shown = ", ".join(f"{label} {name}" for label, name in enumerate(names[:20]))
            lines.append(f"  names        {shown}{', ...' if len(names) > 20 else ''}")
        if store.num_classes <= 20:
            lines.append("  histogram    " + ", ".join(map(str, counts)))
        else:
            lines.append("  histogram    images per class, number of such classes:")
            number, edges = np.histogram(counts, bins=min(10, int(np.ptp(counts)) + 1))
            for k in np.flatnonzero(number):
                share = round(40 * number[k] / number.max())
                span = f"{edges[k]:,.0f}-{edges[k + 1]:,.0f}"
                lines.append(f"    {span:>15} {number[k]:6,} {'#' * share}")
        if counts.min() == 0:
            lines.append(f"  empty        {', '.join(map(str, np.flatnonzero(counts == 0)[:20]))}")
    else:
        lines.append("  classes      none")
    for key in ("transform", "source"):
        if store.info.get(key):
            text = ", ".join(f"{name} {value}" for name, value in store.info[key].items())
            lines.append(f"  {key:<12} {text}")
    if store.info.get("left_out"):
        lines.append(f"  left out     {len(store.info['left_out'])} images that could not be read")
    return printable("\n".join(lines))


def moments(store: ImageStore) -> tuple[float, float]:
    """Mean and standard deviation over all pixels in [-1, 1]."""
    counts = np.zeros(256, np.int64)
    for start in range(0, len(store), 4096):
        block = np.ascontiguousarray(store.images[start : start + 4096])
        counts += np.bincount(block.ravel(), minlength=256)
    levels = np.arange(256) / 127.5 - 1
    mean = float(counts @ levels / counts.sum())
    return mean, float(np.sqrt(counts @ (levels - mean) ** 2 / counts.sum()))


def inspect(options: argparse.Namespace) -> None:
    """Describe a store."""
    if options.grid and Path(options.grid).exists():
        raise InputError(f"--grid {options.grid} exists already: choose another file.")
    store = ImageStore(options.store)
    print(describe(store))
    mean, std = moments(store)
    print(f"  pixels       mean {mean:.4f}, standard deviation {std:.4f} in [-1, 1]")
    if options.verify:
        store.verify()
        print("  verified     every pixel and label")
    if options.grid:
        rows = np.linspace(0, len(store) - 1, min(100, len(store))).astype(np.int64)
        if store.labels is not None and store.num_classes <= 20:
            rows = rows[np.argsort(store.labels[rows], kind="stable")]
        save_png(options.grid, image_grid(store[rows][0], columns=10))
        print(f"  picture      {options.grid}")


def stats(options: argparse.Namespace) -> None:
    """Write reference statistics."""
    if Path(options.out).suffix != ".npz":
        raise InputError(f"--out must end in .npz, got {options.out}.")
    store = ImageStore(options.store)
    init = {} if options.weights is None else {"weights": options.weights}
    extractor = build_features({"class_path": options.features, "init_args": init}, "--features")
    if Path(options.out).exists():
        raise InputError(f"--out {options.out} exists already: choose another file.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    extractor.load().to(device)
    found = reference_statistics(
        store.images,
        store.fingerprint,
        extractor,
        cache=None,
        device=device,
        batch=options.batch,
    )
    with replacing(options.out) as partial:
        np.savez(
            partial,
            mu=found.mu.numpy(),
            sigma=found.sigma.numpy(),
            n=np.array(found.n),
            fingerprint=np.array(store.fingerprint),
            features=np.array(extractor.fingerprint),
        )
    print(f"{options.out}: mu and sigma of {found.n:,} images over {extractor.name}")


def build_features(config: Any, where: str) -> FeatureExtractor:
    """A feature extractor from its config.

    Raises:
        InputError: If it is not one of this package.
    """
    what = f"The features that {where} describes"
    built: FeatureExtractor = build({"features": FeatureExtractor}, {"features": config}, what)[
        "features"
    ]
    return built


def overlaid(config: dict[str, Any], later: dict[str, Any]) -> dict[str, Any]:
    """A config with a later one on top, as ``cm-fit`` takes several: mappings key by key."""
    merged = dict(config)
    for key, value in later.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            if value.get("class_path", old.get("class_path")) != old.get("class_path"):
                old = {}  # arguments of another class
            value = overlaid(old, value)
        merged[key] = value
    return merged


def prefetch(options: argparse.Namespace) -> None:
    """Download, or find, everything that configs need from the network, and say where it is."""
    if offline():
        raise InputError("CM_OFFLINE is set, so nothing may be downloaded: unset it to prefetch.")
    content: dict[str, Any] = {}
    for name in options.config:
        content = overlaid(content, read_mapping(name, "config"))
    where = " and ".join(options.config)
    form = {"fid?": {"profiles?": list}, "model?": {"init_args?": dict}, "data?": dict}
    check_form(content, form, where)
    fid = content.get("fid") or {}
    if fid.get("profiles") != []:
        extractor = build_features(fid.get("features") or {"class_path": "Inception"}, where)
        extractor.load()
        print(f"features  {extractor.name}: SHA-256 {extractor.fingerprint[:16]}")
    model = content.get("model") or {}
    distance = (model.get("init_args") or {}).get("distance")
    if distance is None and str(model.get("class_path")).split(".")[-1] in ("CD", "CT"):
        distance = {"class_path": "LPIPS"}  # their default
    if distance is not None and "LPIPS" in str(distance):
        from cm_lightning.objective import LPIPS, Distance

        lpips = build({"distance": Distance}, {"distance": distance}, f"The distance of {where}")
        if isinstance(lpips["distance"], LPIPS):
            lpips["distance"].prepare(None)
        print("distance  LPIPS: weights are there")
    if content.get("data") is not None:
        given = {"data": content["data"]}
        data = build({"data": ImageDataModule}, given, f"`data` of {where}")["data"]
        data.prepare_data()
        data.setup()
        print(f"data      {data.store.path}: {data.fingerprint[:16]}, {len(data.store):,} images")


if __name__ == "__main__":
    main(sys.argv[1:])
