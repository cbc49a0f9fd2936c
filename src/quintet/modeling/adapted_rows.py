"""An adapter for each row of a batch: from the names given to a forward to one per token."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from torch import Tensor

from quintet.adapters.collection import Adapters
from quintet.cache import Cache
from quintet.errors import InputError
from quintet.layers.adapted import AdapterPlace, Placing
from quintet.modeling.core import ModelCore
from quintet.ops.ragged import Padding


class AdaptedRows(ModelCore):
    """Lets forwards use a different adapter for each row.

    Attributes:
        adapters: those that are on it; None if none ever was.
    """

    adapters: Adapters | None = None

    def require_adapters(self) -> Adapters:
        """Return the adapters on the model.

        Raises:
            InputError: there is none.
        """
        if self.adapters is None or not self.adapters.configs:
            raise InputError(
                "there is no adapter on this model; put one on it with load_adapter or add_adapter"
            )
        return self.adapters

    @contextmanager
    def each_row(
        self, adapter_names: Sequence[str | None], *, copied: bool = False
    ) -> Iterator[None]:
        """Use an adapter per row inside, in this thread; None, or "__base__", for none.

        Args:
            adapter_names: a name for each row.
            copied: whether a row may become several, side by side.

        Raises:
            InputError: there is no such adapter.
        """
        adapters = self.require_adapters()
        with adapters.places.at(adapters.place(adapter_names, self.device, copied=copied)):
            yield

    def check_adapted_rows(self, rows: int) -> None:
        """Check that there is one adapter per row, if rows have their own.

        Raises:
            InputError: there are more, or fewer.
        """
        place = self.place_of_rows()
        if place is not None and place.rows is not None and len(place.rows) != rows:
            raise _other_rows(len(place.rows), rows)

    def place_of_rows(self) -> AdapterPlace | None:
        """Return the adapters of this thread's rows, or None if rows have none of their own."""
        place = None if self.adapters is None else self.adapters.places.current()
        return None if place is None or place.rows is None else place

    def place_tokens(self, tokens: Tensor | None, ends: Tensor | None) -> None:
        """Find the adapter of each token (B, T, ...), if rows have their own.

        Args:
            tokens: ids or embeddings; None if the forward will say that there are none.
            ends: where each text begins, and the end, in one row of several; else None.

        Raises:
            InputError: there are more rows, or fewer.
        """
        place = self.place_of_rows()
        if place is None or self.adapters is None or tokens is None:
            return
        B, T = tokens.shape[:2]
        texts = None if ends is None else ends.diff()
        rows = B if texts is None else len(texts)
        own = place.for_rows(rows)
        if own is None or own.rows is None:
            raise _other_rows(0 if place.rows is None else len(place.rows), rows)
        numbers = own.rows.to(tokens.device)
        per_token = numbers.repeat_interleave(T if texts is None else texts.to(tokens.device))
        if per_token.numel() == B * T:
            self.adapters.places.refine(replace(own, tokens=per_token.view(B, T)))

    def placing(self, rows: Padding | None, cache: Cache | None) -> Placing | None:
        """Return the rows' adapters for the layers, and record them in the cache.

        Args:
            rows: how they are packed; None if they are not.
            cache: what they continue.

        Raises:
            InputError: the cache is of other adapters.
        """
        adapters, place = self.adapters, self.place_of_rows()
        assert adapters is not None
        if cache is not None:
            cache.record_adapters(adapters.keys_of(place))
        if place is None or place.tokens is None:
            return Placing(adapters.places, AdapterPlace()) if adapters.by_layer else None
        tokens = place.tokens if rows is None else rows.pack(place.tokens)
        return Placing(adapters.places, replace(place, tokens=tokens))

    @contextmanager
    def selecting_tokens(self, keep: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Let adapters inside select tokens (B, T, ...) as `keep` does."""
        place = self.place_of_rows()
        if place is None or place.tokens is None or self.adapters is None:
            yield
        else:
            tokens = keep(place.tokens[..., None])[..., 0]
            with self.adapters.places.at(replace(place, tokens=tokens)):
                yield


def _other_rows(named: int, rows: int) -> InputError:
    return InputError(
        f"adapter_names names {named} rows and the input has {rows}; give a name for each"
    )
