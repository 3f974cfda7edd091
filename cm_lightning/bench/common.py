"""What every benchmark shares: networks by name, sides that take turns, words for the machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from statistics import median
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from cm_lightning.callbacks.processor import device_name, processor_name
from cm_lightning.callbacks.run_record import git_state, versions
from cm_lightning.networks import ADMUNet, EDM2Precond, EDM2UNet, EDMPrecond, SongUNet
from cm_lightning.types import Denoiser

__all__ = [
    "NETWORKS",
    "Benchmark",
    "add_device",
    "alternate",
    "build_network",
    "forward_flops",
    "image_shape",
    "machine",
    "matmul_rate",
    "network_line",
    "ratio",
    "spread",
    "wait",
]

NETWORKS = ("small", "ddpmpp", "adm", "edm2_s")


class Benchmark(NamedTuple):
    """One command of ``python -m cm_lightning.bench``.

    Attributes:
        name: Its name on the command line.
        help: What it measures, in a few words.
        options: Adds its options, by the parser's ``add_argument``.
        run: Measures, and returns a Markdown table.
    """

    name: str
    help: str
    options: Callable[[Callable[..., Any]], None]
    run: Callable[[Any], str]


def add_device(add: Callable[..., Any], repeats: int) -> None:
    """Add the options that every timed benchmark has.

    Args:
        add: The parser's ``add_argument``.
        repeats: Default number of turns.
    """
    add("--repeats", type=int, default=repeats, help=f"measured turns [{repeats}]")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--seed", type=int, default=0)


def build_network(name: str, classes: int = 0) -> Denoiser:
    """A network by name, as published for its data.

    Args:
        name: ``small`` (8x8, 0.7M parameters), ``ddpmpp`` (32x32, 55.7M), ``adm`` (64x64, 296M) or
            ``edm2_s`` (64x64, 280M).
        classes: Number of classes, 0 for an unconditional network.
    """
    if name == "small":
        small: dict[str, Any] = {"model_channels": 32, "channel_mult": [1, 2], "num_blocks": 1}
        return EDMPrecond(SongUNet(8, 1, 1, classes, attn_resolutions=[4], dropout=0.0, **small))
    if name == "edm2_s":
        return EDM2Precond(EDM2UNet(64, 3, 3, classes, dropout=0.4, dropout_resolution=16))
    if name == "adm":
        return EDMPrecond(ADMUNet(64, 3, 3, classes))
    return EDMPrecond(SongUNet(32, 3, 3, classes, dropout=0.2))


def image_shape(network: Denoiser) -> tuple[int, int, int]:
    """Shape ``(C, H, W)`` of the images a network was built for."""
    shape = network.image_shape
    assert shape is not None
    return shape


def forward_flops(network: Denoiser) -> float:
    """Floating-point operations of one forward pass per image, two per multiply-add."""
    parameter = next(network.parameters())
    x = torch.zeros(1, *image_shape(network), device=parameter.device)
    labels = torch.zeros(1, dtype=torch.long, device=x.device) if network.num_classes else None
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(x, torch.ones(1, device=x.device), labels)
    return float(counter.get_total_flops())


def matmul_rate(
    device: torch.device, dtype: torch.dtype, size: int | None = None, tf32: bool = False
) -> float:
    """Operations per second of a large matrix product, the best of a few.

    Args:
        device: Where.
        dtype: Type of both factors.
        size: Rows and columns; 8192 on a GPU and 1024 on a CPU unless given.
        tf32: Whether a GPU may round fp32 factors to 10 bits of mantissa.
    """
    size = size or (8192 if device.type == "cuda" else 1024)
    a = torch.randn(size, size, device=device, dtype=dtype)
    matmul = torch.backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.allow_tf32, tf32
    try:
        (seconds,) = alternate([lambda: a @ a], 10, device)
    finally:
        matmul.allow_tf32 = before
    return 2 * size**3 / min(seconds)


def alternate(
    sides: Sequence[Callable[[], object]], repeats: int, device: torch.device
) -> list[list[float]]:
    """Seconds of each side in each repeat, the sides taking turns, after one unmeasured turn.

    Args:
        sides: What to time.
        repeats: Turns, >= 1.
        device: Device to wait for.
    """
    seconds: list[list[float]] = [[] for _ in sides]
    for turn in range(repeats + 1):
        for side, found in zip(sides, seconds, strict=True):
            wait(device)
            start = time.perf_counter()
            side()
            wait(device)
            if turn:
                found.append(time.perf_counter() - start)
    return seconds


def wait(device: torch.device) -> None:
    """Wait until a device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def spread(seconds: Sequence[float]) -> str:
    """Milliseconds as median (smallest-largest)."""
    low, high = min(seconds), max(seconds)
    return f"{1000 * median(seconds):.2f} ({1000 * low:.2f}-{1000 * high:.2f})"


def ratio(first: Sequence[float], second: Sequence[float]) -> float:
    """Median of second / first over neighbouring turns."""
    return median(b / a for a, b in zip(first, second, strict=True))


def network_line(network: Denoiser, batch: int | str, precision: str = "float32") -> str:
    """Network and batch in words."""
    count = sum(p.numel() for p in network.parameters())
    return f"{count:,} parameters, images {network.image_shape}, batch {batch}, {precision}"


def machine(device: torch.device) -> str:
    """Machine, versions, commit and date in words."""
    found, git = versions(), git_state()
    parts = [device_name(device)]
    if device.type != "cpu":
        parts.append(processor_name())
    parts.append(", ".join(f"{key} {found[key]}" for key in ("torch", "lightning", "python")))
    if git is not None:
        parts.append(f"commit {git['commit'][:12]}{' with changes' if git['changed'] else ''}")
    return "; ".join([*parts, datetime.now(UTC).date().isoformat()])
