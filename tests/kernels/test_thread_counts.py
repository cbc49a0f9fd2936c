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
torch.set_num_threads({asked})
found = []

def work():
    found.append(openmp.omp_get_max_threads())
    Call()
    found.append(openmp.omp_get_max_threads())

thread = threading.Thread(target=work)
thread.start()
thread.join()
print(*found)
"""


@pytest.mark.skipif(not available(), reason="there are no kernels on this machine")
@pytest.mark.parametrize("asked", [1, 3])
def test_a_fresh_thread_takes_the_number_that_torch_was_told(asked: int) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    made = subprocess.run(
        [sys.executable, "-c", CODE.format(asked=asked)],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    before, after = map(int, made.stdout.split())
    assert before == 2, "what OpenMP itself would take"
    assert after == asked
