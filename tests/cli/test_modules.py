"""Classes of a config come from known packages, or from those the user names."""

from __future__ import annotations

import json
import sys

import pytest
import torch
import yaml
from safetensors.torch import save_file

from cm_lightning.modules import only
from cm_lightning.types import InputError
from cm_lightning.weights import allow_modules, from_pretrained
from tests.cli.conftest import DIGITS


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package that leaves a mark when it is imported."""
    folder = tmp_path / "path"
    (folder / "stranger").mkdir(parents=True)
    code = (
        f"open({str(tmp_path / 'canary')!r}, 'w').close()\n"
        "from cm_lightning.objective import L2\n"
        "from cm_lightning.evaluation import DigitsFeatures\n"
        "class Own(L2):\n    pass\n"
        "class Features(DigitsFeatures):\n    pass\n"
    )
    (folder / "stranger" / "__init__.py").write_text(code)
    monkeypatch.syspath_prepend(folder)
    yield tmp_path / "canary"
    sys.modules.pop("stranger", None)


PLACES = {
    "option": ["--model.distance", "stranger.Own"],
    "mapping": ["--model.distance", "{class_path: stranger.Own}"],
    "class_path": ["--model.distance.class_path", "stranger.Own"],
    "features": ["--fid.features", "stranger.Features"],
    "optimizer": ["--model.optimizer", "stranger.Own"],
    "callback": ["--trainer.callbacks", "[{class_path: stranger.Own}]"],
    "callback+": ["--trainer.callbacks+", "stranger.Own"],
    "logger": ["--trainer.logger", "stranger.Own"],
    "strategy": ["--trainer.strategy", "{class_path: stranger.Own}"],
    "nested": [
        "--data.source",
        "{class_path: Store, init_args: {path: {class_path: stranger.Own}}}",
    ],
    "regime": ["--model", "stranger.Own"],
    "system": ["--model.optimizer", "{class_path: os.system, init_args: {command: id}}"],
}


@pytest.mark.parametrize("words", PLACES.values(), ids=PLACES.keys())
def test_other_packages_are_not_imported(fit, tmp_path, package, words):
    done = fit(tmp_path / "run", *words)
    assert done.code == 2
    assert not package.exists()
    assert not (tmp_path / "run").exists()
    if words[0] not in ("--data.source", "--trainer.strategy"):  # texts are expected there
        assert "--allow_modules" in done.err, done.err


@pytest.mark.parametrize("short", [False, True])
def test_other_packages_in_a_file(fit, program, tmp_path, package, short):
    distance = "stranger.Own" if short else {"class_path": "stranger.Own"}
    model = {"class_path": "ECT", "init_args": {"distance": distance}}
    (tmp_path / "x.yaml").write_text(yaml.safe_dump({"allow_modules": "stranger", "model": model}))
    done = fit(tmp_path / "run", "--config", tmp_path / "x.yaml")
    assert done.code == 2
    assert "names the class 'stranger.Own'" in done.err
    assert "--allow_modules stranger" in done.err
    assert not package.exists()


def test_a_package_is_allowed_by_name(fit, tmp_path, package):
    words = ["--model.distance", "stranger.Own", "--model.total_kimg", 0.064, "--fid.n", 2]
    done = fit(tmp_path / "run", *words, "--allow_modules", "other,stranger")
    assert done.code == 0, done.err
    assert package.exists()
    refused = fit(tmp_path / "two", "--allow_modules", "/tmp/x.py")
    assert "names of packages separated by commas, got '/tmp/x.py'" in refused.err


def test_a_module_of_the_current_folder_is_found(fit, tmp_path, monkeypatch):
    (tmp_path / "neighbour.py").write_text(
        "from cm_lightning.objective import L2\nclass Own(L2):\n    pass\n"
    )
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    words = ["--model.distance", "neighbour.Own", "--model.total_kimg", 0.064, "--fid.n", 2]
    done = fit(tmp_path / "run", *words, "--allow_modules", "neighbour")
    assert done.code == 0, done.err
    assert sys.path[-1] == str(tmp_path)
    sys.modules.pop("neighbour")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import nothing_here\n", "neighbour cannot be imported: No module named 'nothing_here'."),
        ("def f()\n    pass\n", "cannot be imported: SyntaxError"),
        ("x = y\n", "cannot be imported: NameError in neighbour.py, line 1: name 'y' is not"),
        ("", "there is no class 'neighbour.Own'"),
        (None, "and neighbour is neither installed nor in the current folder"),
    ],
)
def test_what_is_wrong_with_ones_own_module_is_told(fit, tmp_path, monkeypatch, text, message):
    if text is not None:
        (tmp_path / "neighbour.py").write_text(text)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    words = ["--model.distance", "neighbour.Own", "--allow_modules", "neighbour"]
    done = fit(tmp_path / "run", *words)
    assert done.code == 2
    assert message in done.err
    assert done.err.count("\n") == 1
    sys.modules.pop("neighbour", None)


OWN = """
import torch
from torch import nn


