"""Cases of models that several processes hold and save."""

import errno
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from parallel.cases.loading import loaded, logits
from parallel.cases.tensor import family, world
from quintet.checkpoint import disk
from quintet.errors import InputError, RankFailedError
from quintet.modeling.decoder import DecoderModel
from quintet.parallel.fsdp import divide


def save(
    name: str,
    source: Path,
    target: Path,
    degrees: dict[str, int],
    options: dict[str, Any],
    size: str,
) -> None:
    """Save a model that processes hold, and what one process saves of it."""
    cls, here = family(name).cls("ForCausalLM"), world(**degrees)
    if dist.get_rank() == 0:
        whole = loaded(cls, source, None, **options)
        whole.save_pretrained(target / "one", max_shard_size=size)  # type: ignore[operator]
    model = loaded(cls, source, here, **options)
    before = logits(model)
    # Whose main process a process is says the launcher; all take part.
    main = dist.get_rank() == 0
    model.save_pretrained(target / "several", main, max_shard_size=size)  # type: ignore[operator]
    again = logits(model)
    # Of stages the one with the head has them.
    assert again.is_meta or torch.equal(again, before)


def fill_disk(source: Path, target: Path) -> str:
    """Save where there is no room after a while; return what this process says."""
    model = loaded(family("qwen2").cls("ForCausalLM"), source, world(tp=2))
    model.save_pretrained(target)  # type: ignore[operator]
    with pytest.MonkeyPatch.context() as patch:
        write = disk.write

        def full(path: Path, chunks: Any) -> None:
            if path.suffix == ".safetensors":
                kept = [next(chunks) for _ in range(4)]
                assert kept
                raise OSError(errno.ENOSPC, "No space left on device", str(path))
            write(path, chunks)

        patch.setattr(disk, "write", full)
        with pytest.raises(RankFailedError) as caught:
            model.save_pretrained(target)  # type: ignore[operator]
    # They still talk, and save where there is room.
    model.save_pretrained(target)  # type: ignore[operator]
    return str(caught.value)


def nothing(source: Path, target: Path) -> None:
    """Save where no process is to write, and with options of one process."""
    model = loaded(family("qwen2").cls("ForCausalLM"), source, world(tp=2))
    model.save_pretrained(target, is_main_process=False)  # type: ignore[operator]
    assert not target.exists()
    with pytest.raises(InputError, match="state_dict"):
        model.save_pretrained(target, state_dict={})  # type: ignore[operator]


def slices(source: Path, target: Path) -> None:
    """Save a model of which each process has a slice of every weight."""
    here = world(fsdp=2)
    model = loaded(family("qwen2").cls("ForCausalLM"), source, here)
    assert isinstance(model.base_model, DecoderModel)
    divide(model, model.base_model.layers, here, low=False)
    model.save_pretrained(target)  # type: ignore[operator]
