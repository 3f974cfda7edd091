"""What makes a processor slow is told, and only where it does."""

from __future__ import annotations

import multiprocessing
import os
import platform
import time
from pathlib import Path

import pytest
import torch

from cm_lightning.callbacks import processor
from cm_lightning.callbacks.processor import busy_cores, device_name, slow_because

CPU = torch.device("cpu")


@pytest.fixture
def machine(monkeypatch):
    """Pretend to be on some machine; gives what would be said there."""

    def build(precision="32-true", vectors="AVX512", kind="x86_64", cores=2, threads=2, busy=0.0):
        monkeypatch.setattr(platform, "machine", lambda: kind)
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: vectors)
        monkeypatch.setattr(os, "cpu_count", lambda: cores)
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        monkeypatch.setattr(processor, "busy_cores", lambda: busy)
        return slow_because(CPU, precision)

    return build


@pytest.mark.parametrize(
    ("precision", "vectors", "kind", "slow"),
    [
        ("bf16-mixed", "AVX2", "x86_64", True),
        ("bf16-mixed", "AVX512", "x86_64", False),
        ("32-true", "AVX2", "x86_64", False),
        ("bf16-mixed", "DEFAULT", "arm64", False),
    ],
)
def test_bf16_without_its_instructions(precision, vectors, kind, slow, machine):
    said = machine(precision=precision, vectors=vectors, kind=kind)
    assert said == ["bf16-mixed without AVX-512; 32-true may be ten times as fast"] * slow


@pytest.mark.parametrize(
    ("cores", "threads", "busy", "free"),
    [
        (2, 2, 0.1, None),
        (2, 2, 1.0, 1),
        (2, 2, 2.0, 1),
        (2, 1, 2.0, None),
        (16, 16, 1.2, 15),
        (16, 16, 9.8, 6),
        (16, 8, 8.0, None),
        (16, 8, 12.0, 4),
    ],
)
def test_threads_without_cores(cores, threads, busy, free, machine):
    said = machine(cores=cores, threads=threads, busy=busy)
    assert len(said) == (free is not None)
    if said:
        assert said[0].startswith(f"{threads} threads, while other processes use {busy:.1f} of")
        assert f"OMP_NUM_THREADS={free} " in said[0]


def test_a_gpu_has_nothing_to_say(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    assert slow_because(torch.device("cuda"), "bf16-mixed") == []


@pytest.mark.parametrize(
    ("cpuinfo", "python", "name"),
    [
        (
            "processor\t: 0\nmodel\t\t: 1\nmodel name\t: A: 7 CPU\nmodel name\t: B\n",
            "x",
            "A: 7 CPU",
        ),
        ("processor\t: 0\nBogoMIPS\t: 50\n", "arm", "arm"),
        (None, "", "arm64"),
    ],
)
def test_a_processor_has_a_name(cpuinfo, python, name, monkeypatch, tmp_path):
    """Linux tells the model for every core; elsewhere Python knows what it knows."""
    if cpuinfo is not None:
        (tmp_path / "cpuinfo").write_text(cpuinfo)
    monkeypatch.setattr(processor, "Path", lambda path: tmp_path / Path(path).name)
    monkeypatch.setattr(platform, "processor", lambda: python)
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    for threads, words in ((1, "1 thread"), (3, "3 threads")):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert device_name(CPU) == f"{name}, {words}"


def _work(seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


def test_work_of_another_process_is_seen():
    """Others may be at work too: this asks for no more than one process gives."""
    process = multiprocessing.get_context("fork").Process(target=_work, args=(2.0,))
    process.start()
    try:
        readings = [busy_cores(0.2) for _ in range(5)]
    finally:
        process.kill()
        process.join()
    assert max(readings) > 0.5
    assert max(readings) <= os.cpu_count() + 0.01


def test_counters_are_read_as_linux_defines_them(monkeypatch):
    """Columns: user, nice, system, idle, iowait, irq, softirq, steal, guest, guest_nice."""
    lines = [
        "cpu 100 10 50 800 40 0 0 0 99 9\ncpu0 ...",
        "cpu 112 12 54 820 50 1 0 1 105 10\ncpu0 ...",
    ]
    monkeypatch.setattr(Path, "is_file", lambda _: True)
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: lines.pop(0))
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    assert busy_cores() == pytest.approx(4 * 20 / 50)
    monkeypatch.setattr(Path, "is_file", lambda _: False)
    assert busy_cores() == 0
