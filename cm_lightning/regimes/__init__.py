"""Training regimes: one thin LightningModule per paper."""

from cm_lightning.regimes.base import ConsistencyModule, TrainingStopped
from cm_lightning.regimes.diffusion import Diffusion
from cm_lightning.regimes.ect import ECT

__all__ = ["ECT", "ConsistencyModule", "Diffusion", "TrainingStopped"]
