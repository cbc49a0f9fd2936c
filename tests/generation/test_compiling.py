"""A compiled step makes the same tokens, is compiled once, and is found by other processes."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import quintet
from conformance.families import Family, each
from forking import Forks
from quintet import CompileConfig, GenerationConfig
from quintet.errors import InputError
from quintet.generation.compiling import compiled
from quintet.layers.norm import RMSNorm
from support import small_config


@each()
def test_the_tokens_are_the_same_and_the_step_is_compiled_once(family: Family) -> None:
    torch._dynamo.reset()
    model = family.model_of(**{**family.variants[family.thorough[0]], **family.shallow})
    ids = torch.randint(101, (2, 9), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    counter = CompileCounter()
    options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 12}
    plain = model.generate(ids, **options)
    config = CompileConfig(backend=counter, fullgraph=True)
    for _ in range(2):
        made = model.generate(ids, compile_config=config, **options)
        assert torch.equal(made, plain)
    # Another length of the text, but the same program.
    model.generate(ids, compile_config=config, max_new_tokens=3)
    assert counter.frame_count == 1


def test_hooks_that_change_after_compiling_are_obeyed_with_a_warning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch._dynamo.reset()
    model = quintet.Qwen2ForCausalLM(small_config()).eval()
    ids = torch.arange(9)[None]
    config = CompileConfig(backend=CompileCounter())
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
    plain = model.generate(ids, compile_config=config, **options)
    norm, calls = model.model.layers[1].input_layernorm, []

    def mine(self: RMSNorm, hidden_states: torch.Tensor) -> torch.Tensor:
        calls.append(self)
        return hidden_states

    handle = norm.register_forward_hook(lambda *_: calls.append(norm))
    with pytest.warns(UserWarning, match="without effect, compile=True"):
        model.generate(ids, compile_config=config, **options)
    # The prompt and four steps.
    assert len(calls) == 5
    handle.remove()
    assert torch.equal(model.generate(ids, compile_config=config, **options), plain)
    with monkeypatch.context() as patch:
        patch.setattr(RMSNorm, "forward", mine)
        with pytest.warns(UserWarning, match="without effect, compile=True"):
            model.generate(ids, compile_config=config, **options)
    assert len(calls) == 5 + 5 * (2 * model.config.num_hidden_layers + 1)
    assert torch.equal(model.generate(ids, compile_config=config, **options), plain)


def test_what_cannot_be_compiled_is_named() -> None:
    assert GenerationConfig(compile=True).cache.kind == "static"
    with pytest.raises(InputError, match="needs cache_implementation='static', not 'offloaded'"):
        GenerationConfig(compile=True, cache_implementation="offloaded")
    assert "compile_config" not in GenerationConfig(compile_config=CompileConfig()).to_dict()


COMPILER = """
import torch, torch._inductor.compile_fx
from torch._dynamo.utils import counters
from torch._inductor import config
from quintet.generation.compiling import CompileConfig, compiled
from quintet.layers.norm import RMSNorm
"""
# What is compiled is for no vectors: which ones the compiler knows is tried out for some seconds.
SCRIPT = f"""{COMPILER}
config.cpp.vec_isa_ok, config.compile_threads = False, 1
made = compiled(RMSNorm(8, 1e-6), CompileConfig())(torch.arange(8.0)[None])
found = counters["inductor"]["fxgraph_cache_hit"]
print(made[0].tolist(), found)
"""


def test_another_process_finds_the_program(tmp_path: Path) -> None:
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    # Our own kernels would be compiled for that cache as well.
    env["QUINTET_KERNELS"] = "0"
    env.pop("TORCHINDUCTOR_CACHE_DIR", None)
    forks = Forks(COMPILER)
    done = [forks.run(SCRIPT, environment=env) for _ in range(2)]
    forks.close()
    assert [one.returncode for one in done] == [0, 0], [one.stderr for one in done]
    runs = [one.stdout.split("]") for one in done]
    assert runs[0][0] == runs[1][0]
    assert int(runs[0][1]) == 0
    assert int(runs[1][1]) > 0
    assert (tmp_path / "quintet" / "inductor").is_dir()


# What torch's compiler says while it is imported.
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_without_a_cache_that_can_be_written_the_compiler_keeps_its_own_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A file in the place of the folder: permissions do not stop the superuser.
    (tmp_path / "quintet").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    compiled(quintet.Qwen2ForCausalLM(small_config()), CompileConfig())
    assert "quintet" not in os.environ.get("TORCHINDUCTOR_CACHE_DIR", "")
