"""Averages of the denoiser's weights: several profiles at once, lent to whoever evaluates."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from torch import Tensor

from cm_lightning.callbacks.step import StepCallback, find_callback
from cm_lightning.ema import ConstantEMA, EMAProfile, snapshot_of, update_average
from cm_lightning.types import Denoiser, InputError

__all__ = ["LIVE", "EMACallback", "find_ema"]

LIVE = "live"
"""Name of the weights being trained, where a profile's name may be given."""


class EMACallback(StepCallback):
    """Keep fp32 averages of the denoiser's parameters.

    Only the denoiser's trainable parameters are averaged: no buffer, teacher or target network.
    The checkpoint's ``state_dict`` always holds the live weights, the averages are stored beside
    it, and :meth:`lend` exchanges them for a while.

    Args:
        profiles: Profiles to track; the first one is the default of samples and exports.
        snapshots: Shares of the run, in (0, 1), at which every average is kept for good, as
            ``<profile>@<share>`` in checkpoints and exports: the worse models of guidance.

    Raises:
        InputError: If there is no profile, two share a name, or a share is outside (0, 1).
    """

    def __init__(
        self,
        profiles: Sequence[EMAProfile] = (ConstantEMA(),),
        snapshots: Sequence[float] = (),
    ) -> None:
        names = [profile.name for profile in profiles]
        if not names:
            raise InputError("ema.profiles is empty: give at least one profile.")
        if len(set(names)) < len(names):
            raise InputError(f"ema.profiles must have different names, got {names}.")
        for share in snapshots:
            if not 0 < share < 1:
                raise InputError(f"ema.snapshots must lie between 0 and 1, got {share:g}.")
        self.profiles = list(profiles)
        self.snapshots = list(snapshots)
        self.averages: dict[str, dict[str, Tensor]] = {}
        self._total = 0
        self._loaded: dict[str, dict[str, Tensor]] = {}

    @property
    def names(self) -> list[str]:
        """Names of the profiles, the default first."""
        return [profile.name for profile in self.profiles]

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Check that no snapshot's moment has passed; a checkpoint has been applied by now.

        Raises:
            InputError: If one has.
        """
        if self._total not in (0, pl_module.total_nimg):
            # another run's checkpoint: a run of another length has shares of its own
            self._loaded = {name: self._loaded[name] for name in self._loaded if "@" not in name}
        self._total = pl_module.total_nimg
        for share in self.snapshots:
            names = {f"{name}@{share:g}" for name in self.names}
            if pl_module.nimg >= share * pl_module.total_nimg and not names <= self._loaded.keys():
                raise InputError(
                    f"ema.snapshots {share:g} is {share * pl_module.total_kimg:g} of "
                    f"{pl_module.total_kimg:g} kimg, and the run goes on from "
                    f"{pl_module.nimg / 1000:g}: leave it out."
                )

    def on_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Start the averages at the weights, or where the checkpoint left them."""
        parameters = _trainable(pl_module.denoiser)
        self.averages = {}
        for name in self.names:
            source = self._loaded.get(name, parameters)
            self.averages[name] = {
                key: source[key].detach().to(p.device, torch.float32, copy=True)
                for key, p in parameters.items()
            }
        self.averages |= {name: self._loaded[name] for name in self._loaded if "@" in name}
        self._loaded = {}

    def on_step(self, trainer: L.Trainer, pl_module: Any, before: int, after: int) -> None:
        """Move every average towards the new weights."""
        weights = list(_trainable(pl_module.denoiser).values())
        for profile in self.profiles:
            average = list(self.averages[profile.name].values())
            update_average(average, weights, profile.beta(before, after - before))
        for share in self.snapshots:
            if before < share * pl_module.total_nimg <= after:
                for name in self.names:
                    live = self.averages[name]
                    copies = {key: value.cpu().clone() for key, value in live.items()}
                    self.averages[f"{name}@{share:g}"] = copies

    @contextmanager
    def lend(self, denoiser: Denoiser, name: str) -> Iterator[None]:
        """Put an average into the denoiser for the duration of the context.

        Args:
            denoiser: The denoiser whose parameters were averaged.
            name: The name of a profile or snapshot, or ``"live"`` to leave the weights as they are.

        Raises:
            InputError: If no profile has that name.
        """
        if name == LIVE:
            yield
            return
        if name not in self.averages:
            raise InputError(f"No EMA profile is called '{name}': there are {list(self.averages)}.")
        parameters = _trainable(denoiser)
        live = {key: p.data for key, p in parameters.items()}
        try:
            for key, p in parameters.items():
                p.data = self.averages[name][key].to(p.device, p.dtype)
            yield
        finally:
            for key, p in parameters.items():
                p.data = live[key]

    def state_dict(self) -> dict[str, Any]:
        """The averages, by profile and parameter name (tensors only)."""
        return {"averages": self.averages, "total_nimg": self._total}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the stored averages until training starts.

        Raises:
            InputError: If a profile is missing in the checkpoint.
        """
        stored, self._total = state_dict["averages"], int(state_dict.get("total_nimg", 0))
        for name in self.names:
            if name not in stored:
                raise InputError(
                    f"The checkpoint has no EMA profile '{name}' (it has {sorted(stored)}): "
                    "an average cannot start in mid-run."
                )
        kept = {name: value for name, value in stored.items() if snapshot_of(name) in self.names}
        self._loaded = {name: stored[name] for name in self.names} | kept


def _trainable(denoiser: Denoiser) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in denoiser.named_parameters() if p.requires_grad}


def find_ema(trainer: L.Trainer) -> EMACallback:
    """The trainer's EMA callback.

    Raises:
        InputError: If it has none.
    """
    found = find_callback(trainer, EMACallback)
    if found is None:
        raise InputError("This callback needs the EMA callback: add EMACallback to the trainer.")
    return found
