"""What is logged by noise level: titles, axes and how to read it, for pictures, pages and W&B."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["FAMILIES", "Family"]


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
"""Families in their order; a regime that notes another value per row adds it here."""
