"""Options that have no effect in combination with others."""

from collections.abc import Iterator, Mapping
from typing import Any

# What a checkpoint may set without a need, and the value that asks for nothing.
_SAMPLING = {
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "min_p": 0.0,
    "top_h": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
}
_BEAMS = {"early_stopping": False, "length_penalty": 1.0}
_OUTPUTS = {
    "output_scores": False,
    "output_logits": False,
    "output_attentions": False,
    "output_hidden_states": False,
}


def idle(
    options: Mapping[str, Any],
    *,
    samples: bool,
    beams: bool,
    returns_dict: bool,
) -> Iterator[tuple[str, Any, str]]:
    """Yield options without effect: name, value, and requirement."""
    for applies, names, needed in (
        (samples, _SAMPLING, "do_sample=True"),
        (beams, _BEAMS, "num_beams above 1"),
        (returns_dict, _OUTPUTS, "return_dict_in_generate=True"),
    ):
        for name, usual in names.items() if not applies else ():
            if (value := options.get(name)) is not None and value != usual:
                yield name, value, needed
