"""``cm-eval``: scores of a trained model over many samples and several seeds."""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import lightning as L
from lightning.fabric.utilities.exceptions import MisconfigurationException

from cm_lightning.cli.drawing import add_guidance, guided, phased_sampler
from cm_lightning.cli.errors import CommandParser, finite, readable_errors, whole
from cm_lightning.cli.evaluate_results import COLUMNS, Book, Cell, describe, mid_figure, slug
from cm_lightning.cli.evaluate_samples import (
    draw,
    eval_labels,
    prepare_reference,
    read_against,
    read_config,
)
from cm_lightning.documents import one_line
from cm_lightning.evaluation import reference_name
from cm_lightning.evaluation.images import save_npz
from cm_lightning.evaluation.scores import SCORES, check_scores, scores
from cm_lightning.files import hash_tensors
from cm_lightning.modules import check_class_paths
from cm_lightning.sampling import (
    EulerSampler,
    GuidedDenoiser,
    HeunSampler,
    MultistepSampler,
    Sampler,
    check_phases,
)
from cm_lightning.transfer import keep_fp32
from cm_lightning.types import InputError
from cm_lightning.weights import load_weights

__all__ = ["main"]

COMMAND = "cm-eval"


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = CommandParser(
        prog=COMMAND,
        allow_abbrev=False,
        description="Draw samples, compute their scores for every combination of EMA profile, "
        "guidance scale, sampler and seed, and write eval.json, eval.md and, on request, the "
        "samples. Called again, it continues. Data, features and samplers are those of the run.",
    )
    parser.add_allow_modules()
    add = parser.add_argument
    add("source", help="run directory, .ckpt file of a run, or weights folder")
    add("--config", help="YAML with `data` and `fid`, for weights without a run or other features")
    add("--features", metavar="CLASS", help="compare over these instead, such as FashionFeatures")
    add("--out", help="folder for the results [SOURCE/eval]")
    add("--n", type=whole(), default=50_000, help="samples per seed [50000]")
    add(
        "--seeds",
        type=whole(2**53, least=0),
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
    add(
        "--heun",
        type=whole(10_000),
        nargs="+",
        default=[],
        metavar="STEPS",
        help="EDM's sampler: this many noise levels, 2 STEPS - 1 calls",
    )
    add(
        "--euler",
        type=whole(10_000),
        nargs="+",
        default=[],
        metavar="STEPS",
        help="first-order sampler, STEPS calls",
    )
    add_guidance(parser, "several are scored each")
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
    keep_fp32()
    with readable_errors(COMMAND):
        run(options)


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
        chosen += [phased_sampler(phases, eta) for eta in options.eta]
    if options.eta != [1.0] and not options.phases:
        raise InputError("--eta belongs to --phases.")
    chosen += [HeunSampler(steps) for steps in options.heun]
    chosen += [EulerSampler(steps) for steps in options.euler]
    named = [(sampler.words, sampler) for sampler in chosen or configured]
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


def run(options: argparse.Namespace) -> None:
    """Check everything, then score cell after cell and write after each."""
    source = Path(options.source)
    if len(set(options.seeds)) < len(options.seeds):
        raise InputError(f"--seeds must be named once each, got {options.seeds}.")
    if options.mid and "fd" not in options.scores:
        raise InputError("--mid draws Frechet distances: add fd to --scores.")
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
    check_phases(loaded[0].info.get("phases"), [sampler for _, sampler in named], COMMAND)
    models = {str(found.info["ema"]): found for found in loaded}
    drawn = guided({name: found.denoiser for name, found in models.items()}, options)
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
    if against.data is not None:
        shape, real = loaded[0].denoiser.image_shape, against.data.image_shape
        if shape not in (None, real):
            raise InputError(
                f"{source} makes images of shape (C, H, W) {shape}, the data of {where} have "
                f"{real}: give the --config of its data."
            )
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
        "reference": reference_name(against.reference),
        "data_fingerprint": None if against.data is None else against.data.fingerprint,
    }
    guides = {key: (worse_hash(model), guiding(model, options)) for key, model in drawn.items()}
    cells = [
        (Cell(*key, *guides[key], sampling, sampler, seed), model)
        for key, model in drawn.items()
        for sampling, sampler in named
        for seed in options.seeds
    ]
    book = Book(out, identity)
    for number, (cell, model) in enumerate(cells, 1):
        wanted = options.npz and cell.seed == options.seeds[0]
        if book.missing(cell, options.scores) or (wanted and not samples_of(cell, out).is_file()):
            started = time.perf_counter()
            outputs, images = draw(model, cell, against, options, fabric)
            if fabric.is_global_zero:
                found = scores(
                    options.scores,
                    outputs,
                    reference.statistics,
                    reference.real,
                    device=fabric.device,
                )
                if images is not None:
                    labels = eval_labels(against, model, range(options.n))
                    save_npz(samples_of(cell, out), images, labels)
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


def guiding(model: GuidedDenoiser, options: argparse.Namespace) -> str | None:
    """Name of the guiding weights: the run's own average, or others by folder and average."""
    if model.worse is None:
        return None
    if options.worse is None:
        return str(options.worse_ema)
    path = Path(options.worse).resolve()
    inside = path.suffix == ".ckpt" or path.parent.name == "weights"
    run = path.parent.parent.name if inside else path.parent.name
    return " ".join(filter(None, (f"{run}/{path.name}", options.worse_ema)))


def samples_of(cell: Cell, out: Path) -> Path:
    """File of a cell's samples."""
    return out / f"{slug(cell)}.npz"


def worse_hash(model: GuidedDenoiser) -> str | None:
    """Hash of the guiding weights, ``None`` without them."""
    return None if model.worse is None else hash_tensors(model.worse.state_dict())


if __name__ == "__main__":
    main(sys.argv[1:])
