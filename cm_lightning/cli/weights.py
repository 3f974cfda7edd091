"""``cm-weights``: look into weight files and bring public ones in, safely."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cm_lightning.cli.errors import CommandParser, finite, readable_errors, whole
from cm_lightning.documents import check_form, printable, read_mapping
from cm_lightning.ema import power_exponent
from cm_lightning.files import write_text
from cm_lightning.types import Denoiser, InputError
from cm_lightning.weights import (
    Loaded,
    is_public,
    load_posthoc,
    load_public,
    load_weights,
    save_weights,
    write_diffusers,
)

__all__ = ["main"]

COMMAND = "cm-weights"
DESCRIPTION = "Look into weight files and bring public ones in, safely."


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = CommandParser(prog=COMMAND, allow_abbrev=False, description=DESCRIPTION)
    actions = parser.add_subparsers(dest="action", required=True, parser_class=CommandParser)
    inspect = actions.add_parser("inspect", help="say what a file or folder holds")
    inspect.add_argument(
        "source", help=".pkl, .pt, folder of diffusers, weights folder, run directory or .ckpt"
    )
    bring = actions.add_parser("import", help="turn a published file into safe weights")
    bring.add_argument(
        "source",
        help="EDM, EDM2 or ECT .pkl (nothing in it is executed), OpenAI .pt, or a folder of "
        "diffusers' ConsistencyModelPipeline",
    )
    for action in (inspect, bring):
        action.add_argument(
            "--resolution",
            type=whole(16384),
            help="side of the images, where an OpenAI file leaves it open",
        )
    bring.add_argument("--out", required=True, help="folder to make; must not exist")
    bring.add_argument(
        "--regime",
        choices=("Diffusion", "ECT", "CD", "CT"),
        help="what trained the weights [Diffusion; CD for a folder of diffusers]",
    )
    export = actions.add_parser("export", help="portable weights with a model card")
    export.add_argument("source", help="run directory, .ckpt in one, or weights folder")
    export.add_argument("--ema", help="EMA profile or snapshot of a run [its first profile]")
    export.add_argument("--out", required=True, help="folder to make; must not exist")
    export.add_argument(
        "--format",
        choices=("safetensors", "diffusers"),
        default="safetensors",
        help="diffusers: a ConsistencyModelPipeline, where its network can compute ours",
    )
    phema = actions.add_parser(
        "phema", help="averages of other widths, from a run's PowerEMA profiles and snapshots"
    )
    phema.add_argument("source", help="run directory, or .ckpt in one")
    phema.add_argument(
        "--std", type=finite, nargs="+", required=True, help="relative widths, a folder each"
    )
    phema.add_argument("--out", required=True, help="folder for them; must not exist")
    for action in (inspect, export, phema):
        action.add_allow_modules()
    return parser


def main(args: list[str] | None = None) -> None:
    """Entry point of ``cm-weights``."""
    options = build_parser().parse_args(args)
    with readable_errors(COMMAND):
        actions = {"inspect": inspect, "import": bring, "export": export, "phema": phema}
        actions[options.action](options)


def summary(denoiser: Denoiser) -> str:
    """Network, size, images and classes, a line each."""
    backbone = getattr(denoiser, "backbone", denoiser)
    parameters = sum(p.numel() for p in denoiser.parameters())
    return "\n".join(
        [
            f"  network     {type(denoiser).__name__}({type(backbone).__name__})",
            f"  parameters  {parameters:,} in {len(denoiser.state_dict())} tensors with buffers",
            f"  images      {denoiser.image_shape} (channels, height, width)",
            f"  classes     {denoiser.num_classes or 'none'}",
            f"  sigma_data  {denoiser.sigma_data:g}",
        ]
    )


def inspect(options: argparse.Namespace) -> None:
    """Say what a file or folder holds."""
    path = Path(options.source)
    if is_public(path):
        denoiser, info, config = load_public(path, resolution=options.resolution)
        print(f"{path}: {info['kind']}")
    else:
        denoiser, info, config = load_weights(path)
        print(printable(f"{path}: {info.get('regime')}, EMA profile {info.get('ema')}"))
    print(summary(denoiser))
    if is_public(path):
        print(assumption(info))
    arguments = (config["init_args"].get("backbone") or {}).get("init_args") or {}
    if arguments:
        told = ", ".join(f"{key} {value}" for key, value in arguments.items())
        print(printable(f"  arguments   {told}"))
    for key in ("kimg", "data_fingerprint", "source"):
        if info.get(key) is not None:
            print(printable(f"  {key.replace('_', ' '):<11} {info[key]}"))
    licence = "; ".join(licences(info)) or "that of the data and of whoever trained the weights"
    print(printable(f"  licence     {licence}"))


def assumption(info: Mapping[str, Any]) -> str:
    """Which regime published weights are taken to be of; the file does not tell."""
    return f"  regime      {info['regime']} (cm-weights import --regime says another)"


def check_out(out: Path) -> None:
    """Check that a folder may be filled.

    Raises:
        InputError: If it is there and not an empty folder.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"--out {out} exists already: choose another folder.")


