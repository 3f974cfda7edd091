"""The distance to the teacher's ODE: known in closed form on Gaussian data, silent elsewhere."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from cm_lightning.callbacks import EMACallback
from cm_lightning.callbacks.teacher import TeacherDistance, find_teacher
from cm_lightning.evaluation import read_metrics
from cm_lightning.files import hash_tensors
from cm_lightning.objective import Euler, Heun, KarrasGrid, Phases, SampleMean, TeacherMean
from cm_lightning.sampling import HeunSampler, image_noise
from cm_lightning.types import InputError
from cm_lightning.weights import Pretrained, from_pretrained
from tests.cli.conftest import ROOT, TINY
from tests.toys import FunctionDenoiser, gaussian_denoiser, gaussian_endpoint

QUIET = ["--fid.profiles", "[]", "--samples.every_kimg", "null"]
KEY = "teacher/ode_distance/ema_0.9999"


def run_of(student, teacher=None, phases=None):
    """A trainer and a module whose posterior mean is a teacher's."""
    ema = EMACallback()
    ema.averages = {name: {} for name in ema.names}
    trainer = SimpleNamespace(
        is_global_zero=True,
        callbacks=[ema],
        datamodule=SimpleNamespace(num_classes=0, image_shape=(1, 4, 4)),
    )
    solver = Heun(TeacherMean(teacher or gaussian_denoiser()))
    module = SimpleNamespace(
        denoiser=student,
        device=torch.device("cpu"),
        objective=SimpleNamespace(solver=solver, phases=phases),
    )
    return trainer, module


def test_gaussian_data_have_a_closed_form():
    """The endpoint of 80 z is 80 z s / sqrt(s^2 + 80^2): a student a x is off by a known factor."""
    exact = 0.5 / math.sqrt(0.25 + 6400)
    z = image_noise(0, range(32), 1, (1, 4, 4))[0].double()
    size = float((80 * z).square().mean().sqrt())
    for a in (0.0, exact, 0.01):
        student = FunctionDenoiser(lambda x, t, a=a: a * x)
        found = TeacherDistance(32, steps=256)(*run_of(student))
        assert found[KEY] == pytest.approx(abs(a - exact) * size, abs=3e-4)
    coarse = TeacherDistance(32)(*run_of(gaussian_endpoint()))[KEY]
    assert coarse == pytest.approx(0.0273, rel=0.01)  # the error of Heun with 18 levels


@pytest.mark.parametrize("top", [20.0, 40.0])
def test_a_grid_says_where_noise_begins(top):
    """Exact student and teacher agree wherever they start; a student is asked nowhere else."""
    levels = []

    def student(x, t):
        levels.append(float(t.max()))
        return x * (0.25 / (0.25 + t * t)).sqrt()

    trainer, module = run_of(FunctionDenoiser(student))
    module.objective.discretization = KarrasGrid(18, sigma_max=top)
    found = TeacherDistance(32, steps=256)(trainer, module)
    assert found[KEY] < 3e-4
    assert max(levels) == top


def test_phases_go_all_the_way_to_the_endpoint():
    phases = Phases((0.0, 0.5, 80.0))
    student = FunctionDenoiser(  # F of each phase is the exact flow to its lower edge
        lambda x, t: x * _mean_for(t, torch.where(t > 0.5, 0.5, 0.0))
    )
    found = TeacherDistance(32, steps=256)(*run_of(student, phases=phases))
    assert found[KEY] < 3e-4


def _mean_for(t, s):
    """D / x with D + s/t (x - D) = x sqrt((0.25 + s^2) / (0.25 + t^2))."""
    return (((0.25 + s * s) / (0.25 + t * t)).sqrt() - s / t) / (1 - s / t)


def test_endpoints_are_solved_once_and_no_random_state_is_touched():
    calls = []

    def count(x, t):
        calls.append(len(x))
        return 0.25 * x / (0.25 + t * t)

    run = run_of(gaussian_endpoint(), FunctionDenoiser(count))
    measure = TeacherDistance(70, steps=3)
    before = torch.get_rng_state()
    first = measure(*run)
    assert calls == [64] * 5 + [6] * 5
    assert measure(*run) == first
    assert len(calls) == 10
    assert torch.equal(torch.get_rng_state(), before)
    run[0].is_global_zero = False
    assert measure(*run) == {}


