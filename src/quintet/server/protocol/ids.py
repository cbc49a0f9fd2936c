"""Ids of answers: a kind, and random letters that nobody guesses."""

import uuid


def new_id(kind: str) -> str:
    """Return a name that was not given before, as `resp_0a1b…`."""
    return f"{kind}_{uuid.uuid4().hex}"
