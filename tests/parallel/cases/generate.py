"""Cases of generation by several processes; each compares with a model that is whole."""

import os
import signal
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

import quintet
from parallel.cases.tensor import family, world
from quintet.errors import DisagreementError, InputError, RankFailedError
from quintet.generation.following import follow, leading
from quintet.modeling import layer_stack
from quintet.parallel.apply import shard_model
from quintet.parallel.shared_buffer import shared_buffer_of
from quintet.serving.memory import cost_of
from support import relative_error
from waiting import PATIENCE

PROMPT = [[5, 17, 42, 3, 88, 9, 61], [1, 2, 2, 30, 71, 14, 6]]


def models(
    name: str, degrees: dict[str, int], changes: dict[str, Any] | None = None
) -> tuple[Any, Any]:
    """Return a whole model and this process's part of the same."""
    whole, parts = (family(name).model_of(**(changes or {})).eval() for _ in range(2))
    here = world(**degrees)
    shard_model(parts, here)
    parts.world = here
    return whole, parts


def chooses() -> bool:
    return dist.get_rank() == 0


def same_in_all(ids: Tensor) -> None:
    of_all = [torch.empty_like(ids) for _ in range(dist.get_world_size())]
    dist.all_gather(of_all, ids.contiguous())
    assert all(torch.equal(one, of_all[0]) for one in of_all)


def ids_of(model: Any, options: dict[str, Any], prompt: list[list[int]] = PROMPT) -> Tensor:
    ids = torch.tensor(prompt)
    seeded = {"generator": torch.Generator().manual_seed(7), **options}
    made = model.generate(ids, attention_mask=(ids != 1).long(), **seeded)
    return made if isinstance(made, Tensor) else made.sequences


def tokens(
    name: str,
    degrees: dict[str, int],
    each: list[dict[str, Any]],
    changes: dict[str, Any] | None = None,
    prompt: list[list[int]] = PROMPT,
) -> None:
    """Compare the ids that are made, whatever the seed of torch is in each process."""
    whole, parts = models(name, degrees, changes)
    torch.manual_seed(dist.get_rank())
    for options in each:
        made = ids_of(parts, options, prompt)
        same_in_all(made)
        assert made.tolist() == ids_of(whole, options, prompt).tolist(), options


def one_call(name: str, degrees: dict[str, int], changes: dict[str, Any]) -> None:
    """A step of one token runs through all layers in one call, as if each was called."""
    _, parts = models(name, degrees, changes)
    shared_buffer = shared_buffer_of(parts.world.groups["tp"])
    assert shared_buffer is not None
    # Latent attention has a kernel in bfloat16 alone.
    dtypes = [torch.bfloat16] if name.startswith("deepseek") else [torch.float32, torch.bfloat16]
    for dtype in dtypes:
        parts.to(dtype)
        made = []
        for fits in (layer_stack.fits, lambda hidden, context: False):
            with mock.patch.object(layer_stack, "fits", fits), torch.no_grad():
                cache = parts.new_cache()
                parts(torch.tensor(PROMPT), past_key_values=cache, use_cache=True)
                with parts.fused_session(cache):
                    for token in ([[4], [9]], [[7], [7]]):
                        before = shared_buffer.calls
                        output = parts(torch.tensor(token), past_key_values=cache, use_cache=True)
                    # Of each layer two, the embeddings, and the joined logits.
                    assert shared_buffer.calls - before == 2 * parts.config.num_hidden_layers + 2
                    if not made:
                        runs = cache.fused_runs.runs
                        assert [run.stack is not None for run in runs] == [True]
                made.append(output.logits)
        assert relative_error(*made) < (1e-5 if dtype == torch.float32 else 2e-2)


def kept(name: str, degrees: dict[str, int]) -> float:
    """Return which share of what one process keeps of a text each of several keeps."""
    whole, parts = models(name, degrees)
    of_texts, of_rows = [], []
    for model in (parts, whole):
        made = model.generate(
            torch.tensor(PROMPT), max_new_tokens=5, return_dict_in_generate=True, do_sample=False
        )
        of_texts.append(made.past_key_values.nbytes)
    if chooses():
        for model in (parts, whole):
            with leading(model):
                of_rows.append(cost_of(model, None).of(20))
        assert abs(of_rows[0] / of_rows[1] - of_texts[0] / of_texts[1]) < 0.05
    else:
        follow(parts)
    return float(of_texts[0] / of_texts[1])


