"""What is logged by noise level: titles, axes and how to read it, for pictures, pages and W&B."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

__all__ = ["FAMILIES", "Family", "families_in", "level", "own_figures"]


class Family(NamedTuple):
    """Metrics with one value per noise-level bin.

    Attributes:
        title: What it is.
        axis: The same with its unit, for the vertical axis.
        scale: ``"log"`` or ``"linear"``.
        caption: How to read it.
        beside: A family drawn dotted for comparison, and its name in the legend.
    """

    title: str
    axis: str
    scale: str
    caption: str
    beside: tuple[str, str] | None = None


FAMILIES = {
    "loss_by_sigma": Family(
        "Loss",
        "weighted loss per image",
        "log",
        "Where the training signal comes from. Regimes measure and weight differently: compare the "
        "shapes of the lines, and their heights only between runs with the same loss.",
    ),
    "distance_by_sigma": Family(
        "Distance of the pair",
        "unweighted distance per image",
        "log",
        "How much the outputs at the two neighbouring noise levels of a pair still differ. Heights "
        "compare only between runs with the same distance and spacing of levels.",
    ),
    "target_variance": Family(
        "Variance of the target",
        "mean squared error per pixel",
        "linear",
        "Error of the estimate of the clean image that the target is built on (solid), against "
        "the exact mean over the training set; dotted: taking the single training image, as CT, "
        "iCT, ECT and GC do. The further below the dotted line, the less noise in the gradients.",
        ("sample_variance", "single image"),
    ),
    "sample_variance": Family(
        "Variance of a single image",
        "mean squared error per pixel",
        "linear",
        "The same of the single training image, as CT, iCT, ECT and GC take it.",
    ),
    "ess": Family(
        "Effective sample size",
        "number of images",
        "log",
        "How many training images share in the target of SCT. At 1 it is the single image of ECT.",
    ),
    "largest_weight": Family(
        "Largest weight",
        "weight, 0 to 1",
        "linear",
        "Weight of the most important image in the target of SCT. At 1 that image is alone.",
    ),
    "skipped": Family(
        "Rows left as they are",
        "share, 0 to 1",
        "linear",
        "Share of training images so far from all others at this noise level that SCT keeps the "
        "image itself as the target.",
    ),
    "discrepancy": Family(
        "Shift of the target",
        "|mean - image|² / (pixels · t²)",
        "log",
        "How far the target of SCT moved away from the single image, in units of the noise.",
    ),
    "transport_cost": Family(
        "Transport cost",
        "|image - noise|² per pixel",
        "linear",
        "Squared distance between an image and the noise it is paired with (solid), and of the "
        "same rows paired at random (dotted). Lower means shorter paths from noise to image.",
        ("independent_cost", "paired at random"),
    ),
    "independent_cost": Family(
        "Transport cost of random pairs",
        "|image - noise|² per pixel",
        "linear",
        "The same of rows paired at random.",
    ),
    "generated": Family(
        "Rows made by the model",
        "share, 0 to 1",
        "linear",
        "Share of rows whose image is the model's own prediction (GC).",
    ),
}
"""Families in their order; other values that a regime notes get a plain one."""

_NUMBER = r"(\d+(?:\.\d+)?(?:e[+-]\d+)?)"
_BIN = re.compile(f"below_{_NUMBER}|above_{_NUMBER}|{_NUMBER}-{_NUMBER}")


def level(bin: str) -> float | None:
    """Where a bin of noise levels is drawn, ``None`` if the text names none.

    It is the geometric mean of the bin's edges, and beyond the outer edges a step away.
    """
    match = _BIN.fullmatch(bin)
    if match is None:
        return None
    below, above, low, high = (None if text is None else float(text) for text in match.groups())
    if below is not None:
        place = below / 5**0.5
    elif above is not None:
        place = above * 5**0.5
    else:
        assert low is not None
        assert high is not None
        place = (low or high / 5) ** 0.5 * high**0.5
    return place if 0 < place < float("inf") else None


def families_in(keys: Iterable[str]) -> dict[str, tuple[Family, list[str]]]:
    """Families among the names of numbers, each with its bins from low noise to high.

    What no family here is called has one all the same where its bins are those of the loss: a value
    that a regime of one's own notes.

    Args:
        keys: Names, such as ``ess/0.5-2``.
    """
    bins: dict[str, dict[str, float]] = {name: {} for name in FAMILIES}
    for key in keys:
        name, _, bin = key.rpartition("/")
        place = level(bin)
        if name and place is not None:
            bins.setdefault(name, {})[bin] = place
    known = bins["loss_by_sigma"].keys()
    return {
        name: (FAMILIES.get(name) or _noted(name), sorted(found, key=found.__getitem__))
        for name, found in bins.items()
        if found and (name in FAMILIES or found.keys() <= known)
    }


def own_figures(keys: Iterable[str]) -> dict[str, tuple[Family, list[str]]]:
    """Families with a figure of their own: all but those drawn beside another one."""
    beside = {family.beside[0] for family in FAMILIES.values() if family.beside is not None}
    return {name: found for name, found in families_in(keys).items() if name not in beside}


def _noted(name: str) -> Family:
    title = name.replace("_", " ").replace("/", ", ")
    caption = "A value that the regime notes for every image."
    return Family(title[:1].upper() + title[1:], title, "linear", caption)
