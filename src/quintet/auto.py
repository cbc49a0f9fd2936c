"""Auto classes: from `model_type` to a family's classes, imported on first use."""

import importlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, cast

from quintet.configuration.base import PreTrainedConfig
from quintet.configuration.foreign import described
from quintet.configuration.reading import read_config
from quintet.errors import InputError, UnsupportedModelError, named, shown
from quintet.folder import AdapterFolderError
from quintet.hub import CONFIG_PATTERNS, locate

if TYPE_CHECKING:
    from quintet.modeling.base import PreTrainedModel
    from quintet.tokenization import PreTrainedTokenizer

__all__ = [
    "FAMILIES",
    "AutoConfig",
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForQuestionAnswering",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoTokenizer",
]


@dataclass(frozen=True, slots=True)
class Family:
    """A family's module, and the prefix of its class names."""

    module: str
    prefix: str

    def find(self, suffix: str) -> Any:
        """Return the family's class of that name, for example "ForCausalLM".

        Raises:
            UnsupportedModelError: the family has none of that name.
        """
        found = vars(importlib.import_module(self.module)).get(self.prefix + suffix)
        if found is None:
            raise UnsupportedModelError(
                f"architectures: there is no class {shown(self.prefix + suffix)} in "
                f"{self.module}; take it out of config.json, or name one that is there"
            )
        return found


FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "deepseek_v2": Family("quintet.models.deepseek_v2", "DeepseekV2"),
        "deepseek_v3": Family("quintet.models.deepseek_v3", "DeepseekV3"),
        "qwen2": Family("quintet.models.qwen2", "Qwen2"),
        "qwen2_moe": Family("quintet.models.qwen2_moe", "Qwen2Moe"),
        "zamba2": Family("quintet.models.zamba2", "Zamba2"),
    },
)


_QWEN = "The nearest that is: Qwen/Qwen2.5-0.5B-Instruct, -1.5B, -3B, -7B, -14B or -32B"
# What to take in the place of what many ask for.
NEAREST: Mapping[str, str] = MappingProxyType(
    {
        "llama": f"Its GGUF file is read, though. {_QWEN}",
        **dict.fromkeys(("mistral", "gemma", "gemma2", "gemma3", "phi3", "qwen3"), _QWEN),
    }
)


def family(model_type: object) -> Family:
    """Return the family of a `model_type`.

    Raises:
        UnsupportedModelError: there is none.
    """
    found = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if found is None:
        nearest = NEAREST.get(model_type) if isinstance(model_type, str) else None
        raise UnsupportedModelError(
            f"model_type={shown(model_type)} is not supported; there are {', '.join(FAMILIES)}"
            + (f". {nearest}" if nearest else "")
        )
    return found


def _family_of(config: object) -> Family:
    if isinstance(config, PreTrainedConfig):
        return family(config.model_type)
    values = described(config)
    if values is None:
        raise InputError(f"config is a {named(config)}; it has to be a model's config")
    return family(values.get("model_type"))


class AutoConfig:
    """Reads the configuration of a checkpoint of any family."""

    @staticmethod
    def for_model(model_type: str, **values: Any) -> PreTrainedConfig:
        """Build a family's configuration from values.

        Raises:
            UnsupportedModelError: there is no such family.
        """
        return cast("PreTrainedConfig", family(model_type).find("Config")(**values))

    @staticmethod
    def from_pretrained(
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        subfolder: str = "",
        gguf_file: str | None = None,
        trust_remote_code: bool = False,
        **overrides: Any,
    ) -> PreTrainedConfig:
        """Read the `config.json` of a directory or hub id; see `PreTrainedConfig`.

        `trust_remote_code` is accepted and does nothing: no code of a repository is ever run.

        Raises:
            ModelNotFoundError: no such model.
            UnsupportedModelError: its family is not here.
            ConfigError: a value breaks a rule.
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
        if "model_type" not in values:
            raise UnsupportedModelError(
                f"{root / 'config.json'} has no model_type; there are {', '.join(FAMILIES)}"
            )
        config_class = family(values["model_type"]).find("Config")
        values["name_or_path"] = os.fspath(pretrained_model_name_or_path)
        return cast("PreTrainedConfig", config_class.from_dict(values, **overrides))


class _AutoModel:
    """Finds a family's class for one kind of model."""

    suffix: ClassVar[str]

    def __init__(self) -> None:
        raise InputError(
            f"{type(self).__name__} is not made by hand; "
            "use from_pretrained(name_or_path) or from_config(config)"
        )

    @classmethod
    def from_config(cls, config: PreTrainedConfig, **options: Any) -> "PreTrainedModel":
        """Build a model with random weights; see `PreTrainedModel.from_config`.

        Raises:
            InputError: what is given is no config.
            UnsupportedModelError: the config is of no family here.
        """
        model_class = _family_of(config).find(cls.suffix)
        return cast("PreTrainedModel", model_class.from_config(config, **options))

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **options: Any
    ) -> "PreTrainedModel":
        """Load a model; see `PreTrainedModel.from_pretrained`.

        Raises:
            UnsupportedModelError: its family is not here.
        """
        config = options.get("config")
        if config is None or isinstance(config, str | os.PathLike):
            places = ["revision", "cache_dir", "token", "local_files_only", "subfolder"]
            if config is None:
                places.append("gguf_file")
            where = {key: options[key] for key in places if key in options}
            read_from = pretrained_model_name_or_path if config is None else config
            try:
                config = AutoConfig.from_pretrained(read_from, **where)
            except AdapterFolderError as found:
                # Where an adapter's model is, is not said by what says where the adapter is.
                hub_options = ("cache_dir", "token", "local_files_only")
                where = {key: options[key] for key in hub_options if key in options}
                with found.of_base() as base:
                    config = AutoConfig.from_pretrained(base, **where)
        model_class = _family_of(config).find(cls.suffix)
        return cast(
            "PreTrainedModel", model_class.from_pretrained(pretrained_model_name_or_path, **options)
        )


class AutoModel(_AutoModel):
    """The model without a head."""

    suffix = "Model"


class AutoModelForCausalLM(_AutoModel):
    """The model with a language-modelling head."""

    suffix = "ForCausalLM"


class AutoModelForSequenceClassification(_AutoModel):
    """The model with a head that classifies sequences."""

    suffix = "ForSequenceClassification"


class AutoModelForTokenClassification(_AutoModel):
    """The model with a head that classifies tokens."""

    suffix = "ForTokenClassification"


class AutoModelForQuestionAnswering(_AutoModel):
    """The model with a head that finds answers in a text."""

    suffix = "ForQuestionAnswering"


class AutoTokenizer:
    """Loads the tokenizer of a checkpoint."""

    def __init__(self) -> None:
        raise InputError("AutoTokenizer is not made by hand; use from_pretrained(name_or_path)")

    @staticmethod
    def from_pretrained(
        pretrained_model_name_or_path: str | os.PathLike[str], **options: Any
    ) -> "PreTrainedTokenizer":
        """Load the tokenizer of a directory or hub id; see `quintet.tokenization.load`.

        An adapter without one has its model's.
        """
        from quintet.tokenization import load

        try:
            return load(pretrained_model_name_or_path, **options)
        except AdapterFolderError as found:
            others = {k: v for k, v in options.items() if k not in ("revision", "subfolder")}
            with found.of_base() as base:
                return load(base, **others)
