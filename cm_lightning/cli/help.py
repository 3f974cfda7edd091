"""Help on one screen; the thousand-line version stays one option away."""

from __future__ import annotations

import ast
import sys
import textwrap
from pathlib import Path

__all__ = ["fit_help", "main", "wants_help"]

_TEXT = """\
usage: cm-fit --config FILE [--config FILE ...] [--KEY VALUE ...]

Train a consistency model. A YAML file says which regime, network and data; later files and options
override earlier ones.

  cm-fit --config configs/ect_digits.yaml
  cm-fit --config configs/ect_digits.yaml --model.total_kimg 100 --run_dir runs/short

run
  --config FILE       YAML file; may be given several times
  --run_dir DIR       where everything is written [runs/<name of the first config>]
  --resume HOW        auto: continue the run directory if it has a checkpoint [auto]
                      never: refuse a directory that already holds a run
                      RUN or FILE: go on from its newest, or from this, checkpoint
  --check             build everything, train one step, evaluate a few images, write nothing but
                      missing downloads, and say what the run would need
  --print_config      print the resolved config and stop
  --seed_everything N seed of weights, noise and data order [0]

what is trained (defaults: the paper's)
  --model CLASS       {regimes}
  --model.total_kimg N              length in thousands of images
  --model.denoiser CLASS            network; --model.denoiser.backbone ... for its parts
  --model.init.path RUN             start from weights: a run, a weights folder, a published file
  --model.optimizer CLASS           torch.optim.RAdam, ...; --model.optimizer.lr RATE
  --model.learning_rate.KEY VALUE   ramp_kimg, decay_kimg, cooldown_kimg
  --model.discretization | coupling | distance | weighting CLASS    the parts of the objective

on which data
  --data.source CLASS           Store (made by cm-data convert), IDX, Digits
  --data.source.path DIR        folder of a Store
  --data.global_batch N         images per step over all devices and accumulation
  --data.micro_batch N          largest batch per device; accumulation follows
  --data.resolution N, --data.resize pad|resize, --data.flip BOOL, --data.conditional BOOL

evaluation and records (intervals in thousands of images; null: only at the end, or never)
  --ema.profiles ...            ConstantEMA, HalfLifeEMA, PowerEMA; several at once
  --fid.features CLASS          Inception, Timm, DigitsFeatures; --fid.n, --fid.every_kimg
  --samples.every_kimg N        grids of samples from fixed noise
  --diagnostics.every_kimg N    rows of metrics.csv (not null)
  --checkpoints.every_kimg N, --checkpoints.keep N
  --wandb.project NAME          log to Weights & Biases too (offline without a key)

machine
  --trainer.accelerator cpu|gpu, --trainer.devices N, --trainer.precision bf16-mixed, ...
  --performance.compile BOOL, checkpointing BOOL (less memory), tf32 BOOL, channels_last BOOL

All keys but the model's:   cm-fit --help_all
Keys of one class:          cm-fit --model.help ECT      cm-fit --data.source.help IDX
Of a part of the model:     cm-fit --model ECT --model.discretization.help ECTMapping
                            (there --discretization.q means --model.discretization.q)
"""


def fit_help() -> str:
    """Help text of ``cm-fit``, with the regimes and their first lines, which it reads as text."""
    lines = []
    for path in sorted((Path(__file__).parents[1] / "regimes").glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        first = (ast.get_docstring(tree) or "").partition("\n")[0]
        text = textwrap.shorten(first, 66, placeholder=" ...")
        classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
        lines += [
            f"{node.name:<10} {text}"
            for node in classes
            if "ConsistencyModule" in map(ast.unparse, node.bases)
        ]
    return _TEXT.replace("{regimes}", ("\n" + " " * 22).join(lines))


def wants_help(words: list[str]) -> bool:
    """Whether a command line asks for the help on one screen; an empty one does too."""
    return words in ([], ["-h"], ["--help"])


def main() -> None:
    """Entry point of ``cm-fit``, whose help does not wait for torch and Lightning."""
    if wants_help(sys.argv[1:]):
        print(fit_help())
        return
    from cm_lightning.cli import fit

    fit.main()
