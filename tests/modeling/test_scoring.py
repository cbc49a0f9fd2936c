"""With labels, logits are made when somebody reads them, and nothing else tells that."""

import copy
import dataclasses
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from conformance.families import Family, each
from conformance.heads import ids_of, made
from quintet import LoraConfig, Qwen2Config, Qwen2ForCausalLM
from quintet.errors import InputError
from quintet.modeling import scoring
from quintet.modeling.outputs import CausalLMOutputWithPast
from quintet.ops.losses import next_token_loss
from support import relative_error
from waiting import PATIENCE


@pytest.fixture
def model() -> Qwen2ForCausalLM:
    torch.manual_seed(1)
    config = Qwen2Config(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,
    )
    return Qwen2ForCausalLM(config).train()


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Notes each time that logits are made."""
    noted: list[str] = []
    make = scoring._Matrix.logits

    def noting(self: Any, hidden: Tensor) -> Tensor:
        noted.append("logits")
        return make(self, hidden)

    monkeypatch.setattr(scoring._Matrix, "logits", noting)
    return noted


def labelled(model: Any, ids: Tensor, **options: Any) -> Any:
    return model(ids, labels=ids, use_cache=False, output_hidden_states=True, **options)


def gradients(model: Any) -> list[Tensor]:
    found = [p.grad for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return found


READINGS: dict[str, Callable[[Any], Any]] = {
    "attribute": lambda out: out.logits,
    "name": lambda out: out["logits"],
    "get": lambda out: out.get("logits"),
    "place": lambda out: out[1],
    "last place": lambda out: out[-2],
    "slice": lambda out: out[:2][1],
    "tuple": lambda out: out.to_tuple()[1],
    "values": lambda out: list(out.values())[1],
    "items": lambda out: dict(out.items())["logits"],
    "dict": lambda out: dict(out)["logits"],
    "names and values": lambda out: {**out}["logits"],
    "arguments": lambda out: (lambda logits, **others: logits)(**out),
    "keys": lambda out: [out[name] for name in out.keys()][1],  # noqa: SIM118
    "loop": lambda out: [out[name] for name in out][1],
    "copy": lambda out: copy.copy(out).logits,
    "own copy": lambda out: out.copy()["logits"],
    "update": lambda out: CausalLMOutputWithPast(out).logits,
    "union": lambda out: (out | {})["logits"],
    "pop": lambda out: out.pop("logits"),
    "tree": lambda out: pytree.tree_flatten(out)[0][1],
    "map": lambda out: pytree.tree_map_only(Tensor, lambda x: x, out).logits,
    "replace": lambda out: dataclasses.replace(out, loss=None).logits,
    "getattr": lambda out: getattr(out, "logits"),  # noqa: B009
}


@pytest.mark.parametrize("way", READINGS)
def test_logits_are_there_for_whoever_reads_them(
    model: Qwen2ForCausalLM, read: list[str], way: str
) -> None:
    ids = torch.randint(50, (2, 7))
    out = labelled(model, ids)
    assert list(out) == ["loss", "logits", "hidden_states"]
    assert len(out) == 3
    assert "logits" in out
    assert out.loss is out[0] is out["loss"] is out.get("loss")
    assert read == []
    logits = READINGS[way](out)
    assert read == ["logits"]
    plain = model(ids, use_cache=False).logits
    assert torch.equal(logits, plain)
    logits.square().sum().backward()
    ours = gradients(model)
    plain.square().sum().backward()
    assert all(map(torch.equal, ours, gradients(model)))


def test_logits_once_made_stay(model: Qwen2ForCausalLM, read: list[str]) -> None:
    out = labelled(model, ids_of() % 50)
    assert out.logits is out.logits is out["logits"] is out[1]
    assert read == ["logits"]


def test_logits_that_are_replaced_or_left_out_are_not_made(
    model: Qwen2ForCausalLM, read: list[str]
) -> None:
    out = labelled(model, ids_of() % 50)
    out.logits = torch.ones(1)
    assert out[1] is out.logits
    out = labelled(model, ids_of() % 50)
    del out["logits"]
    assert list(out) == ["loss", "hidden_states"]
    assert out.logits is None
    out = labelled(model, ids_of() % 50)
    out.logits = None
    assert "logits" not in out
    assert read == []


@torch.no_grad()
def test_an_output_is_pickled_with_its_logits(model: Qwen2ForCausalLM) -> None:
    out = labelled(model, ids_of() % 50)
    again = pickle.loads(pickle.dumps(out))
    assert list(again) == list(out)
    assert torch.equal(again.logits, out.logits)
    assert "logits=" in repr(labelled(model, ids_of() % 50))


@each
def test_a_step_that_reads_no_logits_makes_none(family: Family, read: list[str]) -> None:
    model, ids = made(family, "ForCausalLM").train(), ids_of()
    model.config.output_router_logits = True
    out = model(ids, labels=ids)
    out.loss.backward()
    assert read == []
    ours = gradients(model)
    model.loss_function = lambda logits, labels, vocab_size: next_token_loss(logits, labels)
    plain = model(ids, labels=ids)
    plain.loss.backward()
    assert list(plain) == list(out)
    assert relative_error(out.loss, plain.loss) < 1e-6
    largest = max(float(g.abs().max()) for g in ours)
    assert all(
        (a - b).abs().max() < 1e-6 * largest for a, b in zip(ours, gradients(model), strict=True)
    )


def test_logits_are_those_of_the_forward_whatever_came_between(model: Qwen2ForCausalLM) -> None:
    ids = torch.randint(50, (1, 5))
    with torch.autocast("cpu", torch.bfloat16):
        out, plain = labelled(model, ids), model(ids).logits
    assert torch.equal(out.logits, plain)
    with torch.no_grad():
        assert labelled(model, ids).logits.requires_grad is False
        assert torch.is_grad_enabled() is False
    out = labelled(model, ids)
    with torch.no_grad():
        assert out.logits.requires_grad
    with torch.inference_mode():
        out = labelled(model, ids)
    assert relative_error(out.logits, model(ids).logits) < 1e-6
    others = {name: p + 1 for name, p in model.named_parameters()}
    out = torch.func.functional_call(model, others, (ids,), {"labels": ids})
    plain = torch.func.functional_call(model, others, (ids,))
    assert torch.equal(out.logits, plain.logits)


def test_logits_of_weights_that_are_gone_are_refused(model: Qwen2ForCausalLM) -> None:
    ids = torch.randint(50, (1, 5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    out = labelled(model, ids)
    out.loss.backward()
    optimizer.step()
    with pytest.raises(InputError, match=r"read output\.logits before"):
        _ = out.logits
    assert torch.equal(labelled(model, ids).logits, model(ids).logits)


def test_a_hook_on_the_head_sees_all_logits_once(model: Qwen2ForCausalLM) -> None:
    ids, seen = torch.randint(50, (2, 5)), []
    expected = model(ids, labels=ids).loss
    model.lm_head.register_forward_hook(lambda module, args, y: seen.append(y))
    out = model(ids, labels=ids)
    assert [tuple(y.shape) for y in seen] == [(2, 5, 50)]
    assert out.logits is seen[0]
    assert relative_error(out.loss, expected) < 1e-6


@pytest.mark.parametrize("kind", ["quantised", "adapted", "replaced", "smaller rows"])
def test_other_heads_run_over_some_tokens_at_a_time(
    model: Qwen2ForCausalLM, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = torch.randint(50, (2, 6))
    if kind == "quantised":
        model = Qwen2ForCausalLM.from_pretrained(
            None, config=model.config, state_dict=model.state_dict(), quantize="int8"
        )
        model.add_adapter(LoraConfig(target_modules=["q_proj"]))
    elif kind == "smaller rows":
        model.add_adapter(LoraConfig(target_modules=["q_proj"], trainable_token_indices=[1, 2]))
    elif kind == "replaced":
        model.add_adapter(LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    else:
        model.add_adapter(LoraConfig(target_modules=["q_proj", "lm_head"]))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p)
    monkeypatch.setattr(scoring, "AT_ONCE", 3 * 50)
    assert isinstance(model.scored_head(), scoring.HeadInParts)
    out = model(ids, labels=ids)
    out.loss.backward()
    ours = gradients(model)
    plain = model(ids).logits
    loss = next_token_loss(plain, ids)
    loss.backward()
    assert relative_error(out.loss, loss) < 1e-6
    assert relative_error(out.logits, plain) < 1e-6
    theirs = gradients(model)
    assert len(ours) == len(theirs) > 0
    assert all(relative_error(a, b) < 1e-5 for a, b in zip(ours, theirs, strict=True))


STEPS = """
from pathlib import Path
import torch
from quintet import Qwen2Config, Qwen2ForCausalLM

torch.set_num_threads(1)
config = Qwen2Config(
    vocab_size=151_936, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
    num_attention_heads=1, num_key_value_heads=1, tie_word_embeddings=False,
)
model = Qwen2ForCausalLM(config)

def kilobytes(name):
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith(name)).split()[1])

def step(tokens, reads):
    before = kilobytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    ids = torch.randint(151_936, (1, tokens))
    out = model(ids, labels=ids)
    if reads:
        out.logits
    out.loss.backward()
    return kilobytes("VmHWM") - before

step(8, False)
print(step(512, False), step(512, True))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="as Linux tells it")
def test_a_step_takes_no_memory_for_logits() -> None:
    paths = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [sys.executable, "-c", STEPS],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=True,
        timeout=PATIENCE,
    )
    unread, read = (int(kilobytes) * 1024 for kilobytes in done.stdout.split())
    logits = 512 * 151_936 * 4
    assert unread < logits / 2
    assert read > logits
