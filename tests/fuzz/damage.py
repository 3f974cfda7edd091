"""Ways to damage bytes, documents and arrays."""

from __future__ import annotations

import copy
import json
import math
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from hypothesis import strategies as st

WILD = [
    None, True, False, math.nan, math.inf, -math.inf, -1, 0, 1, 3, 2**31, 2**63, 10**30, 1e300,
    -0.5, 1e-320, "", " ", "auto", "nan", "none", "-1", "ä漢😀\u202e", "/proc/nowhere", ".",
    "a\nb", "\0", [], [[]], [None], [0], [1, "a"], {}, {"a": 1}, {1: 2}, {"": ""},
    {"class_path": "ECT"},
    {"class_path": "torch.nn.Linear"}, {"class_path": "os.system"}, {"class_path": None},
    {"class_path": 3, "init_args": []}, {"init_args": {"a": 1}},
    {"class_path": "cm_lightning.regimes.ECT"}, {"class_path": "torch.optim.SGD"},
    "torch.optim.SGD", "L2", "ECT", "os.system", "cm_lightning", "..",
]  # fmt: skip
NUMBERS = [math.nan, math.inf, -math.inf, -1, 0, 1, 2, 3, 7, 2**31, 2**63, 1e300, -0.5, 1e-320]
HOW = ["replace"] * 5 + ["number"] * 5 + ["delete", "list", "wrap", "rename", "add", "swap"]
MUTATION = st.tuples(st.integers(0, 10_000), st.sampled_from(HOW), st.sampled_from(WILD))
MUTATIONS = st.lists(MUTATION, min_size=1, max_size=2)


class Evil:
    """Makes a file when it is unpickled."""

    def __reduce__(self) -> Any:
        return Path.touch, (Path("canary"),)


def places(node: Any, path: tuple = ()) -> Iterator[tuple]:
    """Every key and list entry."""
    if isinstance(node, (dict, list)):
        items = list(node.items()) if isinstance(node, dict) else list(enumerate(node))
        for key, value in items:
            yield (*path, key)
            yield from places(value, (*path, key))


def _at(node: Any, path: tuple) -> Any:
    for key in path:
        node = node[key]
    return node


def mutate(config: Any, mutations: list[tuple[int, str, Any]]) -> None:
    """Change places in a document."""
    for number, how, value in mutations:
        found = list(places(config))
        if how == "number":
            found = [p for p in found if type(_at(config, p)) in (int, float)] or found
            value = NUMBERS[number // 7 % len(NUMBERS)]
        if not found:
            return
        path = found[number % len(found)]
        node, last = _at(config, path[:-1]), path[-1]
        if how in ("replace", "number"):
            node[last] = copy.deepcopy(value)
        elif how == "delete":
            del node[last]
        elif how == "list":
            node[last] = [node[last]]
        elif how == "wrap":
            node[last] = {"class_path": node[last], "init_args": {}}
        elif isinstance(node, dict) and how == "rename":
            node[f"{last}x"] = node.pop(last)
        elif isinstance(node, dict) and how == "add":
            node[value if isinstance(value, (str, int, float, bool)) else "more"] = value
        elif how == "swap":
            node[last] = found[(number * 7 + 3) % len(found)][-1]


def mutate_file(path: Path, mutations: list[tuple[int, str, Any]]) -> None:
    """Change places in a YAML or JSON file."""
    text = path.read_text(encoding="utf-8")
    content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    mutate(content, mutations)
    if path.suffix == ".json":
        text = json.dumps(content)
    else:
        text = yaml.safe_dump(content, allow_unicode=True)
    path.write_text(text, encoding="utf-8")


OTHERS = [
    b"", b"\0", b"\0" * 1000, b"PK\x03\x04", b"PK\x05\x06" + b"\0" * 18, b"\x89PNG\r\n\x1a\n" * 3,
    b"\x93NUMPY\x01\x00", b"{}", b"[]", b"null", b"a: b", b"\xff\xfe\xfa", b"[" * 100_000,
    b"&a [*a]", b"\x1f\x8b\x08", pickle.dumps(Evil()), pickle.dumps({"fid": Evil(), "ema": Evil()}),
    pickle.dumps({"data": np.array([Evil()], dtype=object)}), b"\x80\x04.", b"not a file at all\n",
]  # fmt: skip
HARM = st.one_of(
    st.tuples(st.just("cut"), st.floats(0, 1), st.just(0)),
    st.tuples(st.just("flip"), st.floats(0, 1), st.integers(0, 7)),
    st.tuples(st.just("head"), st.floats(0, 1), st.integers(0, 255)),
    st.tuples(st.just("zero"), st.floats(0, 1), st.integers(1, 64)),
    st.tuples(st.just("more"), st.floats(0, 1), st.integers(1, 64)),
    st.tuples(st.just("other"), st.floats(0, 1), st.integers(0, len(OTHERS) - 1)),
)


def harm(path: Path, damage: tuple[str, float, int]) -> None:
    """Damage the bytes of a file."""
    how, where, what = damage
    data = bytearray(path.read_bytes())
    place = min(int(where * len(data)), max(len(data) - 1, 0))
    if how == "cut":
        data = data[:place]
    elif how == "other":
        data = bytearray(OTHERS[what])
    elif how == "more":
        data += b"\x01" * what
    elif data and how == "flip":
        data[place] ^= 1 << what
    elif data and how == "head":
        data[int(where * min(len(data) - 1, 127))] = what
    elif how == "zero":
        data[place : place + what] = bytes(len(data[place : place + what]))
    path.write_bytes(bytes(data))


def files_below(folder: Path) -> list[Path]:
    """Every file, in order."""
    return sorted(p for p in folder.rglob("*") if p.is_file()) if folder.is_dir() else [folder]


def one_of(items: list, number: int) -> Any:
    """An item by a number of any size."""
    return items[number % len(items)]
