"""Consistency models of the diffusers library, in and out, against that library."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
import torch
import yaml

from cm_lightning.networks import ADMUNet, ConsistencyPrecond, EDMPrecond
from cm_lightning.sampling import multistep
from cm_lightning.weights import build_denoiser, load_weights, read_diffusers, save_weights
from tests.cli.conftest import ROOT

SMALL = {
    "img_resolution": 8,
    "model_channels": 128,
    "channel_mult": [1, 2],
    "num_blocks": 1,
    "attn_resolutions": [4],
    "dropout": 0.0,
}


def description(name="ConsistencyPrecond", **changes):
    init = {"sigma_data": 0.5, "noise_scale": 1000.0, **changes.pop("outer", {})}
    backbone = {"class_path": "cm_lightning.networks.ADMUNet", "init_args": SMALL | changes}
    return {
        "class_path": f"cm_lightning.networks.{name}",
        "init_args": init | {"backbone": backbone},
    }


def randomised(network):
    generator = torch.Generator().manual_seed(0)
    for value in network.parameters():
        value.data = torch.randn(value.shape, generator=generator) * 0.05
    return network


@pytest.fixture
def folder(tmp_path):
    """Weights with every tensor random, written as a portable folder."""

    def write(name="ConsistencyPrecond", **changes):
        config = description(name, **changes)
        denoiser = randomised(build_denoiser(config, "test"))
        denoiser.backbone.out_conv.weight.data *= 40  # so that some values leave [-1, 1]
        info = {"regime": "CD", "ema": "ema_0.999", "kimg": 5.0, "data_fingerprint": None}
        path = tmp_path / "portable"
        save_weights(path, config, denoiser.state_dict(), info)
        return path, denoiser.eval()

    return write


def pipeline(path):
    from diffusers import ConsistencyModelPipeline

    found = ConsistencyModelPipeline.from_pretrained(path)
    found.set_progress_bar_config(disable=True)
    return found


@pytest.mark.parametrize("name", ["ConsistencyPrecond", "EDMPrecond"])
@pytest.mark.parametrize("classes", [0, 10])
def test_the_export_draws_the_same_images_in_diffusers(name, classes, folder, program, tmp_path):
    path, denoiser = folder(name, label_dim=classes)
    out = tmp_path / "out"
    done = program("cm-weights", "export", path, "--out", out, "--format", "diffusers")
    assert done.code == 0, done.err
    assert "ConsistencyModelPipeline.from_pretrained" in (out / "README.md").read_text()
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(2, 3, 3, 8, 8, generator=generator)
    labels = torch.tensor([1, 7, 3]) if classes else None
    theirs = pipeline(out)
    arguments = {"class_labels": labels} if classes else {}
    one = theirs(3, latents=noise[0].clone(), output_type="pt", **arguments).images
    ours = multistep(denoiser, noise[:1], [80.0], labels)
    assert ours.std() > 0.01
    assert ours.abs().max() > 1.2
    torch.testing.assert_close(one, as_drawn(ours), atol=1e-4, rtol=1e-4)

    # in two steps, with the noise that the scheduler draws and the level that it takes
    theirs.scheduler.set_timesteps(timesteps=[22, 0])
    level = float(theirs.scheduler.sigmas[1])
    fresh = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    least = theirs.scheduler.config.sigma_min
    fresh_scaled = fresh * (level**2 - least**2) ** 0.5 / level
    two = theirs(
        3,
        latents=noise[0].clone(),
        timesteps=[22, 0],
        generator=torch.Generator().manual_seed(5),
        output_type="pt",
        **arguments,
    ).images
    ours = multistep(denoiser, torch.stack([noise[0], fresh_scaled]), [80.0, level], labels)
    torch.testing.assert_close(two, as_drawn(ours), atol=1e-3, rtol=1e-3)
    assert not torch.allclose(two, one, atol=0.01)


def as_drawn(images):
    """What the pipeline makes of images in [-1, 1]."""
    return (images / 2 + 0.5).clamp(0, 1)


@pytest.mark.parametrize("shift", ["scale_shift", "default"])
def test_import_of_their_own_model(shift, program, tmp_path):
    from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline, UNet2DModel

    unet = UNet2DModel(
        sample_size=16,
        layers_per_block=2,
        num_class_embeds=5,
        block_out_channels=[128, 192],
        attention_head_dim=64,
        down_block_types=["AttnDownBlock2D", "ResnetDownsampleBlock2D"],
        up_block_types=["ResnetUpsampleBlock2D", "AttnUpBlock2D"],
        resnet_time_scale_shift=shift,
        attn_norm_num_groups=32,
        upsample_type="resnet",
        downsample_type="resnet",
    )
    unet = UNet2DModel(**{**unet.config, "block_out_channels": [128, 256]})
    randomised(unet).eval()
    scheduler = CMStochasticIterativeScheduler(num_train_timesteps=40, clip_denoised=False)
    ConsistencyModelPipeline(unet, scheduler).save_pretrained(tmp_path / "theirs")
    done = program("cm-weights", "import", tmp_path / "theirs", "--out", tmp_path / "ours")
    assert done.code == 0, done.err
    loaded = load_weights(tmp_path / "ours")
    assert loaded.info["regime"] == "CD"
    assert isinstance(loaded.denoiser, ConsistencyPrecond)
    assert isinstance(loaded.denoiser.backbone, ADMUNet)
    again = tmp_path / "again"
    words = ["cm-weights", "export", tmp_path / "ours", "--out", again, "--format", "diffusers"]
    assert program(*words).code == 0
    theirs, back = unet.state_dict(), pipeline(again).unet.state_dict()
    assert theirs.keys() == back.keys()
    assert all(torch.equal(theirs[name], back[name]) for name in theirs)
    assert sum(p.numel() for p in loaded.denoiser.parameters()) == unet.num_parameters()
    x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    labels = torch.arange(4)
    for sigma in (0.002, 0.5, 80.0):
        level = torch.tensor(sigma, dtype=torch.float64)
        skip, out = scheduler.get_scalings_for_boundary_condition(level)
        raw = unet(x / (level**2 + 0.25).sqrt().float(), 250 * level.log(), labels).sample
        expected = skip.float() * x + out.float() * raw
        mine = loaded.denoiser(x, torch.full((4,), sigma), labels)
        torch.testing.assert_close(mine, expected, atol=1e-4, rtol=1e-4)
    assert "diffusers" in program("cm-weights", "inspect", tmp_path / "theirs").out


def test_export_and_import_return_every_tensor(folder, program, tmp_path):
    path, denoiser = folder(label_dim=10)
    words = ["cm-weights", "export", path, "--out", tmp_path / "out", "--format", "diffusers"]
    assert program(*words).code == 0
    config, weights = read_diffusers(tmp_path / "out")
    assert config["init_args"]["sigma_min"] == 0.002
    own = denoiser.state_dict()
    assert own.keys() == weights.keys()
    assert all(torch.equal(own[name], weights[name]) for name in own)
    again = build_denoiser(config, "test")
    again.load_state_dict(weights)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"outer": {"noise_scale": 1.0}}, "was trained on 0.25 ln(sigma)"),
        ({"model_channels": 64}, "needs model_channels of 128 or more"),
        ({"augment_dim": 9}, "augment_dim 0"),
        ({"channel_mult_emb": 2}, "channel_mult_emb 4"),
    ],
)
def test_what_diffusers_cannot_compute_is_refused(changes, message, folder, program, tmp_path):
    path, _ = folder(**changes)
    words = ["cm-weights", "export", path, "--out", tmp_path / "out", "--format", "diffusers"]
    done = program(*words)
    assert done.code == 2
    assert message in done.err
    assert "--format safetensors" in done.err
    assert not (tmp_path / "out").exists()


def test_other_networks_are_named(program, tmp_path):
    backbone = {
        "class_path": "cm_lightning.networks.SongUNet",
        "init_args": {"img_resolution": 8, "in_channels": 3, "out_channels": 3},
    }
    config = {"class_path": "cm_lightning.networks.EDMPrecond", "init_args": {"backbone": backbone}}
    denoiser = build_denoiser(config, "test")
    assert isinstance(denoiser, EDMPrecond)
    info = {"regime": "ECT", "ema": "x", "kimg": 1.0, "data_fingerprint": None}
    save_weights(tmp_path / "in", config, denoiser.state_dict(), info)
    words = ["export", tmp_path / "in", "--out", tmp_path / "out", "--format", "diffusers"]
    done = program("cm-weights", *words)
    assert "no network that computes EDMPrecond(SongUNet)" in done.err


class Evil:
    def __reduce__(self):
        return os.system, ("touch canary",)


def damage(folder, what):
    unet = folder / "unet"
    config = json.loads((unet / "config.json").read_text())
    weights = unet / "diffusion_pytorch_model.safetensors"
    if what == "pipeline":
        (folder / "model_index.json").write_text('{"_class_name": "DDPMPipeline"}')
    elif what == "downsampling":
        (unet / "config.json").write_text(json.dumps(config | {"downsample_type": "conv"}))
    elif what == "blocks":
        blocks = ["DownBlock2D", "DownBlock2D"]
        (unet / "config.json").write_text(json.dumps(config | {"down_block_types": blocks}))
    elif what == "default":
        config["resnet_time_scale_shift"] = "spatial"
        (unet / "config.json").write_text(json.dumps(config))
    elif what == "narrow":
        (unet / "config.json").write_text(json.dumps(config | {"block_out_channels": [64, 256]}))
    elif what == "variant":
        weights.rename(unet / "diffusion_pytorch_model.fp16.safetensors")
    elif what == "json":
        (unet / "config.json").write_text("{")
    elif what == "missing":
        weights.unlink()
    elif what == "pickle":
        weights.unlink()
        torch.save({"x": Evil()}, unet / "diffusion_pytorch_model.bin")
    elif what == "tensor":
        from safetensors.torch import load_file, save_file

        state = load_file(weights)
        state["extra.weight"] = torch.ones(2)
        save_file(state, weights)
    elif what == "shape":
        (unet / "config.json").write_text(json.dumps(config | {"layers_per_block": 2}))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("pipeline", "is a DDPMPipeline"),
        ("downsampling", "downsample_type conv"),
        ("blocks", "another form"),
        ("default", "another form"),
        ("narrow", "a level of 64 channels: its norms have 32 groups"),
        ("variant", "only diffusion_pytorch_model.fp16.safetensors: variants and parts"),
        ("json", "is not valid JSON"),
        ("missing", "holds no diffusion_pytorch_model"),
        ("pickle", "refused"),
        ("tensor", "'extra.weight', which ADMUNet has no place for"),
        ("shape", "another form"),
    ],
)
def test_bad_folders(what, message, folder, program, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path, _ = folder()
    words = ["cm-weights", "export", path, "--out", tmp_path / "theirs", "--format", "diffusers"]
    assert program(*words).code == 0
    damage(tmp_path / "theirs", what)
    done = program("cm-weights", "import", tmp_path / "theirs", "--out", tmp_path / "ours")
    assert done.code == 2
    assert message in done.err
    assert done.err.count("\n") == 1
    assert not (tmp_path / "ours").exists()
    assert not (tmp_path / "canary").exists()


def test_import_train_export_import(folder, program, tmp_path):
    """A folder of diffusers starts a run as it is; what the run exports comes back bit for bit."""
    start, _ = folder(in_channels=1, out_channels=1, label_dim=10, outer={"sigma_min": 0.002})
    words = ["cm-weights", "export", start, "--out", tmp_path / "start", "--format", "diffusers"]
    assert program(*words).code == 0
    backbone = {"class_path": "ADMUNet", "init_args": SMALL}
    backbone["init_args"] = SMALL | {"in_channels": 1, "out_channels": 1, "label_dim": 10}
    denoiser = {
        "class_path": "ConsistencyPrecond",
        "init_args": {"noise_scale": 1000.0, "backbone": backbone},
    }
    (tmp_path / "own.yaml").write_text(
        yaml.safe_dump({"model": {"class_path": "ICT", "init_args": {"denoiser": denoiser}}})
    )
    run = tmp_path / "run"
    words = ["--config", ROOT / "configs" / "ict_digits.yaml", "--config", tmp_path / "own.yaml"]
    words += ["--run_dir", run, "--model.init.path", tmp_path / "start", "--model.total_kimg"]
    words += [0.032, "--data.global_batch", 16, "--fid.n", 6, "--samples.n", 2]
    done = program("cm-fit", *words, "--trainer.enable_progress_bar", "false")
    assert done.code == 0, done.err
    assert "as stated where it was published" in (run / "run.json").read_text()
    out, back = tmp_path / "out", tmp_path / "back"
    words = ["cm-weights", "export", run, "--out", out, "--format", "diffusers"]
    assert program(*words).code == 0
    assert program("cm-weights", "import", out, "--out", back).code == 0
    trained, again = load_weights(run), load_weights(back)
    begun = load_weights(start).denoiser.state_dict()
    for name, value in trained.denoiser.state_dict().items():
        assert torch.equal(again.denoiser.state_dict()[name], value)
    moved = [
        name
        for name, value in begun.items()
        if not torch.equal(value, again.denoiser.state_dict()[name])
    ]
    assert len(moved) > len(begun) / 2
    for source, name in ((run, "a"), (back, "b")):
        words = ["--n", 4, "--npz", "--out", tmp_path / name]
        assert program("cm-sample", source, *words).code == 0
    a, b = (np.load(tmp_path / name / "samples.npz")["arr_0"] for name in "ab")
    assert np.array_equal(a, b)
    refused = program("cm-sample", tmp_path / "start", "--ema", "ema_0.9", "--out", tmp_path / "c")
    assert "holds one set of weights" in refused.err
