"""The README's sbatch file, with srun and scontrol played by two processes on this machine."""

from __future__ import annotations

import os
import re
import subprocess
import sys

from cm_lightning.callbacks import checkpoints_of
from tests.cli.conftest import DIGITS, ROOT, TINY
from tests.cli.test_fit import assert_same, load

SRUN = """#!{python}
import glob, os, pathlib, signal, subprocess, sys, time
command = [sys.executable, "-m", "cm_lightning.cli.fit", *sys.argv[2:]]
tasks = []
for task in range(2):
    own = {{"SLURM_NTASKS": "2", "SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "1"}}
    own |= {{"SLURM_PROCID": str(task), "SLURM_NODEID": str(task), "SLURM_LOCALID": "0"}}
    own |= {{"SLURM_NODELIST": "127.0.0.1"}}
    tasks.append(subprocess.Popen(command, env=os.environ | own))
mark = pathlib.Path("interrupted")
while not mark.exists() and all(task.poll() is None for task in tasks):
    if glob.glob("run/checkpoints/nimg*.ckpt"):
        mark.touch()
        for task in tasks:
            task.send_signal(signal.SIGUSR1)
    time.sleep(0.02)
sys.exit(max(task.wait() for task in tasks))
"""


def test_the_sbatch_file_requeues_itself_and_ends(tmp_path, fit):
    (script,) = re.findall(r"^```sh\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    length = ["--model.total_kimg", "3.2", "--checkpoints.every_kimg", "0.64"]
    place = f"{DIGITS} --config {TINY} --fid.every_kimg 9 {' '.join(length)}"
    script = script.replace("configs/sct_imagenet64.yaml", place)
    script = script.replace("runs/sct_imagenet64", "run")
    (tmp_path / "job.sh").write_text(script)
    programs = {
        "srun": SRUN.format(python=sys.executable),
        "scontrol": '#!/bin/sh\necho "$@" > queue',
    }
    for name, text in programs.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    own = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "4711",
        "OMP_NUM_THREADS": "1",
    }
    own |= {"SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS_PER_NODE": "1", "SLURM_JOB_NAME": "cm-fit"}
    own |= {"MASTER_PORT": str(20000 + os.getpid() % 20000)}
    first, second = (
        subprocess.run(
            ["bash", "job.sh"], cwd=tmp_path, env=os.environ | own, capture_output=True, text=True
        )
        for _ in range(2)
    )
    assert first.returncode == 0, first.stderr
    assert "Stopped by SIGUSR1 at" in first.stderr
    assert (tmp_path / "queue").read_text() == "requeue 4711\n"
    assert second.returncode == 0, second.stderr
    assert "Resuming from" in second.stdout
    done = fit(tmp_path / "one", *length, "--fid.every_kimg", 9)
    assert done.code == 0, done.err
    a, b = (load(checkpoints_of(tmp_path / name)[0]) for name in ("run", "one"))
    assert a["cm_lightning"] == b["cm_lightning"]
    for name, value in a["state_dict"].items():
        assert float((value - b["state_dict"][name]).abs().max()) < 1e-5, name
    assert_same(sorted(a["callbacks"]), sorted(b["callbacks"]))
