"""Shared fixtures: tiny denoisers, golden files, a small data set and a tiny run."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

GOLDEN = Path(os.environ.get("CM_GOLDEN_DIR", Path(__file__).parent / "golden"))


FIRST = ("tests/cli/test_study.py", "tests/test_configs.py", "tests/cli/", "tests/fuzz/")
"""Files that take longest; whoever begins one last keeps all others waiting."""


def pytest_collection_modifyitems(items):
    def place(item):
        starts = (item.nodeid.startswith(start) for start in FIRST)
        return next((i for i, starting in enumerate(starts) if starting), len(FIRST))

    items.sort(key=place)


@pytest.fixture(autouse=True)
def _private_cache(tmp_path_factory, monkeypatch):
    """Keep caches out of the home directory and every test away from W&B and the network."""
    monkeypatch.setenv("CM_HOME", str(tmp_path_factory.getbasetemp() / "cm_home"))
    monkeypatch.setenv("CM_OFFLINE", "1")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    yield
    if "wandb" in sys.modules:  # it reads the environment once
        sys.modules["wandb"].teardown()


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
