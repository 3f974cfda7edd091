"""Classes of a config come from known packages, or from those the user names."""

from __future__ import annotations

import pytest
import yaml


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package that leaves a mark when it is imported."""
    folder = tmp_path / "path"
    (folder / "stranger").mkdir(parents=True)
    code = (
        f"open({str(tmp_path / 'canary')!r}, 'w').close()\n"
        "from cm_lightning.objective import L2\n"
        "from cm_lightning.evaluation import DigitsFeatures\n"
        "class Own(L2):\n    pass\n"
        "class Features(DigitsFeatures):\n    pass\n"
    )
    (folder / "stranger" / "__init__.py").write_text(code)
    monkeypatch.syspath_prepend(folder)
    yield tmp_path / "canary"
    import sys

    sys.modules.pop("stranger", None)


PLACES = {
    "option": ["--model.distance", "stranger.Own"],
    "mapping": ["--model.distance", "{class_path: stranger.Own}"],
    "class_path": ["--model.distance.class_path", "stranger.Own"],
    "features": ["--fid.features", "stranger.Features"],
    "optimizer": ["--model.optimizer", "stranger.Own"],
    "callback": ["--trainer.callbacks", "[{class_path: stranger.Own}]"],
    "callback+": ["--trainer.callbacks+", "stranger.Own"],
    "logger": ["--trainer.logger", "stranger.Own"],
    "strategy": ["--trainer.strategy", "{class_path: stranger.Own}"],
    "nested": [
        "--data.source",
        "{class_path: Store, init_args: {path: {class_path: stranger.Own}}}",
    ],
    "regime": ["--model", "stranger.Own"],
    "system": ["--model.optimizer", "{class_path: os.system, init_args: {command: id}}"],
}


@pytest.mark.parametrize("words", PLACES.values(), ids=PLACES.keys())
def test_other_packages_are_not_imported(fit, tmp_path, package, words):
    done = fit(tmp_path / "run", *words)
    assert done.code == 2
    assert not package.exists()
    assert not (tmp_path / "run").exists()
    if words[0] not in ("--data.source", "--trainer.strategy"):  # texts are expected there
        assert "--allow_modules" in done.err, done.err


@pytest.mark.parametrize("short", [False, True])
def test_other_packages_in_a_file(fit, program, tmp_path, package, short):
    distance = "stranger.Own" if short else {"class_path": "stranger.Own"}
    model = {"class_path": "ECT", "init_args": {"distance": distance}}
    (tmp_path / "x.yaml").write_text(yaml.safe_dump({"allow_modules": "stranger", "model": model}))
    done = fit(tmp_path / "run", "--config", tmp_path / "x.yaml")
    assert done.code == 2
    assert "names 'stranger.Own'" in done.err
    assert "--allow_modules stranger" in done.err
    assert not package.exists()


def test_a_package_is_allowed_by_name(fit, tmp_path, package):
    words = ["--model.distance", "stranger.Own", "--model.total_kimg", 0.064, "--fid.n", 2]
    done = fit(tmp_path / "run", *words, "--allow_modules", "other,stranger")
    assert done.code == 0, done.err
    assert package.exists()
    refused = fit(tmp_path / "two", "--allow_modules", "/tmp/x.py")
    assert "names of packages separated by commas, got '/tmp/x.py'" in refused.err
