"""What this machine could do, measured in a process of its own: `python -m benchmarks.peaks N`."""

import json
import sys
from dataclasses import asdict

import torch

from quintet.benchmark.machine import gemm_peak, read_bandwidth


def main() -> None:
    """Print bandwidth and GEMM peak with N threads as JSON."""
    torch.set_num_threads(int(sys.argv[1]))
    bandwidth = asdict(read_bandwidth())
    print(json.dumps({"bandwidth": bandwidth, "gemm_flops_per_second": gemm_peak(torch.bfloat16)}))


if __name__ == "__main__":
    main()
