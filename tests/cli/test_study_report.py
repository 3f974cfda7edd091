"""What a study reports, in numbers computed by hand."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace

import numpy as np
import pytest

from cm_lightning.cli.study import length, training_minutes
from cm_lightning.cli.study_file import Arm
from cm_lightning.cli.study_report import (
    Answer,
    answer_rows,
    answers,
    arms_table,
    interval,
    label,
    main_results,
    other_results,
    search_table,
    summary,
    unanswered,
    verdicts,
)
from cm_lightning.cli.study_runs import Run, Runner, finished
from cm_lightning.cli.words import result_words
from cm_lightning.documents import printable
from cm_lightning.types import InputError
from tests.cli.conftest import ROOT

KNOWN = {
    "title": "known",
    "seeds": [1, 2, 3],
    "arms": {"base": {"runs": ["a", "b", "c"]}, "better": {"runs": ["d", "e", "f"]}},
    "first": {},
    "key": "",
    "search": {},
    "results": {
        "base": {"fd/ema/nfe1": [4.0, 5.0, 6.0], "fd/ema/nfe2": [1.0, 1.0, 2.0], "own": [7, 8, 9]},
        "better": {"fd/ema/nfe1": [2.0, 3.0, 4.0], "fd/ema/nfe2": [0.0, 2.0, 2.0]},
    },
    "questions": {
        "Which?": [["better", "base"]],
        "Inside one arm?": [["base | own", "base | fd/ema/nfe1"], ["base | none", "better | none"]],
        "Unanswered?": [["base | none", "better"]],
    },
}


def test_answers_of_known_numbers():
    found = dict(answers(KNOWN))
    assert list(found) == ["Which?", "Inside one arm?"]
    one, two = found["Which?"]
    assert (one.result, two.result) == ("1 network call", "2 network calls")
    assert one.difference == (-2.0, 0.0)
    assert (one.verdict, two.verdict) == ("better", "undecided")
    assert two.difference == (0.0, pytest.approx(2.484, abs=1e-3))
    (inside,) = found["Inside one arm?"]
    assert inside.difference == (3.0, 0.0)
    assert inside.verdict == "worse"
    assert (inside.arm, inside.baseline) == ("base (own)", "base (ema, 1 network call)")


def test_what_most_arms_have_is_in_the_table(tmp_path):
    """An arm without it has an empty cell, and what few have stands below."""
    write_runs(tmp_path, "abcdefghi")
    other = {"runs": ["g", "h", "i"]}
    results = KNOWN["results"] | {"phased": {"fd/ema/nfe4": [1, 2, 3]}}
    outcome = KNOWN | {"arms": KNOWN["arms"] | {"phased": other}, "results": results}
    assert main_results(outcome) == ["fd/ema/nfe1", "fd/ema/nfe2"]
    head, rows = arms_table(outcome, tmp_path)
    assert head == ["arm", "1 network call", "2 network calls", "kimg", "minutes"]
    assert rows[2] == ["phased", "", "", "2", "1.0"]
    assert [row[1] for row in other_results(outcome)] == ["own", "fd/ema/nfe4"]


def test_labels_say_what_differs():
    keys = ["fd_a10k/ema/nfe1", "fd_b10k/ema/nfe2", "steps/ema/sigmas 80 2"]
    assert [label(key, keys[:1]) for key in keys[:1]] == ["1 network call"]
    assert [label(key, keys) for key in keys] == [
        "a features of 10k samples, 1 network call",
        "b features of 10k samples, 2 network calls",
        "steps, noise levels 80 2",
    ]


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("fd_digits2k/ema_std0.200/nfe1", "digits features of 2k samples, average std 0.200, "),
        ("fd_dinov250k", "dinov2 features of 50k samples"),
        ("fd_dinov2_small50k", "dinov2_small features of 50k samples"),
        ("fid50k", "Inception features of 50k samples"),
        ("live/nfe21", "live weights, 21 network calls"),
        ("ema_0.9993", "average of rate 0.9993"),
        ("ema_halflife10k/euler_nfe18", "average of half-life 10 kimg, euler, 18 network calls"),
        ("phased_nfe4_eta0.8", "4 network calls in phases, eta 0.8"),
        ("phases 0 2 80, eta 0.8", "phases between noise levels 0 2 80, eta 0.8"),
        (
            "sigmas 80, guidance 2 by ema_std0.100@0.5",
            "noise levels 80, guidance 2 by average std 0.100 at 0.5 of the run",
        ),
        ("own", "own"),
    ],
)
def test_names_of_results_in_words(key, words):
    assert result_words(key).startswith(words)


def test_sides_of_a_question_say_what_differs():
    """What both have is the measure; of one arm with nothing of its own, 'without'."""
    results = {"a": {"s/live/x, eta 2": [1, 2, 3], "s/live/x": [3, 3, 3], "s/ema_0.9/x": [4, 5, 6]}}
    results["b"] = results["a"]
    pairs = [["a | s/live/x, eta 2", "a | s/live/x"], ["a | s/live/x", "a | s/ema_0.9/x"]]
    pairs.append(["a | s/live/x", "b | s/live/x"])
    outcome = {"results": results, "questions": {"?": pairs}}
    ((_, found),) = answers(outcome)
    assert [answer[:3] for answer in found] == [
        ("a (eta 2)", "a (without)", "live weights, x"),
        ("a (live weights)", "a (average of rate 0.9)", "x"),
        ("a", "b", "live weights, x"),
    ]


def test_a_question_is_answered_in_a_sentence_for_each_pair():
    low, high, wide = [1.0, 1.0], [2.0, 2.0], [0.0, 3.0]
    found = [Answer("a", "b", "", low, high)] * 3 + [Answer("a", "b", "", wide, low)]
    found += [Answer("c", "b", "", high, low)] * 2
    found += [Answer("d", "b", "", low, high), Answer("e", "b", "", low, high)]
    found.append(Answer("f", "b", "", wide, low))
    assert verdicts(found) == [
        "a against b: better in 3 of 4 measures, undecided in 1.",
        "c against b: worse in both measures.",
        "Better than b: d; e.",
        "Undecided against b: f.",
    ]


def test_printed_text_obeys_no_one():
    assert printable("a\x1b[31mb\n\u202ec\x00 é ± \ud800|") == "a[31mb\nc é ± |"


@pytest.mark.parametrize(
    "changes",
    [
        {"results": {"base": {}}},
        {"seeds": [1, 2]},
        {"questions": {"?": [["a"]]}},
        {"arms": {"base": {"runs": ["a"]}, "better": {"runs": ["b"]}}},
    ],
)
def test_an_outcome_that_does_not_fit_is_refused(changes, program, tmp_path):
    (tmp_path / "study.json").write_text(json.dumps(KNOWN | changes))
    done = program("cm-compare", tmp_path, "--out", tmp_path / "out")
    assert done.code == 2
    assert "study.json does not hold a result of every arm and seed" in done.err


def test_interval_is_students():
    mean, width = interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3
    assert width == pytest.approx(2.776445 * np.sqrt(2.5 / 5), rel=1e-6)


def write_runs(folder, names="abcdef", **changes):
    """A record of every run, of one start of a minute unless told otherwise."""
    record = {"regime": "ECT", "parameters": 1, "total_kimg": 2, "starts": [{"seconds": 60}]}
    for name in names:
        (folder / name).mkdir()
        (folder / name / "run.json").write_text(json.dumps(record | changes))


def test_minutes_count_every_start_and_are_averaged_over_seeds(tmp_path):
    """One start was killed before it could tell its time."""
    write_runs(tmp_path, "abc", total_kimg=19.62, starts=[{"seconds": 90}, {"seconds": 30}, {}])
    write_runs(tmp_path, "de")
    write_runs(tmp_path, "f", starts=[{"seconds": 240}])
    tuned = {name: arm | {"tuned": 3e-4} for name, arm in KNOWN["arms"].items()}
    tuned["base"]["about"] = "the baseline"
    head, rows = arms_table(KNOWN | {"arms": tuned, "key": "model.optimizer.lr"}, tmp_path)
    assert head[:2] == ["arm", "what it is"]
    assert head[4:] == ["kimg", "minutes", "lr"]
    assert rows[0][:2] == ["base", "the baseline"]
    assert rows[0][4:] == ["19.62", "2.0", "0.0003"]
    assert rows[1][1] == ""
    assert rows[1][4:] == ["2", "2.0", "0.0003"]


def test_answers_in_percent_of_the_baseline():
    """Mean difference -2, three seeds: deviation 1, half width 4.3027 / sqrt(3) = 2.484."""
    sides = [7.0, 8.0, 9.0], [10.0, 10.0, 10.0]
    head, rows = answer_rows([Answer("ours", "theirs", "1 call", *sides)])
    assert dict(zip(head, rows[0], strict=True)) == {
        "arm": "ours",
        "is": "undecided",
        "than": "theirs",
        "measure": "1 call",
        "difference": "-2.000 ± 2.484 (-20.0 %)",
        "arm's FD": "8.000 ± 2.484",
        "the other's FD": "10.000 ± 0.000",
    }
    (row,) = answer_rows([Answer("ours", "theirs", "", [1.0, 1.0], [0.0, 0.0])])[1]
    assert row[1] == "worse"
    assert row[3] == "+1.000 ± 0.000"  # no share of nothing, no column of nothing


def test_the_best_of_a_search_is_bold_in_its_row():
    search = {"one": {"0.1": 3.0, "0.01": 2.0}, "two": {"0.1": 1.0, "1.0": 4.0}}
    head, rows = search_table({"key": "lr", "search": search})
    assert head == ["lr", "0.1", "0.01", "1.0"]
    assert rows == [["one", "3.000", "**2.000**", ""], ["two", "**1.000**", "", "4.000"]]


def test_the_page_in_markdown_holds_every_part(tmp_path):
    write_runs(tmp_path)
    timed = KNOWN["arms"]["better"] | {"time_of": "base", "of": "base", "share": 0.75}
    arms = KNOWN["arms"] | {"better": timed}
    outcome = KNOWN | {"arms": arms, "key": "lr", "search": {"base": {"1": 0.5}}}
    text = summary(outcome | {"first": {"teacher": {"floor": 0.25}}}, tmp_path)
    assert text.startswith("# known\n")
    assert "over training seeds 1, 2, 3" in text
    assert "takes as long as another arm's training" in text
    assert "better 0.75 (base)" in text
    assert "**better against base: better in 1 of 2 measures, undecided in 1.**" in text
    assert "| better | better | base | 1 network call | -2.000 ± 0.000 (-40.0 %) |" in text
    assert "| teacher | floor | 0.250 |" in text
    assert "| base | **0.500** |" in text
    assert "- **ECT**: easy consistency tuning" in text
    assert unanswered(outcome).count("base | none") == 1
    changed = outcome["arms"] | {"base": KNOWN["arms"]["base"] | {"about": "a|b\x1b[2J"}}
    assert "| base | a\\|b[2J |" in summary(outcome | {"arms": changed}, tmp_path)


def test_a_run_is_finished_with_results_of_its_whole_length(tmp_path):
    assert finished(tmp_path / "a") is None
    write_runs(tmp_path, "a")
    assert finished(tmp_path / "a") is None
    write_runs(tmp_path, "b", results={"kimg": 1.9, "last": {"fd": 1.0}})
    assert finished(tmp_path / "b") is None
    write_runs(tmp_path, "c", results={"kimg": 2, "last": {"fd": 1.0}})
    assert finished(tmp_path / "c") == {"fd": 1.0}


def test_minutes_of_training_are_those_of_the_median_speed(tmp_path):
    """2,000 images at 10 a second, whatever one slow window and the first row say."""
    write_runs(tmp_path, "ab")
    text = "kimg,speed/images_per_second\n0,0\n1,{}\n2,10\n"
    for name, speed in (("a", 1), ("b", 10)):
        (tmp_path / name / "metrics.csv").write_text(text.format(speed))
    folders = [tmp_path / "a", tmp_path / "b"]
    assert training_minutes(folders) == pytest.approx(2000 / 10 / 60)
    for folder in folders:
        (folder / "metrics.csv").write_text("kimg,loss\n0,1\n")
    with pytest.raises(InputError, match="logged no speed; time_of needs diagnostics"):
        training_minutes(folders)


def test_the_time_that_is_left_goes_by_images(tmp_path, capsys, monkeypatch):
    """Two minutes for a first run of 30 kimg: eight minutes for four times as many."""
    clock = iter([0.0, 120.0, 240.0])
    monkeypatch.setattr("cm_lightning.cli.study_runs.time.perf_counter", lambda: next(clock))
    monkeypatch.setattr(Runner, "_command", lambda *_: None)
    results = iter([None, {"fd": 1.0}, None, {"fd": 2.0}])
    monkeypatch.setattr("cm_lightning.cli.study_runs.finished", lambda _: next(results))
    arm = Arm(ROOT / "configs/ect_digits.yaml", {"model.init_args.total_kimg": 30})
    assert length(arm) == 30
    assert length(replace(arm, options={})) == 72
    runs = [Run(name, arm.config, {}, {}, kimg) for name, kimg in (("a", 30.0), ("b", 60.0))]
    with Runner(tmp_path, (3, 150.0), 1) as runner:
        runner(runs)
    start, first, second = capsys.readouterr().out.splitlines()
    assert start.startswith("3 runs of 150 kimg in all, 1 at a time")
    assert first == "[1/3] a: fd 1 (about 8 min to go)"
    assert second == "[2/3] b: fd 2 (about 3 min to go)"


def write_whole(folder, **changes):
    """A study's folder as cm-compare reads it."""
    outcome = KNOWN | changes
    start = {"device": "two abaci", "time": "2031-05-06T07:08:09+00:00", "host": "shed"}
    start |= {"git": {"commit": "c0ffee" * 4, "changed": True}, "versions": {"torch": "9.8"}}
    write_runs(folder, starts=[start | {"seconds": 60}], seed=1, wandb_id="id7")
    for run in "abcdef":
        record = json.loads((folder / run / "run.json").read_text())
        kimg = 2 if run in "abc" else 3
        results = {"kimg": kimg, "last": {"fd/ema/nfe1": 1.0}}
        record |= {"total_kimg": kimg, "results": results}
        (folder / run / "run.json").write_text(json.dumps(record))
        (folder / run / "config.yaml").write_text("samples: {seed: 0}\n")
        (folder / run / "metrics.csv").write_text("kimg,gradient/norm,fd/ema/nfe1\n1,2,\n2,3,1\n")
    (folder / "study.json").write_text(json.dumps(outcome))


