"""``cm-eval``: scores of a trained model over many samples and several seeds."""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from cm_lightning.callbacks.run_record import device_name, versions, write_text
from cm_lightning.cli.errors import CommandParser, finite, readable_errors, whole
from cm_lightning.cli.study_report import table
from cm_lightning.data import ImageDataModule
from cm_lightning.documents import build, check_form, one_line, read_mapping
from cm_lightning.evaluation import (
    FeatureExtractor,
    load_statistics,
    reference_statistics,
    to_uint8,
)
from cm_lightning.evaluation.images import save_npz
from cm_lightning.evaluation.reference import Statistics
from cm_lightning.evaluation.scores import SCORES, Outputs, check_scores, extract, scores
from cm_lightning.files import hash_tensors
from cm_lightning.sampling import (
    EulerSampler,
    GuidedDenoiser,
    HeunSampler,
    MultistepSampler,
    PhasedSampler,
    Sampler,
    draw_images,
    draw_labels,
    evaluating,
)
from cm_lightning.sigmas import phase_edges
from cm_lightning.types import Denoiser, InputError
from cm_lightning.weights import check_class_paths, load_weights

__all__ = ["main"]

COMMAND = "cm-eval"


class Cell(NamedTuple):
    """One model, one way to draw from it and one seed.

    Attributes:
        ema: EMA profile.
        guidance: Guidance scale.
        worse: Hash of the guiding weights, ``None`` without.
        sampling: The sampler in words.
        sampler: The sampler.
        seed: Seed of the noise.
    """

    ema: str
    guidance: float
    worse: str | None
    sampling: str
    sampler: Sampler
    seed: int

    @property
    def key(self) -> tuple[str, float, str | None, str, int]:
        """What identifies the cell in ``eval.json``, in the order of :data:`KEY`."""
        return (self.ema, self.guidance, self.worse, self.sampling, self.seed)


KEY = ("ema", "guidance", "worse", "sampling", "seed")
RESULTS = {
    "results": [
        {
            "ema": str,
            "guidance": float,
            "worse": (str, type(None)),
            "sampling": str,
            "seed": int,
            "nfe": int,
            **dict.fromkeys(("fd?", "kid?", "is?", "precision?", "recall?"), float),
        }
    ]
}
"""Form of ``eval.json``."""


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


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = CommandParser(
        prog=COMMAND,
        allow_abbrev=False,
        description="Draw samples, compute their scores for every combination of EMA profile, "
        "guidance scale, sampler and seed, and write eval.json, eval.md and, on request, the "
        "samples. Called again, it continues. Data, features and samplers are those of the run.",
    )
    add = parser.add_argument
    add("source", help="run directory, .ckpt file of a run, or weights folder")
    add("--config", help="YAML with `data` and `fid`, for weights without a run or other features")
    add("--features", metavar="CLASS", help="compare over these instead, such as FashionFeatures")
    add("--out", help="folder for the results [SOURCE/eval]")
    add("--n", type=whole(), default=50_000, help="samples per seed [50000]")
    add(
        "--seeds",
        type=whole(2**53),
        nargs="+",
        default=[0, 1, 2],
        help="seeds of the noise [0 1 2]",
    )
    add("--scores", nargs="+", default=["fd"], metavar="S", help=f"of {', '.join(SCORES)} [fd]")
    add("--ema", nargs="+", metavar="NAME", help="EMA profiles, or live [the run's first profile]")
    add(
        "--sigmas",
        type=finite,
        nargs="+",
        action="append",
        metavar="SIGMA",
        help="decreasing noise levels, one network call each; may be given several times",
    )
    add(
        "--mid",
        nargs=3,
        metavar=("LOW", "HIGH", "N"),
        help="sweep the second level of two-step sampling, N levels at equal ratios; draws mid.png",
    )
    add(
        "--phases",
        type=finite,
        nargs="+",
        action="append",
        metavar="EDGE",
        help="deterministic phases: their number, or their edges; may be given several times",
    )
    add("--eta", type=finite, nargs="+", default=[1.0], help="edge skipping of --phases [1]")
    add("--heun", type=whole(10_000), nargs="+", default=[], metavar="STEPS", help="EDM's sampler")
    add(
        "--euler",
        type=whole(10_000),
        nargs="+",
        default=[],
        metavar="STEPS",
        help="first-order sampler",
    )
    add("--guidance", type=finite, nargs="+", default=[1.0], metavar="W", help="scales [1]")
    add("--worse_ema", metavar="NAME", help="guide by this profile or snapshot, as ema_0.9999@0.5")
    add("--worse", metavar="RUN", help="guide by another run; without either by missing labels")
    add(
        "--accept_reference",
        action="store_true",
        help="take a reference file that says it was made from other images or features",
    )
    add("--npz", action="store_true", help="keep the samples of the first seed (arr_0: uint8)")
    add("--batch", type=whole(), default=256, help="images per network call [256]")
    add("--accelerator", default="auto", help="cpu, gpu, ... [auto]")
    add("--devices", type=whole(4096), default=1, help="devices to share the samples [1]")
    return parser


