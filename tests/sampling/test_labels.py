"""Labels are checked before sampling, in Python as on the command line."""

from __future__ import annotations

import pytest
import torch

from cm_lightning.sampling import GuidedDenoiser, euler, heun, multistep, phased
from cm_lightning.types import InputError
from tests.sampling.test_guidance import network

SIGMAS = torch.tensor([80.0, 1.0])
SAMPLERS = {
    "multistep": lambda net, z, labels: multistep(net, z[None], [80.0], labels),
    "phased": lambda net, z, labels: phased(net, z, [0.0, 80.0], labels),
    "euler": lambda net, z, labels: euler(net, z, SIGMAS, labels),
    "heun": lambda net, z, labels: heun(net, z, SIGMAS, labels),
}
WRONG = {
    "too large": (
        torch.full((4,), 3),
        r"lie in 0\.\.2, or be -1 for no class, got 3 to 3",
    ),
    "too small": (torch.tensor([0, 1, -2, 0]), "got -2 to 1"),
    "too few": (torch.zeros(3, dtype=torch.long), r"4 whole numbers in a tensor.*shape \(3,\)"),
    "fractions": (torch.zeros(4), "4 whole numbers in a tensor, one each, got other values"),
    "list": ([0, 1, 2, 0], "got other values"),
}


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS.keys())
def test_wrong_labels_are_refused(sampler):
    net, z = network(), torch.randn(4, 1, 8, 8)
    for labels, message in WRONG.values():
        with pytest.raises(InputError, match=message):
            sampler(net, z, labels)
    for labels in (None, torch.tensor([0, 1, 2, -1]), torch.zeros(4, dtype=torch.int32)):
        assert sampler(net, z, labels).shape == z.shape


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS.keys())
def test_a_model_that_never_was_without_labels_is_not_sampled_without(sampler):
    net = network(label_dropout=0.0)
    for model in (net, GuidedDenoiser(net, None, 1.0)):
        with pytest.raises(InputError, match=r"with labels alone .*: give labels in 0\.\.2"):
            sampler(model, torch.randn(4, 1, 8, 8), None)
