"""Settings that change how fast a step is, and its result at most by rounding."""

from __future__ import annotations

import os
import shutil
import sysconfig
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import nn

from cm_lightning.types import InputError

__all__ = ["PerformanceCallback"]


class PerformanceCallback(L.Callback):
    """Make the networks of a run faster, or smaller, in place: no name of a weight changes.

    Args:
        compile: Compile the backbones of all networks (minutes at the start of a run); ``None``:
            on a GPU with a compiler.
        channels_last: Let convolutions keep the channels of a pixel together; ``None``: on a
            GPU where the backbone is compiled (eager group norms there give the other layout back).
        tf32: Allow products of fp32 numbers with 10 bits of mantissa on a GPU, in convolutions
            too. The published recipes do not.
        checkpointing: Compute the activations of residual blocks a second time in the backward
            pass instead of keeping them: less memory for about a quarter more time.

    Raises:
        InputError: If there is no compiler, or no block to compute again.
    """

    def __init__(
        self,
        compile: bool | None = None,
        channels_last: bool | None = None,
        tf32: bool = False,
        checkpointing: bool = False,
    ) -> None:
        self.compile = compile
        self.channels_last = channels_last
        self.tf32 = tf32
        self.checkpointing = checkpointing
        self._flags: tuple[bool, bool] | None = None

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Apply the settings; every network is on its device."""
        gpu = pl_module.device.type == "cuda"
        matmul, convolution = torch.backends.cuda.matmul, torch.backends.cudnn
        self._flags = (matmul.allow_tf32, convolution.allow_tf32)
        matmul.allow_tf32 = convolution.allow_tf32 = self.tf32
        for network in pl_module.networks:
            backbone: nn.Module = getattr(network, "backbone", network)
            if self.checkpointing:
                _recompute(backbone)
            compiled = gpu and compiler("cuda") if self.compile is None else self.compile
            together = gpu and compiled if self.channels_last is None else self.channels_last
            if hasattr(network, "channels_last"):
                network.channels_last = together
            if compiled:
                if not compiler(pl_module.device.type):
                    raise InputError(
                        "performance.compile needs a C++ compiler, and on a GPU Triton and the "
                        "headers of Python (Python.h): install them, or set it to false."
                    )
                # left alone, inductor keeps a graph with narrow convolutions in its other layout
                options = {"force_layout_optimization": True} if together else None
                backbone.compile(options=options)

    def teardown(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """Give torch its own TF32 switches back."""
        if self._flags is not None:
            torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = self._flags
            self._flags = None


def compiler(kind: str) -> bool:
    """Whether torch can compile for a kind of device.

    Args:
        kind: ``"cuda"`` or ``"cpu"``.
    """
    from torch.utils._triton import has_triton

    found = any(shutil.which(name) for name in ("c++", "g++", "clang++"))
    if kind != "cuda":
        return found
    # Triton builds a module for Python at its first use
    c = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    return found and bool(c) and header.is_file() and has_triton()


def _recompute(backbone: nn.Module) -> None:
    blocks = [module for module in backbone.modules() if hasattr(module, "checkpointing")]
    if not blocks:
        raise InputError(
            f"performance.checkpointing: {type(backbone).__name__} has no residual blocks that "
            "could be computed again; set it to false."
        )
    for block in blocks:
        block.checkpointing = True  # type: ignore[assignment]
