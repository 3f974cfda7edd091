"""How far a consistency model is from the ODE of the diffusion model behind it."""

from __future__ import annotations

from typing import Any, cast

import lightning as L
import torch
from torch import Tensor

from cm_lightning.callbacks.ema import find_ema
from cm_lightning.files import hash_tensors
from cm_lightning.loggers import say
from cm_lightning.objective import TeacherMean
from cm_lightning.sampling import (
    HeunSampler,
    MultistepSampler,
    PhasedSampler,
    Sampler,
    draw_images,
    evaluating,
)
from cm_lightning.types import Denoiser, InputError

__all__ = ["TeacherDistance", "find_teacher"]


def find_teacher(pl_module: Any) -> Denoiser | None:
    """The diffusion model whose ODE a run should follow, on the CPU or where the module is.

    The teacher of CD, guided as CD guides it; else the borrowed network of the role ``teacher``;
    else the diffusion model that the run started from (``model.init``), read anew. ``None`` for
    runs without one, and for diffusion itself.

    Args:
        pl_module: The run's module.

    Raises:
        InputError: If the initial weights cannot be read again or are others by now.
    """
    objective = pl_module.objective
    posterior = None if objective is None else getattr(objective.solver, "posterior", None)
    if isinstance(posterior, TeacherMean):
        return posterior.teacher
    if "teacher" in pl_module.origins:
        return cast("Denoiser", pl_module.network("teacher"))
    if objective is None or pl_module.init is None:
        return None
    with torch.random.fork_rng(devices=[]):  # the network is built with random weights first
        loaded = pl_module.init.load()
    if hash_tensors(loaded.denoiser.state_dict()) != pl_module.origins["init"]["sha256"]:
        raise InputError(f"the weights in {pl_module.init.path} changed since the run started.")
    return loaded.denoiser if loaded.is_diffusion else None


class TeacherDistance:
    r"""Distance of the learned map from the endpoint of its teacher's ODE, on fixed noise.

    .. math:: \Bigl( \tfrac{1}{n D} \sum_{i=1}^{n} \bigl\lVert
              f_\theta(\sigma_\text{max} z_i, \sigma_\text{max}) -
              \Phi(\sigma_\text{max} z_i) \bigr\rVert_2^2 \Bigr)^{1/2}

    with :math:`\Phi` Heun's solution of the probability-flow ODE of :func:`find_teacher`, D the
    number of values of an image and :math:`\sigma_\text{max}` the largest level of the grid or of
    the phases (80 without either): a root mean square per pixel of images in [-1, 1]. Noise and
    labels are those of the sample grids by default. A model with phases goes through all. Endpoints
    are computed at the first call and kept. Rank 0 alone measures; nothing is drawn from torch's
    generators. Smaller values than Heun's own error mean nothing: with 18 levels that is 0.027 on
    Gaussian data of standard deviation 0.5.

    Args:
        n: Number of noises, 0 for no measurement.
        steps: Noise levels of Heun's method, ``2 * steps - 1`` network calls.
        seed: Seed of the noise.

    Raises:
        InputError: If an argument is outside its range.
    """

    def __init__(self, n: int = 64, steps: int = 18, seed: int = 0) -> None:
        if n < 0:
            raise InputError(f"diagnostics.teacher_rows must be 0 or more, got {n}.")
        if steps < 2:
            raise InputError(f"diagnostics.teacher_steps must be 2 or more, got {steps}.")
        self.n = n
        self.steps = steps
        self.seed = seed
        self.endpoints: Tensor | None = None
        """What the teacher makes of the noise, ``(n, C, H, W)``, once it was asked."""

    def __call__(self, trainer: L.Trainer, pl_module: Any) -> dict[str, float]:
        """Measure the first EMA profile; returns ``teacher/ode_distance/<profile>`` or nothing."""
        data = getattr(trainer, "datamodule", None)
        if not self.n or not trainer.is_global_zero or data is None:
            return {}
        objective = pl_module.objective
        phases = getattr(objective, "phases", None)
        grid = getattr(objective, "discretization", None)
        top = getattr(grid, "sigma_max", 80.0) if phases is None else phases.edges[-1]
        device = pl_module.device
        if self.endpoints is None:
            try:
                teacher = find_teacher(pl_module)
            except (InputError, OSError) as error:
                say(f"teacher/ode_distance is left out: {error}")
                teacher = None
            if teacher is None:
                self.n = 0
                return {}
            heun = HeunSampler(self.steps, sigma_max=top)
            self.endpoints = self._images(teacher.to(device), heun, data, device)
        sampler = MultistepSampler((top,)) if phases is None else PhasedSampler(phases.edges)
        ema = find_ema(trainer)
        with ema.lend(pl_module.denoiser, ema.names[0]), evaluating(pl_module.denoiser):
            images = self._images(pl_module.denoiser, sampler, data, device)
        distance = (images.double() - self.endpoints).square().mean().sqrt()
        return {f"teacher/ode_distance/{ema.names[0]}": float(distance)}

    def _images(self, denoiser: Denoiser, sampler: Sampler, data: Any, device: Any) -> Tensor:
        """What a model makes of the fixed noise, ``(n, C, H, W)`` on the CPU."""
        batches = draw_images(
            denoiser,
            sampler,
            range(self.n),
            torch.arange(self.n) % data.num_classes if data.num_classes else None,
            seed=self.seed,
            shape=data.image_shape,
            batch=64,
            device=device,
        )
        return torch.cat([batch.cpu() for batch in batches])
