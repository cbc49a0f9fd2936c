"""`PreTrainedTokenizer`: a pipeline of the `tokenizers` library with its settings."""

import copy
import importlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self, Unpack

from tokenizers import AddedToken, Tokenizer

from quintet.errors import InputError, SaveError, TokenizerError, shown
from quintet.files import write_texts
from quintet.hub import TOKENIZER_PATTERNS, Pushable
from quintet.tokenization import files as names
from quintet.tokenization.chat import Chat
from quintet.tokenization.decoding import Decoder
from quintet.tokenization.files import (
    TokenizerFiles,
    existing,
    json_text,
    read_pipeline,
    template_files,
    template_settings,
    token_flags,
)
from quintet.tokenization.guard import guarded
from quintet.tokenization.lengths import LongTexts
from quintet.tokenization.opening import open_files
from quintet.tokenization.options import (
    FIXED,
    NAMED_TOKENS,
    TokenizerOptions,
    check_fixed,
    check_names,
    check_values,
)
from quintet.tokenization.prefix import set_prefix_space
from quintet.tokenization.sentencepiece import read_with_settings
from quintet.tokenization.surround import surround
from quintet.tokenization.templates import ChatTemplates
from quintet.tokenization.vocabulary import Vocabulary, check_gaps, token_text

_NO_LIMIT = int(1e30)
_LISTS = ("additional_special_tokens", "extra_special_tokens")
_PREFIXED = (names.TOKENIZER, names.SETTINGS, names.SPECIAL_TOKENS)


