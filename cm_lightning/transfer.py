"""From the host to a device without waiting for its queued work, and all bits of fp32 numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

__all__ = ["constant", "full_fp32", "keep_fp32", "may_pick", "send"]


@cache
def constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of fixed numbers, ``(n,)``, made once per device; not to be changed in place.

    Args:
        values: The numbers.
        dtype: Of the tensor.
        device: Of the tensor.
    """
    with torch.inference_mode(False):  # whoever asks first, others may want a gradient
        return torch.tensor(values, dtype=dtype, device=device)


def send(values: Tensor, device: torch.device) -> Tensor:
    """Copy values from the host; on a GPU through memory from which it reads them by itself.

    Args:
        values: On the CPU.
        device: Where they are wanted.
    """
    if device.type == "cuda":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


def may_pick(device: torch.device) -> bool:
    """Whether rows may be chosen by their values: a GPU would have to be waited for."""
    return device.type == "cpu"


def keep_fp32() -> None:
    """Let convolutions on a GPU take all bits of fp32 numbers; torch's default rounds them to 10.

    As in training without ``performance.tf32``, and where that is on, evaluations stay comparable.
    """
    torch.backends.cudnn.allow_tf32 = False


@contextmanager
def full_fp32() -> Iterator[None]:
    """Forbid TF32 and bfloat16 in fp32 matrix products and convolutions, whoever allows them."""
    operations: list[Any] = [
        torch.backends.cuda.matmul,
        torch.backends.cudnn.conv,  # type: ignore[attr-defined]
        torch.backends.mkldnn.matmul,  # type: ignore[attr-defined]
        torch.backends.mkldnn.conv,  # type: ignore[attr-defined]
    ]
    before = [operation.fp32_precision for operation in operations]
    try:
        for operation in operations:
            operation.fp32_precision = "ieee"
        yield
    finally:
        for operation, precision in zip(operations, before, strict=True):
            operation.fp32_precision = precision
