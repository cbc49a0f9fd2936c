"""Reads and writes a tokenizer's files."""

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from quintet.errors import CheckpointError, ModelNotFoundError, SaveError, TokenizerError, shown
from quintet.files import MAX_LISTING_BYTES, check_size, read_json, read_text
from quintet.folder import checked_path
from quintet.tokenization.guard import guarded
from quintet.tokenization.options import NAMED_TOKENS, check_values, is_text

TOKENIZER = "tokenizer.json"
SETTINGS = "tokenizer_config.json"
SPECIAL_TOKENS = "special_tokens_map.json"
ADDED_TOKENS = "added_tokens.json"
VOCAB = "vocab.json"
MERGES = "merges.txt"
SENTENCEPIECE = "tokenizer.model"
TEMPLATE = "chat_template.jinja"
TEMPLATES = "additional_chat_templates"

_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass(slots=True, kw_only=True)
class TokenizerFiles:
    """The files that describe a tokenizer.

    Attributes:
        backend: the pipeline, where it was made already.
    """

    root: Path
    settings: dict[str, Any]
    added: dict[int, AddedToken] = field(default_factory=dict)
    chat_template: str | dict[str, str] | None = None
    backend: Tokenizer | None = None

    @property
    def pipeline(self) -> Path | None:
        """`tokenizer.json`, if present."""
        return _found(self.root / TOKENIZER)

    @property
    def vocabulary(self) -> tuple[Path, Path] | None:
        """`vocab.json` and `merges.txt`, if present."""
        vocab, merges = _found(self.root / VOCAB), _found(self.root / MERGES)
        return (vocab, merges) if vocab and merges else None

    @property
    def sentencepiece(self) -> Path | None:
        """`tokenizer.model`, if present."""
        return _found(self.root / SENTENCEPIECE)


def read_tokenizer_files(root: Path) -> TokenizerFiles:
    """Read the small files of a tokenizer's directory.

    Raises:
        ModelNotFoundError: there is no tokenizer in it.
        TokenizerError: a file is damaged.
    """
    files = TokenizerFiles(root=root, settings=_read(root / SETTINGS))
    if not (files.pipeline or files.vocabulary or files.sentencepiece):
        raise ModelNotFoundError(
            f"{root} has no tokenizer: looked for {TOKENIZER}, for {VOCAB} with {MERGES}, and for "
            f"{SENTENCEPIECE}"
        )
    given = files.settings.pop("added_tokens_decoder", None) or {}
    if not isinstance(given, dict):
        raise TokenizerError(f"{root / SETTINGS}: added_tokens_decoder has to be an object")
    files.added = {
        _as_id(index, SETTINGS): _as_token(token, SETTINGS) for index, token in given.items()
    }
    roles = _read(root / SPECIAL_TOKENS)
    known = (*NAMED_TOKENS, "additional_special_tokens", "extra_special_tokens")
    for role in known:
        if roles.get(role) is not None and role not in files.settings:
            files.settings[role] = roles[role]
    check_values(files.settings, lambda reason: TokenizerError(f"{root / SETTINGS}: {reason}"))
    special = {
        token["content"] if isinstance(token, dict) else token
        for role in known
        for token in _as_list(files.settings.get(role))
    }
    by_text = {token.content: index for index, token in files.added.items()}
    for text, index in _read(root / ADDED_TOKENS).items():
        if not is_text(text):
            raise TokenizerError(f"{root / ADDED_TOKENS}: {shown(text)} is not a token")
        if text not in by_text:
            is_special = text in special
            token = AddedToken(text, special=is_special, normalized=not is_special)
            files.added[_as_id(index, ADDED_TOKENS)] = token
    files.chat_template = _read_templates(root, files.settings.pop("chat_template", None))
    return files


def read_pipeline(path: Path) -> Tokenizer:
    """Read a `tokenizer.json`.

    Raises:
        TokenizerError: it is damaged, or for a version of `tokenizers` that is not installed.
    """
    with guarded(f"{shown(str(path))} is not a readable tokenizer; fetch the file again"):
        check_size(path, MAX_LISTING_BYTES)
        return Tokenizer.from_file(str(path))


def add_with_ids(backend: Tokenizer, added: Mapping[int, AddedToken]) -> None:
    """Add missing tokens in the order of their ids.

    Raises:
        TokenizerError: a token would get another id than the files say.
    """
    for index, token in sorted(added.items()):
        if backend.token_to_id(token.content) is None:
            backend.add_tokens([token])
        found = backend.token_to_id(token.content)
        if found != index:
            raise TokenizerError(
                f"the token {shown(token.content)} has the id {index} in {SETTINGS} (or "
                f"{ADDED_TOKENS}), but the vocabulary gives it {found}; the files are of "
                "different tokenizers"
            )


