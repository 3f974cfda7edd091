import pytest

from cm_lightning.networks import EDMPrecond, SongUNet
from cm_lightning.objective import GeneratorCoupling, Independent, MinibatchOT
from cm_lightning.regimes import SCT
from cm_lightning.types import InputError


def network() -> EDMPrecond:
    backbone = SongUNet(
        8, 1, 1, model_channels=8, channel_mult=[1], num_blocks=1, attn_resolutions=[]
    )
    return EDMPrecond(backbone)


def test_images_and_noise_must_be_independent():
    with pytest.raises(InputError, match="independent: choose Independent or GeneratorCoupling"):
        SCT(network(), coupling=MinibatchOT())
    for coupling in (Independent(), GeneratorCoupling(0.3)):
        SCT(network(), coupling=coupling)
