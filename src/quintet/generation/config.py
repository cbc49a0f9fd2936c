"""How to generate: the options of `generate()`, from a checkpoint's file and from the call."""

import dataclasses
import difflib
import json
import os
import warnings
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Self, get_type_hints

from quintet.configuration.base import PreTrainedConfig
from quintet.configuration.rules import Bounds, Count, NonNegative, Positive, check
from quintet.errors import InputError, ModelNotFoundError, SaveError
from quintet.files import read_json, write_text
from quintet.hub import CONFIG_PATTERNS, locate

__all__ = ["GENERATION_CONFIG_NAME", "GenerationConfig"]

GENERATION_CONFIG_NAME = "generation_config.json"
# Keys of the file that say where it comes from, not how to generate.
_PROVENANCE = ("_from_model_config", "transformers_version")
# What Transformers takes, and people will try.
ABSENT = {
    "assistant_model": "speculative decoding",
    "bad_words_ids": "forbidding words",
    "custom_generate": "running code of others",
    "guidance_scale": "classifier-free guidance",
    "inputs_embeds": "generating from embeddings",
    "length_penalty": "beam search",
    "logits_processor": "a processor of your own",
    "max_time": "a time limit",
    "no_repeat_ngram_size": "forbidding repeated n-grams",
    "num_beams": "beam search",
    "output_attentions": "returning more than tokens",
    "output_hidden_states": "returning more than tokens",
    "output_logits": "returning more than tokens",
    "output_scores": "returning more than tokens",
    "past_key_values": "continuing from a cache",
    "prompt_lookup_num_tokens": "speculative decoding",
    "return_dict_in_generate": "returning more than tokens",
    "stop_strings": "stopping at strings",
    "stopping_criteria": "a criterion of your own",
    "use_mtp": "decoding with prediction layers",
}
Share = Annotated[float, Bounds(0, 1)]


