"""Every command and every block of Python in the README runs."""

from __future__ import annotations

import contextlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cm_lightning import bench
from cm_lightning.bench import parts
from cm_lightning.cli.study_file import read_study
from cm_lightning.evaluation import save_png
from tests.data.test_readers import write_idx

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


STORE = ["--images", "40", "--resolution", "8", "--classes", "4", "--batch", "4"]
STORE += ["--folder", "data/bench"]
TINY = {
    "references": ["--network", "small", "--sizes", "8", "--batch", "2", "--repeats", "1"],
    "store": [*STORE, "--batches", "2"],
    "classes": [*STORE, "--sizes", "2", "--repeats", "1"],
    "frechet": ["--dims", "8", "--images", "20", "--repeats", "1"],
    "step": ["--network", "small", "--batch", "2", "--repeats", "1", "--images", "8"],
    "ema": ["--network", "small", "--repeats", "1"],
    "loader": ["--images", "32", "--batch", "4", "--repeats", "1", "--workers", "1"],
    "sampling": ["--network", "small", "--batch", "2", "--repeats", "1"],
    "fid": ["--images", "40", "--features", "DigitsFeatures", "--repeats", "1"],
    "startup": ["--repeats", "1"],
    "bias": ["--features", "DigitsFeatures", "--sizes", "3", "--reference", "6"],
}
"""Benchmarks of seconds."""


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def lines() -> list[str]:
    joined = [block.replace("\\\n", " ") for block in blocks("bash")]
    return [line for block in joined for line in block.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the configs, and the README's earlier commands already run, shrunk."""
    path = tmp_path_factory.mktemp("readme")
    (path / "configs").symlink_to(ROOT / "configs")
    images = np.random.default_rng(0).integers(0, 256, (300, 28, 28))
    write_idx(path / "fashion", images=images, labels=np.arange(300) % 10)
    for number in range(12):
        save_png(
            path / "photographs" / f"{number}.png", images[number, :20, :25, None].astype(np.uint8)
        )
    patch = pytest.MonkeyPatch()
    patch.chdir(path)
    patch.setenv("CM_HOME", str(path / "home"))
    yield path
    patch.undo()


def run(program: str, words: list[str], monkeypatch) -> None:
    from cm_lightning.cli import compare, data, evaluate, fit, sample, weights

    programs = {"cm-fit": fit, "cm-sample": sample, "cm-eval": evaluate}
    programs |= {"cm-weights": weights, "cm-data": data, "cm-compare": compare}
    monkeypatch.setattr(sys, "argv", [program, *words])
    with contextlib.suppress(SystemExit) if "--print_config" in words else contextlib.nullcontext():
        programs[program].main()


def shrink(words: list[str], place: Path) -> list[str]:
    """The same command for a network of seconds."""
    if any("fashion" in word for word in words):
        words = [*words, "--data.source.root", str(place / "fashion"), "--data.global_batch", "4"]
        return [*words, "--model.denoiser.backbone.num_blocks", "1", "--trainer.accelerator", "cpu"]
    small = [word for word in words if word != "--model.total_kimg" and word != "20"]
    after = small.index("--config") + 2
    return [*small[:after], "--config", str(ROOT / "tests" / "tiny.yaml"), *small[after:]]


def test_readme_has_commands():
    assert len(lines()) >= 9
    assert len(blocks("python")) >= 3


def test_make_targets_exist():
    for line in lines():
        if line.startswith("make "):
            subprocess.run([*shlex.split(line), "-n"], cwd=ROOT, check=True, capture_output=True)


def test_commands_in_order(place, monkeypatch):
    monkeypatch.setattr(parts, "_run", lambda words: None)  # programs that start-up times
    for line in lines():
        program, *words = shlex.split(line)
        if program == "cm-fit":
            run(program, shrink(words, place), monkeypatch)
        elif program == "cm-study":
            for arm in read_study(Path(words[0])).arms.values():
                assert arm.config.is_file()
        elif program == "python":
            assert words[:2] == ["-m", "cm_lightning.bench"]
            bench.main([words[2], *TINY[words[2]], *(words[3:4] if words[2] == "bias" else [])])
        elif program in ("cm-sample", "cm-eval", "cm-weights", "cm-data", "cm-compare"):
            # the shrunk runs have another profile, and fewer samples will do
            words = [word.replace("ema_0.993", "ema_0.9").replace("2000", "66") for word in words]
            if "/usr/share/datasets/fashion-mnist" in words:
                words[words.index("/usr/share/datasets/fashion-mnist")] = str(place / "fashion")
                words += ["--transform", "center-crop", "--resolution", "8"]
            run(program, words, monkeypatch)
        else:
            assert program in ("make", "cd", "git", "pip", "torchrun")
    assert (place / "pictures" / "grid.png").exists()
    assert (place / "samples" / "samples.npz").exists()
    assert (place / "mid" / "mid.png").exists()
    assert (place / "portable" / "README.md").exists()
    assert (place / "comparison" / "comparison.html").exists()
    assert (place / "data" / "mine.png").exists()


def test_python_blocks(place, monkeypatch):
    words = ["--config", "configs/ect_digits.yaml", "--run_dir", "runs/demo"]
    run("cm-fit", shrink(words, place), monkeypatch)
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), {})
    assert (place / "digits.png").exists()
    assert (place / "schedules.png").exists()
    assert (place / "runs" / "python" / "weights" / "model.safetensors").exists()


def test_files_named_in_the_readme_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target
    for target in re.findall(r'src="([^"]+)"', README):
        assert (ROOT / target).exists(), target


def test_links_to_headings_lead_somewhere():
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", README, flags=re.M | re.S), re.M)
    anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    links = re.findall(r"\]\(#([^)]+)\)", README)
    assert len(links) > 10
    assert set(links) <= anchors
