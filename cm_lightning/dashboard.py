"""Where a number appears in the W&B dashboard: its sections are the first words of the names.

W&B gives every run a workspace with one section per first word. The names of ``metrics.csv`` are
gathered into few of them: ``training``, ``schedule``, ``machine``, one ``by_level_*`` section per
diagnostic with a panel for each range of noise levels (values that a regime notes included), and
under their own names Frechet distances (a panel per profile and number of network calls),
``samples`` and ``teacher``.
"""

from __future__ import annotations

from cm_lightning.families import FAMILIES, level

__all__ = ["panel"]

SECTIONS = {
    "loss": "training",
    "distance": "training",
    "loss_histogram": "training",
    "ratio": "training",
    "gradient": "training",
    "speed": "machine",
    "memory": "machine",
    "time": "machine",
}
"""First word of other names, and their section."""


def panel(key: str) -> str:
    """Name of a number in W&B, whose first word is its section.

    Args:
        key: Its name in ``metrics.csv``.
    """
    first, _, rest = key.partition("/")
    if first in FAMILIES or level(rest) is not None:
        return f"by_level_{first.removesuffix('_by_sigma')}/{rest}"
    if first in SECTIONS:
        name = key if first in ("loss", "gradient", "loss_histogram", "distance") else rest
        return f"{SECTIONS[first]}/{name.replace('/', '_')}"
    return key
