"""The command line of the benchmarks."""

from __future__ import annotations

import torch

from cm_lightning.bench import distances, parts, posterior, step, store
from cm_lightning.bench.common import Benchmark, machine
from cm_lightning.cli.errors import CommandParser, readable_errors
from cm_lightning.transfer import keep_fp32
from cm_lightning.types import InputError

__all__ = ["BENCHMARKS", "main"]

COMMAND = "python -m cm_lightning.bench"

BENCHMARKS: list[Benchmark] = [
    *step.BENCHMARKS,
    *posterior.BENCHMARKS,
    *store.BENCHMARKS,
    *distances.BENCHMARKS,
    *parts.BENCHMARKS,
]


def main(args: list[str] | None = None) -> None:
    """Entry point."""
    parser = CommandParser(
        prog=COMMAND,
        allow_abbrev=False,
        description="Both sides of a ratio alternate in one run.",
    )
    names = parser.add_subparsers(dest="name", required=True, parser_class=CommandParser)
    for benchmark in BENCHMARKS:
        benchmark.options(names.add_parser(benchmark.name, help=benchmark.help).add_argument)
    options = parser.parse_args(args)
    with readable_errors(COMMAND):
        for name, value in vars(options).items():
            small = min(value) if isinstance(value, list) else value
            least = 0 if name == "labels" else 1
            if name != "seed" and isinstance(small, int) and small < least and small is not False:
                raise InputError(f"--{name} must be {least} or more, got {value}.")
        keep_fp32()
        torch.backends.cudnn.benchmark = True  # as in cm-fit and in the published loops
        print(machine(torch.device(getattr(options, "device", "cpu"))), flush=True)
        run = {benchmark.name: benchmark.run for benchmark in BENCHMARKS}
        print(run[options.name](options))
