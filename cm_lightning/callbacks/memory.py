"""What a training step keeps in memory, estimated before the first one."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor, nn

from cm_lightning.callbacks.ema import EMACallback
from cm_lightning.callbacks.step import find_callback
from cm_lightning.objective import Distance
from cm_lightning.types import Denoiser

__all__ = ["MemoryEstimate", "estimate_memory", "kept_bytes"]


class MemoryEstimate(NamedTuple):
    """Bytes per device.

    Attributes:
        state: Weights, gradients, optimizer, averages and the other networks.
        images: Those of the data set that stay on the device, references among them.
        activations: What a forward pass over one micro-batch keeps for the backward pass.
        micro_batch: Images of a micro-batch.
    """

    state: int
    images: int
    activations: int
    micro_batch: int

    def __str__(self) -> str:
        """Sum and parts in words."""
        state, images, activations = (f"{size / 2**30:.2f}" for size in self[:3])
        held = f", {images} images" if self.images else ""
        return (
            f"about {sum(self[:3]) / 2**30:.2f} GiB: {state} weights, gradients, optimizer and "
            f"averages{held}, {activations} activations of {self.micro_batch} images"
        )


def kept_bytes(
    denoiser: Denoiser,
    images: int,
    context: AbstractContextManager[Any],
    distance: Distance | None = None,
) -> int:
    """Bytes that a forward pass keeps for the backward pass, weights themselves left out.

    Args:
        denoiser: The network, run as it is on zeros; torch's generators are left untouched.
        images: Images of the batch.
        context: Precision of the pass.
        distance: Distance of the result, which may be a network too.
    """
    assert denoiser.image_shape is not None
    device = next(denoiser.parameters()).device
    x = torch.zeros(images, *denoiser.image_shape, device=device)
    labels = torch.zeros(images, dtype=torch.long, device=device) if denoiser.num_classes else None
    own = {p.untyped_storage().data_ptr() for p in denoiser.parameters()}
    sizes: dict[int, int] = {}

    def keep(saved: Tensor) -> Tensor:
        storage = saved.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return saved.detach()  # with its graph it would hold itself for good

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved)
    eager = torch.compiler.set_stance("force_eager")
    with torch.random.fork_rng([device] if device.type == "cuda" else []), context, hooks, eager:
        out = denoiser(x, torch.ones(images, device=device), labels)
        out = out if distance is None else distance(out, x)
    del out  # until here what was kept stays where it is
    return sum(sizes.values())


def estimate_memory(trainer: L.Trainer, pl_module: Any) -> MemoryEstimate | None:
    """Estimate before the first step; ``None`` for a network that takes images of any shape.

    Activations are measured on one and on two images, without dropout's randomness mattering;
    temporary buffers, the pass of the target and torch's own memory come on top.

    Args:
        trainer: The trainer, at the start of training.
        pl_module: The module, on its device.
    """
    denoiser, data = pl_module.denoiser, trainer.datamodule  # type: ignore[attr-defined]
    if denoiser.image_shape is None:
        return None
    weights = [p.numel() for p in denoiser.parameters() if p.requires_grad]
    defaults = trainer.optimizers[0].defaults
    moments = 2 if "betas" in defaults else int(bool(defaults.get("momentum", 0)))
    ema = find_callback(trainer, EMACallback)
    profiles = 0 if ema is None else len(ema.profiles)
    state = 4 * sum(weights) * (1 + moments + profiles)
    state += sum(_size(network) for network in pl_module.networks)
    batch = data.plan(trainer.world_size).micro_batch
    distance = getattr(getattr(pl_module, "objective", None), "distance", None)
    one, two = (
        kept_bytes(denoiser, n, trainer.precision_plugin.forward_context(), distance)
        for n in (1, 2)
    )
    return MemoryEstimate(
        state, data.held_bytes, max(2 * one - two, 0) + (two - one) * batch, batch
    )


def _size(network: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in network.parameters())
