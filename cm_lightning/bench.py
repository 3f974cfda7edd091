"""Benchmarks: ``python -m cm_lightning.bench NAME``. Both sides of a ratio alternate in one run."""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cm_lightning.callbacks.run_record import device_name, versions
from cm_lightning.cli.data import build_features
from cm_lightning.cli.errors import CommandParser, readable_errors
from cm_lightning.cli.study import table
from cm_lightning.data import ImageStore, ReferenceBank, ReferenceSet, to_float
from cm_lightning.evaluation import FeatureExtractor, save_png
from cm_lightning.evaluation.frechet import frechet_distance
from cm_lightning.networks import EDM2Precond, EDM2UNet, EDMPrecond, SongUNet
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
from cm_lightning.types import Batch, Denoiser, InputError, References

__all__ = ["alternate", "main"]

COMMAND = "python -m cm_lightning.bench"


def build_network(name: str) -> Denoiser:
    """A network by name: ``small`` (8x8), ``ddpmpp`` (32x32, 55.7M) or ``edm2_s`` (64x64, 280M)."""
    if name == "small":
        small = {"model_channels": 32, "channel_mult": [1, 2], "num_blocks": 1}
        return EDMPrecond(SongUNet(8, 1, 1, attn_resolutions=[4], dropout=0.0, **small))  # type: ignore[arg-type]
    if name == "edm2_s":
        return EDM2Precond(EDM2UNet(64, 3, 3, dropout=0.4, dropout_resolution=16))
    return EDMPrecond(SongUNet(32, 3, 3, dropout=0.2))


def alternate(
    sides: Sequence[Callable[[], object]], repeats: int, device: torch.device
) -> list[list[float]]:
    """Seconds of each side in each repeat, the sides taking turns, after one unmeasured turn.

    Args:
        sides: What to time.
        repeats: Turns, >= 1.
        device: Device to wait for.
    """
    seconds: list[list[float]] = [[] for _ in sides]
    for turn in range(repeats + 1):
        for side, found in zip(sides, seconds, strict=True):
            _wait(device)
            start = time.perf_counter()
            side()
            _wait(device)
            if turn:
                found.append(time.perf_counter() - start)
    return seconds


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _spread(seconds: Sequence[float]) -> str:
    low, high = min(seconds), max(seconds)
    return f"{1000 * median(seconds):.2f} ({1000 * low:.2f}-{1000 * high:.2f})"


def references(options: argparse.Namespace) -> str:
    """What SCT's posterior mean costs against the rest of a training step, by number of references.

    Args:
        options: ``network``, ``batch``, ``sizes``, ``repeats``, ``device``, ``seed``.

    Returns:
        A Markdown table: milliseconds as median (smallest-largest), and the median ratio of
        neighbouring turns.
    """
    device = torch.device(options.device)
    torch.manual_seed(options.seed)
    network = build_network(options.network).to(device)
    assert network.image_shape is not None
    shape, n = network.image_shape, options.batch
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
    plain = Batch(x0, None, device_index)
    for size in options.sizes:
        images = torch.randint(0, 256, (size, *shape), dtype=torch.uint8, device=device)
        bank = References(images, None, torch.arange(size, device=device) + n)
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
        ratio = median(b / a for a, b in zip(ect, sct, strict=True))
        share = median(c / a for a, c in zip(ect, alone, strict=True))
        rows.append(
            [
                f"{size:,}",
                _spread(ect),
                _spread(sct),
                f"{ratio:.3f}",
                _spread(alone),
                f"{100 * share:.2f} %",
            ]
        )
    head = [
        "references",
        "ECT step, ms",
        "SCT step, ms",
        "ratio",
        "mean alone, ms",
        "share of step",
    ]
    return f"{network_line(network, n)}\n\n{table(head, rows)}"


