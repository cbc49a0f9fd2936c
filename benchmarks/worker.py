"""A process that holds one contender and does what it is told, one line of JSON at a time.

Between two lines it waits for its input, without a thread that spins.
"""

import json
import os
import sys
import time
import traceback
from typing import Any, TextIO

__all__ = ["main"]


def main() -> None:
    """Serve `peer weights threads` until the input ends."""
    peer_name, weights, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
    # What libraries print must not be taken for an answer.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    started = time.perf_counter()
    try:
        from benchmarks.peers import make

        peer = make(peer_name, weights, threads)
    except Exception as error:
        _answer(answers, {"error": _named(error)})
        return
    _answer(answers, {"import_seconds": time.perf_counter() - started})
    for line in sys.stdin:
        order: dict[str, Any] = json.loads(line)
        what = order.pop("do")
        try:
            if what == "load":
                result: Any = _loaded(peer, order["path"])
            else:
                answer = getattr(peer, what)(**order)
                result = answer if isinstance(answer, dict) else {"seconds": answer}
        except Exception as error:
            traceback.print_exc()
            result = {"error": _named(error)}
        _answer(answers, result | {"peak_memory": _peak_memory()})


def _loaded(peer: Any, path: str) -> dict[str, Any]:
    started = time.perf_counter()
    peer.load(path)
    loaded = time.perf_counter() - started
    peer.first_token()
    return {"load_seconds": loaded, "first_token_seconds": time.perf_counter() - started}


def _answer(answers: TextIO, content: dict[str, Any]) -> None:
    answers.write(json.dumps(content) + "\n")
    answers.flush()


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _peak_memory() -> int:
    from quintet.measurement.machine import peak_memory

    return peak_memory()


if __name__ == "__main__":
    main()
