"""Train consistency models: one LightningModule per paper."""

from cm_lightning.version import __version__

__all__ = ["__version__"]
