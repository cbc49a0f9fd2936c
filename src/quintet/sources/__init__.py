"""Which file in GGUF a name means: a path, a hub id, or what another program keeps."""

from quintet.sources.find import Found, find_gguf
from quintet.sources.smollm2 import fetch_smollm2

__all__ = ["Found", "fetch_smollm2", "find_gguf"]
