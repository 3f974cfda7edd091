"""Published weights of other projects, read safely into the classes of this package."""

from __future__ import annotations

from pathlib import Path

from cm_lightning.files import hash_file, hash_tensors
from cm_lightning.types import InputError
from cm_lightning.weights.diffusers import is_diffusers, read_diffusers
from cm_lightning.weights.edm_pickle import LICENCE, read_edm_pickle
from cm_lightning.weights.openai import OPENAI_LICENCE, read_openai
from cm_lightning.weights.portable import Loaded, filled

__all__ = ["PUBLIC", "is_public", "load_public"]

PUBLIC = (".pkl", ".pt", ".pth")
"""Endings of published files."""


def is_public(path: str | Path) -> bool:
    """Whether a path is a published file or folder rather than one of this package."""
    path = Path(path)
    return is_diffusers(path) if path.is_dir() else path.suffix in PUBLIC


def load_public(
    path: str | Path, regime: str | None = None, resolution: int | None = None
) -> Loaded:
    """Read an EDM, EDM2 or ECT pickle, a state dict of OpenAI's U-Net or a diffusers folder.

    Nothing in a file is executed.

    Args:
        path: The file or folder.
        regime: What trained the weights: ``"Diffusion"``, ``"ECT"``, ``"CD"`` or ``"CT"``; the last
            two give OpenAI's network its boundary-condition preconditioning. ``None`` for
            Diffusion, for ECT in its pickles, and for CD in diffusers' layout.
        resolution: Side of the images, where an OpenAI file leaves it open.

    Returns:
        The denoiser; ``info`` also has ``kind`` (what it is), ``source``, ``source_sha256`` and
        ``licence``.

    Raises:
        InputError: If it is none of them, unsafe, or its tensors do not fit the class here.
    """
    path = Path(path)
    if not is_public(path):
        raise InputError(
            f"{path} is none of the files that can be imported: {', '.join(PUBLIC)}, or a folder "
            "of diffusers."
        )
    if not (path.is_dir() or path.is_file()):
        raise InputError(f"There are no weights at {path}.")
    if path.is_dir():
        config, weights = read_diffusers(path)
        assumed = "CD"
        kind, licence = "diffusers' ConsistencyModelPipeline", "as stated where it was published"
    elif path.suffix == ".pkl":
        found = read_edm_pickle(path)
        config, weights, licence = found.denoiser, found.weights, LICENCE
        kind = f"pickle of a {found.class_name}; nothing in it was executed"
        assumed = "ECT" if found.class_name == "ECMPrecond" else "Diffusion"
    else:
        config, weights = read_openai(path, resolution, consistency=regime in ("CD", "CT"))
        kind, licence = "state dict of OpenAI's U-Net", OPENAI_LICENCE
        assumed = "Diffusion"
    denoiser = filled(config, str(path), weights, str(path))
    digest = hash_tensors(weights) if path.is_dir() else hash_file(path)
    info = {
        "regime": regime or assumed,
        "ema": "imported",
        "kimg": None,
        "data_fingerprint": None,
        "kind": kind,
        "source": path.name,
        "source_sha256": digest,
        "licence": licence,
    }
    return Loaded(denoiser.eval(), info, config)
