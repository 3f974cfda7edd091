"""Pickles in the form of NVIDIA's: read without running anything, refused when they hold more."""

from __future__ import annotations

import collections
import json
import os
import pickle
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from cm_lightning.networks import ADMUNet, EDM2Precond, EDM2UNet, EDMPrecond, SongUNet
from cm_lightning.types import InputError
from cm_lightning.weights import from_pretrained, read_edm_pickle

ROOT = Path(__file__).parents[2]


@pytest.fixture
def foreign(monkeypatch):
    return install_foreign(monkeypatch)


def install_foreign(monkeypatch):
    """The modules whose names such files hold, as far as writing one needs them."""
    persistence = types.ModuleType("torch_utils.persistence")
    util = types.ModuleType("dnnlib.util")

    def _reconstruct_persistent_obj(meta):
        raise AssertionError("the reader must not call this")

    class EasyDict(dict):
        __module__, __qualname__ = "dnnlib.util", "EasyDict"

    _reconstruct_persistent_obj.__module__ = "torch_utils.persistence"
    _reconstruct_persistent_obj.__qualname__ = "_reconstruct_persistent_obj"
    persistence._reconstruct_persistent_obj = _reconstruct_persistent_obj
    util.EasyDict = EasyDict
    for name, module in (
        ("torch_utils", types.ModuleType("torch_utils")),
        ("torch_utils.persistence", persistence),
        ("dnnlib", types.ModuleType("dnnlib")),
        ("dnnlib.util", util),
    ):
        monkeypatch.setitem(sys.modules, name, module)
    return persistence, util


def persistent(module: nn.Module, foreign, name: str, arguments: dict | None = None):
    """An object that pickles as the official decorator makes networks pickle."""
    persistence, util = foreign

    class Stored:
        def __init__(self, state):
            self.state = state

        def __reduce__(self):
            meta = util.EasyDict(
                type="class",
                version=6,
                module_src="raise RuntimeError('executed')",
                class_name=name,
                state=self.state,
            )
            return persistence._reconstruct_persistent_obj, (meta,)

    children = collections.OrderedDict()
    for key, child in module._modules.items():
        if isinstance(child, nn.ModuleDict):
            container = nn.ModuleDict()
            for inner, layer in child.items():
                container._modules[inner] = persistent(layer, foreign, type(layer).__name__)
            children[key] = container
        elif child is not None:
            children[key] = persistent(child, foreign, type(child).__name__)
    state = {
        "training": False,
        "_parameters": collections.OrderedDict(module._parameters),
        "_buffers": collections.OrderedDict(module._buffers),
        "_non_persistent_buffers_set": set(),
        "_modules": children,
        "skip_scale": np.sqrt(0.5),
        "sigma_max": float("inf"),
        "_init_args": (),
        "_init_kwargs": arguments or {},
    }
    return Stored(state)


SONG = {"model_channels": 32, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [8]}
CASES = {
    "song": (
        lambda: EDMPrecond(SongUNet(16, label_dim=4, augment_dim=9, **SONG)),
        "EDMPrecond",
        {"model_type": "SongUNet", "label_dim": 4, "augment_dim": 9, "use_fp16": True, **SONG},
    ),
    "ect": (
        lambda: EDMPrecond(SongUNet(16, **SONG)),
        "ECMPrecond",
        {"model_type": "SongUNet", "label_dim": 0, **SONG},
    ),
    "adm": (
        lambda: EDMPrecond(ADMUNet(16, label_dim=4, **SONG)),
        "EDMPrecond",
        {"model_type": "DhariwalUNet", "label_dim": 4, **SONG},
    ),
    "edm2": (
        lambda: EDM2Precond(EDM2UNet(16, label_dim=4, **SONG)),
        "Precond",
        {"label_dim": 4, "use_fp16": True, "sigma_data": 0.5, **SONG},
    ),
}


@pytest.fixture
def write(foreign, tmp_path):
    def make(case: str):
        torch.manual_seed(0)
        build, name, arguments = CASES[case]
        network = build()
        arguments = foreign[1].EasyDict(img_resolution=16, img_channels=3, **arguments)
        stored = persistent(network, foreign, name, arguments)
        path = tmp_path / f"{case}.pkl"
        content = {"ema": stored, "augment_pipe": None, "dataset_kwargs": {}}
        # ECT's loss keeps a method of its own, EDM2's latent models an array
        content |= {"loss_fn": {"t_to_r": {1}.add}, "encoder": np.arange(3)}
        path.write_bytes(pickle.dumps(content))
        return path, network

    make.foreign = foreign
    return make


@pytest.mark.parametrize("case", CASES)
def test_networks_come_back_bit_for_bit(write, case, monkeypatch):
    path, network = write(case)
    for name in ("torch_utils", "torch_utils.persistence", "dnnlib", "dnnlib.util"):
        monkeypatch.delitem(sys.modules, name)  # the reader needs none of them
    found = read_edm_pickle(path)
    state = network.state_dict()
    assert list(found.weights) == list(state)
    assert all(torch.equal(found.weights[name], value) for name, value in state.items())
    assert found.class_name == CASES[case][1]


