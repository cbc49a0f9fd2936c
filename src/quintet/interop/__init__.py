"""What lets tools made for Transformers take a model of this library. Needs Transformers."""

from quintet.interop.bridge import as_transformers

__all__ = ["as_transformers"]