def main(args: list[str] | None = None) -> None:
    """Entry point of ``cm-eval``."""
    options = build_parser().parse_args(args)
    with readable_errors(COMMAND):
        run(options)


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
    if parts.get("features") is None:
        raise InputError(f"{where} names no fid.features.")
    if config.get("data") is None:
        del types["data"]
    else:
        parts["data"] = config["data"]
    check_class_paths(parts, where)
    built = build(types, parts, f"`fid` or `data` of {where}")
    extractor, data = built["features"], built.get("data")
    reference = "auto" if built["reference"] is None else built["reference"]
    if data is None and reference == "auto":
        raise InputError(f"{where} has neither `data` nor `fid.reference`: give one of them.")
    return Against(data, extractor, reference, built["samplers"] or [])


def choose_samplers(
    options: argparse.Namespace, configured: list[Sampler]
) -> list[tuple[str, Sampler]]:
    """Every sampler asked for, with its words; those of the config if none is.

    Raises:
        InputError: If one is out of range or given twice.
    """
    found = [MultistepSampler(tuple(sigmas)) for sigmas in options.sigmas or []]
    found += [MultistepSampler((80.0, mid)) for mid in mid_levels(options.mid)]
    chosen: list[Sampler] = [*found]
    for phases in options.phases or []:
        if len(phases) == 1 and phases[0] != int(phases[0]):
            raise InputError(f"--phases {phases[0]:g} is no number of phases: give 1, 2, 3, ...")
        edges = phase_edges(int(phases[0])) if len(phases) == 1 else tuple(phases)
        chosen += [PhasedSampler(edges, eta) for eta in options.eta]
    if options.eta != [1.0] and not options.phases:
        raise InputError("--eta belongs to --phases.")
    chosen += [HeunSampler(steps) for steps in options.heun]
    chosen += [EulerSampler(steps) for steps in options.euler]
    named = [(words(sampler), sampler) for sampler in chosen or configured]
    if not named:
        raise InputError("Nothing says how to draw: give --sigmas, --phases, --heun or --euler.")
    if len({name for name, _ in named}) < len(named):
        raise InputError("The same sampling is asked for twice.")
    return named


def mid_levels(given: Sequence[str] | None) -> list[float]:
    """Levels of ``--mid LOW HIGH N``.

    Raises:
        InputError: If they do not make a sweep.
    """
    if given is None:
        return []
    try:
        low, high, n = float(given[0]), float(given[1]), int(given[2])
    except ValueError as error:
        raise InputError(f"--mid {' '.join(given)}: two levels and a number are needed.") from error
    if not 0 < low < high < 80 or not 2 <= n <= 1000:
        raise InputError(
            f"--mid needs 0 < LOW < HIGH < 80 and N of 2 to 1000, got {low:g} {high:g} {n}."
        )
    step = math.log(high / low) / (n - 1)
    return [float(f"{low * math.exp(i * step):.4g}") for i in range(n)]


