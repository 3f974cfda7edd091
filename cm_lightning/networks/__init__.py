"""Networks: backbones F under a preconditioning that makes them denoisers."""

from cm_lightning.networks.adm import ADMUNet
from cm_lightning.networks.preconditioning import (
    ConsistencyPrecond,
    EDMPrecond,
    Precond,
    edm_coefficients,
)
from cm_lightning.networks.songunet import SongUNet

__all__ = [
    "ADMUNet",
    "ConsistencyPrecond",
    "EDMPrecond",
    "Precond",
    "SongUNet",
    "edm_coefficients",
]
