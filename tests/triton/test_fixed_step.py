"""A step of fixed shapes keeps and attends by the kernels that read lengths on the device."""

from typing import Any

import pytest
import torch
from torch import Tensor

from conformance.families import FAMILIES, Family, each
from generation.sequences import prompt_of
from quintet.backends import REGISTRY, Backend, Implementation
from quintet.generation.engine import Engine
from quintet.generation.fixed_step import Recording

pytest.importorskip("triton", reason="Triton is made for Linux")

from quintet.triton.attention import attend_pages
from quintet.triton.keeping import rotate_and_keep

# Blocks of this family may leave positions out.
ROTATING = {"zamba2": {"use_mem_rope": True}}
PLAIN: dict[str, Any] = {"eos_token_id": -1, "pad_token_id": 0, "do_sample": False}


@each
def test_rows_are_attended_to_by_lengths_on_the_device(
    family: Family, fresh: pytest.MonkeyPatch
) -> None:
    # Of a CPU, which would run over a few tokens of all layers at once.
    fresh.setenv("QUINTET_KERNELS", "0")
    calls: list[bool] = []
    writes: list[bool] = []

    def keep(*given: Any, **how: Any) -> Tensor | None:
        made = rotate_and_keep(*given, **how)
        writes.append(made is not None)
        return made

    def attend(*given: Any, **how: Any) -> Tensor | None:
        made = attend_pages(*given, **how)
        calls.append(made is not None)
        return made

    floats = frozenset({torch.float32})
    kernels = {
        "attention over pages": (Implementation(attend, floats),),
        "rotate and keep": (Implementation(keep, floats),),
    }
    backend = Backend(name="pages", device="cpu", implementations=kernels, missing=lambda: None)
    model = family.model_of(**family.shallow, **ROTATING.get(family.name, {}))
    engine = Engine(model, 3, 12, recording=Recording())
    prompts = [prompt_of(length, length) for length in (2, 5, 3)]
    sequences = [engine.sequence(one, max_new_tokens=4, **PLAIN) for one in prompts]
    with REGISTRY.registered(backend):
        for sequence in sequences:
            engine.add(sequence)
            engine.step(engine.sequences)
        while not all(one.finished for one in sequences):
            engine.step(sequences)
    # Two prompts beside steps, and three steps. Latents of a prompt are attended to apart.
    attending = len(family.attends(model.config))
    apart = 2 if vars(model.config).get("kv_lora_rank") else 1
    assert writes == [True] * attending * (2 + 3)
    assert calls == [True] * attending * (2 * apart + 3)
    for prompt, sequence in zip(prompts, sequences, strict=True):
        made = model.generate(prompt, max_new_tokens=4, **PLAIN)
        assert sequence.new == made[0, prompt.shape[1] :].tolist()


def test_windows_are_kept_to() -> None:
    model = FAMILIES[0].model_of(use_sliding_window=True, sliding_window=4, max_window_layers=0)
    seen: list[int | None] = []

    def attend(*given: Any, window: int | None, **how: Any) -> Tensor | None:
        seen.append(window)
        return attend_pages(*given, window=window, **how)

    kernel = {"attention over pages": (Implementation(attend, frozenset({torch.float32})),)}
    backend = Backend(name="pages", device="cpu", implementations=kernel, missing=lambda: None)
    engine = Engine(model, 1, 40, recording=Recording())
    sequence = engine.sequence(prompt := prompt_of(9, 1), max_new_tokens=4, **PLAIN)
    engine.add(sequence)
    with REGISTRY.registered(backend):
        while not sequence.finished:
            engine.step([sequence])
    assert set(seen) == {4}
    assert sequence.new == model.generate(prompt, max_new_tokens=4, **PLAIN)[0, 9:].tolist()