def gone_on_with(name: str, degrees: dict[str, int]) -> None:
    """What one call kept, whole or as a tuple of layers, is gone on with by another."""
    whole, parts = models(name, degrees)
    made = []
    for model in (parts, whole):
        ids = torch.tensor(PROMPT)
        first = model.generate(ids, max_new_tokens=4, return_dict_in_generate=True)
        held = first.past_key_values
        for past in (held, tuple(held)):
            more = model.generate(first.sequences, max_new_tokens=4, past_key_values=past)
            made.append(more.tolist())
    assert made[0] == made[1] == made[2] == made[3]


def assisted(name: str, degrees: dict[str, int]) -> None:
    """A model that each process has whole, or its part of, drafts."""
    whole, parts = models(name, degrees)
    small, small_parts = models(name, degrees, {"num_hidden_layers": 1})
    ids = torch.tensor(PROMPT)
    for options in ({"do_sample": False}, {"do_sample": True}):
        made = [
            model.generate(
                ids,
                assistant_model=assistant,
                max_new_tokens=12,
                generator=torch.Generator().manual_seed(5),
                **options,
            ).tolist()
            for model, assistant in ((parts, small), (parts, small_parts), (whole, small))
        ]
        assert made[0] == made[1] == made[2]


def outputs(name: str, degrees: dict[str, int], options: dict[str, Any]) -> None:
    """Compare what is returned beside the ids."""
    whole, parts = models(name, degrees)
    prompt = torch.tensor(PROMPT[:1])
    asked = {**options, "return_dict_in_generate": True, "output_scores": True}
    ours, wanted = (m.generate(prompt, output_logits=True, **asked) for m in (parts, whole))
    assert ours.sequences.tolist() == wanted.sequences.tolist()
    for kind in ("scores", "logits"):
        assert len(ours[kind]) == len(wanted[kind]) > 0
        for one, other in zip(ours[kind], wanted[kind], strict=True):
            assert torch.equal(one.isneginf(), other.isneginf())
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def read_in_one(name: str, degrees: dict[str, int]) -> None:
    """What reads and ends texts is asked in the process that chooses alone."""
    _, parts = models(name, degrees)
    called: list[str] = []

    class Told(quintet.TextStreamer):
        def put(self, value: Tensor) -> None:
            called.append("put")

        def end(self) -> None:
            called.append("end")

    def processor(ids: Tensor, scores: Tensor) -> Tensor:
        called.append("processor")
        return scores

    class Late(quintet.StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            called.append("criterion")
            return torch.tensor([input_ids.shape[1] >= 11 and chooses()])

    made = parts.generate(
        torch.tensor(PROMPT[:1]),
        logits_processor=[processor],
        stopping_criteria=[Late()],
        streamer=Told(None),
        max_new_tokens=20,
        do_sample=False,
    )
    assert made.shape == (1, 11)
    same_in_all(made)
    assert set(called) == ({"put", "end", "processor", "criterion"} if chooses() else {"end"})
    slow = parts.generate(torch.tensor(PROMPT[:1]), max_time=0.001, max_new_tokens=99)
    same_in_all(slow)
    assert slow.shape[1] < 7 + 99


def raised(call: Callable[[], object], *kinds: type[Exception]) -> str:
    began = time.monotonic()
    try:
        call()
    except kinds as error:
        # Nobody waits for as long as one may be waited for.
        assert time.monotonic() - began < PATIENCE / 4
        return str(error)
    raise AssertionError(f"nothing was raised, and {kinds} was expected")


def disagreement(name: str, degrees: dict[str, int]) -> None:
    """Different prompts and options end in all processes, which go on afterwards."""
    _, parts = models(name, degrees)
    rank = dist.get_rank()
    ids = torch.tensor(PROMPT[:1])
    for prompt, options, told in (
        (ids[:, rank:], {}, "1×7"),
        (ids + rank, {}, "inputs"),
        (ids, {"temperature": 0.5 + rank, "do_sample": True}, "temperature is 1.5"),
        (ids, {"max_new_tokens": 5} if rank else {}, "max_new_tokens"),
        (ids, {"generation_config": quintet.GenerationConfig(top_k=3 + rank)}, "top_k is 4"),
        (ids, {"logits_processor": [lambda ids, scores: scores][rank:]}, "logits_processor"),
        # Each by itself would say another thing, or nothing.
        (ids, {"max_new_tokens": 5 - 6 * rank}, "max_new_tokens is -1"),
    ):
        say = raised(lambda p=prompt, o=options: parts.generate(p, **o), DisagreementError)
        assert told in say, say
        assert "rank 1" in say, say
    same_in_all(parts.generate(ids, max_new_tokens=3))


def failures(name: str, degrees: dict[str, int]) -> None:
    """What fails in the process that chooses ends all."""
    _, parts = models(name, degrees)
    ids = torch.tensor(PROMPT[:1])

    def broken(ids: Tensor, scores: Tensor) -> Tensor:
        raise KeyError("of the caller's")

    def forbids(ids: Tensor, scores: Tensor) -> Tensor:
        return scores.fill_(-torch.inf)

    say = raised(
        lambda: parts.generate(ids, logits_processor=[broken]),
        KeyError if chooses() else RankFailedError,
    )
    assert "of the caller's" in say
    for options in ({}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 2}, {"do_sample": True}):
        say = raised(
            lambda o=options: parts.generate(ids, logits_processor=[forbids], **o), InputError
        )
        assert "row 0 has no token to take" in say
    parts.model.norm.weight.data.fill_(torch.nan)
    assert "NaN" in raised(lambda: parts.generate(ids), InputError)
    parts.model.norm.weight.data.fill_(1.0)
    for options in (
        {"output_attentions": True, "return_dict_in_generate": True},
        {"compile": True},
    ):
        say = raised(lambda o=options: parts.generate(ids, **o), InputError)
        assert say.startswith(f"{next(iter(options))} cannot be used where several processes hold")
    same_in_all(parts.generate(ids, max_new_tokens=3))


