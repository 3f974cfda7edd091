"""OpenAI's U-Net in ADMUNet: outputs of the official code, both layouts of attention."""

from __future__ import annotations

import json
import math

import pytest
import torch

from cm_lightning.networks import ADMUNet, ConsistencyPrecond, EDMPrecond
from cm_lightning.types import InputError
from cm_lightning.weights import build_denoiser, from_pretrained, read_openai
from tests.conftest import GOLDEN

FILES = sorted(GOLDEN.glob("openai*.json"))


def fill(name: str, shape: list[int], number: int) -> torch.Tensor:
    """The deterministic weights with which the golden file was made."""
    n = math.prod(shape)
    phase = (torch.arange(n, dtype=torch.float64) + 1) * 0.6180339887498949
    phase = phase + (number + 1) * 0.7548776662466927
    u = 2 * (phase - phase.floor()) - 1
    if len(shape) == 1:
        u = 0.1 * u + (1 if name.endswith("weight") else 0)
    else:
        u = u * math.sqrt(3 / (n / shape[0]))
    return u.reshape(shape).float()


def state_of(golden: dict) -> dict[str, torch.Tensor]:
    shapes = golden["shapes"]
    return {name: fill(name, shapes[name], i) for i, name in enumerate(sorted(shapes))}


def images() -> torch.Tensor:
    return torch.sin(0.1 * torch.arange(2 * 3 * 16 * 16).double()).float().reshape(2, 3, 16, 16)


def evaluate(config: dict, weights: dict, golden: dict) -> torch.Tensor:
    denoiser = build_denoiser(config, "test").eval()
    denoiser.load_state_dict(weights)
    labels = torch.nn.functional.one_hot(torch.tensor(golden["classes"]), 5)
    with torch.no_grad():
        return denoiser.backbone(images(), torch.tensor(golden["noise_labels"]), labels)


def test_golden_files_were_found():
    assert FILES


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_output_is_official(path, tmp_path):
    golden = json.loads(path.read_text())
    file = tmp_path / "model.pt"
    torch.save(state_of(golden), file)
    config, weights = read_openai(file, resolution=16)
    arguments = dict(config["init_args"]["backbone"]["init_args"])
    assert arguments.pop("dropout") == 0
    assert arguments.pop("adaptive")
    assert arguments == golden["constructor"]
    out = evaluate(config, weights, golden).flatten()
    torch.testing.assert_close(out, torch.tensor(golden["out"]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_layout_of_guided_diffusion(path, tmp_path):
    """1-D convolutions with rows (head, q|k|v, channel) are the same network."""
    golden = json.loads(path.read_text())
    state = state_of(golden)
    for name, value in list(state.items()):
        if ".qkv." in name:
            heads = value.shape[0] // 192
            rows = torch.arange(len(value)).reshape(3, heads, 64).permute(1, 0, 2).flatten()
            value = value[rows]
        if (".qkv." in name or ".proj_out." in name) and value.ndim == 4:
            value = value[..., 0]
        state[name] = value
    file = tmp_path / "model.pt"
    torch.save(state, file)
    out = evaluate(*read_openai(file, resolution=16), golden).flatten()
    torch.testing.assert_close(out, torch.tensor(golden["out"]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("regime", "precond"), [("Diffusion", EDMPrecond), ("CD", ConsistencyPrecond)]
)
def test_import_and_use(program, tmp_path, regime, precond):
    golden = json.loads(FILES[0].read_text())
    file, out = tmp_path / "model.pt", tmp_path / "out"
    torch.save({name: value.half() for name, value in state_of(golden).items()}, file)
    words = ["cm-weights", "import", file, "--out", out, "--regime", regime]
    refused = program(*words)
    assert refused.code == 2
    assert "give --resolution" in refused.err
    done = program(*words, "--resolution", 16)
    assert done.code == 0, done.err
    assert "MIT" in done.out
    denoiser = from_pretrained(out)
    assert isinstance(denoiser, precond)
    assert isinstance(denoiser.backbone, ADMUNet)
    assert denoiser.noise_scale == 1000
    x = denoiser(images(), torch.tensor([0.5, 80.0]), torch.tensor([1, 4]))
    assert x.isfinite().all()
    assert program("cm-weights", "inspect", file, "--resolution", 16).code == 0


def test_the_published_size_is_known_without_being_told(tmp_path):
    """The ImageNet-64 model: 192 channels, (1, 2, 3, 4), 3 blocks, attention at 32, 16, 8."""
    from cm_lightning.weights.openai import _arguments

    with torch.device("meta"):
        ours = ADMUNet(64, label_dim=1000)
        plain = ADMUNet(64, label_dim=1000, adaptive=False)
        narrow = ADMUNet(64, model_channels=64)
        variance = ADMUNet(64, out_channels=6)
    state = backwards(ours)
    arguments = _arguments(state, tmp_path / "x.pt", None)
    assert arguments["adaptive"]
    assert not _arguments(backwards(plain), tmp_path / "x.pt", None)["adaptive"]
    with pytest.raises(InputError, match="a level of 64 channels: its norms have 32 groups"):
        _arguments(backwards(narrow), tmp_path / "x.pt", None)
    with pytest.raises(InputError, match="learned variances"):
        _arguments(backwards(variance), tmp_path / "x.pt", None)
    assert arguments["img_resolution"] == 64
    assert arguments["channel_mult"] == [1, 2, 3, 4]
    assert arguments["num_blocks"] == 3
    assert arguments["attn_resolutions"] == [32, 16, 8]
    assert arguments["label_dim"] == 1000


def backwards(unet: ADMUNet) -> dict[str, torch.Tensor]:
    """Names of OpenAI's U-Net of the same structure, without values."""
    state = {"time_embed.0.weight": unet.map_layer0.weight, "out.2.weight": unet.out_conv.weight}
    if unet.label_dim:
        state["label_emb.weight"] = unet.map_label.weight.T
    for i, (name, block) in enumerate(unet.enc.items()):
        if name.endswith("conv"):
            state["input_blocks.0.0.weight"] = block.weight
            continue
        state[f"input_blocks.{i}.0.in_layers.2.weight"] = block.conv0.weight
        state[f"input_blocks.{i}.0.emb_layers.1.weight"] = block.affine.weight
        state[f"input_blocks.{i}.0.out_layers.0.weight"] = block.norm1.weight
        if block.heads:
            state[f"input_blocks.{i}.1.qkv.weight"] = block.qkv.weight
    number = -1
    for name, block in unet.dec.items():
        if "block" in name:
            number += 1
            state[f"output_blocks.{number}.0.in_layers.0.weight"] = block.norm0.weight
            if block.heads:
                state[f"output_blocks.{number}.1.qkv.weight"] = block.qkv.weight
        elif "up" in name:
            place = 2 if f"output_blocks.{number}.1.qkv.weight" in state else 1
            state[f"output_blocks.{number}.{place}.in_layers.0.weight"] = block.norm0.weight
    return state


def test_other_files_are_refused(tmp_path, program):
    file = tmp_path / "other.pt"
    torch.save({"weight": torch.zeros(2)}, file)
    with pytest.raises(InputError, match="OpenAI's U-Net"):
        read_openai(file)
    golden = json.loads(FILES[0].read_text())
    state = state_of(golden)
    del state["output_blocks.0.0.in_layers.2.bias"]
    torch.save(state, file)
    with pytest.raises(InputError, match="another form"):
        read_openai(file, resolution=16)
    done = program("cm-weights", "import", tmp_path / "x.zip", "--out", tmp_path / "o")
    assert done.code == 2
    assert "can be imported" in done.err
