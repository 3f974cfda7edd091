"""What every regime shares: one optimizer, one clock in images, one source of randomness."""

from __future__ import annotations

import copy
import math
from typing import Any

import lightning as L
import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch.optim import Optimizer

from cm_lightning.callbacks import (
    GuardCallback,
    TargetNetworkCallback,
    WeightNormalizationCallback,
)
from cm_lightning.dropout import forget_keys
from cm_lightning.ema import EMAProfile
from cm_lightning.files import hash_tensors
from cm_lightning.networks import preserves_magnitude
from cm_lightning.objective import Draw, GeneratorCoupling, Grid, Objective
from cm_lightning.optim import GradientGuard, GradientStats, LearningRate
from cm_lightning.regimes.checks import (
    check_endpoint,
    check_fit,
    check_levels,
    check_trained,
    check_trainer,
    check_twin,
)
from cm_lightning.types import Batch, Denoiser, InputError, LossOutput
from cm_lightning.weights import Pretrained, check_weights, start_from

__all__ = ["ConsistencyModule", "radam", "radam_cm"]


def radam(parameters: Any) -> Optimizer:
    """RAdam with rate 1e-4, betas (0.9, 0.999): the optimizer of iCT and ECT."""
    return torch.optim.RAdam(parameters, lr=1e-4)


def radam_cm(parameters: Any) -> Optimizer:
    """RAdam with rate 4e-4, betas (0.9, 0.999): the optimizer of CD and CT on CIFAR-10."""
    return torch.optim.RAdam(parameters, lr=4e-4)