@dataclass(kw_only=True)
class GenerationConfig:
    """The options of `generate()`; None is "not set", and then what is named here holds.

    Attributes:
        max_new_tokens: how many tokens to add at the most; goes before `max_length`.
        max_length: how many tokens there are at the most, the prompt included. With neither set,
            20 are added.
        min_new_tokens: no end of sequence before that many.
        do_sample: draw from the distribution; otherwise (not set) take the most likely token.
        temperature: the logits are divided by it; 1.
        top_k: draw among that many most likely tokens; 50, and 0 for all.
        top_p: draw among the most likely tokens that together have this probability; 1.
        min_p: draw among tokens at least this share as likely as the most likely one.
        repetition_penalty: logits of tokens that occurred are divided (or, below zero,
            multiplied) by it (arXiv:1909.05858, §4.1); 1.
        num_return_sequences: how many continuations of each prompt; 1.
        use_cache: keep what the next step needs, rather than run over the whole text; true.
        cache_implementation: "dynamic" grows, "static" is preallocated; "dynamic".
        token_healing: take the prompt's last token off and let the model choose one that begins
            with its text; needs `generate(tokenizer=…)`; false.
    """

    max_new_tokens: Count | None = None
    max_length: Count | None = None
    min_new_tokens: NonNegative | None = None
    do_sample: bool | None = None
    temperature: Positive | None = None
    top_k: NonNegative | None = None
    top_p: Share | None = None
    min_p: Share | None = None
    repetition_penalty: Positive | None = None
    num_return_sequences: Count | None = None
    use_cache: bool | None = None
    cache_implementation: str | None = None
    token_healing: bool | None = None
    bos_token_id: NonNegative | None = None
    eos_token_id: NonNegative | list[NonNegative] | None = None
    pad_token_id: NonNegative | None = None
    other: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for key, annotation in get_type_hints(type(self), include_extras=True).items():
            try:
                check(type(self).__name__, key, getattr(self, key), annotation)
            except ValueError as error:
                raise InputError(str(error)) from None
        if self.top_p == 0:
            raise InputError("GenerationConfig: top_p=0 leaves no token; it is above 0, up to 1")
        if self.cache_implementation not in (None, "dynamic", "static"):
            raise InputError(
                f"GenerationConfig: cache_implementation={self.cache_implementation!r} has to be "
                "'dynamic' or 'static'"
            )

    @property
    def eos_token_ids(self) -> list[int]:
        """The ids that end a sequence, as a list."""
        if self.eos_token_id is None:
            return []
        return [self.eos_token_id] if isinstance(self.eos_token_id, int) else self.eos_token_id

    def replace(self, **options: Any) -> Self:
        """Return a copy with some options changed; None leaves an option as it is.

        Raises:
            InputError: there is no such option, or its value breaks a rule.
        """
        names = [f.name for f in fields(self) if f.name != "other"]
        # What asks for nothing may be asked for.
        options = {k: v for k, v in options.items() if k not in ABSENT or not _asks_nothing(v)}
        for name in options:
            if name in ABSENT:
                raise InputError(f"{name}={options[name]!r}: {ABSENT[name]} is not in this version")
            if name not in names:
                near = difflib.get_close_matches(name, names, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(names)}"
                raise InputError(f"generate() has no option {name!r}; {hint}")
        given = {name: value for name, value in options.items() if value is not None}
        # A length that is asked for now goes before one that a file sets in the other way.
        if "max_length" in given and "max_new_tokens" not in given:
            given["max_new_tokens"] = None
        return dataclasses.replace(self, **given)

    def over(self, base: Self) -> Self:
        """Return a copy in which the options that are not set here are those of `base`."""
        return base.replace(**{k: v for k, v in vars(self).items() if k != "other"})

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Build from the content of a file; options that are not supported are kept and told."""
        names = {f.name for f in fields(cls)} - {"other"}
        known = {k: v for k, v in values.items() if k in names and v is not None}
        other = {k: v for k, v in values.items() if k not in names}
        idle = [
            f"{key}={value!r}"
            for key, value in other.items()
            if key not in _PROVENANCE and not _asks_nothing(value)
        ]
        if idle:
            warnings.warn(
                f"{GENERATION_CONFIG_NAME} sets {', '.join(idle)}, which generate() does not have; "
                "without effect",
                stacklevel=3,
            )
        return cls(**known, other=other)

    @classmethod
    def from_model_config(cls, config: PreTrainedConfig) -> Self:
        """Build from a model's config, for a checkpoint without a file of its own."""
        return cls(
            bos_token_id=config.bos_token_id,
            eos_token_id=config.eos_token_id,
            pad_token_id=config.pad_token_id,
        )

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        subfolder: str = "",
    ) -> Self:
        """Read the `generation_config.json` of a directory or hub id.

        Raises:
            ModelNotFoundError: no such model, or it has none.
            CheckpointError: it is not a JSON object.
            InputError: an option breaks a rule.
        """
        root = locate(
            name_or_path,
            CONFIG_PATTERNS,
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
            subfolder=subfolder,
        )
        path = root / GENERATION_CONFIG_NAME
        if not path.is_file():
            raise ModelNotFoundError(f"{root} has no {GENERATION_CONFIG_NAME}")
        return cls.from_dict(read_json(path))

    def to_dict(self) -> dict[str, Any]:
        """Return the options that are set."""
        values = {k: v for k, v in vars(self).items() if k != "other" and v is not None}
        return {**self.other, **values}

    def to_json_string(self) -> str:
        """Return what `generation_config.json` holds."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Write `generation_config.json` into a directory, made if needed.

        Raises:
            SaveError: it could not be written.
        """
        path = Path(save_directory)
        if path.is_file():
            raise SaveError(f"{path} is a file; save_pretrained writes into a directory")
        write_text(path / GENERATION_CONFIG_NAME, self.to_json_string())


def _asks_nothing(value: object) -> bool:
    """Tell whether an option has the value it has when nobody asks for what it does."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value in (0, 1)
    return value is None or (isinstance(value, str | list | tuple | dict) and not value)
