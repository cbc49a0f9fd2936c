"""Rotary parameters: merges both vintages of their names.

Transformers 4 wrote `rope_theta` beside `rope_scaling`; Transformers 5 writes one
`rope_parameters`. A configuration holds the second; the first two remain as views of it.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from quintet.configuration.constraints import Bounds, check
from quintet.errors import ConfigError, shown

# What each kind reads beside rope_type and rope_theta: (required, optional).
_KEYS: dict[str, tuple[set[str], set[str]]] = {
    "default": (set(), set()),
    "linear": ({"factor"}, set()),
    "dynamic": ({"factor"}, set()),
    "yarn": (
        {"factor"},
        {
            "original_max_position_embeddings",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
        },
    ),
    "llama3": (
        {"factor", "low_freq_factor", "high_freq_factor"},
        {"original_max_position_embeddings"},
    ),
}
_POSITIVE = Bounds(0, open_below=True)
_BOUNDS = {
    "factor": Bounds(1),
    "rope_theta": _POSITIVE,
    "original_max_position_embeddings": Bounds(1, 2**53),
    "attention_factor": _POSITIVE,
    "beta_fast": _POSITIVE,
    "beta_slow": _POSITIVE,
    "low_freq_factor": _POSITIVE,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeParameters:
    """The validated rotary parameters of a model; see `quintet.ops.rope`."""

    rope_type: str = "default"
    rope_theta: float = 10_000.0
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

    @classmethod
    def parse(cls, values: Mapping[str, Any], *, max_position_embeddings: int) -> "RopeParameters":
        """Validate a `rope_parameters` mapping and fill in its kind's defaults.

        Raises:
            ConfigError: an unknown kind, a missing key, or a value out of range.
        """
        kind = values.get("rope_type", "default")
        if not isinstance(kind, str) or kind not in _KEYS:
            raise ConfigError(
                f"rope_parameters: rope_type={shown(kind)} has to be one of {list(_KEYS)}"
            )
        required, optional = _KEYS[kind]
        given = {name for name, value in values.items() if value is not None}
        if missing := sorted(required - given):
            raise ConfigError(f"rope_parameters: rope_type={kind!r} needs {', '.join(missing)}")
        if unused := sorted(given - required - optional - {"rope_type", "type", "rope_theta"}):
            warnings.warn(
                f"rope_parameters: rope_type={kind!r} does not use {', '.join(map(shown, unused))}",
                stacklevel=2,
            )
        used = {"rope_type", "rope_theta"} | required | optional
        chosen = {name: values[name] for name in used & given}
        chosen.setdefault("original_max_position_embeddings", max_position_embeddings)
        for field in fields(cls):
            if field.name in chosen:
                check("rope_parameters", field.name, chosen[field.name], field.type)
        for name, rule in _BOUNDS.items():
            if name in chosen and not rule.holds(chosen[name]):
                raise ConfigError(f"rope_parameters: {name}={shown(chosen[name])} has to be {rule}")
        if kind == "yarn" and chosen.get("rope_theta") == 1:
            raise ConfigError(
                "rope_parameters: rope_theta=1 turns all dimensions alike; yarn needs another"
            )
        if kind == "llama3" and chosen["high_freq_factor"] <= chosen["low_freq_factor"]:
            raise ConfigError(
                f"rope_parameters: high_freq_factor={chosen['high_freq_factor']} has to be greater "
                f"than low_freq_factor={chosen['low_freq_factor']}"
            )
        return cls(**chosen)


def merge_rope(values: dict[str, Any], default_theta: float) -> dict[str, Any]:
    """Pop the three spellings from `values`; return one `rope_parameters` mapping.

    Where they disagree the nested mapping wins, as in Transformers.
    """
    theta = values.pop("rope_theta", None)
    scaling = values.pop("rope_scaling", None)
    parameters = values.pop("rope_parameters", None)
    for name, value in (("rope_scaling", scaling), ("rope_parameters", parameters)):
        if value is not None and not isinstance(value, dict):
            raise ConfigError(f"{name}={shown(value)} has to be a mapping or null")
    merged = dict(scaling or parameters or {})
    kind = merged.pop("type", None)
    if merged.get("rope_type") is None:
        merged["rope_type"] = "default" if kind is None else kind
    if merged.get("rope_theta") is None:
        merged["rope_theta"] = default_theta if theta is None else theta
    return merged
