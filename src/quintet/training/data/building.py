"""Settings to data."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np

from quintet.errors import DataError
from quintet.kernels.store import cache_folder
from quintet.tokenization import PreTrainedTokenizer
from quintet.training.data.answers import Chats, Completions, Pairs
from quintet.training.data.encoding import store_of
from quintet.training.data.held_out import HeldOut
from quintet.training.data.mixing import Drawn, Fixed, Mixing
from quintet.training.data.order import key
from quintet.training.data.pool import Pool, lots_of, packing_of
from quintet.training.data.samples import Samples
from quintet.training.data.settings import DataSettings, Kind, Packing, SourceSettings
from quintet.training.data.store import Store
from quintet.training.data.tokens import TokenData
from quintet.training.progress import Progress
from quintet.training.schedule import Constant, Schedule
from quintet.training.schedules import schedule_of


def build_data(
    settings: DataSettings,
    tokenizer: PreTrainedTokenizer,
    *,
    vocab_size: int | None = None,
    tell: Callable[[str], None] = lambda message: None,
) -> TokenData:
    """Encode the configured data with a tokenizer once; later calls open the result.

    Args:
        settings: the `[data]` table.
        tokenizer: the model's.
        vocab_size: the model's; the tokenizer's if None.
        tell: called with what is left out, and where ids are kept.

    Raises:
        ModelNotFoundError: a path names no file.
        ConfigError: settings contradict each other or what the files hold.
        DataError: a file cannot be read, a sample is bad and bad ones are not left out, or an id
            is beyond the vocabulary.
        SaveError: the folder of encoded texts cannot be written.
    """
    folder = cache_folder() / "data" if settings.cache is None else Path(settings.cache)
    made_of = partial(_samples, tokenizer, settings)

    def opened(sources: Sequence[SourceSettings]) -> Store:
        store = store_of(sources, settings, tokenizer, made_of, folder, tell)
        _tell_left_out(store, tell)
        _check_ids(store, vocab_size or len(tokenizer))
        return store

    weighted = settings.sources[0].weight is not None
    groups = [(source,) for source in settings.sources] if weighted else [settings.sources]
    stores = [opened(group) for group in groups]
    apart = [opened((source,)) for source in settings.held_out_sources]
    packing = packing_of(settings, {kind for store in stores for kind in store.kind.split("+")})
    pools = [
        Pool(store, settings, packing, key(settings.seed, i), tell)
        for i, store in enumerate(stores)
    ]
    weights = _weights(settings)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return TokenData(
        pools,
        weights,
        _mixing(settings, weights),
        settings,
        packing,
        pad or 0,
        HeldOut(_held_out(stores, apart, settings), tokenizer.eos_token_id),
        _digest(settings, packing, weights, stores),
    )


# -- within ----------------------------------------------------------------------------------------


def _samples(
    tokenizer: PreTrainedTokenizer, settings: DataSettings, source: SourceSettings, kind: Kind
) -> Samples:
    makers: dict[Kind, Callable[..., Samples]] = {
        "chat": Chats,
        "completion": Completions,
        "pairs": Pairs,
    }
    return makers[kind](tokenizer, settings, source.fields)


def _weights(settings: DataSettings) -> list[Schedule]:
    given = [source.weight for source in settings.sources]
    return [schedule_of(weight) for weight in given if weight is not None] or [Constant(1.0)]


def _mixing(settings: DataSettings, weights: Sequence[Schedule]) -> Mixing:
    seed = key(settings.seed, len(weights))
    if all(isinstance(source.weight, int | float | None) for source in settings.sources):
        return Fixed([weight.at(Progress(0, 0, 0.0)) for weight in weights], seed)
    return Drawn(seed)


def _tell_left_out(store: Store, tell: Callable[[str], None]) -> None:
    for reason, (n, first) in store.left_out.items():
        tell(f"data: {reason}: {n:,} left out, the first at {first}")


def _check_ids(store: Store, vocab_size: int) -> None:
    if store.largest >= vocab_size:
        raise DataError(
            f"data: the tokenizer makes the id {store.largest}, and the model knows {vocab_size} "
            "ids; use the tokenizer that belongs to it, or resize its embeddings"
        )


def _held_out(
    stores: Sequence[Store], apart: Sequence[Store], settings: DataSettings
) -> list[tuple[Store, int]]:
    """Return the documents to measure by; of pairs the preferred ones."""
    selected = [(store, lots_of(store) < settings.held_out) for store in stores]
    selected += [(store, np.ones(len(store), np.bool_)) for store in apart]
    found = []
    for store, chosen in selected:
        chosen[1::2] &= store.kind != "pairs"
        found += [(store, int(number)) for number in np.flatnonzero(chosen)]
    return found


def _digest(
    settings: DataSettings, packing: Packing, weights: Sequence[Schedule], stores: Sequence[Store]
) -> str:
    """Return a digest of the rows of all steps; the places of files are no part of it."""
    elsewhere = ("sources", "held_out_sources", "cache", "on_bad")
    options = {k: v for k, v in asdict(settings).items() if k not in elsewhere}
    changing = [[weight.at(Progress(0, 0, i / 64)) for i in range(65)] for weight in weights]
    text = json.dumps([options, packing, changing, [store.digest for store in stores]])
    return hashlib.sha256(text.encode()).hexdigest()
