"""JSON schemas, checked before anything is made of them."""

import json
from collections.abc import Mapping
from typing import Any

from quintet.errors import GrammarError, shown

__all__ = ["checked_schema"]


def checked_schema(schema: Mapping[str, Any] | str, most: int) -> str:
    """Return the text of a schema.

    Args:
        schema: it, or its text.
        most: how many bytes it may have.

    Raises:
        GrammarError: it is none.
    """
    try:
        text = schema if isinstance(schema, str) else json.dumps(schema, allow_nan=False)
        found = json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise GrammarError(f"the JSON schema is no JSON: {shown(str(error))}") from None
    if not isinstance(found, dict):
        raise GrammarError(f"the JSON schema {shown(found)} has to be an object")
    text = json.dumps(found, separators=(",", ":"))
    if len(text) > most:
        raise GrammarError(
            f"the JSON schema has {len(text):,} bytes, and at most {most:,} are read; shorten it"
        )
    return text
