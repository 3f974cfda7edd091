"""Names of results and short forms in words, for reports and pages."""

from __future__ import annotations

import re

__all__ = ["WORDS", "part_words", "piece_words", "pieces", "result_words"]

WORDS = {
    "arm": "one setting that a study trains and compares, over several seeds",
    "call": "one evaluation of the network; images are drawn in one or a few",
    "kimg": "1,000 images seen in training",
    "FD": "Frechet distance between features of generated and of training images; 0 is perfect",
    "EMA, average": "a moving average of the weights over training, used in their place; std is "
    "its length as a share of the run, rate what survives of it per step",
    "live": "the weights themselves, without an average",
    "teacher": "a diffusion model, from which a run starts or which it distils",
    "CT": "consistency training: the network learns to give the same image at two neighbouring "
    "noise levels",
    "iCT": "improved consistency training: CT without a copy of the network, on a finer grid of "
    "noise levels",
    "ECT": "easy consistency tuning: the two noise levels draw closer in stages",
    "SCT": "stable consistency tuning: ECT in smaller steps, targets averaged over many images",
    "CD": "consistency distillation: learns from steps that a teacher takes",
    "GC": "generator-augmented coupling: some training images are the model's own",
}
"""What names and short forms in reports mean."""

_PARTS = {
    r"live": r"live weights",
    r"ema_std(.+)": r"average std \1",
    r"ema_halflife(.+)k": r"average of half-life \1 kimg",
    r"ema_warmup(.+)": r"average of rate \1 with warm-up",
    r"ema_(.+)": r"average of rate \1",
    r"fid": r"Inception features of 50k samples",
    r"fid(\d+k?)": r"Inception features of \1 samples",
    r"fd_(dinov2(?:_[a-z]+)?|.+?)_?(\d+k?)": r"\1 features of \2 samples",
    r"nfe(\d+)": r"\1 network calls",
    r"(euler|heun)_nfe(\d+)": r"\1, \2 network calls",
    r"phased_nfe(\d+)": r"\1 network calls in phases",
    r"phased_nfe(\d+)_eta(.+)": r"\1 network calls in phases, eta \2",
    r"sigmas (.+)": r"noise levels \1",
    r"phases (.+)": r"phases between noise levels \1",
}


def part_words(part: str) -> str:
    """One part of the name of a result in words.

    Args:
        part: What stands between slashes, such as ``ema_0.993@0.5``.
    """
    name, at, share = part.partition("@")
    for pattern, words in _PARTS.items():
        if match := re.fullmatch(pattern, name):
            name = match.expand(words)
            break
    name = re.sub(r"\b1 network calls", "1 network call", name)
    return f"{name} at {share} of the run" if at else name


def result_words(key: str) -> str:
    """The name of a result, or a part of one, in words.

    Args:
        key: Such as ``fd_digits2k/ema_0.993/nfe1``.
    """
    return ", ".join(map(piece_words, pieces(key)))


def pieces(key: str) -> list[str]:
    """What the name of a result is made of, between slashes and commas."""
    return [piece for part in key.split("/") for piece in part.split(", ")]


def piece_words(piece: str) -> str:
    """One of these in words."""
    scale, by, profile = piece.partition(" by ")  # of guidance
    return f"{scale} by {part_words(profile)}" if by else part_words(piece)
