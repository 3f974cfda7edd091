"""Configs of cm-fit with one or two things wrong in them."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import yaml
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.fuzz.damage import MUTATIONS, mutate
from tests.fuzz.harness import ends_well, examples, refused, workplace
from tests.toys import REGIMES


def starts_processes(config: dict) -> bool:
    """Whether a config is about other processes; two workers or nodes are no mistake."""
    trainer, data = config.get("trainer"), config.get("data")
    several = isinstance(trainer, dict) and (
        trainer.get("num_nodes", 1) != 1 or trainer.get("devices", "auto") not in ("auto", 1)
    )
    return several or (isinstance(data, dict) and data.get("num_workers", 0) != 0)


def laughs(lists: int) -> str:
    """Anchors of anchors: a few lines of a billion values."""
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    for i in range(1, lists):
        lines.append(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]")
    return "\n".join(lines)


def chained(depth: int) -> str:
    return "model: " + "{a: " * depth + "1" + "}" * depth


TEXTS = {
    "empty": "",
    "blank": " \n\n",
    "comment": "# nothing",
    "null": "null",
    "list": "- model",
    "word": "model",
    "number": "3",
    "tab": "model:\n\tclass_path: ECT",
    "open": "model: [",
    "two documents": "model: {}\n---\ndata: {}",
    "binary": b"\x00\x01\x02",
    "latin-1": "seed_everything: 0 # é".encode("latin-1"),
    "utf-16": "seed_everything: 0".encode("utf-16"),
    "circle": "model: &a\n  class_path: ECT\n  init_args: *a",
    "circle in a list": "fid:\n  samplers: &a [*a]",
    "laughs": laughs(9),
    "deep": chained(2000),
    "deeper": chained(100_000),
    "deep list": "fid: {samplers: " + "[" * 3000 + "]" * 3000 + "}",
    "doubled": "seed_everything: 0\nseed_everything: 1",
    "doubled inside": "data:\n  flip: true\n  resize: pad\n  flip: false",
    "number as a key": "1: 2",
    "list as a key": "? [1]\n: 2",
    "mapping as a key": "? {a: 1}\n: 2",
    "null as a key": "null: 2",
    "date": "seed_everything: 2001-99-99",
    "sexagesimal": "seed_everything: 1:99:99",
    "digits": "seed_everything: " + "9" * 5000,
    "long": "seed_everything: " + "x" * 100_000,
    "tag": "model: !!python/object/apply:os.system [touch canary]",
    "other tag": "model: !Mine {a: 1}",
    "binary tag": "model: !!binary x",
    "set": "model: !!set {a, b}",
    "pairs": "model: !!pairs [a: 1]",
    "merge": "model:\n  <<: 3",
    "merge of itself": "model: &a\n  <<: *a",
    "unknown anchor": "model: *a",
    "escape": 'run_dir: "\\x1b[31m"\nmodel: {"\\x1b[31m": 1}',
    "directive": "%YAML 9.9\n---\nmodel: {}",
    "json": '{"model": {"class_path": "ECT"',
    "png": b"\x89PNG\r\n\x1a\n",
    "config of itself": "config: x.yaml",
    "help": "help: true",
    "print": "print_config: nonsense",
    "dots": "model.total_kimg.: 3",
    "only dots": "...: 3",
}


def no_network(*arguments: object, **options: object) -> None:
    raise OSError("no network")


@pytest.mark.parametrize("case", TEXTS)
@pytest.mark.parametrize(
    "command",
    [
        "fit",
        "study",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("eval", "prefetch")),
    ],
)
def test_files_that_are_no_configs(case, command, run, weights, monkeypatch, tmp_path):
    if command == "prefetch":
        monkeypatch.delenv("CM_OFFLINE")
        monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
        monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    text = TEXTS[case]
    words = {
        "fit": ["cm-fit", "--config", run / "config.yaml", "--config", "x.yaml", "--check"],
        "eval": ["cm-eval", weights, "--config", "x.yaml", "--n", 66, "--out", "out"],
        "prefetch": ["cm-data", "prefetch", "--config", "x.yaml"],
        "study": ["cm-study", "x.yaml", "--out", "out"],
    }
    with workplace() as folder:
        data = text if isinstance(text, bytes) else text.encode()
        (folder / "x.yaml").write_bytes(data)
        ends_well(folder, *words[command])


FOUND = {
    "model.init_args.weighting": (None, "must not be null"),
    "model.init_args.optimizer.init_args.lr": (-1, "Invalid learning rate"),
    "model.init_args.optimizer.init_args.betas": ([0.9, 1.0], "Invalid beta"),
    "model.init_args.optimizer.class_path": (3, "optimizer.class_path must be a text, got 3"),
    "model.init_args.total_kimg": (math.inf, "total_kimg is inf"),
    "model.init_args.denoiser.init_args.backbone": (2**31, "backbone must be the name of a Module"),
    "model.init_args.denoiser.init_args.backbone.init_args.num_blocks": (10**30, "below 2^53"),
    "model.init_args.discretization.init_args.q": ({"a": 1}, "q must be a number, got {'a': 1}"),
    "model.init_args.distance": ("ECT", "distance must be the name of a Distance class"),
    "model.init_args.a\nb": (1, "Unknown key 'model.init_args.a b'"),
    "checkpoints": ([{"keep": 1}], "checkpoints must be keys and values"),
    "data.global_batch": (2**31, "memory is too small for micro-batches of"),
    "fid.samplers": ([None], "fid.samplers must be a list, each the name of a Sampler"),
    "samples.samplers": (" ", "samples.samplers must be a list"),
    "seed_everything": ([None], "seed_everything must be a whole number"),
    "resume": (None, "resume must be a text, got null"),
    "trainer.callbacks": ("torch.optim.SGD", "trainer.callbacks must be"),
}


@pytest.mark.parametrize("key", FOUND)
def test_what_was_once_a_traceback(resolved, key):
    value, words = FOUND[key]
    config = copy.deepcopy(resolved["ect"])
    *parents, last = key.split(".")
    node = config
    for parent in parents:
        node = node[parent]
    node[last] = value
    if key == "data.global_batch":
        config["data"]["micro_batch"] = None
    with workplace() as folder:
        (folder / "x.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
        assert words in refused(folder, "cm-fit", "--config", "x.yaml", "--check")


@examples(24)
@given(st.sampled_from(REGIMES), MUTATIONS)
def test_one_or_two_things_wrong(resolved, regime, mutations):
    config = copy.deepcopy(resolved[regime])
    mutate(config, mutations)
    assume(not starts_processes(config))
    with workplace() as folder:
        (folder / "x.yaml").write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8")
        ends_well(folder, "cm-fit", "--config", "x.yaml", "--check")