def classes(options: argparse.Namespace) -> str:
    """What references of the row's class cost per micro-batch, from a store of ImageNet's size.

    ``fetch`` is what a loader process does ahead of the step; ``mean`` is part of the step. The
    store is that of :func:`store`, made if it is not there.

    Args:
        options: ``images``, ``resolution``, ``classes``, ``batch``, ``sizes``, ``repeats``,
            ``device``, ``folder``.

    Returns:
        A Markdown table: milliseconds as median (smallest-largest).
    """
    device, path = torch.device(options.device), Path(options.folder)
    _make_store(path, options)
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
            references = bank(labels, int(index[0]), torch.device("cpu"))
            x0 = to_float(images).to(device)
            x_t = x0 + t.to(x0.dtype)[:, None, None, None] * torch.randn_like(x0)
            assert labels is not None
            there = References(*(None if v is None else v.to(device) for v in references))  # type: ignore[arg-type]
            index = torch.from_numpy(index).to(device)
            fetched[:] = [(Batch(x0, labels.to(device), index, there), x_t)]

        def mean(fetched: list[tuple[Batch, Tensor]] = fetched) -> None:
            batch, x_t = fetched[0]
            ReferenceMean(skip=None)(x_t, t, batch)

        fetching, estimating = alternate([fetch, mean], options.repeats, device)
        rows.append([str(n), _spread(fetching), _spread(estimating)])
    head = ["references per row", "fetch, ms", "mean, ms"]
    size = f"{len(opened):,} images {opened.image_shape}, {opened.num_classes:,} classes"
    return f"{size}; micro-batches of {options.batch}\n\n{table(head, rows)}"


