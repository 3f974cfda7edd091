"""What the figures of ``cm-compare`` over training are called and how to read them."""

from __future__ import annotations

from cm_lightning.families import FAMILIES

__all__ = ["BY_LEVEL", "OVER_TRAINING"]

_BESIDE = {family.beside[0] for family in FAMILIES.values() if family.beside is not None}
BY_LEVEL = {name: family for name, family in FAMILIES.items() if name not in _BESIDE}
"""Families with a figure of their own."""

OVER_TRAINING = {
    "teacher/ode_distance": (
        "Distance from the teacher's ODE",
        "root mean square per pixel",
        "Difference per pixel of images in [-1, 1], on fixed noise, between what the model makes "
        "of it and where the ODE of its teacher (or of the diffusion model it started from) goes. "
        "Lower is closer to that teacher, which is not the same as better images.",
    ),
    "gradient/norm": (
        "Gradient",
        "norm of the gradient",
        "Mean size of the gradient before the optimizer. Jumps tell of unstable training.",
    ),
    "speed/images_per_second": (
        "Speed",
        "images per second",
        "Training speed of each window, evaluations and checkpoints left out.",
    ),
}
"""Metrics drawn over training: title, label of the axis, caption."""