class PreTrainedTokenizer(Chat, Decoder, Pushable):
    """Converts text to ids and back, exactly as `tokenizer.json` defines it.

    Args:
        tokenizer_object: a pipeline; it is copied.
        tokenizer_file: the path of a `tokenizer.json`.
        options: roles of tokens (`eos_token`, ...), sides, `model_max_length`, `chat_template`
            and the other keys of `tokenizer_config.json`. A special token that the vocabulary
            lacks is added to it.

    Raises:
        InputError: there is no pipeline, or an option is unknown or not usable.
        TokenizerError: the file is damaged.
    """

    # How `tokenizer_config.json` calls a class that Transformers knows and that obeys the file.
    _saved_as: ClassVar[str] = "PreTrainedTokenizerFast"

    def __init__(
        self,
        tokenizer_object: Tokenizer | None = None,
        tokenizer_file: str | os.PathLike[str] | None = None,
        **options: Unpack[TokenizerOptions],
    ) -> None:
        if (tokenizer_object is None) == (tokenizer_file is None):
            raise InputError(
                f"{type(self).__name__} needs tokenizer_object or tokenizer_file; "
                "for a directory or a hub id use from_pretrained"
            )
        if tokenizer_file is not None:
            backend = read_pipeline(existing(tokenizer_file))
        else:
            assert tokenizer_object is not None
            backend = copy.deepcopy(tokenizer_object)
        self._set_up(backend, options, {})

    def _set_up(
        self, backend: Tokenizer, options: TokenizerOptions, settings: Mapping[str, Any]
    ) -> None:
        """Initialise from a pipeline; `settings` are unused keys, kept for saving."""
        check_names(type(self).__name__, options, TokenizerOptions.__annotations__)
        check_values(options, InputError)
        check_fixed(options)
        with guarded("these files, or options, make no tokenizer"):
            self._take(backend, options, settings)

    def _take(
        self, backend: Tokenizer, options: TokenizerOptions, settings: Mapping[str, Any]
    ) -> None:
        Vocabulary.__init__(self, backend)
        # Cutting and padding belong to a call. What the file says is kept for saving it again.
        self._stored = (backend.truncation, backend.padding)
        backend.no_truncation()
        backend.no_padding()
        self._settings = dict(settings)
        self._long_texts = LongTexts()
        self.name_or_path = options.get("name_or_path", "")
        self.padding_side = options.get("padding_side", "right")
        self.truncation_side = options.get("truncation_side", "right")
        limit = options.get("model_max_length")
        self.model_max_length = _NO_LIMIT if limit is None else int(limit)
        self.model_input_names = list(
            options.get("model_input_names", ["input_ids", "attention_mask"])
        )
        self.clean_up_tokenization_spaces = bool(options.get("clean_up_tokenization_spaces"))
        self.split_special_tokens = bool(options.get("split_special_tokens"))
        backend.encode_special_tokens = self.split_special_tokens
        self.errors = options.get("errors", "replace")
        self._check_errors()
        self._templates = ChatTemplates(options.get("chat_template"))
        self._give_roles(options)
        bos, eos = (self.bos_token, self.bos_token_id), (self.eos_token, self.eos_token_id)
        surround(backend, bos, eos, options.get("add_bos_token"), options.get("add_eos_token"))
        prefix = options.get("add_prefix_space")
        set_prefix_space(backend, prefix)
        if prefix is not None:
            # Transformers makes the pipeline of some classes anew, of the settings.
            self._settings["add_prefix_space"] = prefix

    @property
    def is_fast(self) -> bool:
        """Always true: there is one implementation."""
        return True

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(name_or_path={self.name_or_path!r}, "
            f"vocab_size={self.vocab_size}, added={len(self) - self.vocab_size}, "
            f"special_tokens={self.special_tokens_map})"
        )

    # -- reading ------------------------------------------------------------------------------

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
        force_download: bool = False,
        trust_remote_code: bool | None = None,
        use_fast: bool | None = None,
        legacy: bool | None = None,
        gguf_file: str | os.PathLike[str] | None = None,
        **options: Unpack[TokenizerOptions],
    ) -> Self:
        """Load the tokenizer of a directory or a hub id; options win over its files.

        Or of a model in GGUF: a path of one, `gguf_file` in a directory or a repository, or
        another name that such a file has (`quintet.sources`).

        `tokenizer.json` is obeyed to the letter, whichever class the directory names; so are
        the tokens it adds around a text, unless `add_bos_token` or `add_eos_token` is passed.
        `force_download` fetches files again that the cache has.
        `trust_remote_code`, `use_fast` and `legacy` are accepted and change nothing: no code of
        a repository is ever run, and there is one implementation.

        Raises:
            ModelNotFoundError: no such directory or repository, or no tokenizer in it.
            TokenizerError: its files are damaged or contradict each other.
            InputError: an option is unknown or not usable.
        """
        check_names(f"{cls.__name__}.from_pretrained", options, TokenizerOptions.__annotations__)
        files = open_files(
            pretrained_model_name_or_path,
            TOKENIZER_PATTERNS,
            gguf_file=gguf_file,
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
            subfolder=subfolder,
            force_download=force_download,
        )
        return cls._from_files(
            files, {"name_or_path": os.fspath(pretrained_model_name_or_path), **options}
        )

    @classmethod
    def _from_files(cls, files: TokenizerFiles, options: TokenizerOptions) -> Self:
        check_values(options, InputError)
        with guarded(f"the files in {shown(str(files.root))} make no tokenizer"):
            return cls._made_of(files, options)

    @classmethod
    def _made_of(cls, files: TokenizerFiles, options: TokenizerOptions) -> Self:
        if files.backend is not None:
            backend = files.backend
        elif files.pipeline is not None:
            backend = read_pipeline(files.pipeline)
        elif files.vocabulary is not None:
            backend = cls._from_vocabulary(*files.vocabulary)
        else:
            assert files.sentencepiece is not None
            backend, options = read_with_settings(files, options)
        names.add_with_ids(backend, files.added)
        known = set(TokenizerOptions.__annotations__) - FIXED.keys()
        if files.pipeline is not None:
            # What is added around a text is a step of the pipeline, and its file has the say.
            known -= {"add_bos_token", "add_eos_token", "add_prefix_space"}
        elif files.backend is None and files.vocabulary is None:
            known -= {"add_prefix_space"}
        # A role that is null has no token, whichever the class would give it.
        given = {
            k: v
            for k, v in files.settings.items()
            if k in known and (v is not None or k in NAMED_TOKENS)
        }
        rest = {k: v for k, v in files.settings.items() if k not in known}
        if files.chat_template is not None:
            given["chat_template"] = files.chat_template
        merged: TokenizerOptions = {**cls._defaults(), **given, **options}  # type: ignore[typeddict-item]
        tokenizer = cls.__new__(cls)
        tokenizer._set_up(backend, merged, rest)
        return tokenizer

    @classmethod
    def _defaults(cls) -> TokenizerOptions:
        return {}

    @classmethod
    def _from_vocabulary(cls, vocab: Path, merges: Path) -> Tokenizer:
        raise TokenizerError(
            f"{vocab.parent} has {vocab.name} and {merges.name} but no {names.TOKENIZER}, so how "
            "a text is split is not known; use AutoTokenizer, or the family's own class "
            "(Qwen2Tokenizer)"
        )

    # -- writing ------------------------------------------------------------------------------

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        filename_prefix: str | None = None,
        *,
        save_jinja_files: bool = True,
    ) -> tuple[str, ...]:
        """Write all files of the tokenizer and return their paths.

        Chat templates have files of their own; `save_jinja_files=False` writes them into
        `tokenizer_config.json` instead.

        Raises:
            SaveError: one could not be written, or another process is saving there.
        """
        root = names.save_directory(save_directory)
        texts = self._texts(
            template_settings(self.chat_template, root) if not save_jinja_files else None
        )
        prefix = f"{filename_prefix}-" if filename_prefix else ""
        named = {f"{prefix}{n}" if n in _PREFIXED else n: text for n, text in texts.items()}
        write_texts(root, named)
        return tuple(str(root / name) for name in named)

    def to_files(self) -> dict[str, str]:
        """Return the files of `save_pretrained` by name."""
        return self._texts(None)

    def _texts(self, templates: Mapping[str, Any] | None) -> dict[str, str]:
        """Return the files, with `templates` in the settings if given."""
        roles: dict[str, Any] = {
            **dict.fromkeys(role for role in self._defaults() if role in NAMED_TOKENS),
            **{role: self._named[role] for role in NAMED_TOKENS if role in self._named},
        }
        own = {name: token for name, token in self._named.items() if name not in NAMED_TOKENS}
        if own:
            roles["extra_special_tokens"] = own
        if self._additional:
            roles["additional_special_tokens"] = self._additional
        settings = {
            **self._settings,
            **roles,
            "added_tokens_decoder": {
                str(index): token_flags(token) for index, token in self.added_tokens_decoder.items()
            },
            "clean_up_tokenization_spaces": self.clean_up_tokenization_spaces,
            "errors": self.errors,
            "model_input_names": self.model_input_names,
            "model_max_length": self.model_max_length,
            "padding_side": self.padding_side,
            "split_special_tokens": self.split_special_tokens,
            "tokenizer_class": self._saved_as,
            "truncation_side": self.truncation_side,
        }
        if templates is not None:
            settings |= templates
        return {
            names.TOKENIZER: self._pipeline_json(),
            names.SETTINGS: json_text(settings),
            names.SPECIAL_TOKENS: json_text(
                {role: token for role, token in roles.items() if token is not None}
            ),
            **({} if templates is not None else template_files(self.chat_template)),
        }

    def to_transformers(self) -> Any:
        """Return an equivalent `transformers.PreTrainedTokenizerFast`.

        It is for tools that ask for that class; see `quintet.interop.to_transformers`.

        Raises:
            MissingDependencyError: Transformers is not installed.
        """
        # The bridge stands above everything, and is looked for by its name when it is asked for.
        return importlib.import_module("quintet.interop.tokenizers").to_transformers(self)

    def save_vocabulary(
        self, save_directory: str | os.PathLike[str], filename_prefix: str | None = None
    ) -> tuple[str, ...]:
        """Write the files of the vocabulary alone, without added tokens; return their paths.

        Raises:
            SaveError: one could not be written.
        """
        root = names.save_directory(save_directory)
        try:
            root.mkdir(parents=True, exist_ok=True)
            return tuple(self._tokenizer.model.save(str(root), filename_prefix))
        except Exception as error:
            raise SaveError(f"could not write the vocabulary into {root}: {error}") from error

    def _pipeline_json(self) -> str:
        check_gaps(self.get_vocab())
        text = self._tokenizer.to_str(pretty=True)
        truncation, padding = self._stored
        if truncation is None and padding is None:
            return text
        whole = Tokenizer.from_str(text)
        if truncation is not None:
            whole.enable_truncation(**truncation)
        if padding is not None:
            whole.enable_padding(**padding)
        return whole.to_str(pretty=True)

    # -- setting up ---------------------------------------------------------------------------

    def _give_roles(self, options: TokenizerOptions) -> None:
        given = {role: options[role] for role in NAMED_TOKENS if options.get(role)}  # type: ignore[literal-required]
        listed: list[Any] = []
        for key in _LISTS:
            tokens: Any = options.get(key) or []
            if isinstance(tokens, Mapping):
                given |= {name: token for name, token in tokens.items() if token}
            else:
                listed += tokens
        self._named = {role: token_text(token) for role, token in given.items()}
        self._additional = list(dict.fromkeys(map(token_text, listed)))
        # What the pipeline knows already is left as the pipeline has it.
        missing = [
            token if isinstance(token, AddedToken) else token_text(token)
            for token in [*given.values(), *listed]
            if self._tokenizer.token_to_id(token_text(token)) is None
        ]
        self.add_tokens(missing, special_tokens=True)


PreTrainedTokenizerFast = PreTrainedTokenizer
