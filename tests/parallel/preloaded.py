"""What the processes of a pool, and those that are launched, find imported."""

import torch
import torch.distributed

import quintet
import quintet.cli.main
import quintet.training
from conformance import families

__all__ = ["families", "quintet", "torch"]

torch.set_num_threads(1)
# A thread pool does not survive a fork: nothing is computed before.
