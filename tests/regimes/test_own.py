"""Regimes that a newcomer writes: what is forgotten in them is told in a sentence."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from cm_lightning.callbacks.teacher import find_teacher
from cm_lightning.networks import EDM2Precond, EDM2UNet
from cm_lightning.objective import (
    L2,
    LPIPS,
    Coupled,
    Coupling,
    Draw,
    ECTMapping,
    Euler,
    GeneratorCoupling,
    Independent,
    InverseStep,
    MinibatchOT,
    Objective,
    SampleMean,
)
from cm_lightning.regimes import CT, SCT, ConsistencyModule
from cm_lightning.regimes.checks import check_trained, load_teacher
from cm_lightning.types import Batch, InputError
from cm_lightning.weights import Pretrained
from tests.regimes.test_training import train
from tests.regimes.test_waiting import REGIMES, network, teacher
from tests.toys import TinyDenoiser

OBJECTIVE = Objective(ECTMapping(), Independent(), Euler(SampleMean()), L2(), InverseStep())


class Mine(ConsistencyModule):
    """The objective and one more term."""

    def __init__(self, denoiser, total_kimg=0.064, **options):
        super().__init__(denoiser, total_kimg, **options)
        self.assemble(OBJECTIVE)

    def loss(self, batch, draw):
        output = super().loss(batch, draw)
        return output._replace(loss=output.loss + 1)


class Encoded(TinyDenoiser):
    """A denoiser with a network that is trained along."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(2, 2)


def test_a_network_that_nothing_would_train_is_refused():
    module = Mine(TinyDenoiser())
    module.encoder = nn.Linear(2, 2)
    with pytest.raises(
        InputError, match=r"^encoder\.weight of Mine would not be trained, .* Denoiser subclass"
    ):
        train(module)
    assert module.nimg == 0
    module.encoder.requires_grad_(False)
    train(module)
    assert module.nimg == 64
    module = Mine(Encoded())
    module.same = module.denoiser.encoder  # another name for a part of the denoiser
    train(module)


@pytest.mark.parametrize("name", REGIMES)
def test_what_the_package_adds_to_a_denoiser_is_frozen(name, tmp_path):
    module = REGIMES[name](tmp_path / "teacher")
    check_trained(module, module.denoiser)


def test_a_learned_distance_is_frozen():
    module = CT(network(), 1, distance=LPIPS())
    module.objective.distance._loaded.append(nn.ModuleList([nn.Linear(2, 2)]))
    check_trained(module, module.denoiser)


class Plain(ConsistencyModule):
    """Nothing but a denoiser."""


class Scalar(ConsistencyModule):
    """A loss of the wrong kind."""

    def loss(self, batch, draw):
        return self.denoiser(batch.x0, torch.ones(len(batch.x0))).mean()


def test_a_regime_without_objective_is_told_before_it_starts():
    module = Plain(TinyDenoiser(), 1)
    assert (module.objective, module.stage, module.schedule) == (None, None, {})
    message = r"^Plain has no objective: call assemble\(\.\.\.\) in its __init__, or define loss\.$"
    with pytest.raises(InputError, match=message):
        train(module)
    with pytest.raises(InputError, match=message):
        module.loss(None, None)


def test_a_loss_of_another_type_is_told():
    with pytest.raises(
        InputError, match=r"^The loss of Scalar must be a LossOutput, got Tensor\.$"
    ):
        train(Scalar(TinyDenoiser(), 1))


class Assembled(ConsistencyModule):
    """The base's loss."""

    def __init__(self, denoiser):
        super().__init__(denoiser, 1)
        self.assemble(OBJECTIVE)


def test_a_loss_of_its_own_may_use_the_learned_variance():
    def learning():
        return EDM2Precond(EDM2UNet(8, 1, 1, model_channels=16), learn_variance=True)

    assert Mine(learning()).objective is not None
    with pytest.raises(InputError, match="learn_variance is true, and the loss of Assembled"):
        Assembled(learning())


class Shifted(Coupling):
    """Noise that depends on the image, with gradient."""

    def __init__(self, weight):
        self.weight = weight

    def __call__(self, batch, z, u, t, r, nimg, denoise):
        return Coupled(batch.x0, z + self.weight * batch.x0)


def test_sct_refuses_every_coupling_that_is_not_independent():
    with pytest.raises(InputError, match=r"model\.coupling is Shifted, but SCT's target takes"):
        SCT(network(), coupling=Shifted(torch.ones(())))


def test_notes_of_a_coupling_with_gradient_have_none():
    weight = torch.ones((), requires_grad=True)
    objective, model = replace(OBJECTIVE, coupling=Shifted(weight)), TinyDenoiser()
    batch = Batch(torch.rand(4, 1, 8, 8), None, torch.arange(4))
    output = objective(model, model, batch, Draw(0, 0, 0, 4, torch.device("cpu")))
    assert set(output.notes) == {"transport_cost", "independent_cost"}
    assert not any(note.requires_grad for note in output.notes.values())
    output.loss.mean().backward()
    assert float(weight.grad.abs()) > 0


def test_only_a_generator_tells_what_it_generated():
    batch = Batch(torch.rand(4, 1, 8, 8), None, torch.arange(4))
    z, u, t = torch.randn(4, 1, 8, 8), torch.rand(4), torch.ones(4)

    def pair(coupling):
        return coupling(batch, z, u, t, t / 2, 0, lambda x, sigma, **_: x)

    assert pair(Independent()).generated is pair(MinibatchOT()).generated is None
    for coupling in (GeneratorCoupling(0.0), GeneratorCoupling(start_kimg=1)):
        assert pair(coupling).generated.tolist() == [False] * 4
        assert torch.equal(pair(coupling).x0, batch.x0)
    assert pair(GeneratorCoupling(1.0)).generated.tolist() == [True] * 4


def test_a_teacher_of_another_regime(tmp_path):
    class Sour(ConsistencyModule):
        """A regime with a teacher in its own loss."""

        def __init__(self, denoiser, path):
            super().__init__(denoiser, 1)
            loaded = load_teacher(denoiser, path, type(self).__name__)
            self.borrow("teacher", loaded.denoiser, path.path, loaded.info)
            self.assemble(OBJECTIVE)

    taught, student = teacher(tmp_path / "teacher"), network(label_dropout=0.0)
    module = Sour(student, taught)
    assert find_teacher(module) is module.network("teacher") is not student
    missing = Pretrained(str(tmp_path / "none"))
    with pytest.raises(InputError, match=r"does not exist\. Sour needs a teacher: a run of the"):
        Sour(student, missing)
    with pytest.raises(InputError, match=r"^Sour's teacher must be Pretrained\(path\), got None"):
        load_teacher(student, None, "Sour")
    with pytest.raises(InputError, match=r"0\.1, but Sour's teacher always sees labels"):
        Sour(network(), taught)
