"""The benchmarks run, and measure what they say."""

from __future__ import annotations

import re
import sys
import time
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cm_lightning import bench
from cm_lightning.bench import common, parts, posterior, step, store
from cm_lightning.callbacks.processor import device_name, processor_name
from cm_lightning.data import Resize, write_store
from cm_lightning.evaluation import read_metrics
from cm_lightning.evaluation.digits import digit_images
from cm_lightning.networks import EDMPrecond, SongUNet
from cm_lightning.objective import ReferenceMean
from tests import toys
from tests.cli.conftest import DIGITS, TINY


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
    words = ["references", "--sizes", "4", "32", "--batch", "4", "6", "--labels", "0", "2"]
    bench.main([*words, "--repeats", "2"])
    out = capsys.readouterr().out
    found = rows(out)
    assert [row[:3] for row in found] == [
        [layout, batch, size]
        for layout in ("no classes", "2 classes")
        for batch in ("4", "6")
        for size in ("4", "32")
    ]
    assert all(0 < float(row[-1].removesuffix(" %")) < 1000 for row in found)
    assert "no classes: 748,737 parameters, images (1, 8, 8), batch 4, 6" in out
    # layouts, batches, sizes, turns, the step and the estimate alone
    assert len(calls) == 2 * 2 * 2 * 3 * 2
    seen = {(len(x_t), batch.references.labels is not None) for _, x_t, _, batch in calls}
    assert seen == {(4, False), (6, False), (4, True), (6, True)}
    assert {len(batch.references.images) for *_, batch in calls} == {4, 32}


def test_store(capsys, tmp_path, monkeypatch):
    words = ["store", "--images", "300", "--resolution", "8", "--batch", "16", "--batches", "3"]
    words += ["--files", "20", "--repeats", "3", "--folder", str(tmp_path / "store")]
    turns, real = [], store._turn
    monkeypatch.setattr(store, "_turn", lambda *given: turns.append(real(*given)) or turns[-1])
    for _ in range(2):  # the second call takes the store that is there
        bench.main(words)
        out = capsys.readouterr().out
        assert "300 images (3, 8, 8)" in out
        (row,) = rows(out)
        for cell in row[3:]:
            middle, low, high = (int(n.replace(",", "")) for n in re.findall(r"[\d,]+", cell))
            assert 0 < low <= middle <= high
        assert len(turns) == 3
        assert row[3] == store._rates([cold for _, _, cold, _ in turns])
        turns.clear()
    assert store._rates([1000.4, 5, 2000]) == "1,000 (5-2,000)"
    with pytest.raises(SystemExit):
        bench.main([*words, "--images", "301"])
    assert "store of another shape" in capsys.readouterr().err
    words[-1] = str(tmp_path / "large")
    with pytest.raises(SystemExit):
        bench.main([*words, "--images", str(10**14)])
    assert "GiB free" in capsys.readouterr().err
    assert not (tmp_path / "large").exists()


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


def rows(out: str) -> list[list[str]]:
    """Cells of the table's body."""
    return [line.strip("| ").split(" | ") for line in out.splitlines() if line.startswith("| ")][2:]


def test_step(capsys):
    words = ["step", "--batch", "4", "--repeats", "2", "--images", "16", "--checkpointing"]
    bench.main([*words, "--regimes", *step.PASSES])
    out = capsys.readouterr().out
    found = rows(out)
    assert [row[0] for row in found] == list(step.PASSES)
    assert set(step.PASSES) == set(toys.REGIMES)
    assert "748,737 parameters" in out
    for row in found:
        assert 0.05 < float(row[5]) < 20
    bench.main([*words, "--regimes", "ect", "--precisions", "bf16-mixed"])
    assert rows(capsys.readouterr().out)[0][:3] == ["ect", "bf16-mixed", "no"]


def test_a_row_that_runs_out_of_memory_leaves_the_others(capsys, monkeypatch):
    real = step.time_steps

    def full(settings, *others):
        if settings.regime == "sct":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return real(settings, *others)

    monkeypatch.setattr(step, "time_steps", full)
    words = ["step", "--batch", "4", "--repeats", "1", "--images", "16"]
    bench.main([*words, "--regimes", "sct", "ect"])
    found = rows(capsys.readouterr().out)
    assert [row[3] == "out of memory" for row in found] == [True, False]


