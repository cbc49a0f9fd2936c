"""The base of all configurations: typed fields, both vintages of names, unknown keys kept."""

import copy
import difflib
import functools
import inspect
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from itertools import islice
from types import MappingProxyType
from typing import Any, ClassVar, Self, get_origin, get_type_hints

from quintet.configuration.constraints import (
    EndIds,
    Fraction,
    Layers,
    Length,
    NonNegativeFloat,
    Size,
    TokenId,
    check,
)
from quintet.configuration.contract import ConfigContract
from quintet.configuration.foreign import described
from quintet.configuration.labels import labels
from quintet.configuration.numbers import decoded, encoded
from quintet.configuration.reading import read_config
from quintet.configuration.rope import merge_rope
from quintet.configuration.views import ConfigViews
from quintet.errors import ConfigError, InputError, SaveError, shown
from quintet.files import write_text
from quintet.folder import CONFIG_NAME, checked_path
from quintet.hub import CONFIG_PATTERNS, Pushable, locate

ATTENTION_BACKENDS = ("eager", "sdpa", "flash_attention_2")
FLOAT_DTYPES = ("bfloat16", "float16", "float32", "float64")
_RENAMED = {"torch_dtype": "dtype", "_name_or_path": "name_or_path"}
MOST_COMPARED = 200
_ROPE_KEYS = ("rope_theta", "rope_scaling", "rope_parameters")


class UnknownKeyWarning(UserWarning):
    """A key that looks like a misspelling of a known one."""