def frechet(options: argparse.Namespace) -> str:
    """What a Frechet distance costs once the features are there, against torchmetrics' ``compute``.

    Both get the same sums over random features of two laws; torchmetrics takes the eigenvalues of
    a product that is not symmetric.

    Args:
        options: ``dims``, ``images``, ``repeats``, ``seed``.

    Returns:
        A Markdown table: seconds as median (smallest-largest), both distances.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    from cm_lightning.evaluation.frechet import FrechetDistance

    class Given(FeatureExtractor):
        metric = name = preprocessing = "given"
        num_features = options.dims

        def build(self) -> torch.nn.Module:
            return torch.nn.Identity()

        def extract(self, network: torch.nn.Module, images: Tensor) -> Tensor:
            return images

    generator = torch.Generator().manual_seed(options.seed)
    ours = FrechetDistance(Given())
    theirs = FrechetInceptionDistance(feature=Given(), normalize=False)
    theirs.orig_dtype = torch.float64  # what its update would have set
    mixing = torch.randn(options.dims, options.dims, generator=generator) / options.dims**0.5
    for side in ("real", "fake"):
        sums, squares = 0.0, torch.zeros(options.dims, options.dims, dtype=torch.float64)
        for start in range(0, options.images, 1000):
            count = min(1000, options.images - start)
            x = torch.randn(count, options.dims, generator=generator) @ mixing
            x = (x if side == "real" else 1.1 * x + 0.1).double()
            sums, squares = sums + x.sum(0), squares + x.T @ x
        for metric in (ours, theirs):
            setattr(metric, f"{side}_features_sum", sums)
            setattr(metric, f"{side}_features_cov_sum", squares)
            setattr(metric, f"{side}_features_num_samples", torch.tensor(options.images))
    values: dict[str, float] = {}

    def compute(name: str, metric: FrechetInceptionDistance) -> None:
        metric._computed = None
        metric._update_count = 1
        values[name] = float(metric.compute())

    sides = [lambda: compute("ours", ours), lambda: compute("theirs", theirs)]
    first, second = alternate(sides, options.repeats, torch.device("cpu"))
    ratio = median(b / a for a, b in zip(first, second, strict=True))
    head = ["", "ms", "distance"]
    rows = [
        ["cm_lightning", _spread(first), f"{values['ours']:.6f}"],
        ["torchmetrics", _spread(second), f"{values['theirs']:.6f}"],
    ]
    title = f"{options.dims} features, {options.images:,} images; ratio {ratio:.1f}"
    return f"{title}\n\n{table(head, rows)}"


def bias(options: argparse.Namespace) -> str:
    """Frechet distance of real images to other real images of the same set, by their number.

    The true distance is 0: what is found is the bias of small samples, which every Frechet distance
    has and which only equal numbers make comparable.

    Args:
        options: ``store``, ``features``, ``weights``, ``sizes``, ``reference``, ``seed``.

    Returns:
        A Markdown table.

    Raises:
        InputError: If the store holds too few images.
    """
    opened = ImageStore(options.store)
    most = max(options.sizes)
    if len(opened) < most + options.reference:
        raise InputError(
            f"{options.store} holds {len(opened):,} images: --sizes and --reference need "
            f"{most + options.reference:,}."
        )
    given = {} if options.weights is None else {"weights": options.weights}
    extractor = build_features({"class_path": options.features, "init_args": given}, "--features")
    order = np.random.default_rng(options.seed).permutation(len(opened))

    def features(rows: npt.NDArray[np.int64]) -> Tensor:
        parts = [extractor(opened[part][0]) for part in np.array_split(rows, -(-len(rows) // 100))]
        return torch.cat(parts).double()

    def moments(x: Tensor) -> tuple[Tensor, Tensor]:
        return x.mean(0), x.T.cov()

    reference = moments(features(order[most : most + options.reference]))
    drawn = features(order[:most])
    rows = [
        [f"{n:,}", f"{frechet_distance(*moments(drawn[:n]), *reference):.3f}"]
        for n in options.sizes
    ]
    head = ["real images", f"distance to {options.reference:,} others"]
    return f"{opened.path}, features {extractor.name}\n\n{table(head, rows)}"


def store(options: argparse.Namespace) -> str:
    """How fast random batches come out of a store, against torchvision's ImageFolder.

    A store of random images is made in ``folder`` (kept for the next call). ``cold`` is after the
    system was told to forget the file, ``warm`` after every page used was read before. The folder
    of PNG files holds the first ``files`` of the images; reading is single-threaded on both sides.

    Args:
        options: ``images``, ``resolution``, ``classes``, ``batch``, ``batches``, ``files``,
            ``folder``.

    Returns:
        A Markdown table: time to open, memory it took, images per second.
    """
    path = Path(options.folder)
    _make_store(path, options)
    before = _resident()
    start = time.perf_counter()
    opened = ImageStore(path)
    seconds, grown = time.perf_counter() - start, _resident() - before
    rng = np.random.default_rng(0)
    index = rng.integers(0, len(opened), (options.batches, options.batch))
    _forget(path / "images.npy")
    cold, warm = (_pace(opened, index) for _ in range(2))
    folder = path / "pictures"
    _make_pictures(folder, opened, options.files)
    from torchvision.datasets import ImageFolder
    from torchvision.transforms.functional import pil_to_tensor

    pictures = ImageFolder(str(folder), transform=pil_to_tensor)
    start = time.perf_counter()
    rows = rng.integers(0, len(pictures), options.batch * 4)
    torch.stack([pictures[int(row)][0] for row in rows])
    theirs = len(rows) / (time.perf_counter() - start)
    size = opened.images.nbytes / 2**30
    head = ["store", "to open", "memory", "cold", "warm", "ImageFolder of PNG, warm"]
    row = [
        f"{len(opened):,} images {opened.image_shape}, {size:.1f} GiB",
        f"{1000 * seconds:.0f} ms",
        f"{grown / 2**20:.0f} MiB",
        f"{cold:,.0f} images/s",
        f"{warm:,.0f} images/s",
        f"{theirs:,.0f} images/s",
    ]
    return f"Batches of {options.batch} random images.\n\n{table(head, [row])}"


def _make_store(path: Path, options: argparse.Namespace) -> None:
    """Write random images, unless a store of that shape is there."""
    shape = (options.images, 3, options.resolution, options.resolution)
    if path.is_dir():
        if list(ImageStore(path).info["shape"]) != list(shape):
            raise InputError(f"{path} is a store of another shape: choose another --folder.")
        return
    partial = path.with_name(f".{path.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    images = np.lib.format.open_memmap(partial / "images.npy", "w+", np.uint8, shape)
    for start in range(0, len(images), 4096):
        part = images[start : start + 4096]
        part[:] = np.frombuffer(rng.bytes(part.nbytes), np.uint8).reshape(part.shape)
    del images
    labels = rng.integers(0, options.classes, options.images)
    np.save(partial / "labels.npy", labels)
    info = {"format": 1, "shape": shape, "num_classes": options.classes, "fingerprint": "random"}
    (partial / "store.json").write_text(json.dumps(info), encoding="utf-8")
    partial.rename(path)


def _make_pictures(folder: Path, images: ImageStore, count: int) -> None:
    if folder.is_dir():
        return
    for number in range(min(count, len(images))):
        picture = images.images[number].transpose(1, 2, 0)
        save_png(folder / f"class{number % 10}" / f"{number}.png", np.ascontiguousarray(picture))


def _pace(images: ImageStore, index: npt.NDArray[np.int64]) -> float:
    start = time.perf_counter()
    for rows in index:
        images.read(rows)
    return index.size / (time.perf_counter() - start)


def _forget(path: Path) -> None:
    """Ask the system to drop a file from its page cache (Linux)."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _resident() -> float:
    """Resident memory of this process in bytes (Linux)."""
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def network_line(network: Denoiser, batch: int) -> str:
    """Network and batch in words."""
    count = sum(p.numel() for p in network.parameters())
    return f"{count:,} parameters, images {network.image_shape}, batch {batch}, float32"


