"""What a run knows of the code that made it."""

from __future__ import annotations

import subprocess

from cm_lightning.callbacks import run_record


def test_changes_anywhere_in_the_package_are_seen(tmp_path, monkeypatch):
    def git(*words):
        subprocess.run(["git", *words], cwd=tmp_path, check=True, capture_output=True)

    package = tmp_path / "cm_lightning"
    for name in ("callbacks/run_record.py", "objective/solver.py", "types.py"):
        path = package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    git("init")
    git("add", ".")
    git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-m", "a")
    monkeypatch.setattr(run_record, "__file__", str(package / "callbacks" / "run_record.py"))
    state = run_record.git_state.__wrapped__
    assert state()["changed"] is False
    (tmp_path / "notes.txt").write_text("no part of the package")
    assert state()["changed"] is False
    (package / "objective" / "solver.py").write_text("x = 1")
    assert state()["changed"] is True
    git("checkout", ".")
    assert state()["changed"] is False
    (package / "new.py").write_text("")
    assert state()["changed"] is True
