"""A model becomes a file of another program's format."""

from quintet.exporting.gguf import GGUF_TYPES, export_gguf

__all__ = ["GGUF_TYPES", "export_gguf"]
