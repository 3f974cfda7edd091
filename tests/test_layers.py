"""A file imports only from layers above it, and importing the package is cheap."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "cm_lightning"
LAYERS = [
    ["families", "transfer", "types", "version"],
    ["archives", "dashboard", "dropout", "ema", "modules", "sigmas"],
    ["documents", "files"],
    ["objective", "networks", "sampling", "optim"],
    ["weights", "evaluation", "data", "loggers"],
    ["callbacks"],
    ["regimes"],
    ["cli"],
    ["bench"],
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
FILES = sorted(PACKAGE.rglob("*.py"))


def part(path: Path) -> str:
    relative = path.relative_to(PACKAGE).with_suffix("").parts
    return relative[0]


def imported_parts(path: Path) -> set[str]:
    parts = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} uses a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        parts |= {n.split(".")[1] for n in names if n.startswith("cm_lightning.")}
    return parts - {"__version__"}


def test_every_part_has_a_layer():
    assert len(FILES) > 30
    assert {part(path) for path in FILES} - {"__init__"} == set(RANK)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_upwards(path):
    own = part(path)
    if own == "__init__":
        assert imported_parts(path) <= {"version"}
        return
    for other in imported_parts(path) - {own}:
        assert RANK[other] < RANK[own], f"{path} imports cm_lightning.{other}"


def test_a_regime_never_imports_a_regime():
    shared = {"__init__", "base", "checks"}
    for path in (PACKAGE / "regimes").glob("*.py"):
        if path.stem in shared:
            continue
        text = path.read_text(encoding="utf-8")
        others = {p.stem for p in path.parent.glob("*.py")} - {path.stem} - shared
        assert not [o for o in others if f"cm_lightning.regimes.{o}" in text]


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("cm_lightning", ("torch", "lightning")),
        ("cm_lightning.cli.help", ("torch", "lightning")),
        ("cm_lightning.objective", ("lightning", "torchvision", "wandb")),
        ("cm_lightning.weights", ("lightning", "torchvision", "wandb")),
        ("cm_lightning.sampling", ("lightning", "torchvision", "wandb")),
        ("cm_lightning.evaluation", ("torchmetrics", "torchvision", "torch_fidelity", "timm")),
        ("cm_lightning.regimes", ("wandb", "timm", "sklearn")),
        ("cm_lightning.data", ("wandb", "timm", "sklearn")),
    ],
)
def test_imports_are_light(module, heavy):
    code = f"import sys, {module}; print(*[h for h in {heavy!r} if h in sys.modules], sep=',')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
