"""Benchmarks: ``python -m cm_lightning.bench NAME``. Both sides of a ratio alternate in one run."""

from cm_lightning.bench.commands import main
from cm_lightning.bench.common import alternate

__all__ = ["alternate", "main"]
