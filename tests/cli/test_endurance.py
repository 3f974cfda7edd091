"""The long tests: a hundred kills, two nodes, dying ranks, small disks, a thousand steps."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import pytest

from cm_lightning.callbacks import checkpoints_of
from cm_lightning.files import is_intact
from tests.cli.conftest import ROOT, TINY
from tests.cli.test_ddp import assert_same_runs, train
from tests.cli.test_fit import assert_same, load, rows
from tests.cli.test_reliability import SAVES

pytestmark = pytest.mark.slow

KILLS = {"diffusion": 14, "cd": 14, "ct": 14, "ict": 14, "ect": 15, "gc": 14, "sct": 15}  # 100
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def command(regime: str, run: Path, *options: object) -> list[str]:
    config = ROOT / "configs" / f"{regime}_digits.yaml"
    words = [sys.executable, "-m", "cm_lightning.cli.fit", "--config", config, "--config", TINY]
    return [str(word) for word in (*words, "--run_dir", run, *options)]


def start(words: list[str], **options) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(words, cwd=ROOT, **{"env": ENVIRONMENT, **pipes, **options})


def finish(words: list[str], code: int = 0, **options) -> tuple[str, str]:
    process = start(words, **options)
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, (out, err)
    return out, err


def wait_for(condition, process: subprocess.Popen, seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.02)


def assert_equal_ends(run: Path, straight: Path) -> None:
    """Weights, averages, optimizer, logs, pictures, results and exported weights."""
    (a, *_), (b, *_) = checkpoints_of(run), checkpoints_of(straight)
    assert a.name == b.name
    first, second = load(a), load(b)
    for key in ("state_dict", "optimizer_states", "callbacks", "cm_lightning"):
        assert_same(first[key], second[key], key)
    assert rows(run) == rows(straight)
    for pattern in ("weights/*/model.safetensors", "samples/**/*.png"):
        found = {p.relative_to(run): p.read_bytes() for p in run.glob(pattern)}
        assert found == {p.relative_to(straight): p.read_bytes() for p in straight.glob(pattern)}
        assert found


@pytest.mark.parametrize("regime", KILLS)
def test_kills_at_random_moments(tmp_path, teacher, regime):
    """Every restart continues, no checkpoint is lost, and the end is that of a quiet run."""
    options = ["--model.total_kimg", 6.4, *SAVES]
    options += ["--model.teacher.path", teacher] if regime == "cd" else []
    straight, run = tmp_path / "straight", tmp_path / "run"
    finish(command(regime, straight, *options))
    rng, kills, complete = random.Random(regime), 0, 0
    while kills < KILLS[regime]:
        before = [path.name for path in checkpoints_of(run)]
        process = start(command(regime, run, *options))
        try:
            code = process.wait(timeout=rng.uniform(2, 14))
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills += 1
            found = checkpoints_of(run)
            assert all(is_intact(path) for path in found)
            assert [path.name for path in found][:1] >= before[:1]
            continue
        assert code == 0, process.communicate()
        assert_equal_ends(run, straight)
        shutil.rmtree(run)
        complete += 1
    finish(command(regime, run, *options))
    assert_equal_ends(run, straight)
    print(f"{regime}: {kills} kills, {complete + 1} complete runs")


def children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def ranks(process: subprocess.Popen) -> list[int]:
    """Other ranks among the children of rank 0."""
    found = []
    for pid in children(process.pid):
        with contextlib.suppress(OSError):
            if b"cm_lightning" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
    return found


TWO = ["--trainer.devices", 2, "--model.total_kimg", 6.4, "--checkpoints.every_kimg", 0.64]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_the_job_and_it_continues(tmp_path, victim):
    straight, run = tmp_path / "straight", tmp_path / "run"
    finish(command("ect", straight, *TWO))
    process = start(command("ect", run, *TWO), start_new_session=True)
    wait_for(lambda: checkpoints_of(run), process)
    (other,) = ranks(process)
    os.kill([process.pid, other][victim], signal.SIGKILL)
    killed = time.monotonic()
    process.communicate(timeout=60)
    assert process.returncode != 0
    while Path(f"/proc/{other}").exists():
        assert time.monotonic() - killed < 60
        time.sleep(0.1)
    out, _ = finish(command("ect", run, *TWO))
    assert "Resuming from" in out
    assert_equal_ends(run, straight)


def test_a_signal_to_one_rank_stops_all_of_them(tmp_path):
    straight, run = tmp_path / "straight", tmp_path / "run"
    finish(command("ect", straight, *TWO))
    process = start(command("ect", run, *TWO))
    wait_for(lambda: checkpoints_of(run), process)
    os.kill(ranks(process)[0], signal.SIGUSR1)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert "checkpoint written: the same command continues" in err
    finish(command("ect", run, *TWO))
    assert_equal_ends(run, straight)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def ip(*words: str) -> bool:
    try:
        return subprocess.run(["ip", *words], capture_output=True).returncode == 0
    except OSError:
        return False


@contextlib.contextmanager
def hosts():
    """Two network namespaces on one cable, where the system allows it; else loopback twice."""
    names = [f"cm{os.getpid()}a", f"cm{os.getpid()}b"]
    made = all(ip("netns", "add", name) for name in names)
    try:
        if not made:
            yield [[], []], "127.0.0.1", "lo"
            return
        a, b = names
        assert ip("link", "add", "cm0", "netns", a, "type", "veth", "peer", "cm0", "netns", b)
        for number, name in enumerate(names):
            assert ip("-n", name, "addr", "add", f"10.77.0.{number + 1}/24", "dev", "cm0")
            assert ip("-n", name, "link", "set", "cm0", "up")
            assert ip("-n", name, "link", "set", "lo", "up")
        yield [["ip", "netns", "exec", name] for name in names], "10.77.0.1", "cm0"
    finally:
        for name in names:
            ip("netns", "delete", name)


@pytest.mark.parametrize("regime", ["ect", "sct"])
def test_two_nodes_equal_one_process(tmp_path, regime):
    run, port = tmp_path / "2", free_port()
    with hosts() as (prefixes, address, interface):
        processes = []
        for node, prefix in enumerate(prefixes):
            words = ["--nnodes=2", "--nproc_per_node=1", f"--node_rank={node}"]
            words += [f"--master_addr={address}", f"--master_port={port}"]
            script = command(regime, run, "--trainer.num_nodes=2", "--trainer.devices=1")[1:]
            script += ["--model.total_kimg=1.28", "--checkpoints.every_kimg=9"]
            torchrun = [sys.executable, "-m", "torch.distributed.run", *words, *script]
            environment = ENVIRONMENT | {"GLOO_SOCKET_IFNAME": interface}
            processes.append(start([*prefix, *torchrun], env=environment))
        for process in processes:
            out, err = process.communicate(timeout=300)
            assert process.returncode == 0, (out, err)
    found = load(run / "checkpoints" / "nimg000000001280.ckpt"), rows(run)
    one = train(tmp_path, regime, 1, ["--checkpoints.every_kimg=9"], "1.28")
    assert_same_runs(one, (found[0], train_rows(run)))


def train_rows(run: Path) -> list[dict[str, str]]:
    import csv

    with (run / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 16 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", place], check=True)
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def remount(place: Path, option: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{option}", place], check=True)


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="needs root to mount")
def test_a_full_disk_and_a_read_only_one(tmp_path, small_disk):
    words = ["--checkpoints.every_kimg", 0.128, "--checkpoints.keep", 9, "--model.total_kimg", 2.56]
    straight, run = tmp_path / "straight", small_disk / "run"
    finish(command("ect", straight, *words))
    out, err = finish(command("ect", run, *words), code=1)
    assert "MiB are free there); training goes on. The last good one:" in out
    assert "3 times in a row. Make room; the last good one:" in err
    assert "Traceback" not in err
    assert all(is_intact(path) for path in checkpoints_of(run))
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    remount(small_disk, "ro")
    _, err = finish(command("ect", run, *words), code=2)
    assert "cannot be written" in err
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before
    remount(small_disk, "rw,size=200m")
    out, _ = finish(command("ect", run, *words))
    assert "Resuming from" in out
    assert_equal_ends(run, straight)


def usage(pid: int) -> tuple[int, int, int]:
    """Resident pages, threads, open files."""
    place = Path(f"/proc/{pid}")
    pages = int((place / "statm").read_text().split()[1])
    return pages, len(list((place / "task").iterdir())), len(list((place / "fd").iterdir()))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_thousand_steps_take_no_more_memory(tmp_path, workers):
    """After 200 steps of warm-up; evaluations, grids and checkpoints are frequent."""
    run = tmp_path / "run"
    often = [f"--{name}.every_kimg=3.2" for name in ("fid", "samples", "checkpoints")]
    words = ["--model.total_kimg=76.8", "--diagnostics.every_kimg=0.64", *often]
    process = start(command("ect", run, *words, f"--data.num_workers={workers}"))
    path, seen = run / "metrics.csv", {}
    wait_for(path.exists, process)
    while process.poll() is None:
        with contextlib.suppress(OSError, IndexError, ValueError):
            step = int(path.read_text().splitlines()[-1].split(",")[1])
            seen[step] = usage(process.pid)
        time.sleep(0.02)
    assert process.returncode == 0, process.communicate()
    early = [value for step, value in seen.items() if 200 <= step < 400]
    late = [value for step, value in seen.items() if 1000 <= step < 1190]
    assert len(early) > 5
    assert len(late) > 5
    pages, threads, files = (
        [median(v[k] for v in part) for part in (early, late)] for k in range(3)
    )
    print(f"memory {pages[0] * 4 / 1024:.1f} -> {pages[1] * 4 / 1024:.1f} MiB; {threads}; {files}")
    assert pages[1] < 1.01 * pages[0]
    assert threads[0] == threads[1]
    assert files[0] == files[1]
