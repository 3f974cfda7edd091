"""The benchmarks run, and measure what they say."""

from __future__ import annotations

import re
import time

import pytest
import torch

from cm_lightning import bench
from cm_lightning.data import Resize, write_store
from cm_lightning.evaluation.digits import digit_images
from cm_lightning.objective import ReferenceMean


def test_sides_alternate():
    calls = []
    found = bench.alternate(
        [lambda: calls.append("a"), lambda: calls.append("b") or time.sleep(0.02)],
        2,
        torch.device("cpu"),
    )
    assert calls == ["a", "b"] * 3
    assert [len(seconds) for seconds in found] == [2, 2]
    assert min(found[1]) >= 0.02 > max(found[0])


def test_references(capsys, monkeypatch):
    calls = []
    real = ReferenceMean.__call__
    monkeypatch.setattr(ReferenceMean, "__call__", lambda *a: calls.append(a) or real(*a))
    bench.main(["references", "--sizes", "4", "32", "--batch", "4", "--repeats", "2"])
    out = capsys.readouterr().out
    rows = re.findall(r"^\| ([\d,]+) \|.*\| ([\d.]+) % \|$", out, re.MULTILINE)
    assert [size for size, _ in rows] == ["4", "32"]
    assert all(0 < float(share) < 1000 for _, share in rows)
    assert "images (1, 8, 8), batch 4" in out
    assert len(calls) == 2 * 3 * 2  # sizes, turns, the step and the estimate alone


def test_store(capsys, tmp_path):
    words = ["store", "--images", "300", "--resolution", "8", "--batch", "16", "--batches", "3"]
    words += ["--files", "20", "--folder", str(tmp_path / "store")]
    for _ in range(2):  # the second call takes the store that is there
        bench.main(words)
        out = capsys.readouterr().out
        assert "300 images (3, 8, 8)" in out
        paces = re.findall(r"([\d,]+) images/s", out)
        assert len(paces) == 3
        assert all(int(pace.replace(",", "")) > 0 for pace in paces)
    with pytest.raises(SystemExit):
        bench.main([*words, "--images", "301"])
    assert "store of another shape" in capsys.readouterr().err


def test_classes(capsys, tmp_path):
    words = ["classes", "--images", "300", "--resolution", "8", "--batch", "4", "--classes", "5"]
    bench.main([*words, "--sizes", "3", "9", "--repeats", "2", "--folder", str(tmp_path / "s")])
    out = capsys.readouterr().out
    assert "300 images (3, 8, 8), 5 classes; micro-batches of 4" in out
    assert re.findall(r"^\| (\d+) \| [\d.]+ ", out, re.MULTILINE) == ["3", "9"]


def test_frechet(capsys):
    bench.main(["frechet", "--dims", "16", "--images", "1500", "--repeats", "1"])
    ours, theirs = re.findall(r"([\d.]+) \|$", capsys.readouterr().out, re.MULTILINE)
    assert float(ours) == pytest.approx(float(theirs), abs=2e-6)
    assert float(ours) > 0


def test_bias_falls_with_the_number_of_images(capsys, tmp_path):
    images, labels = digit_images()
    images = images.numpy().transpose(0, 2, 3, 1)
    path = write_store(tmp_path / "s", images, labels.numpy(), source={}, transform=Resize()).path
    words = ["bias", str(path), "--features", "cm_lightning.evaluation.DigitsFeatures"]
    words += ["--sizes", "100", "200", "800"]
    bench.main([*words, "--reference", "900"])
    found = re.findall(r"^\| (\d+) \| ([\d.]+) \|$", capsys.readouterr().out, re.MULTILINE)
    assert [n for n, _ in found] == ["100", "200", "800"]
    values = [float(value) for _, value in found]
    assert values[0] > 1.5 * values[1] > 1.5 * 1.5 * values[2]
    with pytest.raises(SystemExit):
        bench.main([*words, "--reference", "1000"])
    assert "holds 1,797 images" in capsys.readouterr().err


def test_mistakes(capsys):
    for words in (["references", "--batch", "0"], ["references", "--sizes", "0"], ["speed"]):
        with pytest.raises(SystemExit) as stop:
            bench.main(words)
        assert stop.value.code == 2
    assert capsys.readouterr().err.count("error:") == 3
