"""Train consistency models: one LightningModule per paper."""

import importlib
from types import ModuleType

from cm_lightning.version import __version__

PARTS = (
    "callbacks",
    "data",
    "ema",
    "evaluation",
    "networks",
    "objective",
    "optim",
    "regimes",
    "sampling",
    "weights",
)

__all__ = ["__version__", *PARTS]


def __getattr__(name: str) -> ModuleType:
    """Import a part when it is first named: ``import cm_lightning`` alone loads no torch."""
    if name in PARTS:
        return importlib.import_module(f"cm_lightning.{name}")
    raise AttributeError(f"module 'cm_lightning' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