def test_the_page_of_a_study_says_what_it_is(program, tmp_path):
    folder, out = tmp_path / "my study", tmp_path / "out"
    folder.mkdir()
    write_whole(folder)
    done = program("cm-compare", folder, "--out", out)
    assert done.code == 0, done.err
    report, page = (out / name for name in ("comparison.md", "comparison.html"))
    report, page = report.read_text(), page.read_text()
    quoted = shlex.quote(str(folder))
    again = f"`cm-fit --config {shlex.quote(str(folder / 'a/config.yaml'))} --run_dir NEW`"
    for words in (
        "6 runs from 2031-05-06 07:08 UTC to 2031-05-06 07:08 UTC on two abaci (machine shed), by "
        f"torch 9.8, commit {('c0ffee' * 2)} with changes.",
        f"`cm-study STUDY.yaml --out {quoted}`",
        "**a**: ECT on two abaci, seed 1, 2031-05-06 07:08 UTC",
        f"W&B run id7; again: {again}",
    ):
        assert words in report
    for words in ("two abaci", "c0ffeec0ffee with changes", "W&amp;B run id7", "<code>cm-fit"):
        assert words in page
    sentence = "better against base: better in 1 of 2 measures, undecided in 1."
    assert f"<p class=answer>{sentence}</p>" in page
    assert f"**{sentence}**" in report
    assert "different numbers of images (base: 2 kimg; better: 3 kimg)" in page
    assert "Frechet distance during training" not in page  # every run was measured once
    assert {path.name for path in (out / "figures").iterdir()} == {
        "arms_fd_ema_nfe1.png",
        "arms_fd_ema_nfe2.png",
        "gradient_norm.png",
    }
    assert "<dt>iCT</dt><dd>improved consistency training" in page


