"""Which file in GGUF a name means: a path, a hub id, or what another program keeps."""

from quintet.sources.find import Found, find_gguf

__all__ = ["Found", "find_gguf"]
