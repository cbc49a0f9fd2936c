"""`python -m fuzz`: many mutants of every kind of file; exit code 1 if one was not answered."""

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

from fuzz.running import fuzz, keep
from fuzz.targets import TARGETS


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument("--mutants", type=int, default=1000, help="of each kind of file")
    parser.add_argument("--only", default="", help="kinds whose name has this in it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--at", type=int, help="try this mutant alone")
    parser.add_argument("--keep", type=Path, help="with --at: write it into this directory")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="for each kind")
    given = parser.parse_args()
    torch.set_num_threads(1)
    targets = [target for target in TARGETS if given.only in target.name]
    numbers = range(given.mutants) if given.at is None else range(given.at, given.at + 1)
    faults = 0
    for target in targets:
        if given.keep is not None and given.at is not None:
            keep(target, given.at, given.seed, given.keep)
        report = fuzz(target, numbers, given.seed, seconds=given.seconds)
        print(
            f"{target.name:28} {report.tried:7} tried, {report.read:6} read, {report.refused:6} "
            f"refused, {len(report.faults):3} faults, at most {report.slowest:.2f} s and "
            f"{report.largest} MB",
            flush=True,
        )
        for found in report.faults:
            print(f"  {found}", flush=True)
        faults += len(report.faults)
    return 1 if faults or not targets else 0


sys.exit(main())
