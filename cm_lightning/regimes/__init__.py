"""Training regimes: one thin LightningModule per paper."""

from cm_lightning.regimes.base import ConsistencyModule
from cm_lightning.regimes.cd import CD
from cm_lightning.regimes.ct import CT
from cm_lightning.regimes.diffusion import Diffusion
from cm_lightning.regimes.ect import ECT
from cm_lightning.regimes.gc import GC
from cm_lightning.regimes.ict import ICT
from cm_lightning.regimes.sct import SCT

__all__ = [
    "CD",
    "CT",
    "ECT",
    "GC",
    "ICT",
    "SCT",
    "ConsistencyModule",
    "Diffusion",
]
