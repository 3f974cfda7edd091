"""Every regime from the command line: it trains, resumes, keeps its promises, refuses mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from cm_lightning.evaluation import read_metrics
from tests.cli.conftest import ONE_CALL, ROOT, TINY
from tests.toys import REGIMES

COARSE = {  # few levels, so that 30 steps carry the data up to the largest noise
    "cd": ["--model.discretization.n", 4, "--model.target.rate", 0.2],
    "ct": ["--model.discretization.s1", 4, "--model.discretization.mu0", 0.1],
}


@pytest.fixture
def train(program, teacher):
    def run(regime: str, run_dir: Path, *arguments: object):
        words = ["--config", ROOT / "configs" / f"{regime}_digits.yaml", "--config", TINY]
        if regime == "cd":
            words += ["--model.teacher.path", teacher]
        return program("cm-fit", *words, "--run_dir", run_dir, *arguments)

    return run


def results(run: Path) -> dict[str, float]:
    return json.loads((run / "run.json").read_text())["results"]["last"]


@pytest.mark.parametrize("regime", REGIMES)
def test_training_improves_on_the_initialisation(train, tmp_path, regime):
    """30 steps of a tiny network; the same command with rate 0 is the initialisation."""
    quick = ["--fid.n", 256, "--fid.samplers", ONE_CALL, "--samples.samplers", ONE_CALL]
    quick += ["--fid.every_kimg", 99, "--samples.every_kimg", 99, "--checkpoints.every_kimg", 99]
    quick += ["--ema.profiles", "[{class_path: ConstantEMA, init_args: {rate: 0.8}}]"]
    quick += ["--model.learning_rate.cooldown_kimg", 0, *COARSE.get(regime, [])]
    untrained = ["--model.total_kimg", 0.064, "--model.optimizer.lr", 0]
    assert train(regime, tmp_path / "start", *quick, *untrained).code == 0
    trained = ["--model.total_kimg", 1.92, "--model.optimizer.lr", 4e-3]
    done = train(regime, tmp_path / "end", *quick, *trained)
    assert done.code == 0, done.err
    (before,), (after,) = (results(tmp_path / name).values() for name in ("start", "end"))
    assert after < 0.9 * before


@pytest.mark.parametrize(
    ("regime", "words"),
    [("cd", []), ("ct", []), ("gc", []), ("sct", ["--model.references.n", 20])],
)
def test_a_resumed_run_equals_an_uninterrupted_one(train, tmp_path, regime, words):
    """Averaged networks and random references included: 10 steps are 5, a restart, and 5."""
    assert train(regime, tmp_path / "whole", *words).code == 0
    stopped = train(regime, tmp_path / "halves", *words, "--trainer.max_steps", 5)
    assert stopped.code == 0, stopped.err
    done = train(regime, tmp_path / "halves", *words)
    assert done.code == 0, done.err
    assert "Resuming from" in done.out
    whole, halves = (
        torch.load(tmp_path / name / "checkpoints" / "nimg000000000640.ckpt", weights_only=True)
        for name in ("whole", "halves")
    )
    assert whole["state_dict"].keys() == halves["state_dict"].keys()
    for name, value in whole["state_dict"].items():
        assert torch.equal(value, halves["state_dict"][name]), name
    own = {"cd": {"target"}, "ct": {"target"}, "gc": {"endpoint"}, "sct": set()}[regime]
    assert {name.split(".")[0] for name in whole["state_dict"]} == {"denoiser"} | own


def test_a_resumed_run_may_split_its_batches_otherwise(train, tmp_path):
    """Steps are whole from the first one on, whatever micro-batches the checkpoint stood after."""
    assert train("ect", tmp_path / "whole", "--data.micro_batch", 64).code == 0
    for steps, size in ((3, 64), (4, 16), (7, 32), (-1, 16)):
        words = ["--trainer.max_steps", steps, "--data.micro_batch", size]
        done = train("ect", tmp_path / "parts", *words)
        assert done.code == 0, done.err
    whole, parts = (tmp_path / name for name in ("whole", "parts"))
    first, second = (read_metrics(run / "metrics.csv") for run in (whole, parts))
    assert [row["kimg"] for row in first] == [row["kimg"] for row in second]
    for a, b in zip(first, second, strict=True):
        for key in ("loss", "gradient/norm"):
            assert a.get(key, 0) == pytest.approx(b.get(key, 0), rel=1e-4)
    first, second = (
        torch.load(run / "checkpoints/nimg000000000640.ckpt", weights_only=True)["state_dict"]
        for run in (whole, parts)
    )
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-3, atol=1e-5)


def test_rows_that_act_on_each_other_do_so_among_as_many(train, tmp_path):
    words = ["--model.references.source", "batch"]
    assert train("sct", tmp_path / "run", *words, "--trainer.max_steps", 3).code == 0
    refused = train("sct", tmp_path / "run", *words, "--data.micro_batch", 16)
    assert refused.code == 2
    assert "was trained in micro-batches of 32 images, whose rows act" in refused.err
    assert "would go on with 16" in refused.err
    assert train("sct", tmp_path / "run", *words, "--data.micro_batch", 32).code == 0


@pytest.mark.parametrize("source", ["bank", "batch"])
def test_sct_logs_its_weights(train, tmp_path, source):
    run = tmp_path / "run"
    assert train("sct", run, "--model.references.source", source).code == 0
    header, *rows = (run / "metrics.csv").read_text().splitlines()
    last = dict(zip(header.split(","), rows[0].split(","), strict=True))
    size, weight = float(last["ess/above_10"]), float(last["largest_weight/above_10"])
    share, gap = float(last["skipped/below_0.1"]), float(last["discrepancy/below_0.1"])
    if source == "bank":
        assert size > 100  # nearly all mirrored images of a class
        assert weight < 0.05
        assert share > 0.9
    else:
        assert 1 < size < 20
        assert share == 0
    assert gap < 0.1


def test_target_rate_and_grid_size_are_logged(train, tmp_path):
    assert train("ct", tmp_path / "run").code == 0
    header, *rows = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    columns = header.split(",")
    values = [dict(zip(columns, row.split(","), strict=True)) for row in rows]
    sizes = [float(v["schedule/levels"]) for v in values if v["schedule/levels"]]
    rates = [float(v["schedule/target_rate"]) for v in values if v["schedule/target_rate"]]
    assert sizes == sorted(sizes)
    assert sizes[0] > 2
    assert sizes[-1] == 41
    assert rates == sorted(rates)
    assert 0 < rates[0] < rates[-1] < 1


def test_teacher_stays_out_of_everything_and_is_recorded(train, teacher, tmp_path):
    run = tmp_path / "run"
    assert train("cd", run).code == 0
    checkpoint = torch.load(run / "checkpoints" / "nimg000000000640.ckpt", weights_only=True)
    assert {name.split(".")[0] for name in checkpoint["state_dict"]} == {"denoiser", "target"}
    averages = checkpoint["callbacks"]["EMACallback"]["averages"]
    own = {n.removeprefix("denoiser.") for n in checkpoint["state_dict"] if "denoiser." in n}
    for average in averages.values():
        assert set(average) <= own
    (states,) = [state["state"] for state in checkpoint["optimizer_states"]]
    assert len(states) == len(next(iter(averages.values())))
    origins = json.loads((run / "run.json").read_text())["origins"]
    assert origins["teacher"]["path"] == str(teacher)
    assert origins["teacher"]["sha256"] == checkpoint["cm_lightning"]["borrowed"]["teacher"]
    exported = json.loads((run / "weights" / "ema_0.9" / "config.json").read_text())
    assert exported["origins"]["teacher"]["regime"] == "Diffusion"


def test_a_changed_teacher_is_refused_on_resume(train, teacher, tmp_path):
    import shutil

    moved = tmp_path / "teacher"
    shutil.copytree(teacher, moved)
    run = tmp_path / "run"
    words = ["--model.teacher.path", moved]
    assert train("cd", run, *words, "--trainer.max_steps", 5).code == 0
    path = moved / "checkpoints" / "nimg000000001280.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    average = checkpoint["callbacks"]["EMACallback"]["averages"]["ema_0.9"]
    average[next(iter(average))].flatten()[0] += 1e-3
    torch.save(checkpoint, path)
    before = sorted(p.name for p in (run / "checkpoints").iterdir())
    done = train("cd", run, *words)
    assert done.code == 2
    assert "The teacher changed since the run started" in done.err
    assert len(done.err.splitlines()) == 1
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == before


def test_a_student_starts_from_its_teacher_or_from_others(train, teacher, tmp_path):
    """With rate 0 the checkpoint holds the first weights."""
    still = ["--model.total_kimg", 0.064, "--model.optimizer.lr", 0, "--ema.profiles"]
    still += ["[{class_path: ConstantEMA, init_args: {rate: 0}}]"]

    def first(name, regime, *words):
        done = train(regime, tmp_path / name, *still, *words)
        assert done.code == 0, done.err
        path = tmp_path / name / "checkpoints" / "nimg000000000064.ckpt"
        state = torch.load(path, weights_only=True)["state_dict"]
        return {key: value for key, value in state.items() if key.startswith("denoiser.")}

    def equal(a, b):
        return all(torch.equal(a[key], b[key]) for key in a)

    weights = teacher / "weights" / "ema_0.9"
    student = first("teacher", "cd")
    random = first("random", "cd", "--model.init", "random")
    ct = first("ct", "ct", "--model.init.path", teacher)
    folder = first("folder", "ect", "--model.init.path", weights)
    assert equal(student, ct)
    assert equal(student, folder)
    assert not equal(student, random)
    assert equal(random, first("ict", "ict"))


MISTAKES = {
    "no teacher": (
        "cd",
        ["--model.teacher.path", "{tmp}/none"],
        "none does not exist. CD needs a teacher",
    ),
    "no such profile": ("cd", ["--model.teacher.ema", "ema_0.5"], "no EMA profile 'ema_0.5'"),
    "teacher of another resolution": (
        "cd",
        ["--model.denoiser.backbone.img_resolution", 16, "--data.resolution", 16],
        "takes images of shape (1, 8, 8)",
    ),
    "teacher of another class count": (
        "cd",
        ["--model.denoiser.backbone.label_dim", 0, "--data.conditional", "false"],
        "knows 10 classes, model.denoiser 0",
    ),
    "negative guidance": ("cd", ["--model.guidance", -1], "guidance scale must be 0 or more"),
    "student as a teacher": ("cd", ["--model.teacher.path", "{run}"], "is no diffusion model"),
    "too many references": ("sct", ["--model.references.n", 500], "asks for 500 references"),
    "references": ("sct", ["--model.references.source", "nowhere"], "nowhere"),
    "skip": ("sct", ["--model.posterior.skip", -1], "skip must be positive"),
    "mix": ("gc", ["--model.coupling.mix", 1.5], "mix must lie in [0, 1], got 1.5"),
    "mix as text": ("gc", ["--model.coupling.mix", "much"], "much"),
    "frozen endpoint": ("gc", ["--model.coupling.endpoint", "frozen"], "frozen needs weights"),
    "endpoint": ("gc", ["--model.coupling.endpoint", "best"], "best"),
    "no LPIPS weights": (
        "ct",
        ["--model.distance", "LPIPS", "--model.distance.weights", "{tmp}/vgg.pth"],
        "VGG16 weights",
    ),
    "no target": ("ct", ["--model.discretization", "KarrasGrid"], "needs model.target"),
    "grid": ("ict", ["--model.discretization.s0", 500], "1 <= s0 <= s1"),
    "initial weights": ("ict", ["--model.init.path", "{tmp}/none"], "no run directory"),
    "initial weights of another network": (
        "ict",
        ["--model.init.path", "{teacher}", "--model.denoiser.backbone.num_blocks", 2],
        "is of another network",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_sentence(train, teacher, tmp_path, name):
    regime, words, message = MISTAKES[name]
    if "{run}" in words:
        assert train("ict", tmp_path / "student", "--model.total_kimg", 0.064).code == 0
    places = {"tmp": tmp_path, "teacher": teacher, "run": tmp_path / "student"}
    words = [str(word).format(**places) if isinstance(word, str) else word for word in words]
    if any("{" in str(word) for word in words):
        raise AssertionError(words)
    done = train(regime, tmp_path / "run", *words)
    assert done.code == 2
    assert message in done.err
    assert len(done.err.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_guidance_needs_a_teacher_that_knows_the_unlabelled_case(train, teacher, tmp_path):
    short = ["--model.total_kimg", 0.064]
    weights = ["--model.teacher.path", teacher / "weights" / "ema_0.9"]
    assert train("cd", tmp_path / "ok", "--model.guidance", 1.5, *short, *weights).code == 0
    plain = tmp_path / "plain"
    assert train("diffusion", plain, *short).code == 0
    done = train("cd", tmp_path / "run", "--model.guidance", 2, "--model.teacher.path", plain)
    assert done.code == 2
    assert "label_dropout" in done.err
    bare = tmp_path / "bare"
    free = ["--model.denoiser.backbone.label_dim", 0, "--data.conditional", "false"]
    assert train("diffusion", bare, *short, *free).code == 0
    done = train("cd", tmp_path / "r", "--model.guidance", 2, "--model.teacher.path", bare, *free)
    assert done.code == 2
    assert "needs a model trained with and without labels" in done.err


def test_check_of_sct_leaves_the_cache_alone(train, tmp_path, monkeypatch):
    """Neither with an empty cache nor with one that holds the store."""
    monkeypatch.setenv("CM_HOME", str(tmp_path / "home"))
    assert train("sct", tmp_path / "run", "--check").code == 0
    assert list(tmp_path.iterdir()) == []
    assert train("ect", tmp_path / "run", "--model.total_kimg", 0.064).code == 0
    before = sorted(path for path in (tmp_path / "home").rglob("*"))
    done = train("sct", tmp_path / "other", "--check")
    assert done.code == 0, done.err
    assert sorted(path for path in (tmp_path / "home").rglob("*")) == before
    assert not (tmp_path / "other").exists()
    assert train("sct", tmp_path / "other", "--model.total_kimg", 0.064).code == 0
    assert list((tmp_path / "home").rglob("nearest*.npy"))


def test_training_and_evaluation_in_phases(train, program, tmp_path):
    edges = "[0, 2.515, 80]"
    sampler = f"[{{class_path: PhasedSampler, init_args: {{edges: {edges}, eta: 0.9}}}}]"
    words = [
        "--model.phases.edges",
        edges,
        "--fid.samplers",
        sampler,
        "--samples.samplers",
        sampler,
    ]
    run = tmp_path / "run"
    done = train("sct", run, "--model.total_kimg", 0.128, *words)
    assert done.code == 0, done.err
    assert set(results(run)) == {
        f"fd_digits66/{name}/phased_nfe2_eta0.9"
        for name in ("ema_0.9", "ema_halflife0.3k", "ema_std0.100")
    }
    weights = run / "weights" / "ema_0.9"
    assert json.loads((weights / "config.json").read_text())["phases"] == [0, 2.515, 80]
    drawn = []
    for number, words in enumerate(
        [[run], [weights], [run, "--phases", 2], [run, "--eta", 0.5], [weights, "--eta", 0.5]]
    ):
        out = tmp_path / str(number)
        done = program("cm-sample", *words, "--n", 3, "--npz", "--out", out)
        assert done.code == 0, done.err
        assert "2 network calls each" in done.out
        drawn.append((out / "samples.npz").read_bytes())
    assert drawn[0] == drawn[1] != drawn[3] == drawn[4]
    words = ["--format", "diffusers", "--out", tmp_path / "bad"]
    done = program("cm-weights", "export", weights, *words)
    assert done.code == 2
    assert "trained in phases" in done.err
    for wrong in (["--sigmas", 80], ["--phases", 4], ["--heun", 3]):
        for words in (["cm-sample", weights, "--out", tmp_path / "bad"], ["cm-eval", run]):
            done = program(*words, *wrong, "--n", 3)
            assert done.code == 2
            assert "trained in phases with the edges 0, 2.515, 80" in done.err
    for bad, message in (
        ("[0, 3, 2]", "edges must increase"),
        ("[1, 2]", "start at 0"),
        (edges, "fid.samplers would draw it by MultistepSampler"),
    ):
        done = train("sct", tmp_path / "bad", "--model.phases.edges", bad)
        assert done.code == 2
        assert message in done.err
