"""Files made to fill the memory, to keep a command waiting, or to reach files of others."""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import sys
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from cm_lightning.callbacks import EMACallback
from cm_lightning.ema import ConstantEMA
from cm_lightning.files import read_pickled_arrays
from cm_lightning.loggers import check_server
from cm_lightning.types import InputError
from cm_lightning.weights.edm_pickle import _tensors
from tests.fuzz.harness import refused, workplace

ZEROS = np.zeros(15 << 20, np.uint8)


def archive(path, members: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        for name, content in members.items():
            file.writestr(name, content)


def test_many_small_members(weights):
    """Each stays below the limit of one."""
    content = io.BytesIO()
    np.save(content, ZEROS)
    with workplace() as folder:
        archive("many.npz", {f"arr_{i}.npy": content.getvalue() for i in range(8)})
        message = refused(folder, "cm-data", "convert", "many.npz", "--out", "out")
        assert "would unpack to 120 MiB, more than 100 times its size" in message


def test_packed_weights():
    with workplace() as folder:
        torch.save({"input_blocks.0.0.weight": torch.from_numpy(ZEROS).repeat(2)}, "plain.pt")
        with zipfile.ZipFile("plain.pt") as plain:
            archive("packed.pt", {name: plain.read(name) for name in plain.namelist()})
        message = refused(folder, "cm-weights", "inspect", "packed.pt")
        assert "would unpack to 30 MiB, more than 100 times its size" in message


def test_tensors_with_more_values_than_are_stored(run):
    with workplace(run) as folder:
        path = sorted((folder / run.name / "checkpoints").iterdir())[-1]
        checkpoint = torch.load(path, weights_only=True)
        state = checkpoint["state_dict"]
        name = max(state, key=lambda key: state[key].numel())
        state[name] = torch.zeros(1).expand(state[name].shape)
        torch.save(checkpoint, path)
        message = refused(folder, "cm-sample", run.name, "--ema", "live", "--n", 2, "--out", "out")
        assert f"'{name.removeprefix('denoiser.')}' has more values than are stored" in message


def test_lists_that_hold_one_another_60_times(tmp_path):
    node = [0]
    for _ in range(60):
        node = [node, node]
    (tmp_path / "x").write_bytes(pickle.dumps(node))
    assert len(read_pickled_arrays(tmp_path / "x")) == 2
    node.append(node)
    (tmp_path / "x").write_bytes(pickle.dumps(node))
    assert read_pickled_arrays(tmp_path / "x")[2] is None


def test_modules_that_hold_one_another_60_times():
    module = SimpleNamespace(state={})
    for _ in range(60):
        module = SimpleNamespace(state={"_modules": {"a": module, "b": module}})
    with pytest.raises(ValueError, match="is in two places"):
        _tensors(module, set())


def test_links_that_lead_to_one_another():
    with workplace() as folder:
        for name, other in (("a", "b"), ("b", "a")):
            (folder / "in" / name).mkdir(parents=True)
            for link in ("x", "y"):
                (folder / "in" / name / link).symlink_to(folder / "in" / other)
        words = ["convert", "in", "--kind", "flat", "--out", "out"]
        assert "more than 100 times" in refused(folder, "cm-data", *words)


def test_numbers_of_base_60():
    with workplace() as folder:
        (folder / "x.yaml").write_text(f"seed_everything: {'1:' * 400_000}1\n")
        assert "base 60" in refused(folder, "cm-fit", "--config", "x.yaml", "--check")


def test_what_is_no_file(run):
    with workplace(run) as folder:
        (folder / run.name / "run.json").unlink()
        os.mkfifo(folder / run.name / "run.json")
        os.mkfifo(folder / "x.pkl")
        assert "a folder or a device" in refused(folder, "cm-compare", run.name, "--out", "out")
        assert "There are no weights" in refused(folder, "cm-weights", "inspect", "x.pkl")


def test_a_store_with_millions_of_classes(store):
    with workplace(store) as folder:
        path = folder / store.name / "store.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"num_classes": 600_000_000}))
        assert "not what store.json describes" in refused(folder, "cm-data", "inspect", store.name)


def test_loggers_stay_in_the_run(run):
    with workplace(run) as folder:
        (folder / "victim").mkdir()
        (folder / "victim" / "metrics.csv").write_text("mine")
        init = {"save_dir": "new", "name": "../..", "version": f"{folder.name}/victim"}
        logger = {"class_path": "CSVLogger", "init_args": init}
        (folder / "x.yaml").write_text(yaml.safe_dump({"trainer": {"logger": logger}}))
        words = ["--config", f"{run.name}/config.yaml", "--config", "x.yaml", "--run_dir", "new"]
        assert "leads out of the run directory" in refused(folder, "cm-fit", *words)


@pytest.mark.parametrize("place", ["~/x", "file:///tmp/x", "$HOME/x"])
def test_places_that_lightning_would_expand(run, place):
    with workplace(run) as folder:
        logger = {"class_path": "CSVLogger", "init_args": {"save_dir": place}}
        (folder / "x.yaml").write_text(yaml.safe_dump({"trainer": {"logger": logger}}))
        words = ["--config", f"{run.name}/config.yaml", "--config", "x.yaml", "--run_dir", "new"]
        assert "give a path of this machine" in refused(folder, "cm-fit", *words)
        (folder / "y.yaml").write_text("run_dir: 'file:'\n")
        words = ["--config", f"{run.name}/config.yaml", "--config", "y.yaml"]
        assert "--run_dir file:: give a path of this machine" in refused(folder, "cm-fit", *words)


def test_checkpoints_of_another_run_are_not_taken_over(run):
    with workplace(run) as folder:
        for name in ("config.yaml", "run.json", "metrics.csv"):
            (folder / "theirs").mkdir(exist_ok=True)
            (folder / "theirs" / name).write_bytes((folder / run.name / name).read_bytes())
        (folder / "theirs" / "checkpoints").symlink_to(folder / run.name / "checkpoints")
        words = ["--config", "theirs/config.yaml", "--run_dir", "theirs"]
        assert "is a link into another run" in refused(folder, "cm-fit", *words)


def test_names_of_averages_are_those_of_the_config():
    ema = EMACallback([ConstantEMA(0.9)])
    weights = {"a": torch.zeros(1)}
    names = ["ema_0.9", "ema_0.9@0.5", "../../x/ema_0.9@0.5", "ema_0.5@0.5", "ema_0.9@x", "x@y"]
    ema.load_state_dict({"averages": dict.fromkeys(names, weights), "total_nimg": 10})
    assert list(ema._loaded) == ["ema_0.9", "ema_0.9@0.5"]


def test_the_current_folder_does_not_say_where_a_key_is_sent(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("WANDB_DIR", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    check_server()
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "settings").write_text("[default]\nmode = offline\n")
    check_server()
    (tmp_path / "wandb" / "settings").write_text("[default]\nbase_url = http://x.y\n")
    with pytest.raises(InputError, match=r"and your key, to http://x\.y: set WANDB_BASE_URL"):
        check_server()
    monkeypatch.setenv("WANDB_BASE_URL", "http://x.y")
    check_server()


@pytest.mark.parametrize("name", ["filelock", "multiprocessing", "tempfile"])
def test_modules_of_the_current_folder_are_not_imported(name, tmp_path):
    """Neither by the programs of a study nor by processes that decode images."""
    (tmp_path / f"{name}.py").write_text("open('mark', 'w').close()\nraise SystemExit(1)\n")
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "a.png")
    study = "from cm_lightning.cli.launcher import Launcher\nLauncher({}).close()\n"
    data = "from cm_lightning.cli.data import main\nif __name__ == '__main__':\n    main()\n"
    convert = ["convert", tmp_path, "--kind", "flat", "--out", tmp_path / "out", "--workers", "1"]
    for text, words in ((study, []), (data, map(str, convert))):
        script = tmp_path / "bin" / "script"  # as pip installs them
        script.parent.mkdir(exist_ok=True)
        script.write_text(text)
        command = [sys.executable, script, *words]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert not (tmp_path / "mark").exists()
