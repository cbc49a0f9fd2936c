"""The chat page: its parts lie beside this file and are joined once.

It is plain HTML, CSS and JavaScript, without a step that builds it and without anything from
another server. A strict policy holds for it: browsers run the one script and the one style whose
hashes the header names, connect to this server alone, load no picture from elsewhere, and refuse
to make HTML of a text.
"""

import base64
import hashlib
import re
from dataclasses import dataclass
from importlib.resources import files

__all__ = ["Page", "join"]

# They share one scope, and a later one may use what an earlier one does when it runs.
SCRIPTS = (
    "dom",
    "markdown",
    "store",
    "client",
    "transcript",
    "answering",
    "drawer",
    "settings",
    "main",
)


@dataclass(frozen=True, slots=True)
class Page:
    """The page as sent."""

    body: bytes
    headers: dict[str, str]


def join() -> Page:
    """Join the parts of the page, with its security headers."""
    folder = files("quintet.server.page")

    def read(name: str) -> str:
        return (folder / name).read_text(encoding="utf-8")

    style = dense(read("style.css"))
    parts = [squeezed(read(f"{name}.js")) for name in SCRIPTS]
    script = "\n".join(('"use strict";(() => {', *parts, "})();"))
    text = "".join(map(str.strip, read("index.html").splitlines()))
    text = text.replace("{{style}}", style).replace("{{script}}", script)
    policy = {
        "default-src": "'none'",
        "script-src": _hash(script),
        "style-src": _hash(style),
        "connect-src": "'self'",
        "img-src": "'self' data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
    }
    headers = {
        "Content-Type": "text/html; charset=utf-8",
        "Content-Security-Policy": "; ".join(map(" ".join, policy.items())),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        # A page of an earlier version would not fit the server.
        "Cache-Control": "no-cache",
    }
    return Page(text.encode(), headers)


def squeezed(source: str) -> str:
    """Minify CSS or JavaScript: indents, blank lines, whole-line comments.

    No text between quotes goes over the end of a line in these files.
    """
    lines = []
    inside = False
    for line in map(str.strip, source.splitlines()):
        inside = inside or line.startswith("/*")
        if line and not inside and not line.startswith("//"):
            lines.append(line)
        inside = inside and not line.endswith("*/")
    return "\n".join(lines)


def dense(source: str) -> str:
    """Minify CSS further."""
    text = re.sub(r"(?<=[{};:,])\s|\s(?=[{}])|;\s(?=})", "", squeezed(source))
    return re.sub(r"\b0(?=\.\d)", "", text)


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
