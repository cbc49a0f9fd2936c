"""What the processes of a pool, and those that are launched, find imported."""

import gc

import torch
import torch.distributed

import quintet
import quintet.cli.main
import quintet.training
from conformance import families

__all__ = ["families", "quintet", "torch"]

torch.set_num_threads(1)
# A thread pool does not survive a fork: nothing is computed before.
if not torch.cuda.device_count():
    # As for other tests: each seed would be kept, with a whole stack.
    torch.cuda.manual_seed_all = torch.xpu.manual_seed_all = lambda seed: None
# What is here is no garbage, and pages that no process looks through stay everybody's.
gc.collect()
gc.freeze()