def template_files(template: str | Mapping[str, str] | None) -> dict[str, str]:
    """Return the template files by name.

    Raises:
        SaveError: a name is not one of a file.
    """
    named = template if isinstance(template, Mapping) else {"default": template}
    files = {}
    for name, source in named.items():
        if source is None:
            continue
        if Path(f"{name}.jinja").name != f"{name}.jinja" or name in ("", ".", ".."):
            raise SaveError(f"the chat template's name {shown(name)} is not a name for a file")
        files[TEMPLATE if name == "default" else f"{TEMPLATES}/{name}.jinja"] = source
    return files


def template_settings(template: str | Mapping[str, str] | None, root: Path) -> dict[str, Any]:
    """Return chat templates in the legacy settings format.

    Raises:
        SaveError: the directory has a file with a template, which would win.
    """
    for name in (TEMPLATE, TEMPLATES):
        if (root / name).exists():
            raise SaveError(
                f"{root / name} would be read in place of what save_jinja_files=False writes into "
                f"{SETTINGS}; remove it"
            )
    if isinstance(template, Mapping):
        named = [{"name": name, "template": source} for name, source in template.items()]
        return {"chat_template": named}
    return {} if template is None else {"chat_template": template}


def token_flags(token: AddedToken) -> dict[str, Any]:
    """Return an added token's entry in `added_tokens_decoder`."""
    return {
        "content": token.content,
        "lstrip": token.lstrip,
        "normalized": token.normalized,
        "rstrip": token.rstrip,
        "single_word": token.single_word,
        "special": token.special,
    }


def json_text(value: Any) -> str:
    """Return a value as the text of a file."""
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def save_directory(path: str | os.PathLike[str]) -> Path:
    """Check a path to save into.

    Raises:
        SaveError: it is a file.
        InputError: it is no path, or one that no folder can have.
    """
    root = checked_path(path, "save_directory")
    if root.is_file():
        raise SaveError(f"{root} is a file; a tokenizer is saved into a directory")
    return root


def _read_templates(root: Path, settings: Any) -> str | dict[str, str] | None:
    """Read templates from files, else from the settings."""
    named: dict[str, str] = {}
    if isinstance(settings, list):
        try:
            named = {entry["name"]: entry["template"] for entry in settings}
        except (TypeError, KeyError):
            raise TokenizerError(
                f"{root / SETTINGS}: chat_template has to be a string, or a list of objects "
                "with 'name' and 'template'"
            ) from None
    elif settings is not None:
        named = dict(settings) if isinstance(settings, dict) else {"default": settings}
    if _found(root / TEMPLATE):
        named["default"] = _text(root / TEMPLATE)
    for path in sorted((root / TEMPLATES).glob("*.jinja")):
        named[path.stem] = _text(path)
    if not named:
        return None
    return named["default"] if list(named) == ["default"] else named


def _text(path: Path) -> str:
    try:
        return read_text(path)
    except (CheckpointError, OSError) as error:
        raise TokenizerError(str(error)) from error


def existing(path: str | os.PathLike[str]) -> Path:
    """Return the path of a file that a caller names.

    Raises:
        ModelNotFoundError: there is none.
    """
    with suppress(OSError, ValueError):
        if Path(path).is_file():
            return Path(path)
    raise ModelNotFoundError(f"there is no file {shown(os.fspath(path))}")


def _found(path: Path) -> Path | None:
    """Return the path of a regular file, or None."""
    if path.is_file():
        return path
    if path.exists() or path.is_symlink():
        raise TokenizerError(f"{path} is not a file; remove it, or put the file in its place")
    return None


def _read(path: Path) -> dict[str, Any]:
    if _found(path) is None:
        return {}
    try:
        value = read_json(path)
    except (CheckpointError, OSError) as error:
        raise TokenizerError(str(error)) from error
    if not is_text(json.dumps(value, ensure_ascii=False)):
        raise TokenizerError(f"{path} holds half of a surrogate pair, so it is not Unicode text")
    return value


def _as_list(value: Any) -> list[Any]:
    if isinstance(value, dict) and "content" not in value:
        return list(value.values())
    return value if isinstance(value, list) else [] if value is None else [value]


def _as_id(index: Any, file: str) -> int:
    with suppress(TypeError, ValueError):
        if isinstance(index, str | int) and 0 <= int(index) < 2**32:
            return int(index)
    raise TokenizerError(f"{file}: {shown(index)} is not a token id")


def _as_token(token: Any, file: str) -> AddedToken:
    if not isinstance(token, dict) or not is_text(token.get("content")):
        raise TokenizerError(f"{file}: {shown(token)} is not an added token")
    flags = {name: bool(token[name]) for name in _FLAGS if name in token}
    return AddedToken(token["content"], **flags)
