"""The vocabulary of a tokenizer, with added and special tokens."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, overload

from tokenizers import AddedToken, Tokenizer

from quintet.errors import InputError, TokenizerError, shown
from quintet.tokenization.options import NAMED_TOKENS, check_names, is_text

MAX_GAP = 1_000_000


def _several(value: object) -> bool:
    return isinstance(value, Iterable) and not isinstance(value, str | bytes)


class _Role:
    """A special token: `tokenizer.eos_token`, settable, None to remove."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.role = name

    def __get__(self, owner: "Vocabulary", kind: type) -> str | None:
        return owner._named.get(self.role)

    def __set__(self, owner: "Vocabulary", token: str | AddedToken | None) -> None:
        if token is None:
            owner._named.pop(self.role, None)
            return
        if not isinstance(token, str | AddedToken):
            raise InputError(f"{self.role}={shown(token)} has to be a token or None")
        owner._known(self.role, token_text(token))
        owner._named[self.role] = token_text(token)


class _RoleId:
    """The id of a special token: `tokenizer.eos_token_id`."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.role = name.removesuffix("_id")

    def __get__(self, owner: "Vocabulary", kind: type) -> int | None:
        token = owner._named.get(self.role)
        return None if token is None else owner._known(self.role, token)

    def __set__(self, owner: "Vocabulary", index: int | None) -> None:
        if index is None:
            owner._named.pop(self.role, None)
            return
        token = owner.convert_ids_to_tokens(index)
        if token is None:
            raise InputError(
                f"{self.role}_id={index} is outside of a vocabulary of {len(owner)} tokens"
            )
        owner._named[self.role] = token


class Vocabulary:
    """The tokens of a pipeline; base of all tokenizers."""

    bos_token = _Role()
    eos_token = _Role()
    unk_token = _Role()
    sep_token = _Role()
    pad_token = _Role()
    cls_token = _Role()
    mask_token = _Role()
    bos_token_id = _RoleId()
    eos_token_id = _RoleId()
    unk_token_id = _RoleId()
    sep_token_id = _RoleId()
    pad_token_id = _RoleId()
    cls_token_id = _RoleId()
    mask_token_id = _RoleId()

    def __init__(self, backend: Tokenizer) -> None:
        self._tokenizer = backend
        self._named: dict[str, str] = {}
        self._additional: list[str] = []

    if not TYPE_CHECKING:  # a misspelt name stays one for type checkers

        def __getattr__(self, name: str) -> Any:
            # `copy` and `pickle` ask for names before there are any.
            named = self.__dict__.get("_named", {})
            if name in named:
                return named[name]
            if name.endswith("_id") and name[:-3] in named:
                return self._known(name[:-3], named[name[:-3]])
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        named = self.__dict__.get("_named", {})
        if name in named and name not in NAMED_TOKENS:
            if not isinstance(value, str | AddedToken):
                raise InputError(f"{name}={shown(value)} has to be a token")
            self._known(name, token_text(value))
            named[name] = token_text(value)
        else:
            super().__setattr__(name, value)

    # -- sizes and look-ups -------------------------------------------------------------------

    @property
    def backend_tokenizer(self) -> Tokenizer:
        """The pipeline of the `tokenizers` library that does the work."""
        return self._tokenizer

    @property
    def vocab_size(self) -> int:
        """The size of the model's vocabulary, without added tokens."""
        return self._tokenizer.get_vocab_size(with_added_tokens=False)

    def __len__(self) -> int:
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def __bool__(self) -> bool:
        return True

    def get_vocab(self) -> dict[str, int]:
        """Return all tokens and ids, added ones included."""
        return self._tokenizer.get_vocab(with_added_tokens=True)

    @property
    def vocab(self) -> dict[str, int]:
        """The same as `get_vocab()`."""
        return self.get_vocab()

    @property
    def added_tokens_decoder(self) -> dict[int, AddedToken]:
        """The added tokens by id."""
        return dict(sorted(self._tokenizer.get_added_tokens_decoder().items()))

    @property
    def added_tokens_encoder(self) -> dict[str, int]:
        """The ids of the added tokens."""
        return {token.content: index for index, token in self.added_tokens_decoder.items()}

    def get_added_vocab(self) -> dict[str, int]:
        """Return the ids of the added tokens."""
        return self.added_tokens_encoder

    @overload
    def convert_tokens_to_ids(self, tokens: str | None) -> int | None: ...
    @overload
    def convert_tokens_to_ids(self, tokens: list[str] | tuple[str, ...]) -> list[int | None]: ...
    def convert_tokens_to_ids(
        self, tokens: str | list[str] | tuple[str, ...] | None
    ) -> int | list[int | None] | None:
        """Return the id of a token, or of each; an unknown one is `unk_token_id`, and None none.

        Raises:
            InputError: what is given is neither a token nor several.
        """
        if tokens is None:
            # A role that no token has: tokenizer.convert_tokens_to_ids(tokenizer.unk_token).
            return None
        if isinstance(tokens, str):
            index = self._tokenizer.token_to_id(tokens)
            return self.unk_token_id if index is None else index
        if not _several(tokens):
            raise InputError(f"tokens are a {type(tokens).__name__}; give a token, or several")
        return [self.convert_tokens_to_ids(token) for token in tokens]

    @overload
    def convert_ids_to_tokens(self, ids: int, skip_special_tokens: bool = False) -> str | None: ...
    @overload
    def convert_ids_to_tokens(
        self, ids: Iterable[int], skip_special_tokens: bool = False
    ) -> list[str | None]: ...
    def convert_ids_to_tokens(
        self, ids: int | Iterable[int], skip_special_tokens: bool = False
    ) -> str | list[str | None] | None:
        """Return the token of an id, or of each; None for unknown ids.

        Raises:
            InputError: an id is negative, or what is given is none.
        """
        if isinstance(ids, int):
            if ids < 0:
                raise InputError(f"{ids} is not a token id; ids are at least 0")
            return self._tokenizer.id_to_token(ids) if ids < 2**32 else None
        if not _several(ids):
            raise InputError(f"ids are a {type(ids).__name__}; give an id, or several")
        skipped = set(self.all_special_ids) if skip_special_tokens else set()
        return [
            self.convert_ids_to_tokens(index) for index in map(int, ids) if index not in skipped
        ]

    @property
    def pad_token_type_id(self) -> int:
        """The segment of padding."""
        return 0

    # -- added tokens -------------------------------------------------------------------------

    def add_tokens(
        self,
        new_tokens: str | AddedToken | Sequence[str | AddedToken],
        special_tokens: bool = False,
    ) -> int:
        """Add tokens; return the number of new ones.

        A model needs `resize_token_embeddings(len(tokenizer))` before it knows their ids.

        Raises:
            InputError: one is no token.
        """
        given: Any = [new_tokens] if isinstance(new_tokens, str | AddedToken) else new_tokens
        if isinstance(given, bytes) or not isinstance(given, Iterable):
            raise InputError(f"new_tokens={shown(given)} has to be a token or a list of them")
        tokens = list(given)
        for token in tokens:
            if not isinstance(token, AddedToken) and not (
                isinstance(token, str) and is_text(token)
            ):
                raise InputError(f"{shown(token)} in new_tokens has to be text, or an AddedToken")
        size = len(self)
        if special_tokens:
            self._tokenizer.add_special_tokens(tokens)
        else:
            self._tokenizer.add_tokens(tokens)
        return len(self) - size

    def add_special_tokens(
        self,
        special_tokens_dict: Mapping[str, str | AddedToken | Sequence[str | AddedToken]],
        replace_additional_special_tokens: bool = True,
        *,
        replace_extra_special_tokens: bool = True,
    ) -> int:
        """Set special tokens, adding new ones; return their number.

        Args:
            special_tokens_dict: `{"pad_token": "[PAD]", "additional_special_tokens": [...]}`.
            replace_additional_special_tokens: whether the list given takes the place of the
                one there is, or is appended to it.
            replace_extra_special_tokens: the name Transformers 5 has for the same.

        Raises:
            InputError: an unknown role, or the list of tokens without a role by both its names.
        """
        lists = ("additional_special_tokens", "extra_special_tokens")
        if not isinstance(special_tokens_dict, Mapping):
            raise InputError(
                f"special_tokens_dict={shown(special_tokens_dict)} has to be a mapping of roles to "
                "tokens, such as {'pad_token': '[PAD]'}"
            )
        if all(name in special_tokens_dict for name in lists):
            raise InputError(f"{' and '.join(lists)} are names of one list; give it once")
        replace = replace_additional_special_tokens and replace_extra_special_tokens
        check_names(
            "add_special_tokens", special_tokens_dict, {*NAMED_TOKENS, *lists, *self._named}
        )
        given = dict(special_tokens_dict)
        if lists[0] in given:
            # Which token gets which id goes by the order, and Transformers renames first.
            given[lists[1]] = given.pop(lists[0])
        added = 0
        for role, value in given.items():
            if role in lists:
                if isinstance(value, str | AddedToken):
                    raise InputError(f"{role}={shown(value)} has to be a list of tokens")
                tokens = list(value)
                names = [token_text(token) for token in tokens]
                existing = [] if replace else self._additional
                self._additional = [*existing, *(name for name in names if name not in existing)]
            else:
                if not isinstance(value, str | AddedToken):
                    raise InputError(f"{role}={shown(value)} has to be a token")
                tokens = [value]
                self._named[role] = token_text(value)
            added += self.add_tokens(tokens, special_tokens=True)
        return added

    # -- tokens with a role -------------------------------------------------------------------

    @property
    def special_tokens_map(self) -> dict[str, str]:
        """The special tokens by role; named ones last."""
        usual = {role: self._named[role] for role in NAMED_TOKENS if role in self._named}
        return usual | self._named

    @property
    def additional_special_tokens(self) -> list[str]:
        """Special tokens without a role."""
        return list(self._additional)

    @additional_special_tokens.setter
    def additional_special_tokens(self, tokens: Sequence[str]) -> None:
        for token in tokens:
            self._known("additional_special_tokens", token)
        self._additional = list(tokens)

    @property
    def extra_special_tokens(self) -> list[str]:
        """Transformers 5's name of `additional_special_tokens`."""
        return self.additional_special_tokens

    @extra_special_tokens.setter
    def extra_special_tokens(self, tokens: Sequence[str]) -> None:
        self.additional_special_tokens = list(tokens)

    @property
    def extra_special_tokens_ids(self) -> list[int]:
        """The ids of `extra_special_tokens`."""
        return self.additional_special_tokens_ids

    @property
    def additional_special_tokens_ids(self) -> list[int]:
        """The ids of `additional_special_tokens`."""
        return [self._known("additional_special_tokens", token) for token in self._additional]

    @property
    def all_special_tokens(self) -> list[str]:
        """All special tokens, each once."""
        return list(dict.fromkeys([*self.special_tokens_map.values(), *self._additional]))

    @property
    def all_special_ids(self) -> list[int]:
        """The ids of `all_special_tokens`."""
        return [self._known("special token", token) for token in self.all_special_tokens]

    def _known(self, role: str, token: str) -> int:
        index: int | None = self._tokenizer.token_to_id(token)
        if index is None:
            missing = shown(token)
            raise TokenizerError(
                f"{role}={missing} is not in the vocabulary; add it with "
                f"add_special_tokens({{{role!r}: {missing}}}) and resize the model's embeddings"
            )
        return index