@pytest.mark.parametrize("case", CASES)
def test_import_inspect_and_use(write, case, program, tmp_path):
    path, network = write(case)
    done = program("cm-weights", "inspect", path)
    assert done.code == 0, done.err
    count = sum(p.numel() for p in network.parameters())
    assert f"{count:,}" in done.out
    assert "CC BY-NC-SA" in done.out
    out = tmp_path / "weights"
    done = program("cm-weights", "import", path, "--out", out)
    assert done.code == 0, done.err
    again = program("cm-weights", "import", path, "--out", out)
    assert again.code == 2
    assert "exists already" in again.err
    loaded = from_pretrained(out)
    x, sigma = torch.randn(2, 3, 16, 16), torch.tensor([0.3, 5.0])
    labels = torch.tensor([0, 3]) if network.num_classes else None
    with torch.no_grad():
        assert torch.equal(loaded(x, sigma, labels), network.eval()(x, sigma, labels))
    config = json.loads((out / "config.json").read_text())
    assert config["regime"] == ("ECT" if case == "ect" else "Diffusion")
    assert f"regime      {config['regime']}" in done.out
    assert "CC BY-NC-SA" in config["licence"]
    assert program("cm-weights", "inspect", out).code == 0
    done = program("cm-sample", out, "--n", 2, "--out", tmp_path / "pictures")
    assert done.code == 0, done.err
    assert "imported, 1 network calls" in done.out