class ConsistencyModule(L.LightningModule):
    """Base of all regimes: a regime assembles an objective, or has a :meth:`loss` of its own.

    The clock is ``nimg``, the number of images seen by all ranks, with ``skipped``, those whose
    batches a return to a checkpoint left behind. ``nimg`` advances by the global batch right
    after each optimizer step, before any callback runs. Randomness is a pure function of (seed,
    nimg + skipped, row in the global batch), so a resumed run repeats an uninterrupted one.

    Args:
        denoiser: The network that is trained.
        total_kimg: Length of the run in thousands of images, >= 0.001.
        optimizer: Called with the parameters.
        learning_rate: Factor on the optimizer's rate over the run.
        gradients: Sanitising of gradients.
        seed: Seed of noise levels, noise and dropout, >= 0.
        init: Weights to start from, ``None`` for random ones.

    Raises:
        InputError: If ``total_kimg`` is below one image, the seed is negative, the denoiser is
            none, or ``init`` is missing or of another network.
    """

    objective: Objective | None = None
    """What :meth:`assemble` took; ``None`` for a regime that has its :meth:`loss` alone."""

    def __init__(
        self,
        denoiser: Denoiser,
        total_kimg: float,
        optimizer: OptimizerCallable = radam,
        learning_rate: LearningRate = LearningRate(),
        gradients: GradientGuard = GradientGuard(),
        seed: int = 0,
        init: Pretrained | None = None,
    ) -> None:
        super().__init__()
        if not 0.001 <= total_kimg < math.inf:
            raise InputError(
                f"total_kimg must be 0.001 (one image) or more and finite, got {total_kimg}."
            )
        if not isinstance(denoiser, Denoiser):
            raise InputError(
                f"A regime trains a Denoiser, such as EDMPrecond around a network; got "
                f"{type(denoiser).__name__}."
            )
        if init is not None and not isinstance(init, Pretrained):
            raise InputError(f"init must be Pretrained(path) or None, got {init!r}.")
        if seed < 0:
            raise InputError(f"seed must be 0 or more, got {seed}.")
        self.denoiser = denoiser
        self.total_kimg = total_kimg
        self.optimizer = optimizer
        self.learning_rate = learning_rate
        self.gradients = gradients
        self.seed = seed
        self.nimg = 0
        self.skipped = 0
        self.gradient_stats: GradientStats | None = None
        self._micro_step = 0
        self._settings: list[dict[str, Any]] = []
        self._stored: list[dict[str, Any]] = []
        self.global_batch = 0
        self.averages: dict[str, EMAProfile] = {}
        """Averaged copies of the denoiser that the loss needs, by the name of their attribute."""
        self.origins: dict[str, dict[str, Any]] = {}
        """Weights of other runs that this one uses, by role, with path and SHA-256."""
        self._borrowed: dict[str, Denoiser] = {}
        self.init = init
        if init is not None:
            loaded, info, _ = init.load()
            left_out = start_from(denoiser, loaded, init.path)
            digest = hash_tensors(loaded.state_dict())
            found = {"path": init.path, "sha256": digest, "left_out": left_out}
            self.origins["init"] = info | found

    def borrow(self, role: str, denoiser: Denoiser, path: str, info: dict[str, Any]) -> None:
        """Keep a frozen network of another run, such as a teacher, beside the module.

        It is no submodule: optimizer, averages, checkpoints and DDP do not know it. It follows the
        module to its device when training starts, and a resumed run refuses it if it changed.

        Args:
            role: What it is for; one word. A ``teacher`` is a diffusion model, from whose ODE
                diagnostics measure the distance.
            denoiser: The network; it is frozen and put into eval mode.
            path: Where it came from.
            info: What is known about it.
        """
        self._borrowed[role] = denoiser.requires_grad_(False).eval()
        digest = hash_tensors(denoiser.state_dict())
        self.origins[role] = info | {"path": path, "sha256": digest}

    def assemble(self, objective: Objective, target: EMAProfile | None = None) -> None:
        """Take the objective, and make the networks that it needs besides the denoiser.

        Args:
            objective: The objective; schedules without a length get that of the run.
            target: Profile of an averaged target network, ``None`` for the denoiser itself.

        Raises:
            InputError: If the denoiser learns a variance, which the base's :meth:`loss` does not
                use.
        """
        if self.denoiser.learn_variance and type(self).loss is ConsistencyModule.loss:
            raise InputError(
                f"model.denoiser.learn_variance is true, and the loss of {type(self).__name__} "
                "does not use it: set it to false."
            )
        self.objective = objective.spanning(self.total_kimg)
        if target is not None:
            self._average("target", target)
        coupling = objective.coupling
        if isinstance(coupling, GeneratorCoupling):
            if coupling.endpoint == "ema":
                self._average("endpoint", coupling.average)
            if coupling.weights is not None:
                loaded = Pretrained(coupling.weights).load()
                check_twin(self.denoiser, loaded.denoiser, f"endpoint {coupling.weights}")
                check_endpoint(loaded, coupling.weights)
                self.borrow("endpoint", loaded.denoiser, coupling.weights, loaded.info)

    def _average(self, name: str, profile: EMAProfile) -> None:
        self.add_module(name, copy.deepcopy(self.denoiser).requires_grad_(False))
        self.averages[name] = profile

    def network(self, role: str) -> Denoiser:
        """The network of a role: a borrowed one, an averaged one, else the denoiser itself."""
        if role in self._borrowed:
            return self._borrowed[role]
        return getattr(self, role) if role in self.averages else self.denoiser

    @property
    def networks(self) -> list[Denoiser]:
        """All networks of the run: the denoiser, averaged copies, borrowed ones."""
        averaged = [getattr(self, name) for name in self.averages]
        return [self.denoiser, *averaged, *self._borrowed.values()]

    def configure_callbacks(self) -> list[L.Callback]:
        """Callbacks that this module cannot be trained without."""
        needed: list[L.Callback] = [GuardCallback(self.gradients)]
        if self.averages:
            needed.append(TargetNetworkCallback())
        if preserves_magnitude(self.denoiser):
            needed.append(WeightNormalizationCallback())
        return needed

    def on_fit_start(self) -> None:
        """Take borrowed networks along to the device."""
        for denoiser in self._borrowed.values():
            denoiser.to(self.device)

    def on_train_start(self) -> None:
        """Give loggers the clock and the optimizer its settings; stop at once where a run is over.

        Lightning has restored the optimizer's settings from the checkpoint. Those that the config
        changed since are the config's; those that an optimizer changes itself stay.
        """
        for logger in self.loggers:
            if hasattr(logger, "follow"):
                logger.follow(lambda: self.nimg)
        self._micro_step = 0
        optimizers = self.optimizers(use_pl_optimizer=False)
        assert isinstance(optimizers, Optimizer)
        for group, own, old in zip(
            optimizers.param_groups, self._settings, self._stored or self._settings, strict=True
        ):
            group.update({key: own[key] for key in own if key not in old or own[key] != old[key]})
        if self.nimg >= self.total_nimg:
            self.trainer.should_stop = True

    def on_train_end(self) -> None:
        """Leave networks whose dropout is random again."""
        for network in self.networks:
            forget_keys(network)

    def complete(self, batch: Batch) -> Batch:
        """A batch with all that the objective's leaves need; regimes may add to it."""
        return batch

    def loss(self, batch: Batch, draw: Draw) -> LossOutput:
        """Loss of each image of a batch: the objective's, with this run's networks.

        Args:
            batch: Images ``(B, C, H, W)`` in [-1, 1], labels, positions in the store.
            draw: The batch's randomness; ``draw.nimg`` is the clock for schedules.

        Raises:
            InputError: If the regime assembled no objective.
        """
        return self._assembled()(
            self.denoiser,
            self.network("target"),
            self.complete(batch),
            draw,
            self.network("endpoint"),
        )

    def _assembled(self) -> Objective:
        """The objective, or an error where there is none."""
        if self.objective is None:
            raise InputError(
                f"{type(self).__name__} has no objective: call assemble(...) in its __init__, or "
                "define loss."
            )
        return self.objective

    @property
    def stage(self) -> int | None:
        """Index of the discretization stage, ``None`` for a regime without stages."""
        if self.objective is None:
            return None
        return int(self.objective.discretization.stage(self.nimg))

    @property
    def schedule(self) -> dict[str, float]:
        """Where the schedules stand: stage, number of levels, rates of averaged networks."""
        values = {} if self.stage is None else {"stage": float(self.stage)}
        grid = None if self.objective is None else self.objective.discretization
        if isinstance(grid, Grid):
            values["levels"] = float(grid.size(self.nimg))
        for name, profile in self.averages.items():
            values[f"{name}_rate"] = profile.beta(self.nimg, self.global_batch)
        return values

    @property
    def position(self) -> int:
        """Where the run stands in the order of images and in its random stream."""
        return self.nimg + self.skipped

    @property
    def total_nimg(self) -> int:
        """Length of the run in images."""
        return round(1000 * self.total_kimg)

    def setup(self, stage: str) -> None:
        """Check that regime, network, data and trainer fit, before anything is written.

        Raises:
            InputError: If image shape, number of classes, precision, device, strategy or the
                smallest noise levels of grid and network do not fit, if the regime has no loss, or
                a network that nothing trains.
        """
        if type(self).loss is ConsistencyModule.loss:
            self._assembled()
        check_trained(self, self.denoiser)
        data = getattr(self.trainer, "datamodule", None)
        if data is not None:
            check_fit(self.denoiser, data.image_shape, data.num_classes)
        if self.objective is not None:
            self.objective.distance.prepare(None if data is None else data.image_shape)
            check_levels(self.objective.discretization, self.denoiser)
        check_trainer(self.trainer)

    def configure_optimizers(self) -> Optimizer:
        """Build the optimizer over the denoiser's trainable parameters.

        Raises:
            InputError: If it refuses its arguments.
        """
        try:
            optimizer = self.optimizer([p for p in self.denoiser.parameters() if p.requires_grad])
        except (TypeError, ValueError) as error:
            raise InputError(f"model.optimizer refuses its arguments: {error}.") from error
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
            if isinstance(optimizer, torch.optim.Adam) and group["foreach"] is None:
                group["fused"] = group["fused"] is not False  # one pass over the weights
        kept = ("params", "fused", "foreach", "capturable", "differentiable")
        self._settings = [
            {key: value for key, value in group.items() if key not in kept and _is_plain(value)}
            for group in optimizer.param_groups
        ]
        # under 16-mixed a fused one would get scaled gradients, of which infinite ones are
        # sanitised before the scaler looks for them: let it unscale, look and skip first
        optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
        return optimizer

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """Mean loss of a batch; the per-image values travel along for diagnostics.

        Raises:
            InputError: If the loader gives no :class:`Batch`, the micro-batches of a step differ in
                size, or the loss is no :class:`LossOutput`.
        """
        if not isinstance(batch, Batch):
            raise InputError(
                "A loader must give batches as cm_lightning.types.Batch (images in [-1, 1], labels "
                f"or None, positions in the data), got {type(batch).__name__}."
            )
        n, world = len(batch.x0), self.trainer.world_size
        accumulation = self.trainer.accumulate_grad_batches
        if self._micro_step and n * world * accumulation != self.global_batch:
            raise InputError(
                f"The micro-batches of a step must be equal, got one of {n} images after those of "
                f"{self.global_batch // (world * accumulation)}: set drop_last=True in the loader."
            )
        self.global_batch = n * world * accumulation
        start = (self._micro_step * world + self.trainer.global_rank) * n
        self._micro_step += 1
        device = batch.x0.device
        draw = Draw(self.seed, self.nimg, start, self.global_batch, device, self.skipped)
        output = self.loss(batch, draw)
        if not isinstance(output, LossOutput):
            raise InputError(
                f"The loss of {type(self).__name__} must be a LossOutput, got "
                f"{type(output).__name__}."
            )
        return {"loss": output.loss.mean(), "output": output}

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Sanitise and count gradients."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.gradient_stats = self.gradients(parameters, self.gradient_stats)

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Optimizer | LightningOptimizer,
        optimizer_closure: Any = None,
    ) -> None:
        """Set the learning rate, step, advance the clock, end the run when it is over."""
        factor = self.learning_rate.factor(self.nimg, self.total_kimg)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        # the last step of a loader may have fewer micro-batches
        self.nimg += self.global_batch // self.trainer.accumulate_grad_batches * self._micro_step
        self._micro_step = 0
        if self.nimg >= self.total_nimg:
            self.trainer.should_stop = True

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the clock and what identifies the run (plain numbers, strings and tensors)."""
        stats = self.gradient_stats
        data = getattr(self.trainer, "datamodule", None)
        checkpoint["cm_lightning"] = {
            "nimg": self.nimg,
            "skipped": self.skipped,
            "seed": self.seed,
            "regime": type(self).__name__,
            "data": getattr(data, "fingerprint", None),
            "borrowed": {role: self.origins[role]["sha256"] for role in self._borrowed},
            "nonfinite_steps": 0 if stats is None else int(stats.nonfinite_steps),
            "streak": 0 if stats is None else int(stats.streak),
            "optimizer": self._settings,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the clock.

        Raises:
            InputError: If the file is not a checkpoint of this package, or of another network
                or data set.
        """
        state = checkpoint.get("cm_lightning")
        if state is None:
            raise InputError("The checkpoint was not written by cm_lightning.")
        self._start_at_a_step(checkpoint)
        check_weights(self.state_dict(), checkpoint["state_dict"], "The checkpoint")
        data = getattr(getattr(self, "_trainer", None), "datamodule", None)
        fingerprint = getattr(data, "fingerprint", None)
        if fingerprint and state["data"] and fingerprint != state["data"]:
            raise InputError(
                f"The checkpoint was trained on data with fingerprint {state['data'][:16]}, "
                f"the config's data have {fingerprint[:16]}."
            )
        for role, digest in state["borrowed"].items():
            found = self.origins.get(role, {"sha256": "none", "path": "the config"})
            if found["sha256"] != digest:
                raise InputError(
                    f"The {role} changed since the run started: {found['path']} now has SHA-256 "
                    f"{found['sha256'][:16]}, the checkpoint was trained with {digest[:16]}."
                )
        self.nimg, self.skipped = int(state["nimg"]), int(state["skipped"])
        self._stored = state.get("optimizer", [])
        count, streak = state["nonfinite_steps"], state["streak"]
        self.gradient_stats = GradientStats(
            torch.zeros(()), torch.tensor(count), torch.tensor(streak)
        )

    def _start_at_a_step(self, checkpoint: dict[str, Any]) -> None:
        """Let Lightning, which steps at multiples of the accumulation, begin at one.

        It goes on counting micro-batches where the checkpoint stood, at the end of a step; with
        another accumulation the next step would take fewer of them.
        """
        accumulation = getattr(getattr(self, "_trainer", None), "accumulate_grad_batches", 1)
        loop = checkpoint.get("loops", {}).get("fit_loop", {})
        progress = loop.get("epoch_loop.batch_progress", {})
        if progress.get("is_last_batch"):  # the next one begins another epoch
            return
        current = progress.get("current", {})
        over = current.get("ready", 0) % accumulation
        for name in current:
            current[name] -= over


def _is_plain(value: Any) -> bool:
    values = value if isinstance(value, (tuple, list)) else (value,)
    return all(isinstance(v, (bool, int, float, str, type(None))) for v in values)
