"""How images are drawn, as ``cm-sample`` and ``cm-eval`` ask for it on the command line."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence

from cm_lightning.cli.errors import finite
from cm_lightning.sampling import GuidedDenoiser, PhasedSampler
from cm_lightning.sigmas import phase_edges
from cm_lightning.types import Denoiser, InputError
from cm_lightning.weights import load_weights

__all__ = ["add_guidance", "guided", "image_shape", "phased_sampler"]


def add_guidance(parser: argparse.ArgumentParser, several: str) -> None:
    """Add the options of guidance.

    Args:
        parser: The command line.
        several: What several scales do.
    """
    add = parser.add_argument
    add(
        "--guidance",
        type=finite,
        nargs="+",
        metavar="W",
        help=f"guidance scales, 1 for none [1]; {several}. Two network calls a step",
    )
    add("--worse_ema", metavar="NAME", help="guide by this profile or snapshot, as ema_0.9999@0.5")
    add(
        "--worse",
        metavar="RUN",
        help="guide by another run; with neither, by itself without labels",
    )


def guided(
    denoisers: Mapping[str, Denoiser], options: argparse.Namespace
) -> dict[tuple[str, float], GuidedDenoiser]:
    """Models under every guidance scale, by name and scale.

    Args:
        denoisers: The models by name.
        options: Of :func:`add_guidance`, and the ``source`` of the models.

    Raises:
        InputError: If a scale is out of range or given twice, if the guiding weights are missing
            or unfit, or if they are given without a scale.
    """
    scales = options.guidance or [1.0]
    if len(set(scales)) < len(scales):
        raise InputError(f"--guidance names a scale twice: {' '.join(f'{w:g}' for w in scales)}.")
    worse = None
    if options.worse or options.worse_ema:
        if options.guidance is None:
            raise InputError("--worse and --worse_ema belong to --guidance.")
        worse = load_weights(options.worse or options.source, options.worse_ema).denoiser
    return {
        (name, scale): GuidedDenoiser(denoiser, None if scale == 1 else worse, scale)
        for name, denoiser in denoisers.items()
        for scale in scales
    }


def phased_sampler(numbers: Sequence[float], eta: float) -> PhasedSampler:
    """Sampler of ``--phases``: of their number or their edges.

    Raises:
        InputError: If they are neither, or eta is out of range.
    """
    if len(numbers) > 1:
        return PhasedSampler(tuple(numbers), eta)
    if numbers[0] != int(numbers[0]):
        raise InputError(f"--phases {numbers[0]:g} is no number of phases: give 1, 2, 3, ...")
    return PhasedSampler(phase_edges(int(numbers[0])), eta)


def image_shape(denoiser: Denoiser) -> tuple[int, int, int]:
    """Shape of a model's images.

    Raises:
        InputError: If the model does not say.
    """
    if denoiser.image_shape is None:
        raise InputError("The network does not say which image shape it makes.")
    return denoiser.image_shape
