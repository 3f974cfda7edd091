"""Networks: backbones F under a preconditioning that makes them denoisers."""

from cm_lightning.networks.adm import ADMUNet
from cm_lightning.networks.edm2 import (
    EDM2Precond,
    EDM2UNet,
    normalize_weights,
    preserves_magnitude,
)
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
    "EDM2Precond",
    "EDM2UNet",
    "EDMPrecond",
    "Precond",
    "SongUNet",
    "edm_coefficients",
    "normalize_weights",
    "preserves_magnitude",
]
