"""The benchmarks run, and measure what they say."""

from __future__ import annotations

import re
import time

import pytest
import torch

from cm_lightning import bench
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


def test_mistakes(capsys):
    for words in (["references", "--batch", "0"], ["references", "--sizes", "0"], ["speed"]):
        with pytest.raises(SystemExit) as stop:
            bench.main(words)
        assert stop.value.code == 2
    assert capsys.readouterr().err.count("error:") == 3
