"""What must fit together before a regime is trained."""

from __future__ import annotations

from pathlib import Path

import lightning as L
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy
from torch import nn

from cm_lightning.objective import Discretization
from cm_lightning.types import Denoiser, InputError
from cm_lightning.weights import Loaded, Pretrained

__all__ = [
    "check_endpoint",
    "check_fit",
    "check_levels",
    "check_trained",
    "check_trainer",
    "check_twin",
    "load_teacher",
]

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
"""Precisions in which weights, noise levels and losses stay fp32."""


def check_trained(module: nn.Module, denoiser: nn.Module) -> None:
    """Check that all that wants a gradient is part of the denoiser.

    Args:
        module: The regime.
        denoiser: Its denoiser, which optimizer, averages and exports know alone.

    Raises:
        InputError: If a parameter outside it is not frozen.
    """
    known = {id(parameter) for parameter in denoiser.parameters()}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and id(parameter) not in known:
            raise InputError(
                f"{name} of {type(module).__name__} would not be trained, as it is no part of "
                "model.denoiser: make its network a submodule of a Denoiser subclass, or freeze it "
                "with requires_grad_(False)."
            )


def check_trainer(trainer: L.Trainer) -> None:
    """Check precision, strategy and device.

    Args:
        trainer: The trainer.

    Raises:
        InputError: If weights would not stay whole and fp32, or levels not float64.
    """
    if trainer.precision not in PRECISIONS:
        raise InputError(
            f"trainer.precision must be one of {', '.join(PRECISIONS)}, got {trainer.precision}."
        )
    strategy = trainer.strategy
    whole = isinstance(strategy, (SingleDeviceStrategy, DDPStrategy))
    if not whole or isinstance(strategy, DeepSpeedStrategy):
        raise InputError(
            "trainer.strategy must be auto or ddp, as averages and checkpoints need the whole "
            f"network on every device; got {type(strategy).__name__}."
        )
    if strategy.root_device.type == "mps":
        raise InputError("Apple's mps device has no float64: use --trainer.accelerator cpu.")


def check_levels(grid: Discretization, denoiser: Denoiser) -> None:
    """Check that a grid ends where the network is the identity.

    Args:
        grid: The discretization.
        denoiser: The network.

    Raises:
        InputError: If both have a ``sigma_min``, and not the same.
    """
    ours, its = (getattr(part, "sigma_min", 0) for part in (grid, denoiser))
    if ours and its and ours != its:
        raise InputError(
            f"model.discretization ends at sigma_min {ours:g}, where model.denoiser with sigma_min "
            f"{its:g} is not the identity: give both one value."
        )


def check_twin(denoiser: Denoiser, other: Denoiser, what: str) -> None:
    """Check that another network takes the images and labels of the trained one.

    Args:
        denoiser: The trained network.
        other: The other one.
        what: What it is and where it lies, for messages.

    Raises:
        InputError: If shapes or numbers of classes differ.
    """
    if other.image_shape != denoiser.image_shape:
        raise InputError(
            f"The {what} takes images of shape {other.image_shape} (channels, height, width), "
            f"model.denoiser takes {denoiser.image_shape}."
        )
    if other.num_classes != denoiser.num_classes:
        raise InputError(
            f"The {what} knows {other.num_classes} classes, model.denoiser {denoiser.num_classes}."
        )


def check_endpoint(loaded: Loaded, path: str) -> None:
    """Check that a network can predict endpoints for a coupling.

    Args:
        loaded: The network.
        path: Where it lies.

    Raises:
        InputError: If it predicts means, or goes to the ends of phases instead of 0.
    """
    if loaded.is_diffusion:
        raise InputError(
            f"model.coupling.weights {path} is a diffusion model, which predicts the mean of many "
            "images and no endpoint: name a consistency model."
        )
    if len(loaded.info.get("phases") or []) > 2:
        raise InputError(
            f"model.coupling.weights {path} was trained in phases, so it does not go to 0: name a "
            "model without phases."
        )


def check_fit(denoiser: Denoiser, image_shape: tuple[int, int, int], num_classes: int) -> None:
    """Check that images and labels fit a network.

    Args:
        denoiser: The network.
        image_shape: ``(C, H, W)`` of the data.
        num_classes: Classes of the data, 0 if they are used without labels.

    Raises:
        InputError: If they do not.
    """
    wanted = denoiser.image_shape
    if wanted is not None and tuple(image_shape) != tuple(wanted):
        raise InputError(
            f"The data have images of shape {tuple(image_shape)} (channels, height, width), the "
            f"network takes {tuple(wanted)}: change data.resolution or the network's "
            "img_resolution and in_channels."
        )
    if denoiser.num_classes != num_classes:
        raise InputError(
            f"The data have {num_classes} classes, the network is built for "
            f"{denoiser.num_classes}: change data.conditional or the network's label_dim."
        )


def load_teacher(denoiser: Denoiser, teacher: Pretrained, regime: str) -> Loaded:
    """Load a teacher and check that it can teach this student.

    Args:
        denoiser: The student.
        teacher: Where the teacher lies.
        regime: Name of the regime, for messages.

    Raises:
        InputError: If it cannot.
    """
    if not isinstance(teacher, Pretrained):
        raise InputError(f"{regime}'s teacher must be Pretrained(path), got {teacher!r}.")
    path = Path(teacher.path)
    if not path.exists():
        raise InputError(
            f"model.teacher.path {path} does not exist. {regime} needs a teacher: a run of the "
            "regime Diffusion, such as of configs/diffusion_digits.yaml, or weights that "
            "cm-weights import made."
        )
    loaded = teacher.load()
    if not loaded.is_diffusion:
        raise InputError(
            f"The teacher {path} is no diffusion model: it was trained by "
            f"{loaded.info.get('regime')} and is a {type(loaded.denoiser).__name__}."
        )
    check_twin(denoiser, loaded.denoiser, f"teacher {path}")
    if dropped := denoiser.label_dropout:
        raise InputError(
            f"model.denoiser has label_dropout {dropped:g}, but {regime}'s teacher always sees "
            "labels: what the student does without one would not be distilled. Set it to 0."
        )
    return loaded
