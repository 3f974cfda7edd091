"""``cm-sample``: draw images from a run directory or a weights folder."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from cm_lightning.cli.drawing import add_guidance, guided, image_shape, phased_sampler
from cm_lightning.cli.errors import CommandParser, finite, readable_errors, whole
from cm_lightning.evaluation import (
    count_nonfinite,
    grid_columns,
    image_grid,
    save_npz,
    save_png,
    to_uint8,
)
from cm_lightning.files import hash_tensors, write_json
from cm_lightning.sampling import (
    EulerSampler,
    HeunSampler,
    MultistepSampler,
    Sampler,
    check_phases,
    draw_images,
)
from cm_lightning.transfer import keep_fp32
from cm_lightning.types import InputError
from cm_lightning.version import __version__
from cm_lightning.weights import load_weights

__all__ = ["main"]

COMMAND = "cm-sample"

RECORD = "samples.json"
"""What the images of a folder are: weights, sampler, guidance, seed, labels."""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = CommandParser(
        prog=COMMAND,
        allow_abbrev=False,
        description="Draw images from a trained model. Without --grid or --npz every image "
        "becomes a PNG file. Image i depends on the seed, the sigmas and its label alone.",
    )
    parser.add_allow_modules()
    add = parser.add_argument
    add("source", help="run directory, .ckpt file of a run, or weights folder")
    add(
        "--sigmas",
        type=finite,
        nargs="+",
        help="decreasing noise levels, one network call each [80, or the phases of the model]",
    )
    add(
        "--phases",
        type=finite,
        nargs="+",
        help="deterministic phases: their number, or their edges from 0 upwards",
    )
    add("--eta", type=finite, default=1.0, help="edge skipping of --phases, in (0, 1] [1]")
    add(
        "--heun",
        type=whole(10_000),
        metavar="STEPS",
        help="EDM's sampler instead: this many noise levels, 2 STEPS - 1 calls",
    )
    add(
        "--euler",
        type=whole(10_000),
        metavar="STEPS",
        help="first-order sampler instead, STEPS calls",
    )
    add("--n", type=whole(), default=64, help="number of images [64]")
    add("--seed", type=whole(2**53, least=0), default=0, help="seed of the noise [0]")
    add(
        "--out",
        required=True,
        help="folder for the images and samples.json, their record; existing files stay",
    )
    add("--labels", type=whole(least=-1), nargs="+", help="classes, repeated as needed [0 1 2 ...]")
    add("--ema", help="EMA profile of a run, or live [the run's first profile]")
    add_guidance(parser, "several write a folder each")
    add("--grid", action="store_true", help="write one picture, grid.png")
    add(
        "--npz",
        action="store_true",
        help="write samples.npz (arr_0: uint8 N x H x W x C, arr_1: labels)",
    )
    add("--batch", type=whole(), default=64, help="images per network call [64]")
    add("--device", help="cpu, cuda, cuda:1, ... [cuda if there is one]")
    return parser


def main(args: list[str] | None = None) -> None:
    """Entry point of ``cm-sample``."""
    options = build_parser().parse_args(args)
    keep_fp32()
    with readable_errors(COMMAND):
        run(options)


def choose_sampler(
    sigmas: list[float] | None,
    heun: int | None,
    euler: int | None,
    phases: list[float] | None = None,
    eta: float = 1.0,
) -> Sampler:
    """The sampler the options ask for.

    Raises:
        InputError: If several are given, or one is out of range.
    """
    if sum(option is not None for option in (sigmas, heun, euler, phases)) > 1:
        raise InputError("--sigmas, --phases, --heun and --euler exclude each other.")
    if phases is None and eta != 1:
        raise InputError("--eta belongs to --phases.")
    if heun is not None:
        return HeunSampler(heun)
    if euler is not None:
        return EulerSampler(euler)
    if phases is None:
        return MultistepSampler(tuple(sigmas or (80.0,)))
    return phased_sampler(phases, eta)


def choose_labels(given: list[int] | None, classes: int, n: int) -> torch.Tensor | None:
    """One label per image, repeating those given.

    Raises:
        InputError: If the model has no classes, or a label is out of range.
    """
    if not classes:
        if given:
            raise InputError("--labels was given, but the model is unconditional.")
        return None
    for label in given or []:
        if not 0 <= label < classes:
            raise InputError(f"--labels must lie in 0..{classes - 1}, got {label}.")
    choice = torch.tensor(given if given else range(classes))
    return choice[torch.arange(n) % len(choice)]


def check_out(out: Path, names: list[str]) -> None:
    """Refuse to replace files.

    Raises:
        InputError: If one of the files exists.
    """
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file, not a folder.")
    for name in names:
        if (out / name).exists():
            raise InputError(f"{out / name} exists already: choose another --out.")


def choose_device(name: str | None) -> torch.device:
    """The device to run on.

    Raises:
        InputError: If it does not exist.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name} cannot be used on this machine.") from error


