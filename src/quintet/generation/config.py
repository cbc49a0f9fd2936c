"""`GenerationConfig`: the options of `generate()`, as files and calls give them."""

import dataclasses
import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Self

from quintet.configuration.base import PreTrainedConfig
from quintet.errors import InputError, ModelNotFoundError, SaveError, shown
from quintet.files import read_json, write_text
from quintet.folder import checked_path, find_file
from quintet.generation.gguf import gguf_options
from quintet.generation.option_names import check_names, is_default
from quintet.generation.options import Options
from quintet.gguf import read_gguf
from quintet.hub import CONFIG_PATTERNS, locate
from quintet.sources import FoundModel, find_gguf

__all__ = ["GENERATION_CONFIG_NAME", "NEW_TOKENS", "GenerationConfig"]

GENERATION_CONFIG_NAME = "generation_config.json"
# Keys of the file that say where it comes from, not how to generate.
_PROVENANCE = ("_from_model_config", "transformers_version")
# How many of the likeliest tokens are drawn from, where nobody says.
TOP_K = 50
# How many tokens are made, where nobody says.
NEW_TOKENS = 20
_NAMES = tuple(f.name for f in fields(Options))


@dataclass(kw_only=True)
class GenerationConfig(Options):
    """The options of `generate()`, from a checkpoint's file or made by hand.

    None is "not set". In a call, as `generate(top_k=None)`, it says that the option is not to hold
    at all: it lifts what the configs set.

    Attributes:
        other: keys of a file that are no options here.
        read_as: what the file said, by which a change is known; None for one made by hand.
    """

    other: dict[str, Any] = field(default_factory=dict)
    read_as: dict[str, Any] | None = field(default=None, init=False, repr=False, compare=False)

    @staticmethod
    def _get_default_generation_params() -> dict[str, Any]:
        """Return the defaults that trainers assume."""
        return {"max_length": NEW_TOKENS}

    @property
    def _from_model_config(self) -> bool:
        """Whether it was derived from a model's config; part of Transformers' format."""
        return bool(self.other.get("_from_model_config"))

    @_from_model_config.setter
    def _from_model_config(self, value: bool) -> None:
        self.other = {**self.other, "_from_model_config": value}

    def replace(self, **options: Any) -> Self:
        """Return a copy with some options changed; None leaves an option unchanged.

        Raises:
            InputError: there is no such option, or its value breaks a rule.
        """
        return self.overridden(**{name: v for name, v in options.items() if v is not None})

    def overridden(self, **options: Any) -> Self:
        """Return a copy with a call's options applied; None unsets an option.

        Raises:
            InputError: there is no such option, or its value breaks a rule.
        """
        given = check_names(options, _NAMES)
        # A length that is asked for now goes before one that a file sets in the other way.
        if given.get("max_length") is not None and "max_new_tokens" not in given:
            given["max_new_tokens"] = None
        return dataclasses.replace(self, **given)

    def usual(self) -> Self:
        """Return a copy with explicit defaults for options whose None means something else."""
        return self if self.top_k is not None else dataclasses.replace(self, top_k=TOP_K)

    def update(
        self, defaults_only: bool = False, allow_custom_entries: bool = False, **options: Any
    ) -> dict[str, Any]:
        """Set known options in place, and return the unknown ones.

        Args:
            defaults_only: set only what is not set.
            allow_custom_entries: keep what is none, as a file's further keys are kept.
            **options: the options.

        Raises:
            InputError: a value breaks its rule, and nothing is changed.
        """
        known = {
            name: value
            for name, value in options.items()
            if name in _NAMES and not (defaults_only and getattr(self, name) is not None)
        }
        rest = {name: value for name, value in options.items() if name not in known}
        if allow_custom_entries:
            custom = {k: v for k, v in rest.items() if k not in _NAMES and k not in self.other}
            known["other"] = {**self.other, **custom}
            rest = {name: value for name, value in rest.items() if name not in custom}
        vars(self).update({**vars(dataclasses.replace(self, **known)), "read_as": self.read_as})
        return rest

    def over(self, base: Self) -> Self:
        """Return a copy with unset options taken from `base`."""
        return base.replace(**{name: getattr(self, name) for name in _NAMES})

    @classmethod
    def from_dict(
        cls, values: dict[str, Any], *, source: str = GENERATION_CONFIG_NAME, **options: Any
    ) -> Self:
        """Build from the content of a file; warn of unsupported options, but keep them.

        Args:
            values: the content.
            source: what it is called in a warning.
            **options: what is to be otherwise; None is not set.

        Raises:
            InputError: there is no such option, or a value breaks a rule.
        """
        names = set(_NAMES)
        known = {k: v for k, v in values.items() if k in names and v is not None}
        other = {k: v for k, v in values.items() if k not in names}
        idle = [
            f"{key}={shown(value)}"
            for key, value in other.items()
            if key not in _PROVENANCE and not is_default(value)
        ]
        if idle:
            warnings.warn(
                f"{source} sets {', '.join(idle)}, which generate() does not have; without effect",
                stacklevel=3,
            )
        read = cls(**known, other=other)
        return read.overridden(**options) if options else read

    @classmethod
    def from_model_config(cls, config: PreTrainedConfig | Mapping[str, Any]) -> Self:
        """Build from a model's config, if there is no generation config."""
        if isinstance(config, Mapping):
            named = ("bos_token_id", "eos_token_id", "pad_token_id")
            given: dict[str, Any] = {name: config.get(name) for name in named}
            return cls(**given)
        return cls(
            bos_token_id=config.bos_token_id,
            eos_token_id=config.eos_token_id,
            pad_token_id=config.pad_token_id,
        )

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name: str | os.PathLike[str],
        config_file_name: str | os.PathLike[str] | None = None,
        *,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        subfolder: str = "",
        gguf_file: str | os.PathLike[str] | None = None,
        **options: Any,
    ) -> Self:
        """Read `generation_config.json` of a directory or hub id, or a GGUF file's metadata.

        Args:
            pretrained_model_name: the directory, or the id.
            config_file_name: the name of the file, if it has another one.
            revision: of a hub id, as the following.
            cache_dir: where its files are kept.
            token: to get them by.
            local_files_only: take them from the cache.
            subfolder: where in it they lie.
            gguf_file: which file of a directory or hub id, where the model is one in GGUF.
            **options: what is to be otherwise than in the file; None is not set.

        Raises:
            ModelNotFoundError: no such model, or it has none.
            CheckpointError: it is not a JSON object.
            InputError: there is no such option, or one breaks a rule.
        """
        name = os.fspath(config_file_name or GENERATION_CONFIG_NAME)
        if os.path.basename(name) != name:
            raise InputError(f"config_file_name={name!r} has to be a name without a folder")
        where: dict[str, Any] = {
            "revision": revision,
            "cache_dir": cache_dir,
            "token": token,
            "local_files_only": local_files_only,
            "subfolder": subfolder,
            "gguf_file": gguf_file,
        }
        root = locate(pretrained_model_name, (*CONFIG_PATTERNS, name), **where)
        if root.is_file():
            found = find_gguf(pretrained_model_name, **where) or FoundModel(root)
            read = cls(**gguf_options(read_gguf(root).metadata, found))
        elif (path := find_file(root, name)) is None:
            raise ModelNotFoundError(f"{root} has no {name}")
        else:
            read = cls.from_dict(read_json(path))
        read.read_as = read.to_dict()
        return read.overridden(**options) if options else read

    def to_dict(self) -> dict[str, Any]:
        """Return the options that are set."""
        values = {name: v for name in _NAMES if (v := getattr(self, name)) is not None}
        values.pop("compile_config", None)  # of a process, not of a checkpoint
        if isinstance(self.sequence_bias, dict):
            # A tuple is no key in JSON.
            values["sequence_bias"] = [[list(k), v] for k, v in self.sequence_bias.items()]
        if self.watermarking_config is not None:
            values["watermarking_config"] = self.watermarking_config.to_dict()
        return {**self.other, **values}

    def to_diff_dict(self) -> dict[str, Any]:
        """Return the options that are set, like `to_dict`."""
        return self.to_dict()

    def to_json_file(self, json_file_path: str | os.PathLike[str]) -> None:
        """Write the content of `generation_config.json` to a file.

        Raises:
            SaveError: it could not be written.
        """
        write_text(checked_path(json_file_path, "json_file_path"), self.to_json_string())

    def to_json_string(self) -> str:
        """Return the content of `generation_config.json`."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        config_file_name: str | os.PathLike[str] | None = None,
    ) -> None:
        """Write `generation_config.json` into a directory, creating it if needed.

        Raises:
            InputError: an option breaks a rule, or has no effect beside the others; what was read
                from a file and not changed is written as it was.
            SaveError: it could not be written.
        """
        self.validate(strict=self.to_dict() != self.read_as)
        name = os.fspath(config_file_name or GENERATION_CONFIG_NAME)
        if os.path.basename(name) != name:
            raise InputError(f"config_file_name={name!r} has to be a name without a folder")
        path = checked_path(save_directory, "save_directory")
        if path.is_file():
            raise SaveError(f"{path} is a file; save_pretrained writes into a directory")
        write_text(path / name, self.to_json_string())
