"""The byte-level alphabet of printable characters."""


def _alphabet() -> dict[str, int]:
    """Return the byte of each letter."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable}
    return letters | {chr(0x100 + place): byte for place, byte in enumerate(others)}


BYTE_OF = _alphabet()


def token_bytes(token: str) -> bytes:
    """Return a token's bytes; one outside the alphabet is UTF-8."""
    try:
        return bytes([BYTE_OF[letter] for letter in token])
    except KeyError:
        return token.encode("utf-8")