def own_options(name: str, degrees: dict[str, int]) -> None:
    """Rows with options of their own go through an engine, which others follow."""
    whole, parts = models(name, degrees)
    ids = torch.tensor(PROMPT)
    configs = [
        quintet.GenerationConfig(max_new_tokens=4, pad_token_id=0),
        quintet.GenerationConfig(max_new_tokens=9, do_sample=True, pad_token_id=0),
    ]
    made, wanted = (
        model.generate(ids, configs, generator=torch.Generator().manual_seed(3))
        for model in (parts, whole)
    )
    same_in_all(made)
    assert made.tolist() == wanted.tolist()

    def broken(ids: Tensor, scores: Tensor) -> Tensor:
        raise KeyError("of the caller's")

    raised(
        lambda: parts.generate(ids, configs, [broken]),
        KeyError if chooses() else RankFailedError,
    )


def interrupted(name: str, degrees: dict[str, int]) -> None:
    """Ctrl-C in the process that chooses ends all at the same step; in another, nothing."""
    _, parts = models(name, degrees)
    ids = torch.tensor(PROMPT[:1])

    def stop(ids: Tensor, scores: Tensor) -> Tensor:
        if ids.shape[1] == 10:
            os.kill(os.getpid(), signal.SIGINT)
        return scores

    class Elsewhere(torch.nn.Module):
        """A part of the model in which the other process is interrupted."""

        def forward(self, x: Tensor) -> Tensor:
            if not chooses():
                os.kill(os.getpid(), signal.SIGINT)
            return x

    parts.model.norm = torch.nn.Sequential(parts.model.norm, Elsewhere())
    try:
        parts.generate(ids, logits_processor=[stop], max_new_tokens=50)
    except KeyboardInterrupt:
        pass
    else:
        raise AssertionError("it was not interrupted")
    same_in_all(parts.generate(ids, max_new_tokens=3))