class Evil:
    """Runs a command when unpickled."""

    def __reduce__(self):
        return os.system, ("touch executed",)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"ema": Evil()}, "posix.system"),
        ({"ema": collections.Counter()}, "collections.Counter"),
        ({"ema": None}, "no network under 'ema'"),
        ([1, 2], "no network"),
    ],
)
def test_other_pickles_are_refused_by_name(content, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "evil.pkl"
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(InputError, match=words):
        read_edm_pickle(path)
    assert not (tmp_path / "executed").exists()


def call(module: str, name: str, argument: str = "touch executed") -> bytes:
    """A pickle that calls one function with one text; protocol 4 follows dotted names."""
    parts = [b"\x80\x04"]
    parts += [b"X" + len(text).to_bytes(4, "little") + text.encode() for text in (module, name)]
    parts += [b"\x93", b"X" + len(argument).to_bytes(4, "little") + argument.encode(), b"\x85R."]
    return b"".join(parts)


def reaching(size: tuple, stride: tuple) -> bytes:
    """A tensor that wants more than its storage holds."""

    class Tensor:
        def __reduce__(self):
            storage = torch.zeros(4).storage()
            arguments = (storage, 0, size, stride, False, collections.OrderedDict())
            return torch._utils._rebuild_tensor_v2, arguments

    return pickle.dumps({"ema": Tensor()})


HOSTILE = {
    **{
        f"{module}.{name}": call(module, name)
        for module, name in (
            ("os", "system"),
            ("posix", "system"),
            ("subprocess", "getoutput"),
            ("builtins", "eval"),
            ("builtins", "exec"),
            ("builtins", "getattr"),
            ("builtins", "__import__"),
            ("builtins", "set.__class__"),
            ("importlib", "import_module"),
            ("runpy", "run_path"),
            ("shutil", "rmtree"),
            ("operator", "attrgetter"),
            ("functools", "partial"),
            ("numpy", "load"),
            ("torch", "load"),
            ("torch.hub", "load"),
            ("torch.serialization", "load"),
            ("torch.storage", "os.system"),
            ("torch._utils", "_import_dotted_name"),
            ("torch.nn.modules", "os"),
            ("torch.nn.modules.container", "os.system"),
            ("torch.nn.modules.module", "torch.load"),
            ("collections", "OrderedDict.__init__.__globals__"),
            ("pickle", "loads"),
        )
    },
    "protocol 0": b"cos\nsystem\n(S'touch executed'\ntR.",
    "inst opcode": b"(S'touch executed'\nios\nsystem\n.",
    "changed function": b"\x80\x04ctorch.storage\n_load_from_bytes\n}X\x01\x00\x00\x00aK\x01sb.",
    "changed slots": b"\x80\x04ctorch.storage\n_load_from_bytes\n"
    b"N}X\x04\x00\x00\x00_runK\x01s\x86b.",
    "persistent id": b"\x80\x04Ptouch executed\n.",
    "extension code": b"\x80\x02\x82\x01.",
    "a length of 2^31": b"\x80\x04\x8e" + (2**31).to_bytes(8, "little") + b"x.",
    "a length of 2^62": b"\x80\x04\x8e" + (2**62).to_bytes(8, "little") + b"x.",
    "a memo of 2^31": b"\x80\x04Nr\xff\xff\xff\x7f.",
    "an array of 2^40 elements": b"\x80\x04\x95" + (2**40).to_bytes(8, "little") + b"N.",
    "a bytearray of 2^40": b"\x80\x05\x96" + (2**40).to_bytes(8, "little") + b"x.",
    "large tensor": reaching((2**40,), (1,)),
    "negative stride": reaching((4,), (-1,)),
    "empty": b"",
    "text": b"this is no pickle",
    "zip": b"PK\x03\x04" + bytes(100),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_in_one_sentence(name, program, tmp_path, monkeypatch):
    """Nothing runs: the canary file does not appear, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "evil.pkl"
    path.write_bytes(HOSTILE[name])
    for words in (["inspect", path], ["import", path, "--out", "out"]):
        done = program("cm-weights", *words)
        assert done.code == 2
        assert len(done.err.strip().splitlines()) == 1, done.err
        assert "Traceback" not in done.err
    assert [p.name for p in tmp_path.iterdir()] == ["evil.pkl"]


def test_hostile_files_take_no_memory(tmp_path):
    """All of them together, read in a fresh process, whose peak is measured before and after."""
    for number, content in enumerate(HOSTILE.values()):
        (tmp_path / f"{number}.pkl").write_bytes(content)
    code = """
import pathlib, resource, sys
from cm_lightning.types import InputError
from cm_lightning.weights import read_edm_pickle
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
for path in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    try:
        read_edm_pickle(path)
    except InputError:
        continue
    sys.exit(f"{path} was read")
print(peak() - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 100_000  # KiB; a memo of 2^31 entries alone would take 16 GiB


def test_storages_are_read_as_weights_only(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    inner = pickle.dumps(Evil())

    class Storage:
        def __reduce__(self):
            return torch.storage._load_from_bytes, (inner,)

    path = tmp_path / "evil.pkl"
    path.write_bytes(pickle.dumps({"ema": Storage()}))
    with pytest.raises(InputError):
        read_edm_pickle(path)
    assert not (tmp_path / "executed").exists()


def test_damaged_and_foreign_files(write, program, tmp_path):
    path, _ = write("song")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    missing = tmp_path / "none.pkl"
    for source in (path, missing):
        done = program("cm-weights", "import", source, "--out", tmp_path / "out")
        assert done.code == 2
        assert len(done.err.strip().splitlines()) == 1
        assert not (tmp_path / "out").exists()
    assert program("cm-weights", "inspect", tmp_path / "none").code == 2
    assert program("cm-weights", "look", path).code == 2


def test_an_unknown_network_is_named(foreign, tmp_path):
    stored = persistent(nn.Linear(1, 1), foreign, "VPPrecond")
    path = tmp_path / "vp.pkl"
    path.write_bytes(pickle.dumps({"ema": stored}))
    with pytest.raises(InputError, match="VPPrecond"):
        read_edm_pickle(path)


def test_the_licence_of_imported_weights_travels_on(write, program, tmp_path):
    """Import, tune, export: the model card names where the weights came from."""
    from tests.cli.conftest import DIGITS, TINY

    torch.manual_seed(0)
    small = {"model_channels": 32, "channel_mult": [1], "num_blocks": 1, "augment_dim": 9}
    network = EDMPrecond(SongUNet(8, 1, 1, 10, **small))
    arguments = {"model_type": "SongUNet", "label_dim": 10, "augment_dim": 9, "model_channels": 32}
    arguments |= {"channel_mult": [1], "num_blocks": 1, "img_resolution": 8, "img_channels": 1}
    stored = persistent(network, write.foreign, "EDMPrecond", arguments)
    path = tmp_path / "edm.pkl"
    path.write_bytes(pickle.dumps({"ema": stored}))
    weights, run, out = tmp_path / "weights", tmp_path / "run", tmp_path / "out"
    assert program("cm-weights", "import", path, "--out", weights).code == 0
    words = ["--config", DIGITS, "--config", TINY, "--run_dir", run, "--fid.n", 66]
    words += ["--model.init.path", weights, "--model.total_kimg", 0.064]
    words += ["--model.denoiser.backbone.attn_resolutions", "[16]"]
    words += ["--model.denoiser.backbone.channel_mult_emb", 4]
    done = program("cm-fit", *words)
    assert done.code == 0, done.err
    assert "left out, as the network has no such layer: model.map_augment.weight" in done.out
    done = program("cm-weights", "export", run, "--ema", "ema_0.9", "--out", out)
    assert done.code == 0, done.err
    card = (out / "README.md").read_text()
    for words in ("CC BY-NC-SA", "ECT", "0.064 thousand images", str(weights), "fd_digits66"):
        assert words in card, words
    a, b = from_pretrained(out).state_dict(), from_pretrained(run, "ema_0.9").state_dict()
    assert all(torch.equal(a[name], b[name]) for name in b)
    again = tmp_path / "again"
    assert program("cm-weights", "export", out, "--out", again).code == 0
    assert "CC BY-NC-SA" in (again / "README.md").read_text()
    refused = program("cm-weights", "export", run, "--out", out)
    assert refused.code == 2
    assert "exists already" in refused.err
