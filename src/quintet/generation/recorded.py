"""Recorded decode steps in `generate()`, over rows of a pool."""

from torch import Tensor

from quintet.cache import PooledCache
from quintet.generation.config import GenerationConfig
from quintet.generation.fixed_step import FixedStep, Recording
from quintet.generation.graphs import Graphs, graphs_of
from quintet.generation.rows import Cached

# Recording takes as long as some steps that are not recorded.
LEAST_NEW = 16
# Memory is taken for all tokens that there may be, whether they come or not.
MOST_TOKENS = 2**15


class RecordedRows(PooledCache):
    """A cache of a batch whose one-token steps are recorded.

    Args:
        model: what is run.
        rows: B.
        tokens: how many each may have.
        graphs: of the device.
    """

    def __init__(self, model: Cached, rows: int, tokens: int, graphs: Graphs) -> None:
        super().__init__(model.config, rows, tokens)
        self._model, self._size, self._recording = model, rows, Recording(graphs)
        self._fixed: FixedStep | None = None

    def step(self, ids: Tensor) -> Tensor | None:
        """Return the logits (B, 1, V) after one more token (B, 1) per row, or None.

        None if nothing was done, as before the prompt: then the model has to be called.
        """
        if not self.rows:
            return None
        if self._fixed is None:
            self._fixed = FixedStep(self._model, self, self._size, self._recording)
        logits = self._fixed.run_all(ids[:, 0])
        return None if logits is None else logits[:, None]


def recorded_rows(
    model: Cached, rows: int, tokens: int, config: GenerationConfig, new: int
) -> RecordedRows | None:
    """Return recorded rows if they can serve a generation, else None.

    Args:
        model: what is run.
        rows: how many there are.
        tokens: how many each may have in the end.
        config: the options.
        new: of them, how many may be made.
    """
    graphs = graphs_of(model.device)
    if graphs is None or model.world is not None:
        return None
    if config.use_cache is False or config.compiles or config.cache.kind != "dynamic":
        return None
    if new < LEAST_NEW or rows * tokens > MOST_TOKENS:
        return None
    return RecordedRows(model, rows, tokens, graphs)