def machine(device: torch.device) -> str:
    """Machine, versions and time in words."""
    found = versions()
    names = ", ".join(f"{key} {found[key]}" for key in ("torch", "python"))
    when = datetime.now(UTC).date().isoformat()
    return f"{device_name(device)}; {platform.processor() or platform.machine()}; {names}; {when}"


def main(args: list[str] | None = None) -> None:
    """Entry point."""
    parser = CommandParser(prog=COMMAND, allow_abbrev=False, description=__doc__)
    names = parser.add_subparsers(dest="name", required=True, parser_class=CommandParser)
    add = names.add_parser("references", help="SCT's posterior mean against a step").add_argument
    add("--network", choices=("small", "ddpmpp", "edm2_s"), default="small")
    add("--sizes", type=int, nargs="+", default=[64, 256, 1024, 4096])
    add("--batch", type=int, default=64)
    add("--repeats", type=int, default=20)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--seed", type=int, default=0)
    add = names.add_parser("classes", help="references of a class from a store").add_argument
    add("--images", type=int, default=1_281_167, help="[ImageNet's number, 15.7 GB at 64x64]")
    add("--resolution", type=int, default=64)
    add("--classes", type=int, default=1000)
    add("--batch", type=int, default=32, help="[32]")
    add("--sizes", type=int, nargs="+", default=[64, 256, 1024], help="references per row")
    add("--repeats", type=int, default=20)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--folder", required=True, help="where the store is made, and kept")
    add = names.add_parser("frechet", help="Frechet distance of given features").add_argument
    add("--dims", type=int, default=2048, help="features [2048]")
    add("--images", type=int, default=10000, help="images per side [10000]")
    add("--repeats", type=int, default=3)
    add("--seed", type=int, default=0)
    add = names.add_parser("bias", help="Frechet distance by number of samples").add_argument
    add("store", help="folder of a store")
    add("--features", default="Timm", help="[Timm]")
    add("--weights", help="file with the weights of the features")
    add("--sizes", type=int, nargs="+", default=[250, 500, 1000, 2000, 5000], help="images")
    add("--reference", type=int, default=10000, help="other images compared with [10000]")
    add("--seed", type=int, default=0)
    add = names.add_parser("store", help="random batches from a store").add_argument
    add("--images", type=int, default=1_281_167, help="[ImageNet's number, 15.7 GB at 64x64]")
    add("--resolution", type=int, default=64)
    add("--classes", type=int, default=1000)
    add("--batch", type=int, default=256)
    add("--batches", type=int, default=50)
    add("--files", type=int, default=2000, help="PNG files for the comparison")
    add("--folder", required=True, help="where the store is made, and kept")
    options = parser.parse_args(args)
    with readable_errors(COMMAND):
        for name, value in vars(options).items():
            small = min(value) if isinstance(value, list) else value
            if name != "seed" and isinstance(small, int) and small < 1:
                raise InputError(f"--{name} must be 1 or more, got {value}.")
        print(machine(torch.device(getattr(options, "device", "cpu"))), flush=True)
        benchmarks = {"references": references, "classes": classes, "frechet": frechet}
        benchmarks |= {"bias": bias, "store": store}
        print(benchmarks[options.name](options))


if __name__ == "__main__":
    main()