def test_reading_initial_weights_leaves_the_generators_alone(teacher):
    init = Pretrained(str(teacher))
    network = init.load().denoiser
    digest = hash_tensors(network.state_dict())
    objective = SimpleNamespace(solver=Euler(SampleMean()))
    origins = {"init": {"sha256": digest}}
    module = SimpleNamespace(objective=objective, init=init, origins=origins)
    before = torch.get_rng_state()
    found = find_teacher(module)
    assert torch.equal(torch.get_rng_state(), before)
    assert hash_tensors(found.state_dict()) == digest
    module.init = None
    assert find_teacher(module) is None


def test_arguments_are_checked():
    for words, given in (("teacher_rows", {"n": -1}), ("teacher_steps", {"steps": 1})):
        with pytest.raises(InputError, match=f"diagnostics.{words}"):
            TeacherDistance(**given)


def distances(run):
    return [
        (row["kimg"], row["teacher/ode_distance/ema_0.9"])
        for row in read_metrics(run / "metrics.csv")
        if "teacher/ode_distance/ema_0.9" in row
    ]


def test_a_run_from_a_diffusion_model_logs_it_and_resumes_to_the_same(fit, teacher, tmp_path):
    words = ["--model.init.path", teacher, "--diagnostics.teacher_steps", 4]
    words += ["--diagnostics.teacher_rows", 12, *QUIET]
    assert fit(tmp_path / "whole", *words).code == 0
    whole = distances(tmp_path / "whole")
    assert [kimg for kimg, _ in whole] == [0.192, 0.384, 0.576, 0.64]
    assert fit(tmp_path / "halves", *words, "--trainer.max_steps", 5).code == 0
    done = fit(tmp_path / "halves", *words)
    assert done.code == 0, done.err
    assert distances(tmp_path / "halves") == whole
    labels = torch.arange(12) % 10
    noise = 80 * image_noise(0, range(12), 1, (1, 8, 8))[0]
    with torch.no_grad():
        endpoint = HeunSampler(4)(
            Pretrained(str(teacher)).load().denoiser, noise[None] / 80, labels
        )
        ours = from_pretrained(tmp_path / "whole")(noise, torch.full((12,), 80.0), labels)
    assert whole[-1][1] == pytest.approx(float((ours - endpoint).square().mean().sqrt()), rel=1e-5)


def test_runs_without_a_teacher_or_with_lost_weights_leave_it_out(
    fit, program, teacher, tmp_path, monkeypatch
):
    steps = [*QUIET, "--trainer.max_steps", 5]
    assert fit(tmp_path / "scratch", *steps).code == 0
    words = ["--config", ROOT / "configs" / "diffusion_digits.yaml", "--config", TINY]
    words += ["--run_dir", tmp_path / "diffusion", "--model.init.path", teacher]
    assert program("cm-fit", *words, *steps).code == 0
    path = tmp_path / "scratch"
    done = fit(tmp_path / "tuned", "--model.init.path", path, *steps)
    assert done.code == 0, done.err  # a consistency model is no teacher
    monkeypatch.setattr("cm_lightning.callbacks.teacher.hash_tensors", lambda tensors: "other")
    done = fit(tmp_path / "lost", "--model.init.path", teacher, *steps)
    assert done.code == 0, done.err
    assert "teacher/ode_distance is left out: the weights in" in done.out
    for name in ("scratch", "diffusion", "tuned", "lost"):
        rows = read_metrics(tmp_path / name / "metrics.csv")
        assert len(rows) > 0
        assert not any(key.startswith("teacher/") for row in rows for key in row)
    assert fit(tmp_path / "bad", "--diagnostics.teacher_rows", -1).code == 2


def test_cd_is_measured_against_its_guided_teacher(program, teacher, tmp_path):
    words = ["--config", ROOT / "configs" / "cd_digits.yaml", "--config", TINY]
    words += ["--model.teacher.path", teacher, "--trainer.max_steps", 3, *QUIET]
    words += ["--diagnostics.teacher_rows", 10, "--diagnostics.teacher_steps", 2]
    found = []
    for scale in (1, 4):
        run = tmp_path / f"guided{scale}"
        done = program("cm-fit", *words, "--run_dir", run, "--model.guidance", scale)
        assert done.code == 0, done.err
        found.append(distances(run)[0][1])
    assert abs(found[0] - found[1]) > 1e-3
