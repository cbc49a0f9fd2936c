"""Names of options: known ones, Transformers' unsupported ones, and misspellings."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from quintet.errors import InputError, shown

# What Transformers takes, and people will try.
_ABSENT = {
    "assistant_early_exit": "speculative decoding",
    "assistant_ensemble_weight": "speculative decoding",
    "assistant_lookbehind": "speculative decoding",
    "constraints": "constrained beam search",
    "custom_generate": "running code of others",
    "diversity_penalty": "group beam search",
    "dola_layers": "contrasting layers",
    "force_words_ids": "constrained beam search",
    "is_assistant": "speculative decoding",
    "low_memory": "a beam search in turns",
    "num_beam_groups": "group beam search",
    "penalty_alpha": "contrastive search",
    "speculation_type": "speculative decoding",
    "target_lookbehind": "speculative decoding",
    "trust_remote_code": "running code of others",
}
# What is so where it is needed: processes are in step until all have ended.
_ALWAYS = {"synced_gpus": (True, False, None)}
# What `generate()` takes beside options, for those who mistype it.
ARGUMENTS = (
    "inputs",
    "generation_config",
    "logits_processor",
    "stopping_criteria",
    "prefix_allowed_tokens_fn",
    "input_ids",
    "inputs_embeds",
    "attention_mask",
    "past_key_values",
    "negative_prompt_ids",
    "negative_prompt_attention_mask",
    "tokenizer",
    "streamer",
    "generator",
    "assistant_model",
    "assistant_tokenizer",
)


def check_names(options: Mapping[str, Any], known: Iterable[str]) -> dict[str, Any]:
    """Check the names of options, and return those that differ from their defaults.

    Raises:
        InputError: there is none of that name, or it is not in this version.
    """
    names = list(known)
    # What asks for nothing may be asked for.
    given = {k: v for k, v in options.items() if k not in _ABSENT or not is_default(v)}
    given = {k: v for k, v in given.items() if not any(v is one for one in _ALWAYS.get(k, ()))}
    for name in given:
        if name in _ABSENT:
            raise InputError(f"{name}={shown(given[name])}: {_ABSENT[name]} is not in this version")
        if name not in names:
            near = difflib.get_close_matches(name, [*names, *ARGUMENTS], n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(names)}"
            raise InputError(f"generate() has no option {shown(name)}; {hint}")
    return given


def is_default(value: object) -> bool:
    """Return whether an option has its default value."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value in (0, 1)
    return value is None or (isinstance(value, str | list | tuple | dict) and not value)
