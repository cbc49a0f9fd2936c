"""Adapters on a model, by the methods that Transformers' models have for them."""

import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from quintet.adapters.collection import Adapters
from quintet.adapters.config import LoraConfig
from quintet.adapters.files import open_adapter
from quintet.adapters.forwards import Active
from quintet.adapters.layout import Layout, layout_of
from quintet.adapters.reading import read_adapter
from quintet.cache import Cache
from quintet.checkpoint import InMemory, Weights
from quintet.errors import InputError
from quintet.layers.adapted import Place, Placing
from quintet.modeling.core import ModelCore
from quintet.ops.documents import Documents
from quintet.ops.ragged import Padding

__all__ = ["Adapting", "takes_adapters"]

Run = TypeVar("Run", bound=Callable[..., Any])


class Adapting(ModelCore):
    """What a model has so that adapters can be put on it.

    Attributes:
        adapters: those that are on it; None where none ever was.
    """

    adapters: Adapters | None = None

    def load_adapter(
        self,
        peft_model_id: str | os.PathLike[str] | None = None,
        adapter_name: str = "default",
        *,
        peft_config: LoraConfig | Mapping[str, Any] | None = None,
        adapter_state_dict: Mapping[str, Tensor] | None = None,
        is_trainable: bool = False,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        subfolder: str = "",
    ) -> None:
        """Put an adapter on the model, completely or not at all, and use it alone from then on.

        Args:
            peft_model_id: a directory, or a hub id, with an adapter in the layout of PEFT.
            adapter_name: what it is to be called by.
            peft_config: in place of the file's; with `adapter_state_dict`, for an adapter in
                memory.
            adapter_state_dict: its tensors in place of the files', named as there.
            is_trainable: whether it gets gradients.
            revision: branch, tag or commit of a hub id.
            cache_dir: where downloads are kept.
            token: for private repositories.
            local_files_only: never use the network.
            subfolder: where in the repository the adapter is.

        Raises:
            ModelNotFoundError: no such directory or repository.
            CheckpointError: it is no adapter, is damaged, or does not fit this model.
            UnsupportedModelError: it is of a kind, or asks for something, that is not here.
            InputError: there is one of that name.
        """
        adapters = Adapters() if self.adapters is None else self.adapters
        adapters.check_new(adapter_name)
        config = None if peft_config is None else LoraConfig.of(peft_config)
        weights: Weights | None = None
        where = "adapter_state_dict"
        if adapter_state_dict is not None:
            weights = InMemory(adapter_state_dict)
        if peft_model_id is not None and (config is None or weights is None):
            root, found, files = open_adapter(
                peft_model_id,
                revision=revision,
                cache_dir=cache_dir,
                token=token,
                local_files_only=local_files_only,
                subfolder=subfolder,
            )
            config, where = config or found, where if weights is not None else str(root)
            weights = weights or files
        if config is None or weights is None:
            raise InputError(
                "load_adapter needs the directory or the hub id of an adapter, or peft_config and "
                "adapter_state_dict"
            )
        # Weights that are made in inference mode could not be trained, ever.
        with torch.inference_mode(False):
            made = read_adapter(self._layout(), config, weights, where)
            self._shared(adapters)
            adapters.put(self, adapter_name, config, made, trains=is_trainable)
        adapters.use(self, [Active(adapter_name)])

    def set_adapter(
        self, adapter_name: str | Sequence[str], weights: Sequence[float] | None = None
    ) -> None:
        """Use one adapter, or several whose changes are added up, in place of those in use.

        Args:
            adapter_name: its name, or a list of names; none for an empty list.
            weights: what the changes of each are multiplied by, one if not given.

        Raises:
            InputError: there is no such adapter, or two of them exclude each other.
        """
        adapters = self._adapters()
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        adapters.check_known(names)
        factors = [1.0] * len(names) if weights is None else list(weights)
        if len(factors) != len(names) or len(set(names)) < len(names):
            raise InputError(
                f"set_adapter({names}, weights={factors}) has to name each adapter once, with a "
                "weight each"
            )
        adapters.use(self, [Active(n, float(w)) for n, w in zip(names, factors, strict=True)])

    def active_adapters(self) -> list[str]:
        """Return the names of the adapters in use."""
        return [one.name for one in self._adapters().active]

    def disable_adapters(self) -> None:
        """Use no adapter until `enable_adapters`; the model is what it was without any."""
        adapters = self._adapters()
        adapters.enabled = False
        adapters.install(self)

    def enable_adapters(self) -> None:
        """Use the adapters again that were in use."""
        adapters = self._adapters()
        adapters.enabled = True
        adapters.install(self)

    def delete_adapter(self, adapter_names: str | Sequence[str]) -> None:
        """Take adapters off the model.

        Raises:
            InputError: there is no such adapter.
        """
        adapters = self._adapters()
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        adapters.remove(self, list(dict.fromkeys(adapters.check_known(names))))

    # -- what forwards ask -------------------------------------------------------------------

    @contextmanager
    def each_row(self, adapter_names: Sequence[str | None]) -> Iterator[None]:
        """Use an adapter for each row inside, in this thread; None, or "__base__", for none.

        Raises:
            InputError: there is no such adapter.
        """
        adapters = self._adapters()
        with adapters.places.at(adapters.place(adapter_names, self.device)):
            yield

    def place_of_rows(self) -> Place | None:
        """Return the adapters of the rows of this thread's forward; None if they have no own."""
        place = None if self.adapters is None else self.adapters.places.here()
        return None if place is None or place.rows is None else place

    def placing(
        self,
        embeds: Tensor,
        rows: Padding | None,
        texts: Documents | None,
        cache: Cache | None,
    ) -> Placing | None:
        """Return what adapters need to know of tokens (B, T, C), and note it in the cache.

        Args:
            embeds: the tokens in the columns of the input.
            rows: how they are packed; None where they are not.
            texts: the texts in a row; None if it is one.
            cache: what they continue.

        Raises:
            InputError: there are more rows, or fewer; or the cache is of other adapters.
        """
        adapters, place = self.adapters, self.place_of_rows()
        assert adapters is not None
        if cache is not None:
            cache.made_with(adapters.keys_of(place))
        if place is None:
            return Placing(adapters.places, Place()) if adapters.by_layer else None
        tokens = _of_tokens(place, embeds, texts)
        # For the head, which comes after the layers.
        adapters.places.refine(replace(place, tokens=tokens))
        tokens = tokens if rows is None else rows.pack(tokens)
        return Placing(adapters.places, replace(place, tokens=tokens))

    @contextmanager
    def kept_tokens(self, keep: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Say inside that of tokens (B, T, ...) those are left that `keep` returns."""
        place = self.place_of_rows()
        if place is None or place.tokens is None or self.adapters is None:
            yield
        else:
            tokens = keep(place.tokens[..., None])[..., 0]
            with self.adapters.places.at(replace(place, tokens=tokens)):
                yield

    def _adapters(self) -> Adapters:
        if self.adapters is None or not self.adapters.configs:
            raise InputError(
                "there is no adapter on this model; put one on it with load_adapter or add_adapter"
            )
        return self.adapters

    def _shared(self, adapters: Adapters) -> None:
        """Let the parts of a model that are models know of its adapters."""
        for module in self.modules():
            if isinstance(module, Adapting):
                object.__setattr__(module, "adapters", adapters)

    def _layout(self) -> Layout:
        headless = self.base_model is self
        ends = self.tied_names()
        tied = next(
            (
                (a.rpartition(".")[0], b.rpartition(".")[0])
                for a, b in ends.items()
                if "lm_head" in a
            ),
            None,
        )
        prefix = f"{self.base_model_prefix}." if headless else ""
        return layout_of(self, prefix=prefix, tied=tied)


def _of_tokens(place: Place, embeds: Tensor, texts: Documents | None) -> Tensor:
    """Return the number of the adapter of each token, (B, T), where rows have their own."""
    numbers, (B, T) = place.rows, embeds.shape[:2]
    assert numbers is not None
    own = numbers.to(embeds.device)
    if texts is not None and texts.lengths is not None and len(own) == len(texts.lengths):
        counts = torch.tensor(texts.lengths, dtype=torch.long, device=embeds.device)
        return own.repeat_interleave(counts).view(B, T)
    if len(own) != B:
        raise InputError(
            f"adapter_names names {len(own)} rows and the input has {B}; give a name for each"
        )
    return own[:, None].expand(B, T)


def takes_adapters(forward: Run) -> Run:
    """Let a forward take `adapter_names`, the name of an adapter for each row."""

    @functools.wraps(forward)
    def run(self: Any, *args: Any, **inputs: Any) -> Any:
        names = inputs.pop("adapter_names", None)
        if names is None:
            return forward(self, *args, **inputs)
        with self.each_row(names):
            return forward(self, *args, **inputs)

    return run  # type: ignore[return-value]