def words(sampler: Sampler) -> str:
    """A sampler in words, as its row in tables."""
    if isinstance(sampler, MultistepSampler):
        return "sigmas " + " ".join(f"{sigma:g}" for sigma in sampler.sigmas)
    if isinstance(sampler, PhasedSampler):
        eta = "" if sampler.eta == 1 else f", eta {sampler.eta:g}"
        return "phases " + " ".join(f"{edge:.4g}" for edge in sampler.edges) + eta
    kind = "heun" if isinstance(sampler, HeunSampler) else "euler"
    return f"{kind}, {sampler.nfe} calls"


def run(options: argparse.Namespace) -> None:
    """Check everything, then score cell after cell and write after each."""
    source = Path(options.source)
    for name, value in (("n", options.n), ("batch", options.batch), ("devices", options.devices)):
        if value < 1:
            raise InputError(f"--{name} must be 1 or more, got {value}.")
    if min(options.seeds) < 0 or len(set(options.seeds)) < len(options.seeds):
        raise InputError(f"--seeds must be 0 or more, each once, got {options.seeds}.")
    if options.guidance == [1.0] and (options.worse or options.worse_ema):
        raise InputError("--worse and --worse_ema belong to --guidance.")
    config, where = read_config(source, options.config)
    if options.features is not None:
        check_class_paths({"class_path": options.features}, "--features")
        config["fid"] = config["fid"] | {"features": options.features}
        where = f"--features {options.features} or of {where}"
    against = read_against(config, where)
    named = choose_samplers(options, against.samplers)
    out = Path(options.out) if options.out else source / "eval"
    if options.out is None and not source.is_dir():
        raise InputError(f"{source} is a file: give --out.")
    loaded = [load_weights(source, name) for name in options.ema or [None]]
    models = {str(found.info["ema"]): found for found in loaded}
    guided = {
        (name, scale): guide(found.denoiser, scale, options)
        for name, found in models.items()
        for scale in options.guidance
    }
    against.extractor.load()
    try:
        fabric = L.Fabric(accelerator=options.accelerator, devices=options.devices)
    except (ValueError, RuntimeError, MisconfigurationException) as error:
        raise InputError(
            f"--accelerator {options.accelerator} with --devices {options.devices} cannot be used "
            f"here: {one_line(error)}."
        ) from error
    fabric.launch()
    reference = prepare_reference(against, options, fabric)
    check_scores(options.scores, options.n, reference.real_n, against.extractor)
    first = loaded[0]
    identity = {
        "source": str(source),
        "weights": {
            name: hash_tensors(found.denoiser.state_dict()) for name, found in models.items()
        },
        "regime": first.info["regime"],
        "kimg": first.info["kimg"],
        "n": options.n,
        "features": against.extractor.name,
        "features_sha256": against.extractor.fingerprint,
        "reference": against.reference,
        "data_fingerprint": None if against.data is None else against.data.fingerprint,
    }
    cells = [
        (Cell(name, scale, worse_hash(model), sampling, sampler, seed), model)
        for (name, scale), model in guided.items()
        for sampling, sampler in named
        for seed in options.seeds
    ]
    book = Book(out, identity, fabric.is_global_zero)
    for number, (cell, model) in enumerate(cells, 1):
        if book.missing(cell, options.scores):
            started = time.perf_counter()
            outputs, images = draw(model, cell, against, options, fabric)
            if fabric.is_global_zero:
                found = scores(options.scores, outputs, reference.statistics, reference.real)
                if images is not None:
                    labels = eval_labels(against, model, range(options.n))
                    save_npz(out / f"{slug(cell)}.npz", images, labels)
                nfe = cell.sampler.nfe * model.calls
                book.add(cell, nfe, found, time.perf_counter() - started, fabric.device)
        if fabric.is_global_zero:
            row = book.found(cell)
            shown = ", ".join(f"{k} {row[k]:.5g}" for k in COLUMNS if k in row)
            print(
                f"[{number}/{len(cells)}] {describe(cell)}, seed {cell.seed}: {shown}", flush=True
            )
    if fabric.is_global_zero:
        book.write_table()
        if options.mid:
            mid_figure(book, out / "mid.png")
        print(f"\n{book.table()}\nWritten to {out / 'eval.md'} and {out / 'eval.json'}.")


