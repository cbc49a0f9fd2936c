"""Adapter configurations: the keys of `adapter_config.json`, as in PEFT."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol, Self, runtime_checkable

from quintet.configuration.numbers import is_finite
from quintet.configuration.patterns import PLAIN, is_plain
from quintet.errors import CheckpointError, ConfigError, UnsupportedModelError, named, shown
from quintet.files import read_json
from quintet.folder import ADAPTER_CONFIG_NAME, find_file

__all__ = ["LoraConfig", "broken_rule"]

MAX_BYTES = 16_000_000
MAX_PATTERNS = 100_000
MAX_RANK = 2**20
# What only training reads, or what says nothing about the numbers.
IGNORED = {
    "arrow_version",
    "auto_mapping",
    "corda_config",
    "eva_config",
    "inference_mode",
    "loftq_config",
    "lora_ga_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
}
# Ways to begin that take from the base model what they put into the adapter.
CHANGES_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")
# Those whose part the weights alone say: see `quintet.adapters.beginnings`.
KNOWN_PARTS = ("pissa", "olora")


@runtime_checkable
class _Convertible(Protocol):
    """A configuration of another library."""

    def to_dict(self) -> dict[str, Any]: ...


@dataclass(kw_only=True)
class LoraConfig:
    """A low-rank adapter: W + s · B A, s = lora_alpha / r (arXiv:2106.09685).

    The names and defaults are PEFT's. A module is targeted whose path is one of `target_modules`,
    or ends with a dot and one of them; a string is a regular expression for the whole path, or
    "all-linear".

    Attributes:
        r: the rank.
        lora_alpha: what s is counted from.
        target_modules: the modules whose matrices are changed.
        exclude_modules: those that are not, though targeted.
        target_parameters: the parameters that are changed and are no linear map's, such as
            "mlp.experts.gate_up_proj".
        layers_to_transform: the layers that are changed; None for all.
        layers_pattern: the name of the list of layers.
        rank_pattern: other ranks, by a regular expression that paths end with.
        alpha_pattern: other alphas, by the same.
        lora_dropout: the share of the inputs of A that is left out in training.
        bias: which biases are the adapter's own: "none", "all" or "lora_only".
        use_rslora: s = lora_alpha / √r (arXiv:2312.03732).
        use_dora: a magnitude for each row beside its direction (arXiv:2402.09353).
        lora_bias: whether B has a bias.
        modules_to_save: the modules that the adapter has whole.
        trainable_token_indices: the ids whose vectors are the adapter's own; or by module.
        init_lora_weights: how a new adapter begins: True, as no change; "gaussian" the same with
            another A; False with random numbers.
        fan_in_fan_out: False; whether matrices lie as (I, O).
        ensure_weight_tying: whether what is done to tied embeddings is done to the head.
        task_type: what the adapter was trained for.
        base_model_name_or_path: the model that it was trained on.
    """

    r: int = 8
    lora_alpha: float = 8
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    target_parameters: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    lora_dropout: float = 0.0
    bias: str = "none"
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    modules_to_save: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    init_lora_weights: bool | str = True
    fan_in_fan_out: bool = False
    ensure_weight_tying: bool = False
    task_type: str | None = None
    base_model_name_or_path: str | None = None

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Validate all values.

        Raises:
            ConfigError: a value breaks its rule.
            UnsupportedModelError: it asks for something that is not here.
        """
        if broken := broken_rule(asdict(self)):
            key, rule = broken
            raise ConfigError(
                f"{ADAPTER_CONFIG_NAME}: {key}={shown(getattr(self, key))} has to be {rule}"
            )
        if self.fan_in_fan_out:
            raise UnsupportedModelError(
                "fan_in_fan_out=true is for models whose matrices lie as (inputs, outputs), and "
                "none of this library's does"
            )
        start = self.init_lora_weights
        known = isinstance(start, str) and start.lower() in KNOWN_PARTS
        if isinstance(start, str) and start.startswith(CHANGES_BASE) and not known:
            raise UnsupportedModelError(
                f"init_lora_weights={start!r} changed the base model's weights when the adapter "
                "was made, and the adapter is right on those alone: save it again in PEFT with "
                "path_initial_model_for_weight_conversion, as an adapter of the original model; or "
                "load both in PEFT, merge_and_unload(), and save the model"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read a file's keys; drop those that only matter for training.

        Raises:
            ConfigError: a value breaks its rule.
            UnsupportedModelError: it is another kind of adapter, or a key that may change what it
                computes is not known here.
        """
        kind = values.get("peft_type")
        if kind != "LORA":
            raise UnsupportedModelError(
                f"peft_type={shown(kind)} is another kind of adapter than LORA, the one kind that "
                "is read here; PEFT itself can put it on a model of this library (get_peft_model)"
            )
        own = {one.name for one in fields(cls)}
        for key, value in values.items():
            # What asks for nothing changes nothing, whatever it is.
            if key in own or key in IGNORED or key == "peft_type" or value in _NOTHING:
                continue
            raise UnsupportedModelError(
                f"{ADAPTER_CONFIG_NAME} has {shown(key)}: {shown(value)}, which may change what "
                "the adapter computes and is not known here; take it out if it does not"
            )
        known = {key: value for key, value in values.items() if key in own}
        return cls(**{k: v for k, v in known.items() if v is not None or k in _OPTIONAL})

    @classmethod
    def read(cls, directory: Path) -> Self:
        """Read `adapter_config.json`.

        Raises:
            CheckpointError: there is none, or it is unreadable.
            ConfigError: as in `from_dict`.
            UnsupportedModelError: as in `from_dict`.
        """
        path = find_file(directory, ADAPTER_CONFIG_NAME)
        if path is None:
            raise CheckpointError(f"{directory} has no {ADAPTER_CONFIG_NAME}; it is no adapter")
        return cls.from_dict(read_json(path, MAX_BYTES))

    @classmethod
    def of(cls, given: object) -> Self:
        """Convert from this class, PEFT's, or a mapping.

        Raises:
            ConfigError: it is something else, or a value breaks its rule.
        """
        if isinstance(given, cls):
            given.check()
            return cls(**{one.name: getattr(given, one.name) for one in fields(given)})
        if not isinstance(given, Mapping) and isinstance(given, _Convertible):
            given = given.to_dict()
        if isinstance(given, Mapping):
            plain = json.loads(json.dumps(dict(given), default=_as_json))
            return cls.from_dict({"peft_type": "LORA", **plain})
        raise ConfigError(
            f"an adapter's configuration is a {named(given)}; give a quintet LoraConfig, PEFT's, "
            "or a mapping of the same keys"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the keys as in files."""
        return {"peft_type": "LORA", "inference_mode": True, **asdict(self)}

    def to_json_string(self) -> str:
        """Return the content of `adapter_config.json`."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    def saves(self, path: str) -> bool:
        """Return whether the adapter replaces a module, or one that contains it."""
        parts = path.split(".")
        above = [".".join(parts[: end + 1]) for end in range(len(parts))]
        # PEFT asks for how the whole path ends, not for a name: "norm" are all norms.
        return any(one.endswith(tuple(self.modules_to_save or ())) for one in above)

    def scale(self, path: str, rank: int) -> float:
        """Return the scale s of a module or parameter of some rank."""
        alpha = self.alpha_pattern.get(_key_for(self.alpha_pattern, path) or "", self.lora_alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def rank(self, path: str) -> int:
        """Return the rank of a module or parameter in a new adapter."""
        return self.rank_pattern.get(_key_for(self.rank_pattern, path) or "", self.r)


def broken_rule(values: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return the first invalid key and its rule."""
    broken = ((key, rule) for key, rule, fits in _RULES if key in values and not fits(values[key]))
    return next(broken, None)


_NOTHING: tuple[Any, ...] = (None, False, "", [], {})
_OPTIONAL = {
    *("target_modules", "exclude_modules", "target_parameters", "layers_to_transform"),
    *("layers_pattern", "modules_to_save", "trainable_token_indices", "task_type"),
    "base_model_name_or_path",
}


def _as_json(value: object) -> object:
    if isinstance(value, set | frozenset):
        return sorted(value)
    return str(getattr(value, "value", value))


def _is_int(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_rank(value: object) -> bool:
    return _is_int(value, 1) and value <= MAX_RANK  # type: ignore[operator]


def _is_number(value: object) -> bool:
    return is_finite(value) and abs(value) <= 1e9


def _is_text(value: object) -> bool:
    return isinstance(value, str) and len(value) <= 100_000


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and all(_is_text(one) for one in value)


def _are_ids(value: object) -> bool:
    return isinstance(value, list) and all(_is_int(one, 0) for one in value)


def _is_pattern(value: object, fits: Any) -> bool:
    if not isinstance(value, dict) or len(value) > MAX_PATTERNS:
        return False
    return all(_is_text(key) and is_plain(key) and fits(one) for key, one in value.items())


def _key_for(patterns: Mapping[str, Any], path: str) -> str | None:
    """Return the first pattern that a path ends with."""
    ends = {path[start:] for start in (0, *(m.end() for m in re.finditer(r"\.", path)))}
    for key in patterns:
        if key in ends or (
            not re.fullmatch(r"[\w.]+", key) and re.match(rf"(.*\.)?({key})$", path)
        ):
            return key
    return None


def _regexes(value: list[str] | str) -> bool:
    return all(map(is_plain, [value] if isinstance(value, str) else value))


def _targets(value: object) -> bool:
    return value is None or _are_texts(value) or (_is_text(value) and is_plain(value))  # type: ignore[arg-type]


_RULES: tuple[tuple[str, str, Any], ...] = (
    ("r", f"an integer of at least 1 and at most {MAX_RANK}", _is_rank),
    ("lora_alpha", "a number", _is_number),
    ("lora_dropout", "a number from 0 to 1", lambda v: _is_number(v) and 0 <= v < 1),
    ("bias", "'none', 'all' or 'lora_only'", lambda v: v in ("none", "all", "lora_only")),
    ("target_modules", f"a list of names, or a {PLAIN}", _targets),
    ("exclude_modules", f"a list of names, or a {PLAIN}", _targets),
    ("target_parameters", "a list of names", lambda v: v is None or _are_texts(v)),
    (
        "layers_to_transform",
        "a layer's number, or a list of such",
        lambda v: v is None or _is_int(v, 0) or _are_ids(v),
    ),
    (
        "layers_pattern",
        f"a {PLAIN}, or a list of such",
        lambda v: v is None or (_are_texts([v] if isinstance(v, str) else v) and _regexes(v)),
    ),
    (
        "rank_pattern",
        f"a mapping from names or a {PLAIN} to ranks, at most {MAX_RANK}",
        lambda v: _is_pattern(v, _is_rank),
    ),
    (
        "alpha_pattern",
        f"a mapping from names or a {PLAIN} to numbers",
        lambda v: _is_pattern(v, _is_number),
    ),
    ("modules_to_save", "a list of names", lambda v: v is None or _are_texts(v)),
    (
        "trainable_token_indices",
        "a list of ids, or a mapping from modules to such",
        lambda v: (
            v is None
            or _are_ids(v)
            or (isinstance(v, dict) and all(_is_text(k) and _are_ids(ids) for k, ids in v.items()))
        ),
    ),
    (
        "init_lora_weights",
        "true, false or a word",
        lambda v: isinstance(v, bool) or _is_text(v),
    ),
    *(
        (key, "true or false", lambda v: isinstance(v, bool))
        for key in ("use_rslora", "use_dora", "lora_bias", "fan_in_fan_out", "ensure_weight_tying")
    ),
    ("task_type", "a word", lambda v: v is None or _is_text(v)),
    ("base_model_name_or_path", "a name or a path", lambda v: v is None or _is_text(v)),
)
