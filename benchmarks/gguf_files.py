"""Our checkpoints as llama.cpp's files, with the same weights.

Its own quantiser makes those of fewer bits, where its Python package is here; else ours does.
"""

import importlib.util
import warnings
from pathlib import Path

from quintet.exporting import export_gguf

__all__ = ["convert"]


def convert(checkpoint: Path, target: Path, weights: str) -> Path:
    """Return the file of a checkpoint in BF16, Q8_0 or Q4_0, writing it if it is not there."""
    if target.is_file():
        return target
    print(f"writing {target}", flush=True)
    if weights == "BF16" or importlib.util.find_spec("llama_cpp") is None:
        with warnings.catch_warnings():
            # They have no tokenizer: what is measured are ids.
            warnings.filterwarnings("ignore", message=".*no tokenizer")
            export_gguf(checkpoint, target, dtype=weights)
        return target
    source = convert(checkpoint, target.parent / f"{checkpoint.name}-BF16.gguf", "BF16")
    # A file is there whole or not at all.
    scratch = target.with_suffix(".part")
    _quantise(source, scratch, weights)
    scratch.rename(target)
    return target


def _quantise(source: Path, target: Path, weights: str) -> None:
    import llama_cpp

    kinds = {"Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, "Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0}
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = kinds[weights]
    failed = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), options)
    if failed:
        raise RuntimeError(f"llama.cpp could not quantise {source} to {weights}")