COLUMNS = ("fd", "kid", "is", "precision", "recall")


def describe(cell: Cell) -> str:
    """A cell without its seed in words."""
    guidance = "" if cell.guidance == 1 else f", guidance {cell.guidance:g}"
    return f"{cell.ema}, {cell.sampling}{guidance}"


def slug(cell: Cell) -> str:
    """A cell without its seed as a file name."""
    return describe(cell).replace(",", "").replace(" ", "-")


def guide(denoiser: Denoiser, scale: float, options: argparse.Namespace) -> GuidedDenoiser:
    """The model under a guidance scale.

    Raises:
        InputError: If the guiding model is missing or unfit.
    """
    worse = None
    if scale != 1 and (options.worse or options.worse_ema):
        worse = load_weights(options.worse or options.source, options.worse_ema).denoiser
    return GuidedDenoiser(denoiser, worse, scale)


def worse_hash(model: GuidedDenoiser) -> str | None:
    """Hash of the guiding weights, ``None`` without them."""
    return None if model.worse is None else hash_tensors(model.worse.state_dict())


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
        images = torch.from_numpy(data.store.images)
        real = torch.cat(
            [
                extract(extractor, images[i : i + options.batch].to(fabric.device)).features
                for i in range(0, len(images), options.batch)
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
    if model.image_shape is None:
        raise InputError("The network does not say which image shape it makes.")
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
            shape=model.image_shape,
            batch=options.batch,
            device=fabric.device,
        ):
            bad += int((~batch.isfinite()).flatten(1).any(1).sum())
            images = to_uint8(batch.nan_to_num())
            outputs = extract(against.extractor, images)
            logits = torch.empty(len(images), 0) if outputs.logits is None else outputs.logits
            kept = images.cpu() if keep else torch.empty(len(images), 0, dtype=torch.uint8)
            parts.append((outputs.features, logits, kept))
    if bad:
        raise InputError(f"{bad} of {len(index)} samples of {describe(cell)} are not finite.")
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


class Book:
    """``eval.json``: what was measured, under which identity.

    Args:
        out: Folder of the results.
        identity: What must be equal for results to stand together.
        writes: Whether this process writes.

    Raises:
        InputError: If the folder holds results of something else.
    """

    def __init__(self, out: Path, identity: dict[str, Any], writes: bool) -> None:
        self.path, self.identity, self.writes = out / "eval.json", identity, writes
        self.results: list[dict[str, Any]] = []
        if not self.path.is_file():
            return
        try:
            old = read_mapping(self.path)
            check_form(old, RESULTS | dict.fromkeys(identity, object), str(self.path))
            self.results, weights = old["results"], old["weights"]
            check_form(weights, {...: str}, str(self.path), "weights")
        except InputError as error:
            raise InputError(f"{self.path} is not a result of {COMMAND}: {error}") from error
        compared = {key: old[key] for key in identity if key not in ("source", "weights")}
        known = identity["weights"]
        compared["weights"] = {name: weights.get(name, digest) for name, digest in known.items()}
        for key, value in compared.items():
            if value != identity[key]:
                raise InputError(
                    f"{self.path} was measured with another {key} ({value}, now {identity[key]}): "
                    "choose another --out."
                )
        self.identity["weights"] = weights | known

    def found(self, cell: Cell) -> dict[str, Any]:
        """The row of a cell, empty if it is not there."""
        for row in self.results:
            if tuple(row[name] for name in KEY) == cell.key:
                return row
        return {}

    def missing(self, cell: Cell, names: Sequence[str]) -> bool:
        """Whether a score of a cell is not there yet."""
        row = self.found(cell)
        return any(("precision" if name == "prc" else name) not in row for name in names)

    def add(
        self, cell: Cell, nfe: int, found: dict[str, float], seconds: float, device: torch.device
    ) -> None:
        """Add scores of a cell and write the file."""
        row = self.found(cell)
        if not row:
            row |= dict(zip(KEY, cell.key, strict=True)) | {"nfe": nfe}
            self.results.append(row)
        row |= found | {
            "seconds": round(seconds, 1),
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "device": device_name(device),
            "host": platform.node(),
        }
        content = self.identity | {"versions": versions(), "results": self.results}
        write_text(self.path, json.dumps(content, indent=2) + "\n")

    def rows(self) -> Iterator[tuple[tuple[str, float, str, int], list[dict[str, Any]]]]:
        """Results by everything but the seed."""
        groups: dict[tuple[str, float, str, int], list[dict[str, Any]]] = {}
        for row in self.results:
            key = (row["ema"], row["guidance"], row["sampling"], row["nfe"])
            groups.setdefault(key, []).append(row)
        yield from groups.items()

    def table(self) -> str:
        """Mean and standard deviation over seeds as Markdown."""
        columns = [name for name in COLUMNS if any(name in row for row in self.results)]
        lines = []
        for (ema, guidance, sampling, nfe), rows in self.rows():
            cells = [ema, sampling, f"{guidance:g}", str(nfe), str(len(rows))]
            for name in columns:
                values = torch.tensor([r[name] for r in rows if name in r], dtype=torch.float64)
                if not len(values):
                    cells.append("")
                elif len(values) == 1:
                    cells.append(f"{float(values[0]):.4g}")
                else:
                    cells.append(f"{float(values.mean()):.4g} ± {float(values.std()):.2g}")
            lines.append(cells)
        head = ["EMA", "sampling", "guidance", "NFE", "seeds", *columns]
        return table(head, lines)

    def write_table(self) -> None:
        """Write ``eval.md``."""
        identity = self.identity
        text = (
            f"{identity['regime']} at {identity['kimg']} kimg from {identity['source']}; "
            f"{identity['n']:,} samples per seed, features {identity['features']} "
            f"({identity['features_sha256'][:16]}), data "
            f"{(identity['data_fingerprint'] or identity['reference'])[:16]}. Mean ± standard "
            "deviation over seeds; NFE counts every network call, two per guided step."
        )
        write_text(self.path.with_name("eval.md"), f"{text}\n\n{self.table()}\n")


def mid_figure(book: Book, path: Path) -> None:
    """Draw the Frechet distance over the second level of two-step sampling."""
    from matplotlib.figure import Figure

    from cm_lightning.evaluation import save_figure

    figure = Figure(figsize=(4.5, 3.2), layout="constrained")
    axis = figure.subplots()
    curves: dict[tuple[str, float], list[tuple[float, float]]] = {}
    for (ema, guidance, sampling, _), rows in book.rows():
        levels = sampling.removeprefix("sigmas ").split()
        if sampling.startswith("sigmas ") and len(levels) == 2 and levels[0] == "80":
            mean = sum(row["fd"] for row in rows) / len(rows)
            curves.setdefault((ema, guidance), []).append((float(levels[1]), mean))
    for (ema, guidance), points in curves.items():
        label = ema if guidance == 1 else f"{ema}, guidance {guidance:g}"
        axis.plot(*zip(*sorted(points), strict=True), marker="o", label=label)
    axis.set_xscale("log")
    axis.set_xlabel("second noise level")
    axis.set_ylabel(f"FD, {book.identity['features']}, n = {book.identity['n']:,}")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
    save_figure(figure, path)


if __name__ == "__main__":
    main(sys.argv[1:])
