"""Texts that are read from files."""

from pathlib import Path

from quintet.errors import InputError, ModelNotFoundError


def text_of_file(name: str, most: int | None = None, first: int = -1) -> str:
    """Read a text of at most `most` bytes, or its first characters.

    Raises:
        ModelNotFoundError: there is no such file.
        InputError: it is too large, or not UTF-8.
    """
    path = Path(name).expanduser()
    if not path.is_file():
        raise ModelNotFoundError(f"there is no file {name!r}")
    if most is not None and path.stat().st_size > most:
        raise InputError(f"{name!r} has more than {most:,} bytes, which is too much for what it is")
    try:
        with path.open(encoding="utf-8") as file:
            return file.read(first)
    except UnicodeDecodeError:
        raise InputError(f"{name!r} is not UTF-8 text; convert it, e.g. with iconv") from None
