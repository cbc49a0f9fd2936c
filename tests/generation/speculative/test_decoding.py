"""Speculation generates what the model would have: token by token, in number, in distribution."""

import copy
import itertools
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from conformance.families import FAMILIES, Family
from families.deepseek import model_of
from quintet import GenerationConfig
from quintet.errors import InputError
from quintet.generation.sampler import Sampler
from quintet.generation.speculative.candidates import DraftSchedule, PromptLookup
from quintet.generation.speculative.mtp import MTPDrafter
from quintet.generation.token_buffer import TokenBuffer

V = 101
each_family = pytest.mark.parametrize("family", FAMILIES, ids=repr)


def small(family: Family, **changes: Any) -> Any:
    torch.manual_seed(1)
    config = family.config(**changes)
    model = family.cls("ForCausalLM")(config)
    family.randomise(model)
    return model.eval()


def noisy(model: Any, share: float) -> Any:
    """A copy that agrees with the model now and then, the less the larger the share of noise."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            if p.ndim > 1:
                p += share * p.std() * torch.randn_like(p)
    return other


class Spoilt:
    """A model that knows what the other will say, and says something else every third time."""

    def __init__(self, model: Any) -> None:
        self.model, self.config, self.calls = model, model.config, 0
        self.generation_config, self.new_cache = model.generation_config, model.new_cache

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        out = self.model(*args, **kwargs)
        self.calls += 1
        for row in range(len(out.logits)):
            if (self.calls + row) % 3 == 0:
                out.logits[row] *= -1
        return out


def prompts(B: int = 3, T: int = 11) -> dict[str, Tensor]:
    torch.manual_seed(5)
    ids = torch.randint(2, V, (B, T))
    ids[:, T // 2 :] = ids[:, : T - T // 2].clone()  # something to look up
    mask = torch.ones_like(ids)
    for row in range(1, B):
        mask[row, : 2 * row] = 0
    return {"input_ids": ids, "attention_mask": mask}


def ways(model: Any) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {
        "lookup": {"prompt_lookup_num_tokens": 4, "max_matching_ngram_size": 3},
        "like": {"assistant_model": Spoilt(model)},
        "unlike": {"assistant_model": noisy(model, 3.0), "num_assistant_tokens": 3},
        "itself": {"assistant_model": model, "num_assistant_tokens_schedule": "heuristic"},
    }
    if hasattr(model, "prediction_depth") and model.prediction_depth():
        found["mtp"] = {"use_mtp": True}
        found["mtp, further"] = {"use_mtp": True, "num_assistant_tokens": 4}
    return found


def told(model: Any, inputs: dict[str, Tensor], **options: Any) -> Any:
    return model.generate(inputs, **{"max_new_tokens": 25, "do_sample": False, **options})


# -- greedy ----------------------------------------------------------------------------------


@each_family
@pytest.mark.parametrize("B", [1, 3])
def test_ids_are_those_without_drafts(family: Family, B: int) -> None:
    changes = {"num_nextn_predict_layers": 2} if family.name == "deepseek-v3" else {}
    model = small(family, **changes)
    inputs = prompts(B)
    free = told(model, inputs, eos_token_id=[])
    assert len(set(free[0, 11:].tolist())) > 3, "a text that says nothing proves nothing"
    # One row ends in the middle of what the others go on with.
    end = int(free[-1, 24]) if B > 1 else []
    plain = told(model, inputs, eos_token_id=end)
    lengths = set()
    for name, way in ways(model).items():
        out = told(model, inputs, eos_token_id=end, return_dict_in_generate=True, **way)
        assert torch.equal(out.sequences, plain), name
        lengths |= {kept for turn in out.speculation.accepted for _, kept in turn}
    assert len(lengths) > 2, "drafts were taken whole or not at all"


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.4},
        {"no_repeat_ngram_size": 2},
        {"min_new_tokens": 12, "eos_token_id": list(range(2, 60))},
        {"presence_penalty": 3.0, "frequency_penalty": 1.0},
        {"bad_words_ids": [[7], [9, 11]], "forced_eos_token_id": 5},
        {"exponential_decay_length_penalty": [3, 1.5], "eos_token_id": 8},
        {"cache_implementation": "static"},
        {"cache_implementation": "quantized"},
        {"cache_implementation": "offloaded"},
        {"use_cache": False},
        {"max_new_tokens": 1},
        {"max_new_tokens": 2},
        {"prefill_chunk_size": 3},
    ],
    ids=str,
)
def test_options_mean_what_they_mean_without_drafts(options: dict[str, Any]) -> None:
    model = model_of("DeepseekV3", num_hidden_layers=2, num_nextn_predict_layers=1)
    inputs = prompts()
    options = {"max_new_tokens": 16, **options}
    plain = told(model, inputs, **options)
    for name, way in ways(model).items():
        if "use_cache" in options and "use_mtp" in way:
            continue
        assert torch.equal(told(model, inputs, **options, **way), plain), name


@each_family
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_the_cache_is_gone_on_with_as_if_there_had_been_no_drafts(
    family: Family, kind: str
) -> None:
    model, inputs = small(family, **family.shallow), prompts()
    options: dict[str, Any] = {
        "return_dict_in_generate": True,
        "eos_token_id": 3,
        "cache_implementation": kind,
    }
    if kind == "static":
        options["max_cache_len"] = 64
    plain = told(model, inputs, **options)
    for name, way in ways(model).items():
        out = told(model, inputs, **options, **way)
        lengths = out.past_key_values.lengths(3)
        assert torch.equal(lengths, plain.past_key_values.lengths(3)), name
        more = torch.randint(2, V, (3, 4))
        ways_on = [
            model(more, past_key_values=copy.deepcopy(one.past_key_values)).logits
            for one in (out, plain)
        ]
        torch.testing.assert_close(*ways_on, rtol=1e-3, atol=1e-3)


def test_a_conversation_goes_on_with_its_cache_and_that_of_the_prediction_layers() -> None:
    model = model_of("DeepseekV3", num_nextn_predict_layers=1)
    inputs = {k: v[:1] for k, v in prompts().items()}
    options = {"use_mtp": True, "num_assistant_tokens": 2, "return_dict_in_generate": True}
    first = told(model, inputs, **options)
    held = first.past_key_values
    beside = held.companion.cache
    assert beside.lengths(1).tolist() == held.lengths(1).tolist()
    text = torch.cat((first.sequences, torch.randint(2, V, (1, 5))), dim=1)
    again = model.generate(text, past_key_values=held, max_new_tokens=9, **options)
    assert torch.equal(again.sequences, told(model, {"input_ids": text}, max_new_tokens=9))
    held.crop(20)
    text = text[:, :25]
    again = model.generate(text, past_key_values=held, max_new_tokens=9, **options)
    assert held.companion.cache is beside
    assert beside.lengths(1).tolist() == held.lengths(1).tolist()
    assert torch.equal(again.sequences, told(model, {"input_ids": text}, max_new_tokens=9))


# -- what prediction layers draft ------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("B", [1, 3])
def test_drafts_are_what_the_layers_predict_of_the_whole_text(
    depth: int, B: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of("DeepseekV3", num_nextn_predict_layers=depth)
    seen: list[tuple[list[list[int]], Tensor]] = []
    propose = MTPDrafter.propose

    def spy(
        self: Any, text: TokenBuffer, wanted: list[int], unfinished: list[bool], sampler: Any
    ) -> Any:
        draft = propose(self, text, wanted, unfinished, sampler)
        rows = [
            row[len(row) - int(length) :].tolist()
            for row, length in zip(text.ids, text.lengths(), strict=True)
        ]
        for row, goes, count, drafted in zip(
            rows, unfinished, draft.counts, draft.tokens, strict=True
        ):
            if goes and count == depth:
                seen.append((row, drafted))
        return draft

    monkeypatch.setattr(MTPDrafter, "propose", spy)
    # What is drafted by chance is what is taken, so that rows go on by different numbers.
    out = told(model, prompts(B), use_mtp=True, return_dict_in_generate=True, max_new_tokens=12)
    assert len(seen) > 5
    assert out.speculation.drafted_tokens >= depth * len(seen)
    for row, drafted in seen:
        for k in range(depth):
            known = torch.tensor([[*row, *drafted[:k].tolist()]])
            ahead = model(known, output_mtp_logits=True).mtp_logits[k][0, -(k + 2)]
            assert ahead.argmax() == drafted[k]


def test_a_prediction_layer_that_knows_the_future_is_taken_at_its_word() -> None:
    """With the prediction layer's help, a text of the main model's own is made in fewer steps."""
    model = model_of("DeepseekV3", num_nextn_predict_layers=1)
    _make_shift(model)
    inputs = {k: v[:1] for k, v in prompts().items()}
    out = told(model, inputs, use_mtp=True, num_assistant_tokens=3, return_dict_in_generate=True)
    assert torch.equal(out.sequences, told(model, inputs))
    assert out.speculation.acceptance > 0.95
    assert out.speculation.tokens_per_forward > 3


@torch.no_grad()
def _make_shift(model: Any) -> None:
    """Make a model of which token t + 1 follows from token t alone, in both kinds of layer."""
    C = model.config.hidden_size
    for layer in model.model.layers:
        for name, p in layer.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", "down_proj")):
                p.zero_()
    last = model.model.layers[-1]
    # eh_proj takes the embedding of the token ahead, and nothing of the state.
    last.eh_proj.weight.copy_(torch.cat((torch.eye(C), torch.zeros(C, C)), dim=1))
    for norm in (model.model.norm, last.enorm, last.hnorm, last.shared_head["norm"]):
        norm.weight.fill_(1.0)


# -- sampled ---------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["lookup", "unlike", "mtp, further"])
def test_sampled_texts_are_distributed_as_without_drafts(way: str) -> None:
    model = model_of("DeepseekV3", num_nextn_predict_layers=1, vocab_size=5)
    ids = torch.tensor([[1, 2, 3, 1, 2]])
    options: dict[str, Any] = {
        "max_new_tokens": 3,
        "do_sample": True,
        "temperature": 1.3,
        "top_k": 4,
        "repetition_penalty": 1.2,
        "num_return_sequences": 3000,
    }
    expected: dict[tuple[int, ...], float] = {}
    logs = {}
    for text in itertools.product(range(5), repeat=3):
        p = 1.0
        for place in range(3):
            known = text[:place]
            if known not in logs:
                out = model.generate(
                    torch.cat((ids, torch.tensor([known], dtype=torch.long)), dim=1),
                    **{**options, "num_return_sequences": 1, "max_new_tokens": 1},
                    return_dict_in_generate=True,
                    output_scores=True,
                )
                logs[known] = out.scores[0][0].softmax(-1)
            p *= float(logs[known][text[place]])
        expected[text] = p
    drafting = ways(model)[way]
    torch.manual_seed(11)
    out = model.generate(ids, **options, **drafting, return_dict_in_generate=True)
    counts = Counter(tuple(row) for row in out.sequences[:, 5:].tolist())
    assert out.speculation.accepted_tokens > 200
    assert all(expected[text] > 0 for text in counts)
    total = 3000
    likely = [text for text, p in expected.items() if p * total >= 5]
    chi = sum((counts[t] - expected[t] * total) ** 2 / (expected[t] * total) for t in likely)
    freedom = len(likely) - 1
    assert chi < freedom + 4 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("way", ["lookup", "unlike", "mtp, further"])
def test_what_is_drawn_for_a_row_does_not_depend_on_the_others(way: str) -> None:
    model = model_of("DeepseekV3", num_nextn_predict_layers=1)
    inputs = prompts()
    options = {**ways(model)[way], "do_sample": True, "temperature": 0.7, "max_new_tokens": 20}
    generators = [torch.Generator().manual_seed(row) for row in range(3)]
    together = model.generate(inputs, generator=generators, **options)[:, -20:]
    single = [
        model.generate(
            inputs["input_ids"][row : row + 1, inputs["attention_mask"][row].bool()],
            generator=[torch.Generator().manual_seed(row)],
            **options,
        )[0, -20:]
        for row in range(3)
    ]
    assert torch.equal(together, torch.stack(single))


# -- ends, streams, records ------------------------------------------------------------------


class Counting:
    """A tokenizer whose tokens are written as numbers between spaces."""

    def decode(self, ids: list[int], **options: Any) -> str:
        return "".join(f" {i}" for i in ids)


class Puts:
    def __init__(self) -> None:
        self.put_values: list[list[int]] = []
        self.ended = 0

    def put(self, value: Tensor) -> None:
        self.put_values.append(value.reshape(-1).tolist())

    def end(self) -> None:
        self.ended += 1


@pytest.mark.parametrize("B", [1, 3])
def test_stop_strings_own_criteria_and_streams_are_as_without_drafts(B: int) -> None:
    model, inputs = model_of("DeepseekV3", num_nextn_predict_layers=1), prompts(B)
    free = told(model, inputs)
    stop = f" {free[0, -6]} {free[0, -5]}"

    def ends_at_multiples(ids: Tensor, scores: Any, **others: Any) -> Tensor:
        return ids[:, -1] % 17 == 0

    for options in (
        {"stop_strings": [stop], "tokenizer": Counting()},
        {"stopping_criteria": [ends_at_multiples]},
        {"eos_token_id": int(free[0, -4])},
    ):
        streams = [Puts() for _ in range(len(ways(model)) + 1)]
        plain = told(model, inputs, **options, streamer=streams[0])
        for stream, way in zip(streams[1:], ways(model).values(), strict=True):
            made = told(model, inputs, **options, **way, streamer=stream)
            assert torch.equal(made, plain)
            assert stream.put_values == streams[0].put_values
            assert stream.ended == 1


@pytest.mark.parametrize("B", [1, 3])
def test_scores_and_logits_are_recorded_for_the_tokens_that_were_taken(B: int) -> None:
    model, inputs = model_of("DeepseekV3", num_nextn_predict_layers=1), prompts(B)
    options = {
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": True,
        "repetition_penalty": 1.3,
    }
    if B == 1:
        options |= {"output_attentions": True, "output_hidden_states": True}
    plain = told(model, inputs, **options)
    for way in ways(model).values():
        out = told(model, inputs, **options, **way)
        for name in ("scores", "logits", "attentions", "hidden_states"):
            mine, other = getattr(out, name), getattr(plain, name)
            if other is None:
                assert mine is None
                continue
            assert len(mine) == len(other) == 25
            torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-3)


def test_what_was_accepted_is_told() -> None:
    model, inputs = model_of("DeepseekV3"), prompts()
    out = told(
        model, inputs, assistant_model=model, num_assistant_tokens=4, return_dict_in_generate=True
    )
    found = out.speculation
    assert found.acceptance == 1.0
    assert found.tokens_per_forward == pytest.approx(25 / 5, rel=0.05)
    assert all(len(turn) == 3 for turn in found.accepted)
    assert found.drafted_tokens == found.accepted_tokens == 3 * (4 * 4 + 3)
    assert told(model, inputs, return_dict_in_generate=True).speculation is None


# -- drafts ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "count", "expected"),
    [
        ([1, 2, 3, 9, 1, 2], 2, [3, 9]),
        ([1, 2, 3, 9, 1, 2], 9, [3, 9, 1, 2]),
        ([1, 2, 3, 1, 2, 4, 1, 2], 2, [4, 1]),
        ([1, 2, 3, 1, 2, 4, 1, 2], 5, [3, 1, 2, 4, 1]),
        ([7, 2, 3, 8, 1, 2], 2, [3, 8]),
        ([5, 5, 5], 3, [5]),
        ([1, 2, 3], 3, []),
        ([1], 3, []),
    ],
)
def test_a_text_is_looked_up_in_itself(row: list[int], count: int, expected: list[int]) -> None:
    padded = TokenBuffer(torch.tensor([[6, *row]]), torch.tensor([1]))
    draft = PromptLookup().propose(padded, [count], [True], Sampler())
    assert draft.tokens[0, : draft.counts[0]].tolist() == expected


def test_a_schedule_learns_row_by_row() -> None:
    schedule = DraftSchedule(2, "heuristic")
    schedule.start(3)
    schedule.learn([2, 2, 0], [2, 1, 0])
    assert schedule.rows == [4, 1, 2]
    schedule.learn([4, 1, 2], [0, 0, 2])
    assert schedule.rows == [3, 1, 4]
    constant = DraftSchedule(2)
    constant.start(1)
    constant.learn([2], [2])
    assert constant.rows == [2]


def test_a_draft_ends_with_a_token_that_is_unlikely() -> None:
    model, inputs = model_of("DeepseekV3"), prompts(1)
    options = {"assistant_model": noisy(model, 0.3), "num_assistant_tokens": 6}
    sure, unsure = (
        told(
            model, inputs, **options, assistant_confidence_threshold=t, return_dict_in_generate=True
        ).speculation
        for t in (0.0, 0.99)
    )
    assert sure.accepted[0][0][0] == 6
    assert min(asked for turn in unsure.accepted[:2] for asked, _ in turn) < 6
    assert unsure.drafted_tokens < sure.drafted_tokens


# -- errors ----------------------------------------------------------------------------------


def test_what_cannot_go_together_is_named() -> None:
    model, inputs = model_of("DeepseekV3", num_nextn_predict_layers=1), prompts()
    without = model_of("DeepseekV3")
    for options, said in (
        ({"use_mtp": True, "prompt_lookup_num_tokens": 2}, "give one of them"),
        ({"use_mtp": True, "num_beams": 2}, "num_beams=2"),
        ({"use_mtp": True, "guidance_scale": 2.0}, "guidance_scale"),
        ({"use_mtp": True, "use_cache": False}, "needs a cache"),
        ({"use_mtp": True, "output_attentions": True, "return_dict_in_generate": True}, "one row"),
        ({"assistant_model": model_of("DeepseekV3", vocab_size=120)}, "assistant_tokenizer"),
        ({"num_assistant_tokens_schedule": "sometimes"}, "heuristic"),
    ):
        with pytest.raises(InputError, match=said):
            told(model, inputs, **options)
    with pytest.raises(InputError, match="multi-token prediction"):
        told(without, inputs, use_mtp=True)
    with pytest.raises(InputError, match="multi-token prediction"):
        told(model_of("DeepseekV2"), inputs, use_mtp=True)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    with pytest.raises(InputError, match="inputs_embeds"):
        model.generate(inputs_embeds=embeds, prompt_lookup_num_tokens=2)
    plain = model.generate(inputs_embeds=embeds, max_new_tokens=8)
    assert torch.equal(model.generate(inputs_embeds=embeds, max_new_tokens=8, use_mtp=True), plain)
    # Nothing watches the model any longer, whether it went well or not.
    assert not model.model._forward_hooks


@pytest.mark.parametrize(
    ("options", "needed"),
    [
        ({"num_assistant_tokens": 3}, "assistant_model or use_mtp=True"),
        ({"num_assistant_tokens_schedule": "heuristic"}, "assistant_model or use_mtp=True"),
        ({"assistant_confidence_threshold": 0.4}, "assistant_model or use_mtp=True"),
        ({"max_matching_ngram_size": 3}, "prompt_lookup_num_tokens"),
        ({"assistant_tokenizer": SimpleNamespace(get_vocab=dict)}, "assistant_model"),
        (
            {"num_assistant_tokens": 3, "prompt_lookup_num_tokens": 2},
            "assistant_model or use_mtp=True",
        ),
        ({"max_matching_ngram_size": 3, "use_mtp": True}, "prompt_lookup_num_tokens"),
    ],
    ids=str,
)
def test_options_of_drafts_that_nothing_writes_are_told(
    options: dict[str, Any], needed: str
) -> None:
    model, inputs = model_of("DeepseekV3", num_nextn_predict_layers=1), prompts(1)
    name = next(iter(options))
    with pytest.warns(UserWarning, match=f"{name}.* has no effect without {needed}") as told_of:
        model.generate(inputs, do_sample=False, max_new_tokens=2, **options)
    assert len(told_of) == 1
    assert told_of[0].filename == __file__


def test_what_a_checkpoint_says_of_drafts_is_not_told(recwarn: pytest.WarningsRecorder) -> None:
    model, inputs = model_of("DeepseekV3", num_nextn_predict_layers=1), prompts(1)
    model.generation_config = model.generation_config.replace(
        num_assistant_tokens=3, max_matching_ngram_size=3, assistant_confidence_threshold=0.1
    )
    told(model, inputs, max_new_tokens=2)
    told(model, inputs, max_new_tokens=2, num_assistant_tokens=2, use_mtp=True)
    told(model, inputs, max_new_tokens=2, max_matching_ngram_size=1, prompt_lookup_num_tokens=2)
    assert not recwarn.list


def test_an_assistant_of_another_size_is_taken_with_the_same_tokenizer() -> None:
    class Same:
        def get_vocab(self) -> dict[str, int]:
            return {"a": 0}

    class Other:
        def get_vocab(self) -> dict[str, int]:
            return {"b": 0}

    model, inputs = model_of("DeepseekV3"), prompts()
    for size in (90, 120):
        assistant = model_of("DeepseekV3", vocab_size=size)
        with pytest.raises(InputError, match="differ"):
            told(
                model,
                inputs,
                assistant_model=assistant,
                tokenizer=Same(),
                assistant_tokenizer=Other(),
            )
        made = told(
            model, inputs, assistant_model=assistant, tokenizer=Same(), assistant_tokenizer=Same()
        )
        assert torch.equal(made, told(model, inputs))


def test_the_assistants_own_config_says_how_much_it_drafts() -> None:
    model, inputs = model_of("DeepseekV3"), prompts(1)
    assistant = copy.deepcopy(model)
    assistant.generation_config = GenerationConfig(num_assistant_tokens=2)
    out = told(model, inputs, assistant_model=assistant, return_dict_in_generate=True)
    assert out.speculation.accepted[0] == [(2, 2)]
    out = told(
        model,
        inputs,
        assistant_model=assistant,
        num_assistant_tokens=3,
        return_dict_in_generate=True,
    )
    assert out.speculation.accepted[0] == [(3, 3)]