def token_text(token: Any) -> str:
    """Return a token's text, in whatever form it is given.

    Raises:
        TokenizerError: it is neither a string, an `AddedToken` nor their JSON form.
    """
    if isinstance(token, str):
        return token
    if isinstance(token, AddedToken):
        return token.content
    if isinstance(token, Mapping) and isinstance(token.get("content"), str):
        return str(token["content"])
    raise TokenizerError(f"{shown(token)} is not a token: a string, or an object with 'content'")


def check_gaps(vocabulary: Mapping[str, int]) -> None:
    """Refuse ids with large gaps.

    Raises:
        TokenizerError: an id is far beyond the number of tokens.
    """
    last = max(vocabulary.values(), default=0)
    if last > len(vocabulary) + MAX_GAP:
        raise TokenizerError(
            f"a token has the id {last} in a vocabulary of {len(vocabulary)} tokens; ids are "
            "counted from 0, with few gaps"
        )


def share_pipeline(source: Tokenizer, *, added_tokens: bool) -> Tokenizer:
    """Return a second pipeline on the same vocabulary, with settings of its own.

    The vocabulary is not copied, so this takes microseconds, and what is then switched in the
    second one is never seen by threads that use the first.
    """
    twin = Tokenizer(source.model)
    twin.normalizer = source.normalizer
    twin.pre_tokenizer = source.pre_tokenizer
    twin.post_processor = source.post_processor
    twin.decoder = source.decoder
    if added_tokens:
        added = source.get_added_tokens_decoder()
        twin.add_tokens([token for _, token in sorted(added.items())])
        if twin.get_added_tokens_decoder().keys() != added.keys():
            raise TokenizerError(
                "the added tokens of this tokenizer have ids with gaps, so special tokens can "
                "only be split for the whole tokenizer: pass split_special_tokens to its maker"
            )
    return twin