class PreTrainedConfig(ConfigContract, ConfigViews, Pushable):
    """The keys of `config.json` as attributes, each checked against its annotation.

    A family declares its keys as annotated class attributes with their defaults. Keys it does not
    know are kept as attributes and written back, so that a checkpoint survives a round trip.

    Raises:
        ConfigError: a value breaks its rule; the message names key, value and rule.
    """

    model_type: ClassVar[str] = ""
    default_rope_theta: ClassVar[float] = 10_000.0
    # Further names of keys, as `config.json` files of other origin and callers may have them.
    aliases: ClassVar[Mapping[str, str]] = MappingProxyType({})
    # Keys that `derive` fills in; a file leaves them out where they are what it would give.
    derived: ClassVar[tuple[str, ...]] = ()
    # Keys whose override makes the `layer_types` of a file obsolete.
    decides_layer_types: ClassVar[tuple[str, ...]] = ()

    architectures: list[str] | None = None
    attn_implementation: str = "sdpa"
    bos_token_id: TokenId | None = None
    classifier_dropout: Fraction | None = None
    dtype: str | None = None
    eos_token_id: TokenId | EndIds | None = None
    hidden_size: Size = 1
    id2label: dict[int, str] | None = None
    initializer_range: NonNegativeFloat = 0.02
    label2id: dict[str, int] | None = None
    max_position_embeddings: Length = 2048
    name_or_path: str = ""
    num_attention_heads: Size = 1
    num_hidden_layers: Layers = 1
    output_attentions: bool = False
    output_hidden_states: bool = False
    output_router_logits: bool = False
    pad_token_id: TokenId | None = None
    problem_type: str | None = None
    return_dict: bool = True
    rope_parameters: dict[str, Any] = {}  # noqa: RUF012  (a default, copied for each object)
    tie_word_embeddings: bool = False
    use_cache: bool = True
    vocab_size: Size = 1

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        for alias, key in cls.aliases.items():
            setattr(cls, alias, _view(key))
        keys = [key for key in cls.accepted_keys() if key not in cls.aliases]
        cls.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [
                inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=cls.default(key))
                for key in keys
            ]
            + [inspect.Parameter("unknown", inspect.Parameter.VAR_KEYWORD)]
        )

    def __init__(self, **values: Any) -> None:
        values = self._renamed(values)
        family = values.pop("model_type", self.model_type)
        if family != self.model_type:
            raise ConfigError(
                f"{type(self).__name__}: model_type={shown(family)} has to be {self.model_type!r}; "
                "use AutoConfig, or the class of that family"
            )
        self._warn_of_misspellings(values)
        values["dtype"] = _dtype_name(values.get("dtype"))
        values["rope_parameters"] = merge_rope(values, self.default_rope_theta)
        values["id2label"], values["label2id"] = labels(type(self).__name__, values)
        for key, annotation in self.declared_keys().items():
            value = values.pop(key, copy.copy(self.default(key)))
            check(type(self).__name__, key, value, annotation)
            setattr(self, key, value)
        for key, value in values.items():
            # Names of methods and of internals are not for a file to set.
            if key.startswith("_") or hasattr(type(self), key):
                warnings.warn(
                    f"{type(self).__name__} cannot have a key {shown(key)}; it is left out",
                    UnknownKeyWarning,
                    stacklevel=2,
                )
            else:
                setattr(self, key, value)
        self.derive()
        self.validate()

    def check(self) -> None:
        """Check the type and bounds of every key, as they are now.

        Raises:
            ConfigError: a value that was set since breaks its rule.
        """
        for key, annotation in self.declared_keys().items():
            check(type(self).__name__, key, getattr(self, key), annotation)
        self._check_padding()

    # -- what a family extends ---------------------------------------------------------------

    def derive(self) -> None:
        """Compute keys that follow from others."""

    def validate(self) -> None:
        """Check the rules between values.

        Raises:
            ConfigError: a value, or two together, break a rule.
        """
        self.require(
            self.attn_implementation in ATTENTION_BACKENDS,
            "attn_implementation",
            f"one of {list(ATTENTION_BACKENDS)}",
        )
        self.require(
            self.dtype is None or self.dtype in FLOAT_DTYPES, "dtype", f"one of {FLOAT_DTYPES}"
        )
        kinds = ("regression", "single_label_classification", "multi_label_classification")
        self.require(
            self.problem_type is None or self.problem_type in kinds,
            "problem_type",
            f"one of {kinds}, or null",
        )
        self._check_padding()
        self.rope()

    def attention_layers(self) -> Sequence[int]:
        """Return the layers with keys and values in the cache."""
        return range(self.num_hidden_layers)

    def recurrent_layers(self) -> Sequence[int]:
        """Return the layers with a recurrent state."""
        return ()

    def cache_numbers(self) -> tuple[int, int]:
        """Return the numbers a cache holds per token, and per row beyond its tokens."""
        raise NotImplementedError

    def require(self, holds: bool, key: str, rule: str) -> None:
        """Raise a ConfigError that names `key`, its value and `rule` unless `holds`."""
        if not holds:
            raise ConfigError(
                f"{type(self).__name__}: {key}={shown(getattr(self, key))} has to be {rule}"
            )

    # -- mappings and files ------------------------------------------------------------------

    @classmethod
    def of(cls, config: object) -> Self:
        """Return a config of this class, converted from Transformers' if needed.

        Raises:
            InputError: it is of another family, or no configuration.
        """
        if isinstance(config, cls):
            return config
        values = None if isinstance(config, PreTrainedConfig) else described(config)
        kind = f"{type(config).__module__}.{type(config).__qualname__}"
        if values is None or values.get("model_type") != cls.model_type:
            raise InputError(
                f"a configuration has to be a quintet.{cls.__name__}, or Transformers' of the same "
                f"name; this is a {kind}. AutoConfig and the Auto classes choose by model_type"
            )
        return cls.from_dict(values)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], **overrides: Any) -> Self:
        """Build a configuration from the content of a file; `overrides` win over it."""
        merged, overrides = (
            cls._renamed({key: decoded(value) for key, value in values.items()}),
            cls._renamed(overrides),
        )
        if "num_labels" in overrides:
            merged = {k: v for k, v in merged.items() if k not in ("id2label", "label2id")}
        elif "id2label" in overrides:
            merged = {k: v for k, v in merged.items() if k not in ("label2id", "num_labels")}
        if any(key in overrides for key in cls.decides_layer_types):
            merged.pop("layer_types", None)
        elif isinstance(types := merged.get("layer_types"), list):
            layers = overrides.get("num_hidden_layers")
            merged["layer_types"] = types[:layers] if isinstance(layers, int) else types
        if any(key in overrides for key in _ROPE_KEYS):
            rope = merge_rope(merged, cls.default_rope_theta)
            given = {key: overrides.pop(key) for key in _ROPE_KEYS if key in overrides}
            if set(given) == {"rope_theta"}:
                overrides["rope_parameters"] = {**rope, **given}
            else:
                overrides["rope_parameters"] = merge_rope(given, rope["rope_theta"])
        with warnings.catch_warnings():
            # Only a caller's own misspelling is worth a warning, not a file's.
            warnings.simplefilter("ignore", UnknownKeyWarning)
            config = cls(**{**merged, **overrides})
        config._warn_of_misspellings(key for key in overrides if key not in merged)
        return config

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        subfolder: str = "",
        gguf_file: str | None = None,
        **overrides: Any,
    ) -> Self:
        """Read `config.json` of a directory or hub id; `overrides` replace keys.

        Of a model in GGUF, its file says the same; `gguf_file` is its name in a directory or hub
        id that has other models, too.

        Raises:
            ModelNotFoundError: no such model, or no config.json in it.
            CheckpointError: the file is not a JSON object.
            ConfigError: a value breaks a rule, or the file is of another family.
        """
        root = locate(
            pretrained_model_name_or_path,
            CONFIG_PATTERNS,
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
            subfolder=subfolder,
            gguf_file=gguf_file,
        )
        values = read_config(root)
        found = values.get("model_type", cls.model_type)
        if found != cls.model_type:
            raise ConfigError(
                f"{root if root.is_file() else root / CONFIG_NAME} has model_type={shown(found)}, "
                f"not {cls.model_type!r}; use AutoConfig, or the class of that family"
            )
        return cls.from_dict(
            {**values, "name_or_path": os.fspath(pretrained_model_name_or_path)}, **overrides
        )

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Write `config.json` into a directory, creating it if needed.

        Raises:
            SaveError: it could not be written; an older one is untouched.
            ConfigError: a value cannot be written as JSON.
        """
        path = checked_path(save_directory, "save_directory")
        if path.is_file():
            raise SaveError(f"{path} is a file; save_pretrained writes into a directory")
        write_text(path / CONFIG_NAME, self.to_json_string())

    def to_dict(self) -> dict[str, Any]:
        """Return every key, with rotary keys in both vintages.

        Where the configuration was read from is no part of it.
        """
        values = {"model_type": self.model_type, **copy.deepcopy(vars(self))}
        del values["name_or_path"]
        scaling = {k: v for k, v in self.rope_parameters.items() if k != "rope_theta"}
        values["rope_theta"] = self.rope_theta
        values["rope_scaling"] = None if self.rope_scaling is None else scaling
        return values

    def to_json_string(self) -> str:
        """Return the content of `config.json`, without common keys at their default.

        Raises:
            ConfigError: a value (a function as `hidden_act`) cannot be written as JSON.
        """
        usual = {key: PreTrainedConfig.default(key) for key in PreTrainedConfig.declared_keys()}
        for family in type(self).__mro__[: -len(PreTrainedConfig.__mro__)]:
            usual = {key: usual[key] for key in usual if key not in family.__annotations__}
        usual["id2label"], usual["label2id"] = labels(type(self).__name__, {})
        values = {
            key: value
            for key, value in self.to_dict().items()
            if key not in ("name_or_path", "attn_implementation")
            and not (key in usual and value == usual[key])
        }
        with warnings.catch_warnings():
            # What there was to say was said when this object was made.
            warnings.simplefilter("ignore")
            plain = type(self)(**{k: v for k, v in vars(self).items() if k not in self.derived})
        for key in self.derived:
            if getattr(plain, key) == values.get(key):
                values.pop(key, None)
        try:
            return json.dumps(encoded(values), indent=2, sort_keys=True, allow_nan=False) + "\n"
        except (TypeError, ValueError, RecursionError) as error:
            raise ConfigError(f"{type(self).__name__} cannot be written as JSON: {error}") from None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PreTrainedConfig) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"{type(self).__name__} {json.dumps(self.to_dict(), indent=2, default=repr)}"

    # -- helpers -----------------------------------------------------------------------------

    @classmethod
    def declared_keys(cls) -> dict[str, Any]:
        """Return the declared keys and their annotations, the common ones first."""
        # As a class it has a hash, which its objects have not.
        kind: type = cls
        return {**_declared(kind)}

    @classmethod
    def accepted_keys(cls) -> list[str]:
        """Return the names of the declared keys and of the views of them."""
        return [*cls.declared_keys(), "rope_theta", "rope_scaling", "num_labels", *cls.aliases]

    @classmethod
    def default(cls, key: str) -> Any:
        """Return the default of a declared key."""
        if key == "rope_theta":
            return cls.default_rope_theta
        return None if isinstance(value := getattr(cls, key), property) else value

    def _check_padding(self) -> None:
        pad, size = self.pad_token_id, self.vocab_size
        holds = pad is None or -size <= pad < size
        self.require(holds, "pad_token_id", f"less than vocab_size={size}, or null for none")

    @classmethod
    def _renamed(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        names = {**_RENAMED, **cls.aliases}
        return {names.get(key, key): value for key, value in values.items()}

    def _warn_of_misspellings(self, keys: "Any") -> None:
        known = {*self.accepted_keys(), "model_type"}
        # A file may have any number of keys, and comparing takes a while.
        for key in islice((key for key in keys if key not in known), MOST_COMPARED):
            near = difflib.get_close_matches(key, sorted(known), n=1, cutoff=0.85)
            if near:
                warnings.warn(
                    f"{type(self).__name__} does not know {shown(key)} and keeps it unused; "
                    f"did you mean {near[0]!r}?",
                    UnknownKeyWarning,
                    stacklevel=3,
                )


@functools.cache
def _declared(kind: type) -> Mapping[str, Any]:
    hints = get_type_hints(kind, include_extras=True)
    return {key: hint for key, hint in hints.items() if get_origin(hint) is not ClassVar}


def _view(key: str) -> property:
    return property(lambda self: getattr(self, key), lambda self, to: setattr(self, key, to))


def _dtype_name(dtype: Any) -> Any:
    """Return the name of a torch dtype, and anything else unchanged."""
    return str(dtype).removeprefix("torch.") if str(dtype).startswith("torch.") else dtype