class Tiny(nn.Module):
    \"\"\"The interface of a backbone: scaled images, c_noise and rows of a one-hot matrix.\"\"\"

    def __init__(self, img_resolution: int = 8, in_channels: int = 1, label_dim: int = 10):
        super().__init__()
        self.img_resolution, self.in_channels = img_resolution, in_channels
        self.label_dim = label_dim
        self.first = nn.Conv2d(in_channels, 8, 3, padding=1)
        self.told = nn.Linear(label_dim + 1, 8)
        self.last = nn.Conv2d(8, in_channels, 3, padding=1)

    def forward(self, x, noise, labels):
        told = self.told(torch.cat([labels, noise.reshape(-1, 1)], 1))
        return self.last(torch.relu(self.first(x) + told[:, :, None, None]))
"""


def test_a_network_of_your_own_from_training_to_tuning(program, tmp_path, package):
    """Trained, sampled, evaluated, exported, loaded in Python, and started from."""
    (tmp_path / "path/stranger/__init__.py").write_text(OWN)
    words = ["--config", DIGITS, "--model.denoiser.backbone", "stranger.Tiny", "--fid.n", 66]
    words += ["--allow_modules", "stranger", "--model.total_kimg", 0.064, "--samples.n", 4]
    run, weights = tmp_path / "run", tmp_path / "weights"
    done = program("cm-fit", *words, "--run_dir", run)
    assert done.code == 0, done.err
    commands = {
        "cm-sample": [run, "--n", 2, "--out", tmp_path / "pictures"],
        "cm-eval": [run, "--n", 66, "--seeds", 0, "--sigmas", 80],
        "cm-weights": ["export", run, "--out", weights],
    }
    for name, arguments in commands.items():
        done = program(name, *arguments)
        assert done.code == 2
        assert "names the class 'stranger.Tiny': classes come from cm_lightning alone" in done.err
        assert "add --allow_modules stranger to the command line" in done.err
        done = program(name, *arguments, "--allow_modules", "stranger")
        assert done.code == 0, done.err
    allow_modules("stranger")
    assert type(from_pretrained(weights).backbone).__name__ == "Tiny"
    allow_modules()
    with pytest.raises(InputError, match="allow_modules"):
        from_pretrained(weights)
    done = program("cm-fit", *words, "--run_dir", tmp_path / "tuned", "--model.init.path", weights)
    assert done.code == 0, done.err
    done = program("cm-sample", run, "--out", tmp_path / "x", "--allow_modules", "a b")
    assert "separated by commas, got 'a b'" in done.err


CODE = "import os\nopen({!r}, 'w').close()\ndef forward(self): pass\n"


def runs(mark) -> dict[str, object]:
    """Descriptions of a backbone that would run code, by the way they take."""
    graph = "torch.fx.graph_module.reduce_graph_module"
    body = {"class_path": graph, "init_args": {"import_block": "", "body": {"code": mark}}}
    inside = {"in_features": 1, "out_features": 1}
    shell = {"class_path": "cm_lightning.callbacks.run_record.subprocess.Popen"}
    device = {"device": shell | {"init_args": {"args": mark, "shell": True}}}
    linear = "cm_lightning.networks.layers.nn.Linear"
    own = {"class_path": "cm_lightning.networks.SongUNet"}
    sizes = {"init_args": {"img_resolution": 8, "in_channels": 1, "out_channels": 1}}
    return {
        "mapping": body,
        "text": json.dumps(body),
        "attributes of a module": {"class_path": linear, "init_args": inside | device},
        "text of a module": "this.s",
        "untyped argument": own | {"init_args": {"img_resolution": 8, "resample_filter": device}},
        "function of a regime": {
            "class_path": "cm_lightning.regimes.ECT",
            "init_args": {
                "denoiser": {"class_path": "EDMPrecond", "init_args": {"backbone": own | sizes}},
                "total_kimg": 1,
                "optimizer": {
                    "class_path": "cm_lightning.weights.portable.save_weights",
                    "init_args": {"folder": mark, "denoiser": {}, "weights": {}, "info": {}},
                },
            },
        },
    }


@pytest.mark.parametrize("way", runs("").keys())
def test_no_description_of_a_network_runs_code(way, program, tmp_path, capsys):
    mark = tmp_path / "mark"
    words = CODE.format(str(mark))
    if "attributes" in way or "argument" in way:
        words = f"touch {mark}"
    elif "function" in way:
        words = str(mark)
    init = {"backbone": runs(words)[way]}
    denoiser = {"class_path": "cm_lightning.networks.EDMPrecond", "init_args": init}
    folder = tmp_path / "weights"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"denoiser": denoiser}))
    save_file({"a": torch.zeros(1)}, folder / "model.safetensors")
    for name, arguments in {
        "cm-weights": ["inspect", folder],
        "cm-sample": [folder, "--out", tmp_path / "out"],
    }.items():
        done = program(name, *arguments)
        assert done.code == 2
        assert "config.json" in done.err
    with pytest.raises(InputError):
        from_pretrained(folder)
    model = {"class_path": "ECT", "init_args": {"denoiser": denoiser}}
    (tmp_path / "x.yaml").write_text(yaml.safe_dump({"model": model}))
    done = program("cm-fit", "--config", DIGITS, "--config", tmp_path / "x.yaml", "--check")
    assert done.code == 2
    assert "this" not in sys.modules
    assert not mark.exists()


@pytest.mark.parametrize(
    "words",
    [
        ["--config", "exec.yaml"],
        [
            "--trainer.callbacks",
            "[{class_path: lightning.pytorch.callbacks.LambdaCallback, init_args: {on_fit_start: "
            "cm_lightning.cli.fit.main}}]",
        ],
        ["--trainer.callbacks", "[{class_path: LambdaCallback}]"],
        [
            "--trainer.callbacks",
            "[{class_path: BackboneFinetuning, init_args: {lambda_func: "
            "cm_lightning.evaluation.save_png}}]",
        ],
        [
            "--trainer.callbacks",
            "[{class_path: BackboneFinetuning, init_args: {lambda_func: {class_path: "
            "cm_lightning.files.write_text, init_args: {path: x, text: y}}}}]",
        ],
        ["--trainer.logger", "{class_path: cm_lightning.loggers.MetricsCSV}"],
        ["--model.optimizer", "{class_path: torch.distributed.launcher.api.elastic_launch}"],
    ],
)
def test_what_runs_code_in_torch_and_lightning_is_closed(words, fit, tmp_path):
    mark = tmp_path / "mark"
    source = {"src": f"open({str(mark)!r}, 'w')", "globals": {}}
    code = {"class_path": "torch.fx.graph_module._exec_with_source", "init_args": source}
    strategy = {"class_path": "DDPStrategy", "init_args": {"ddp_comm_state": code}}
    (tmp_path / "exec.yaml").write_text(yaml.safe_dump({"trainer": {"strategy": strategy}}))
    done = fit(tmp_path / "run", *(tmp_path / w if w.endswith("yaml") else w for w in words))
    assert done.code == 2
    assert "classes come from cm_lightning, torch.optim, Lightning's callbacks" in done.err
    assert "--allow_modules torch" not in done.err
    assert "--allow_modules lightning" not in done.err
    assert not mark.exists()
    assert not (tmp_path / "run").exists()


def test_settings_of_the_parser_are_put_back():
    """They are global: a program of the user's has its own."""
    from jsonargparse import _common, _typehints

    before = dict(_common.parsing_settings), _typehints.import_object
    with only():
        assert _common.parsing_settings["import_path_verdicts"]["*"] is False
        assert _typehints.import_object is not before[1]
    assert (_common.parsing_settings, _typehints.import_object) == before
