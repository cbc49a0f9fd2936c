"""The packaged model, as if it could chat, and one whose answers break off."""

from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

from quintet.errors import EngineStoppedError
from quintet.server.registry import Loaded
from quintet.serving import Answer, Engine
from served import loaded

__all__ = ["Breaking", "chatting"]

TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}\n{% endif %}"
    "{% for message in messages %}<{{ message.role }}>{{ message.content or '' }}"
    "{% for call in message.tool_calls or [] %}{{ call.function.name }}"
    "{{ call.function.arguments | tojson }}{% endfor %}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


class Breaking(Engine):
    """Fails after the first pieces of an answer."""

    async def generate(self, *args: Any, **options: Any) -> AsyncIterator[Answer]:
        count = 0
        async for answer in super().generate(*args, **options):
            yield answer
            count += 1
            if count == 2:
                raise EngineStoppedError("it fell over")


def chatting(engine: type[Engine] = Engine) -> Loaded:
    it = loaded()
    it.tokenizer.chat_template = TEMPLATE
    if engine is not Engine:
        it.engine.close()
        it = replace(it, engine=engine(it.engine.model, it.tokenizer, it.engine.limits))
    return it
