"""Prompts as OpenAI's protocol has them: a text, ids, or a list of either."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from quintet.errors import ContextLengthError, DoesNotFitError, shown
from quintet.server.conversation import too_long
from quintet.server.failures import invalid
from quintet.server.protocol.common import within
from quintet.tokenization import PreTrainedTokenizer


@contextmanager
def placed(where: str) -> Iterator[None]:
    """Raise an error of length again as an ApiError that names the field `where`.

    Raises:
        ApiError: it has.
    """
    try:
        yield
    except (ContextLengthError, DoesNotFitError) as error:
        raise invalid(f"{where}: {error}", where, "context_length_exceeded") from None


def listed(given: str | list[Any], name: str, most: int) -> list[tuple[str, str | list[Any]]]:
    """Return each prompt with its place in the request.

    Raises:
        ApiError: none, too many, or some of text and some of ids.
    """
    if isinstance(given, str) or (given and not isinstance(given[0], str | list)):
        return [(name, given)]
    if not given:
        raise invalid(f"{name}: the list is empty", name)
    within(name, len(given), most, "texts")
    for index, one in enumerate(given):
        if type(one) is not type(given[0]):
            where = f"{name}[{index}]"
            raise invalid(f"{where}: they are all of text, or all of ids", where)
    return [(f"{name}[{index}]", one) for index, one in enumerate(given)]


def checked(given: Sequence[Any], where: str, context: int, vocab_size: int) -> tuple[int, ...]:
    """Return ids that are a model's.

    Raises:
        ApiError: there are none, or one is not.
        ContextLengthError: there are more than the context has room for.
    """
    if not given:
        raise invalid(f"{where}: it has no tokens; there has to be one at least", where)
    fitting(given, context)
    for index, one in enumerate(given):
        if type(one) is not int or not 0 <= one < vocab_size:
            place = f"{where}[{index}]"
            raise invalid(
                f"{place} is {shown(one)}; ids are whole numbers from 0 to {vocab_size - 1}", place
            )
    return tuple(given)


def fitting(ids: Sequence[int], context: int) -> tuple[int, ...]:
    """Return ids that the context has room for.

    Raises:
        ContextLengthError: there are more.
    """
    if len(ids) > context:
        raise ContextLengthError(
            f"the model's context is {context} tokens and the prompt has {len(ids)}; shorten it"
        )
    return tuple(ids)


def ids_of(
    given: str | list[Any],
    where: str,
    tokenizer: PreTrainedTokenizer,
    context: int,
    vocab_size: int,
) -> tuple[int, ...]:
    """Return the ids of one prompt; what is written in a text stays text.

    Raises:
        ApiError: it has none, or one is not the model's.
        ContextLengthError: there are more than the context has room for.
    """
    if isinstance(given, str):
        too_long(tokenizer, given, context)
        given = tokenizer(given, split_special_tokens=True)["input_ids"]
    return checked(given, where, context, vocab_size)
