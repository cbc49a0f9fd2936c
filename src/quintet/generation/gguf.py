"""Generation options for models in GGUF."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quintet.errors import InputError, shown
from quintet.generation.options import Options
from quintet.gguf.cursor import Value
from quintet.sources import FoundModel
from quintet.tokenization.gguf import end_ids, has_tokenizer, token_id

_SAMPLING = "general.sampling."
# Whose names are others'. A penalty there looks at the last tokens alone, 64 by default.
_OF_FILE = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}
_OF_OLLAMA = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "typical_p": "typical_p",
    "repeat_penalty": "repetition_penalty",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "num_predict": "max_new_tokens",
}


def gguf_options(metadata: Mapping[str, Value], found: FoundModel) -> dict[str, Any]:
    """Return a GGUF file's generation options.

    What ends an answer are the file's own end tokens, and control tokens known to be one. How
    tokens are drawn is what the file says (`general.sampling.*`), and before it what Ollama does;
    of that, what has no effect here is told.

    Raises:
        TokenizerError: ids that are no ids of tokens.
    """
    of_file = {
        ours: metadata[_SAMPLING + theirs]
        for theirs, ours in _OF_FILE.items()
        if _SAMPLING + theirs in metadata
    }
    given = dict(found.parameters)
    ends, texts = _ends(metadata, found.path, given.pop("stop", None))
    of_ollama = {ours: given.pop(name) for name, ours in _OF_OLLAMA.items() if name in given}
    if isinstance(of_ollama.get("max_new_tokens"), int) and of_ollama["max_new_tokens"] < 1:
        del of_ollama["max_new_tokens"]  # without a limit
    idle = [f"{name}={shown(value)}" for name, value in given.items()]
    if texts:
        idle.append(f"stop={shown(texts)}, which is to be passed to generate() as stop_strings")
    if idle:
        warnings.warn(
            f"Ollama's parameters for this model have no effect here: {', '.join(idle)}",
            stacklevel=2,
        )
    return _options(found.path, ends, metadata, {**of_file, **of_ollama})


def _ends(metadata: Mapping[str, Value], path: Path, stop: object) -> tuple[list[int], list[str]]:
    """Return the ids of end tokens, and end strings that are no token."""
    texts = [str(text) for text in stop] if isinstance(stop, list) else [str(stop)] if stop else []
    if not has_tokenizer(metadata):
        return [], texts
    by_text = {text: token_id(metadata, text, path) for text in texts}
    ids = [*end_ids(metadata, path), *(index for index in by_text.values() if index is not None)]
    return list(dict.fromkeys(ids)), [text for text, index in by_text.items() if index is None]


def _options(
    path: Path, ends: list[int], metadata: Mapping[str, Value], sampling: dict[str, Any]
) -> dict[str, Any]:
    ids: dict[str, Any] = {"eos_token_id": ends[0] if len(ends) == 1 else ends or None}
    for role, key in (("bos_token_id", "bos"), ("pad_token_id", "padding")):
        index = metadata.get(f"tokenizer.ggml.{key}_token_id")
        ids[role] = index if type(index) is int else None
    sampling = {name: value for name, value in sampling.items() if value is not None}
    # The likeliest token is what a temperature of 0 asks for.
    if sampling.get("temperature") == 0:
        sampling |= {"temperature": None, "do_sample": False}
    elif sampling.keys() & {"temperature", "top_k", "top_p", "min_p", "typical_p"}:
        sampling["do_sample"] = True
    options: dict[str, Any] = {}
    for name, value in sampling.items():
        try:
            Options(**{name: value})
        except InputError as error:
            warnings.warn(f"{path}: {error}; left out", stacklevel=3)
        else:
            options[name] = value
    return {**ids, **options}