def run(options: argparse.Namespace) -> None:
    """Check everything, then draw and write."""
    device = choose_device(options.device)
    denoiser, info, _ = load_weights(options.source, options.ema)
    phases = options.phases
    if phases is options.sigmas is options.heun is options.euler is None:
        phases = info.get("phases")
    chosen = (phases, options.sigmas, options.heun, options.euler)
    if info["regime"] == "Diffusion" and chosen == (None,) * 4:
        print(
            f"{options.source} is a diffusion model, whose first call gives a mean: try --heun 18."
        )
    sampler = choose_sampler(options.sigmas, options.heun, options.euler, phases, options.eta)
    check_phases(info.get("phases"), [sampler], COMMAND)
    labels = choose_labels(options.labels, denoiser.num_classes, options.n)
    models = {
        f"guidance{scale:g}" if len(options.guidance or []) > 1 else "": model
        for (_, scale), model in guided({"": denoiser}, options).items()
    }
    single = [f"{i:06d}.png" for i in range(options.n)]
    pictures = [] if options.grid or options.npz else single
    grid = ["grid.png"] if options.grid else []
    npz = ["samples.npz"] if options.npz else []
    for folder in models:
        check_out(Path(options.out) / folder, [*pictures, *grid, *npz, RECORD])

    for folder, model in models.items():
        out = Path(options.out) / folder
        parts: list[torch.Tensor] = []
        bad = 0
        for batch in draw_images(
            model.to(device).eval(),
            sampler,
            range(options.n),
            labels,
            seed=options.seed,
            shape=image_shape(model),
            batch=options.batch,
            device=device,
        ):
            bad += count_nonfinite(batch)
            parts.append(to_uint8(batch).cpu())
        if bad:
            raise InputError(f"{bad} of {options.n} images of {options.source} are not finite.")
        images = torch.cat(parts)
        for name, image in zip(pictures, images, strict=False):
            save_png(out / name, image.permute(1, 2, 0).numpy())
        if grid:
            columns = grid_columns(len(options.labels or range(model.num_classes)))
            save_png(out / "grid.png", image_grid(images, columns=columns))
        if npz:
            save_npz(out / "samples.npz", images, labels)
        record = {
            "source": str(options.source),
            **{key: info[key] for key in ("regime", "ema", "kimg")},
            "weights_sha256": hash_tensors(denoiser.state_dict()),
            "sampler": str(sampler),
            "guidance": model.scale,
            "guided_by": options.worse_ema or options.worse,
            "seed": options.seed,
            "labels": None if labels is None else labels.tolist(),
            "version": __version__,
        }
        write_json(out / RECORD, record)
        age = "" if info["kimg"] is None else f"{info['kimg']:g} kimg, "
        written = [*grid, *npz] or [f"{len(pictures)} PNG files"]
        print(
            f"{options.n} images ({info['regime']}, {info['ema']}, {age}"
            f"{sampler.nfe * model.calls} network calls each): {', '.join(written)} in {out}"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