def test_out_of_memory_elsewhere_is_a_sentence(capsys, monkeypatch):
    def full(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has")

    monkeypatch.setattr(posterior.ReferenceMean, "__call__", full)
    with pytest.raises(SystemExit) as stop:
        bench.main(["references", "--sizes", "4", "--batch", "4", "--repeats", "1"])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "not enough memory for this (Tried to allocate 2.00 GiB): take a smaller batch" in error
    assert "Traceback" not in error


def test_steps_take_turns_and_the_other_side_is_not_ours():
    calls = []
    turns = step._Turns(lambda: calls.append(1) or time.sleep(0.2), warmup=1)
    module = SimpleNamespace(device=torch.device("cpu"))
    turns.on_train_start(None, module)
    for batch in range(3):
        time.sleep(0.01)
        turns.on_train_batch_end(None, module, None, None, batch)
    assert len(calls) == 3
    assert len(turns.ours) == len(turns.theirs) == 2
    assert min(turns.theirs) >= 0.2 > max(turns.ours)
    assert min(turns.ours) >= 0.01


def test_operations_of_a_network_by_hand():
    network = EDMPrecond(
        SongUNet(
            8,
            1,
            1,
            model_channels=16,
            channel_mult=[1],
            num_blocks=1,
            attn_resolutions=[],
            dropout=0.0,
        )
    )
    with torch.no_grad():
        layers = [m for m in network.modules() if getattr(m, "weight", None) is not None]
    pixels, total = 64, 0
    for module in layers:
        if module.weight.ndim == 4:  # every convolution sees all pixels: there is one level
            total += 2 * module.weight.numel() * pixels
        elif module.weight.ndim == 2:
            total += 2 * module.weight.numel()
    attention = 2 * 2 * pixels * pixels * 16  # q k and w v of the one attention block
    assert common.forward_flops(network) == pytest.approx(total + attention, rel=1e-6)


def test_parts(capsys):
    bench.main(["ema", "--repeats", "1"])
    assert [row[0][:4] for row in rows(capsys.readouterr().out)] == ["loop", "ours", "ours"]
    bench.main(["loader", "--images", "64", "--batch", "8", "--repeats", "1", "--workers", "1"])
    found = rows(capsys.readouterr().out)
    assert [row[0] for row in found] == ["loader", "resident", "1 workers"]
    bench.main(["sampling", "--batch", "2", "--repeats", "1"])
    assert [row[0] for row in rows(capsys.readouterr().out)] == ["1", "1", "2", "2", "4", "4"]
    bench.main(["fid", "--images", "70", "--batch", "40"])
    out = capsys.readouterr().out
    assert [row[0] for row in rows(out)] == ["generation", "features", "sums", "distance"]
    assert 0 < float(re.findall(r"distance ([\d.]+)", out)[0]) < 1000


def test_startup(capsys, monkeypatch):
    ran = []
    monkeypatch.setattr(parts, "_run", ran.append)
    bench.main(["startup", "--repeats", "1"])
    names = [row[0] for row in rows(capsys.readouterr().out)]
    assert names[2:] == [
        "cm-fit to the end of its first step",
        "cm-fit --check, its evaluation included",
    ]
    assert "--help" in ran[1]
    assert "--check" not in ran[2]
    assert "--check" in ran[3]
    places = [words[-1] for words in ran if words[-2] == "--run_dir"]
    assert len(set(places)) == 2  # no turn goes on where another one was
    assert not any(Path(place).exists() for place in places)


def test_a_first_step_ends_its_process(tmp_path):
    """After the callbacks of that step: its diagnostics are there, its checkpoint is not."""
    run = tmp_path / "run"
    words = ["--config", DIGITS, "--config", TINY, "--diagnostics.every_kimg", "0.001"]
    words += ["--diagnostics.exact_rows", "0", "--fid.profiles", "[]", "--run_dir", str(run)]
    parts._run([sys.executable, "-c", parts.FIRST_STEP, *words])
    assert [row["kimg"] for row in read_metrics(run / "metrics.csv")] == [0.064]
    assert not list(run.glob("**/*.ckpt"))


def test_the_header_names_machine_versions_and_commit(capsys, monkeypatch):
    monkeypatch.setattr(common, "git_state", lambda: {"commit": "0123456789abcdef", "changed": 1})
    monkeypatch.setattr(parts, "_run", lambda words: None)
    bench.main(["startup", "--repeats", "1"])
    device, versions, commit, date = capsys.readouterr().out.partition("\n")[0].split("; ")
    assert device == device_name(torch.device("cpu"))
    for name in ("torch", "lightning"):
        assert f"{name} {metadata.version(name)}" in versions
    assert commit == "commit 0123456789ab with changes"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", date)
    monkeypatch.setattr(common, "git_state", lambda: None)
    monkeypatch.setattr(common, "device_name", lambda device: "GPU")
    gpu = common.machine(torch.device("cuda")).split("; ")
    assert gpu[:2] == ["GPU", processor_name()]
    assert len(gpu) == 4


def test_mistakes(capsys):
    for words in (["references", "--batch", "0"], ["references", "--sizes", "0"], ["speed"]):
        with pytest.raises(SystemExit) as stop:
            bench.main(words)
        assert stop.value.code == 2
    assert capsys.readouterr().err.count("error:") == 3
    with pytest.raises(SystemExit):
        bench.main(["references", "--labels", "-1"])
    assert "--labels must be 0 or more, got [-1]" in capsys.readouterr().err
