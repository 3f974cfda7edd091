"""The device of a run: its name, and what will make a processor slow."""

from __future__ import annotations

import math
import os
import platform
import time
from contextlib import suppress
from pathlib import Path

import torch

__all__ = ["busy_cores", "device_name", "processor_name", "slow_because"]


def device_name(device: torch.device) -> str:
    """Name of a GPU, or that of the processor and the number of CPU threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = processor_name() if device.type == "cpu" else device.type
    count = torch.get_num_threads()
    return f"{name}, {count} thread{'s' if count > 1 else ''}"


def processor_name() -> str:
    """Model of the processor as Linux tells it, elsewhere what Python knows."""
    with suppress(OSError), Path("/proc/cpuinfo").open(encoding="utf-8") as lines:
        for line in lines:
            key, _, value = line.partition(":")
            if key.strip() == "model name" and value.strip():
                return value.strip()
    return platform.processor() or platform.machine()


def slow_because(device: torch.device, precision: str) -> list[str]:
    """What will slow a run down on this processor, and what helps, a line each.

    Args:
        device: Where the run trains; only a CPU has something to say.
        precision: Lightning's name of it, such as ``bf16-mixed``.

    Returns:
        A line where bf16 products are computed one by one, and one where other processes leave
        too few cores for the threads: they wait for the last of them several times in every layer.
    """
    if device.type != "cpu":
        return []
    lines = []
    x86 = platform.machine() in ("x86_64", "AMD64")
    if x86 and torch.backends.cpu.get_cpu_capability() != "AVX512" and precision.startswith("bf16"):
        lines.append(f"{precision} without AVX-512; 32-true may be ten times as fast")
    cores, threads = os.cpu_count() or 1, torch.get_num_threads()
    busy = busy_cores() if threads > 1 else 0.0
    if busy > 0.5 and busy + threads > cores + 0.5:
        free = max(1, cores - math.ceil(busy - 0.5))
        lines.append(
            f"{threads} threads, while other processes use {busy:.1f} of {cores} cores; "
            f"OMP_NUM_THREADS={free} in the environment may be ten times as fast"
        )
    return lines


def busy_cores(seconds: float = 0.1) -> float:
    """Number of cores at work while this thread sleeps, 0 where Linux does not tell.

    Args:
        seconds: How long to look; the system counts in hundredths.
    """
    counters = Path("/proc/stat")
    if not counters.is_file():
        return 0.0
    readings = []
    for pause in (0.0, seconds):
        time.sleep(pause)
        words = counters.read_text(encoding="ascii").split("\n", 1)[0].split()
        counts = [int(word) for word in words[1:9]]  # guests are counted in the first two
        readings.append((sum(counts), counts[3] + counts[4]))  # all; idle, or waiting for a disk
    (start, idle), (end, idle_at_end) = readings
    return (os.cpu_count() or 1) * (1 - (idle_at_end - idle) / max(end - start, 1))