def test_names_in_a_study_are_shown_as_they_are(program, tmp_path):
    """Markup, mathematics of matplotlib and orders to the terminal in names and texts."""
    evil = r"<i>$\frac{$ \x1b[2J"
    arms = {evil: KNOWN["arms"]["base"] | {"about": evil}, "better": KNOWN["arms"]["better"]}
    results = {evil: {evil: [1, 2, 3]}, "better": {evil: [2, 3, 4]}}
    questions = {evil: [[evil, "better"]]}
    write_whole(tmp_path, title=evil, arms=arms, results=results, questions=questions)
    done = program("cm-compare", tmp_path, "--out", tmp_path / "out")
    assert done.code == 0, done.err
    page = (tmp_path / "out/comparison.html").read_text()
    assert "<i>" not in page
    assert "&lt;i&gt;" in page
    assert "\x1b" not in page + (tmp_path / "out/comparison.md").read_text() + done.out


@pytest.mark.parametrize("place", ["teacher", "ect/seed1", "ect/0.1/seed1"])
def test_a_study_that_is_not_finished_says_how_it_goes_on(place, program, tmp_path):
    (tmp_path / place).mkdir(parents=True)
    (tmp_path / place / "run.json").write_text("{}")
    done = program("cm-compare", tmp_path, "--out", tmp_path / "out")
    assert done.code == 2
    assert f"not finished goes on with cm-study STUDY.yaml --out {tmp_path};" in done.err


def test_a_text_of_another_type_is_refused(program, tmp_path):
    arms = {"base": KNOWN["arms"]["base"] | {"about": [1]}, "better": KNOWN["arms"]["better"]}
    write_whole(tmp_path, arms=arms)
    done = program("cm-compare", tmp_path, "--out", tmp_path / "out")
    assert done.code == 2
    assert "'arms.base.about' of" in done.err
    assert "must be a text" in done.err
