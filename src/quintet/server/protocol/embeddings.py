"""`/v1/embeddings`: what to make vectors of, and how they are written."""

import base64
import struct
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from quintet.server.protocol.common import Body


class EmbeddingsRequest(Body):
    """Texts to make vectors of."""

    IDLE = frozenset({"user"})
    REFUSED: ClassVar[Mapping[str, str]] = {
        "dimensions": "vectors are as long as the model's states; cut them yourself",
        "truncate_prompt_tokens": "send as much of the text as fits",
    }

    model: Annotated[str, Field(min_length=1, max_length=512)]
    input: str | list[Any]
    encoding_format: Literal["float", "base64"] | None = None
    pooling: Literal["last", "mean"] | None = None
    normalize: bool | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    priority: Annotated[int, Field(ge=-1000, le=1000)] | None = None


def embeddings(
    body: EmbeddingsRequest, vectors: Sequence[Sequence[float]], tokens: int
) -> dict[str, Any]:
    """Return vectors as clients read them."""
    return {
        "object": "list",
        "model": body.model,
        "data": [
            {
                "object": "embedding",
                "index": index,
                "embedding": _packed(one) if body.encoding_format == "base64" else list(one),
            }
            for index, one in enumerate(vectors)
        ],
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


def _packed(vector: Sequence[float]) -> str:
    # Clients read it as float32, the lowest byte first.
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
