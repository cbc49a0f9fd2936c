"""The number of threads that torch is told is that of the kernels, in whichever thread they run."""

import os
import subprocess
import sys

import pytest

from quintet.kernels.native import available

CODE = """
import ctypes, threading, torch, quintet
from quintet.kernels import native
from quintet.kernels.calls import Call

openmp = ctypes.CDLL(str(native._openmp()))

def work():
    before = openmp.omp_get_max_threads()
    Call()
    print(before, openmp.omp_get_max_threads())

for asked in (1, 3):
    torch.set_num_threads(asked)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
"""


@pytest.mark.skipif(not available(), reason="there are no kernels on this machine")
def test_a_fresh_thread_takes_the_number_that_torch_was_told() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    made = subprocess.run(
        [sys.executable, "-c", CODE],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    # First what OpenMP itself would take.
    assert made.stdout.split() == ["2", "1", "2", "3"]
