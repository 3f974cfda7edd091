import pytest
import torch

from cm_lightning.networks import ConsistencyPrecond, EDMPrecond, SongUNet
from cm_lightning.types import InputError
from cm_lightning.weights.portable import start_from


def network() -> SongUNet:
    return SongUNet(8, 1, 1, model_channels=8, channel_mult=[1], num_blocks=1, attn_resolutions=[])


def test_preconditionings_share_weights():
    teacher = EDMPrecond(network(), noise_scale=1000.0)
    student = ConsistencyPrecond(network(), noise_scale=1000.0)
    assert start_from(student, teacher, "teacher") == []
    own, theirs = student.backbone.state_dict(), teacher.backbone.state_dict()
    assert all(torch.equal(own[name], theirs[name]) for name in own)


@pytest.mark.parametrize(("ours", "theirs"), [(1.0, 1000.0), (1000.0, 1.0)])
def test_another_embedding_of_noise_levels_is_refused(ours, theirs):
    teacher = EDMPrecond(network(), noise_scale=theirs)
    student = ConsistencyPrecond(network(), noise_scale=ours)
    with pytest.raises(InputError, match=f"a noise_scale of {theirs}, model.denoiser has {ours}"):
        start_from(student, teacher, "teacher")
