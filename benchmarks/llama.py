"""llama.cpp, by the C interface that llama-cpp-python brings."""

import ctypes
import time
from typing import Any

import llama_cpp
import numpy as np

from benchmarks.llama_state import lengthened
from quintet.measurement.synthetic import random_ids

__all__ = ["LlamaCpp"]


class LlamaCpp:
    """llama.cpp as it comes, in the weights of its file."""

    def __init__(self, weights: str, threads: int) -> None:
        self.threads = threads
        self._silent = llama_cpp.llama_log_callback(_ignore)
        llama_cpp.llama_log_set(self._silent, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self.context: Any = None

    def load(self, path: str) -> None:
        options = llama_cpp.llama_model_default_params()
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), options)
        if not self.model:
            raise RuntimeError(f"llama.cpp does not read {path}")
        self.vocabulary = llama_cpp.llama_model_get_vocab(self.model)
        self.size = llama_cpp.llama_vocab_n_tokens(self.vocabulary)

    def first_token(self) -> None:
        self.prefill(1, 8, 0)

    def prefill(self, batch: int, tokens: int, seed: int) -> float:
        ids = random_ids(self.size, batch, tokens, seed).numpy()
        with self._opened(batch, tokens):
            started = time.perf_counter()
            # As many at once as llama.cpp takes by default.
            for begin in range(0, tokens, 2048):
                self._decode(ids[:, begin : begin + 2048], begin)
            self._next(batch)
            return time.perf_counter() - started

    def decode(self, batch: int, depth: int, steps: int, seed: int, limit: float) -> float:
        ids = random_ids(self.size, batch, steps + 1, seed).numpy()
        with self._opened(batch, depth + steps + 1):
            self._fill(batch, depth)
            started, made = 0.0, 0
            for step in range(steps + 1):
                self._decode(ids[:, step : step + 1], depth + step)
                self._next(batch)
                if not started:
                    started = time.perf_counter()
                    continue
                made += 1
                if time.perf_counter() - started > limit:
                    break
            return (time.perf_counter() - started) / made

    def facts(self, kind: str, batch: int, tokens: int) -> dict[str, Any]:
        info = llama_cpp.llama_print_system_info().decode()
        return {"version": llama_cpp.__version__, "build": info}

    def _opened(self, batch: int, tokens: int) -> "_Context":
        options = llama_cpp.llama_context_default_params()
        # Each row its own part of the cache, of a multiple of 256 as llama.cpp rounds it.
        options.n_ctx = batch * (-(-tokens // 256) * 256)
        options.n_seq_max = batch
        options.n_threads = options.n_threads_batch = self.threads
        options.no_perf = True
        return _Context(self, options)

    def _decode(self, ids: Any, begin: int) -> None:
        """Run tokens (B, T) that begin at a position; logits of each row's last."""
        rows, length = ids.shape
        batch = llama_cpp.llama_batch_init(rows * length, 0, 1)
        try:
            batch.n_tokens = rows * length
            for at, (row, step) in enumerate(np.ndindex(rows, length)):
                batch.token[at] = int(ids[row, step])
                batch.pos[at] = begin + step
                batch.n_seq_id[at] = 1
                batch.seq_id[at][0] = row
                batch.logits[at] = step == length - 1
            if (code := llama_cpp.llama_decode(self.context, batch)) != 0:
                raise RuntimeError(f"llama_decode returned {code}")
        finally:
            llama_cpp.llama_batch_free(batch)

    def _next(self, rows: int) -> list[int]:
        """Take the likeliest tokens."""
        logits = llama_cpp.llama_get_logits(self.context)
        return [int(x.argmax()) for x in np.ctypeslib.as_array(logits, (rows, self.size))]

    def _fill(self, batch: int, depth: int) -> None:
        """Give each row `depth` tokens, made of the stored state of one."""
        self._decode(random_ids(self.size, batch, 1).numpy(), 0)
        memory = llama_cpp.llama_get_memory(self.context)
        for row in range(batch):
            size = llama_cpp.llama_state_seq_get_size(self.context, row)
            stored = (ctypes.c_uint8 * size)()
            llama_cpp.llama_state_seq_get_data(self.context, stored, size, row)
            longer = lengthened(bytes(stored), depth)
            given = (ctypes.c_uint8 * len(longer)).from_buffer(bytearray(longer))
            llama_cpp.llama_state_seq_set_data(self.context, given, len(longer), row)
            last = llama_cpp.llama_memory_seq_pos_max(memory, row)
            if last != depth - 1:
                raise RuntimeError(f"the cache of llama.cpp ends at {last}, not {depth - 1}")


class _Context:
    """A context of llama.cpp, freed when it is left."""

    def __init__(self, peer: LlamaCpp, options: Any) -> None:
        self._peer, self._options = peer, options

    def __enter__(self) -> None:
        self._peer.context = llama_cpp.llama_init_from_model(self._peer.model, self._options)
        if not self._peer.context:
            raise RuntimeError("llama.cpp makes no context of that size")

    def __exit__(self, *_: object) -> None:
        llama_cpp.llama_free(self._peer.context)
        self._peer.context = None


def _ignore(level: int, text: bytes, data: object) -> None:
    """Keep llama.cpp's log to itself."""