def bring(options: argparse.Namespace) -> None:
    """Write ``model.safetensors`` and ``config.json`` of a published file."""
    path, out = Path(options.source), Path(options.out)
    check_out(out)
    denoiser, info, config = load_public(path, options.regime, options.resolution)
    save_weights(out, config, denoiser.state_dict(), info)
    print(f"{path} -> {out}/model.safetensors and config.json")
    print(summary(denoiser))
    print(assumption(info))
    print(f"  licence     {info['licence']}")


def export(options: argparse.Namespace) -> None:
    """Write portable weights and a model card."""
    out = Path(options.out)
    check_out(out)
    source = Path(options.source)
    write(load_weights(source, options.ema), source, out, options.format)


def phema(options: argparse.Namespace) -> None:
    """Reconstruct averages and write each as portable weights."""
    out = Path(options.out)
    check_out(out)
    for std in options.std:
        power_exponent(std)
    names = [f"std{std:.3f}" for std in options.std]
    if len(set(names)) < len(names):
        raise InputError(f"--std names a width twice: {', '.join(names)}.")
    for std in options.std:
        write(load_posthoc(options.source, std), Path(options.source), out / f"std{std:.3f}")


def write(loaded: Loaded, source: Path, out: Path, layout: str = "safetensors") -> None:
    """Write weights with a model card and say so."""
    denoiser, info, config = loaded
    if layout == "diffusers":
        if len(info.get("phases") or []) > 2:
            raise InputError(
                f"{source} is trained in phases, which no pipeline of diffusers follows."
            )
        write_diffusers(out, config, denoiser.state_dict())
        use = "from diffusers import ConsistencyModelPipeline\n\n" + DIFFUSERS_USE
        files = "model_index.json, unet, scheduler"
    else:
        save_weights(out, config, denoiser.state_dict(), info)
        use = "from cm_lightning.weights import from_pretrained\n\n" + PACKAGE_USE
        files = "model.safetensors, config.json"
    measured = distances(source, info.get("kimg"))
    write_text(out / "README.md", model_card(denoiser, info, measured, use))
    print(f"{source} -> {out}: {files} and README.md")
    print(summary(denoiser))


def distances(source: Path, kimg: float | None) -> dict[str, float]:
    """Frechet distances in a run's record, empty if there are none of that moment.

    Args:
        source: Run directory, checkpoint in one, or other weights.
        kimg: Length of training of the weights in thousands of images.
    """
    run = source.parent.parent if source.suffix == ".ckpt" else source
    if not (run / "run.json").is_file():
        return {}
    record = read_mapping(run / "run.json")
    form = {"results?": {"kimg": float, "last": {...: float}}}
    check_form(record, form, str(run / "run.json"))
    results = record.get("results")
    return dict(results["last"]) if results and results["kimg"] == kimg else {}


def licences(info: dict[str, Any]) -> list[str]:
    """Licences of all weights that these rest on, each once."""
    found = [info["licence"]] if info.get("licence") else []
    for origin in (info.get("origins") or {}).values():
        if isinstance(origin, dict):
            found += licences(origin)
    return list(dict.fromkeys(found))


DIFFUSERS_USE = 'pipeline = ConsistencyModelPipeline.from_pretrained("this folder")'
PACKAGE_USE = 'denoiser = from_pretrained("this folder")'


def model_card(
    denoiser: Denoiser, info: dict[str, Any], measured: dict[str, float], use: str
) -> str:
    """A model card in Markdown.

    Args:
        denoiser: The network.
        info: What is known about its training.
        measured: Frechet distances by name.
        use: Python that loads the model.
    """
    kimg = "unknown" if info.get("kimg") is None else f"{info['kimg']:g} thousand images"
    lines = [
        f"# {info.get('regime')} model",
        "",
        "Image generator trained with [cm-lightning](https://github.com/cm-lightning/cm-lightning).",
        "",
        "| | |",
        "|---|---|",
        f"| regime | {info.get('regime')} |",
        f"| length of training | {kimg} |",
        f"| average of the weights | {info.get('ema')} |",
        f"| data, SHA-256 | {info.get('data_fingerprint') or 'unknown'} |",
    ]
    lines += [line.replace("  ", "| ", 1) + " |" for line in _rows(denoiser)]
    if info.get("phases"):
        lines.append(f"| phases (edges) | {', '.join(f'{edge:g}' for edge in info['phases'])} |")
    for role, origin in (info.get("origins") or {}).items():
        lines.append(f"| {role} | {origin.get('path')}, SHA-256 {origin.get('sha256')} |")
    own = [(key, value) for key, value in measured.items() if f"/{info.get('ema')}/" in key]
    lines += [f"| {key} | {value:.4g} |" for key, value in own]
    carried = licences(info)
    text = "; ".join(carried) or "that of the data and of whoever trained the weights"
    lines += ["", "## Licence", "", f"Of the weights this model was made from: {text}.", ""]
    lines += ["## Use", "", "```python", use, "```", ""]
    return "\n".join(lines)


def _rows(denoiser: Denoiser) -> list[str]:
    return ["  " + " | ".join(line.split(maxsplit=1)) for line in summary(denoiser).splitlines()]


if __name__ == "__main__":
    main(sys.argv[1:])
