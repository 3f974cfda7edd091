"""From the host to a device without waiting for the work that the device has queued."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

__all__ = ["constant", "keep_fp32", "send"]


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


def keep_fp32() -> None:
    """Let convolutions on a GPU take all bits of fp32 numbers; torch's default rounds them to 10.

    As in training without ``performance.tf32``, and where that is on, evaluations stay comparable.
    """
    torch.backends.cudnn.allow_tf32 = False
