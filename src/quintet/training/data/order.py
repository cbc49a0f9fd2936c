"""Random numbers that depend on a seed and a place alone, and on nothing before.

They are SplitMix64's (doi:10.1145/2714064.2660195), computed here, so that an order is the same on
every machine and with every version of every library.
"""

import numpy as np
from numpy.typing import NDArray

_STEP = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def key(*numbers: int) -> int:
    """Return a 64-bit seed that depends on these numbers."""
    mixed = 0
    for number in numbers:
        mixed = int(_mix(np.array([(mixed + _STEP + number) & _MASK], np.uint64))[0])
    return mixed


def lots(seed: int, n: int, start: int = 0) -> NDArray[np.uint64]:
    """Return n numbers of 64 random bits, those from place `start` on of the row of a seed."""
    places = np.arange(start + 1, start + n + 1, dtype=np.uint64)
    return _mix(places * np.uint64(_STEP) + np.uint64(seed))


def shares(seed: int, n: int, start: int = 0) -> NDArray[np.float64]:
    """Return n random numbers of [0, 1)."""
    return (lots(seed, n, start) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation(seed: int, n: int) -> NDArray[np.int64]:
    """Return 0 to n - 1 in the order of a seed."""
    return np.argsort(lots(seed, n), kind="stable").astype(np.int64, copy=False)


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
