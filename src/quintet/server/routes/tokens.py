"""Text to tokens and back, as programs ask that count, or score, with the server's tokenizer."""

import asyncio
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import JSONResponse

from quintet.server.bodies import documented, received
from quintet.server.conversation import render, too_long
from quintet.server.failures import invalid
from quintet.server.protocol.common import Body, unsupported, warnings_header, within
from quintet.server.protocol.prompts import placed
from quintet.server.questions import Conversation
from quintet.server.registry import ServedModel
from quintet.server.service import Service, service_of

router = APIRouter(tags=["tokens"])
# Ids of tokens that may be written at once, for each that a row has.
ROWS = 4


class PlainMessage(Body):
    """A message.

    Attributes:
        role: whose.
        content: its text.
    """

    role: Literal["system", "user", "assistant"]
    content: str


class Tokenize(Body):
    """The body of a request to tokenize a text or a conversation.

    Attributes:
        model: the model; the first if not given.
        prompt: the text.
        messages: the conversation, as the model's template writes it.
        add_generation_prompt: conversations end with what asks for an answer.
        add_special_tokens: whether a text gets those that the tokenizer puts around it; it does if
            not given.
        return_token_strs: whether to tell each token's text, too.
    """

    REFUSED: ClassVar[Mapping[str, str]] = {
        "chat_template": "the model's own is used",
        "tools": "leave them out",
    }

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[PlainMessage], Field(min_length=1, fail_fast=True)] | None = None
    add_generation_prompt: bool | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class Detokenize(Body):
    """The body of a request for the text of tokens.

    Attributes:
        model: the model; the first if not given.
        tokens: ids.
    """

    model: str | None = None
    tokens: Annotated[list[Annotated[int, Field(ge=0, le=2**31 - 1)]], Field(fail_fast=True)]


@router.post("/tokenize", openapi_extra=documented(Tokenize))
async def tokenize(request: Request) -> JSONResponse:
    """Return the tokens of a text or conversation, and the maximum of a prompt."""
    service = service_of(request)
    body, warnings = await received(request, Tokenize)
    if (body.prompt is None) == (body.messages is None):
        raise invalid("there has to be either a prompt or messages", "prompt")
    if body.add_generation_prompt is False:
        raise unsupported(
            "add_generation_prompt", "conversations end with what asks for an answer; leave it out"
        )
    within("messages", len(body.messages or []), service.settings.messages)
    served = await _named(service, body.model)
    with placed("prompt" if body.messages is None else "messages"):
        ids = await asyncio.to_thread(_ids, served, body)
    spelt = None
    if body.return_token_strs:
        spelt = await asyncio.to_thread(served.tokenizer.convert_ids_to_tokens, ids)
    return JSONResponse(
        {
            "count": len(ids),
            "max_model_len": served.context,
            "tokens": ids,
            "token_strs": spelt,
        },
        headers=warnings_header(warnings),
    )


@router.post("/detokenize", openapi_extra=documented(Detokenize))
async def detokenize(request: Request) -> JSONResponse:
    """Return the text of tokens."""
    service = service_of(request)
    body, warnings = await received(request, Detokenize)
    served = await _named(service, body.model)
    within("tokens", len(body.tokens), ROWS * served.context, "ids")
    most = max(len(served.tokenizer), served.engine.model.config.vocab_size)
    for place, token in enumerate(body.tokens):
        if token >= most:
            raise invalid(
                f"tokens[{place}] is {token}; ids of this model are from 0 to {most - 1}",
                f"tokens[{place}]",
            )
    text = await asyncio.to_thread(served.tokenizer.decode, body.tokens)
    return JSONResponse({"prompt": text}, headers=warnings_header(warnings))


@router.get("/tokenizer_info")
async def tokenizer_info(request: Request, model: str | None = None) -> dict[str, Any]:
    """Return the special tokens and the template, so that a program can write prompts."""
    served = await _named(service_of(request), model)
    tokenizer = served.tokenizer
    named = {
        name: token
        for name, token in tokenizer.special_tokens_map.items()
        if isinstance(token, str)
    }
    template = tokenizer.chat_template
    return {
        "tokenizer_class": type(tokenizer).__name__,
        **dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token")),
        **named,
        "chat_template": template if isinstance(template, str) else (template or {}).get("default"),
        "model_max_length": served.context,
        "vocab_size": len(tokenizer),
    }


async def _named(service: Service, name: str | None) -> ServedModel:
    """Return the model of a name; the first where there is none, as lm-eval names none."""
    return await service.registry.get(name or service.registry.offers[0].name)


def _ids(served: ServedModel, body: Tokenize) -> list[int]:
    # As much as would be taken as a prompt, several times: it is what programs count for.
    if body.messages is not None:
        messages = tuple({"role": one.role, "content": one.content} for one in body.messages)
        conversation = Conversation(messages=messages)
        return list(render(served.tokenizer, conversation, served.context).ids)
    assert body.prompt is not None
    too_long(served.tokenizer, body.prompt, ROWS * served.context)
    return served.tokenizer.encode(
        body.prompt, add_special_tokens=body.add_special_tokens is not False, verbose=False
    )
