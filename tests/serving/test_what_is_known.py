"""What can be asked beside tokens: probabilities, vectors, and where a string ends the text."""

import asyncio
from typing import Any

import pytest
import torch

from conformance.families import FAMILIES, Family, each
from generation.sequences import prompt_of
from quintet import AutoModelForCausalLM, AutoTokenizer, demo_model
from quintet.errors import DeadlineError, InputError
from quintet.generation.observing import token_logprobs
from quintet.serving import Answer, Engine, Limits, TokenLogprobs

PLAIN: dict[str, Any] = {"eos_token_id": -1, "do_sample": False}


def limits(**changes: Any) -> Limits:
    return Limits(**{"rows": 3, "capacity": 400, "piece": 64, **changes})


async def collected(engine: Engine, prompt: Any, **options: Any) -> list[Answer]:
    return [answer async for answer in engine.generate(prompt, **options)]


def of_new(answers: list[Answer]) -> list[TokenLogprobs]:
    return [one for answer in answers for one in answer.logprobs or ()]


def check(found: list[TokenLogprobs], logits: torch.Tensor, ids: list[int], top: int) -> None:
    """Compare with logits (n, V) of the same tokens."""
    expected = logits.float().log_softmax(dim=-1)
    assert [one.id for one in found] == ids
    for one, row in zip(found, expected, strict=True):
        assert one.logprob == pytest.approx(float(row[one.id]), abs=1e-4)
        assert len(one.top) == top
        values = row.topk(top).values.tolist()
        assert [value for _, value in one.top] == pytest.approx(values, abs=1e-4)
        assert all(value == pytest.approx(float(row[i]), abs=1e-4) for i, value in one.top)


@each
def test_probabilities_are_those_of_the_models_forward(family: Family) -> None:
    """In pieces, in company, behind what was read before, and with drafts."""
    model, prompt = family.model_of(max_position_embeddings=512), prompt_of(205, 4)

    async def several(engine: Engine) -> list[list[Answer]]:
        await collected(engine, prompt, stable=130, max_new_tokens=2, **PLAIN)
        return await asyncio.gather(
            collected(
                engine, prompt, logprobs=2, prompt_logprobs=1, max_new_tokens=5, stable=70, **PLAIN
            ),
            collected(
                engine, prompt, logprobs=0, max_new_tokens=9, prompt_lookup_num_tokens=3, **PLAIN
            ),
            # Temperature and masks are no affair of theirs.
            collected(
                engine,
                prompt_of(30, 8),
                logprobs=3,
                max_new_tokens=6,
                eos_token_id=-1,
                do_sample=True,
                temperature=3.0,
                suppress_tokens=[7, 8, 9],
                repetition_penalty=1.5,
                generator=torch.Generator().manual_seed(1),
            ),
        )

    with Engine(model, limits=limits()) as engine:
        first, second, third = asyncio.run(several(engine))
    with torch.no_grad():
        for answers, asked, top in ((first, prompt, 2), (second, prompt, 0), (third, None, 3)):
            ids = [token for answer in answers for token in answer.ids]
            given = prompt_of(30, 8) if asked is None else asked
            whole = torch.cat((given, torch.tensor([ids])), dim=1)
            logits = model(whole).logits[0, :-1]
            check(of_new(answers), logits[given.shape[1] - 1 :], ids, top)
            assert all(len(answer.logprobs or ()) == len(answer.ids) for answer in answers)
        of_prompt = first[0].prompt_logprobs
        assert of_prompt is not None
        assert of_prompt[0] is None
        rest = [one for one in of_prompt[1:] if one is not None]
        check(rest, model(prompt).logits[0, :-1], prompt[0, 1:].tolist(), 1)
    assert all(answer.prompt_logprobs is None for answer in first[1:])
    assert first[-1].usage is not None
    assert first[-1].usage.cached == 0
    assert third[0].prompt_logprobs is None


def test_a_long_prompt_never_has_all_its_logits_at_once() -> None:
    model, widest = FAMILIES[0].model_of(max_position_embeddings=512), [0]
    head = model.lm_head.register_forward_hook(
        lambda module, given, made: widest.__setitem__(0, max(widest[0], made.shape[-2]))
    )
    try:
        with Engine(model, limits=limits(capacity=64, piece=64 * 64)) as engine:
            asked = prompt_of(60, 3)
            list(engine.answer(asked, max_new_tokens=1, prompt_logprobs=0, **PLAIN))
        with Engine(model, limits=limits(capacity=400, piece=64 * 64)) as engine:
            (answer,) = engine.answer(prompt_of(390, 3), max_new_tokens=1, prompt_logprobs=0)
            assert answer.prompt_logprobs is not None
            assert len(answer.prompt_logprobs) == 390
    finally:
        head.remove()
    assert 128 <= widest[0] <= 160


def test_a_salt_keeps_apart_what_was_read_and_gives_no_turns() -> None:
    model, prompt = FAMILIES[0].model_of(), prompt_of(100, 4)
    with Engine(model, limits=limits(capacity=128)) as engine:
        cached = []
        for scope, salt in (("a", "x"), ("a", "x"), ("a", "y"), ("a", ""), ("b", "x")):
            *_, last = engine.answer(prompt, max_new_tokens=1, scope=scope, salt=salt, **PLAIN)
            assert last.usage is not None
            cached.append(last.usage.cached)
        assert cached[0] == cached[2] == cached[3] == cached[4] == 0
        assert cached[1] > 0
        # Its turns are those of its scope, whatever salts it has.
        held = [engine.answer(prompt, max_new_tokens=20, scope="a", salt=s, **PLAIN) for s in "xy"]
        for one in held:
            next(one)
        assert set(engine._runner.scheduler._had) == {"a"}
        for one in held:
            one.close()  # type: ignore[attr-defined]


def test_a_prompt_may_be_all_there_is() -> None:
    model, prompt = FAMILIES[0].model_of(max_position_embeddings=512), prompt_of(150, 4)
    with Engine(model, limits=limits()) as engine:
        (answer,) = engine.answer(prompt, max_new_tokens=0, prompt_logprobs=1, **PLAIN)
        assert (answer.ids, answer.text, answer.finish_reason) == ((), "", "length")
        assert answer.usage is not None
        assert (answer.usage.prompt, answer.usage.completion) == (150, 0)
        assert answer.prompt_logprobs is not None
        assert len(answer.prompt_logprobs) == 150
        # It is read for those that come, too.
        *_, last = engine.answer(prompt, max_new_tokens=1, **PLAIN)
        assert last.usage is not None
        assert last.usage.cached == 64  # with enough left to be read


@each
def test_a_text_becomes_a_vector(family: Family) -> None:
    model, text = family.model_of(max_position_embeddings=512), prompt_of(150, 6)
    with torch.no_grad():
        states = model.base_model(text).last_hidden_state[0].float()

    async def vectors(engine: Engine) -> list[Any]:
        return await asyncio.gather(
            engine.embed(text),
            engine.embed(text, pooling="mean"),
            engine.embed(text[0].tolist(), pooling="mean", normalize=True),
            collected(engine, prompt_of(9, 1), max_new_tokens=6, **PLAIN),
        )

    with Engine(model, limits=limits()) as engine:
        last, mean, unit, answers = asyncio.run(vectors(engine))
        assert engine.state.running == 0
    torch.testing.assert_close(last, states[-1], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(mean, states.mean(dim=0), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(unit, mean / mean.norm())
    alone = model.generate(prompt_of(9, 1), max_new_tokens=6, **PLAIN)[0, 9:].tolist()
    assert [token for answer in answers for token in answer.ids] == alone


def test_what_waits_for_a_vector_can_leave() -> None:
    model = FAMILIES[0].model_of(max_position_embeddings=512)

    async def leave(engine: Engine) -> None:
        waiting = asyncio.create_task(engine.embed(prompt_of(390, 1)))
        await asyncio.sleep(0.005)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        with pytest.raises(DeadlineError):
            await engine.embed(prompt_of(390, 1), timeout=1e-6)
        with pytest.raises(InputError, match="pooling='max'"):
            await engine.embed([5], pooling="max")  # type: ignore[arg-type]
        while engine.state.running:
            await asyncio.sleep(0.001)

    with Engine(model, limits=limits()) as engine:
        asyncio.run(leave(engine))


def test_an_adapter_is_a_requests_own() -> None:
    """And what was read with it is not gone on from without it."""
    from quintet import LoraConfig

    model, prompt = FAMILIES[0].model_of(max_position_embeddings=512), prompt_of(100, 2)
    model.add_adapter(LoraConfig(r=4, target_modules=["q_proj", "v_proj"]), adapter_name="own")
    for name, weight in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.5)
    model.eval()
    names = ("own", "__base__", "own", "__base__")
    with torch.no_grad():
        expected = {
            name: model.generate(prompt, adapter_names=[name], max_new_tokens=6, **PLAIN)[0, 100:]
            for name in set(names)
        }
    assert not torch.equal(expected["own"], expected["__base__"])
    with Engine(model, limits=limits()) as engine:
        for turn, name in enumerate(names):
            answers = list(engine.answer(prompt, adapter_name=name, max_new_tokens=6, **PLAIN))
            assert [t for one in answers for t in one.ids] == expected[name].tolist()
            assert answers[-1].usage is not None
            assert answers[-1].usage.cached == (64 if turn > 1 else 0)
        with pytest.raises(InputError, match="nobody"):
            next(engine.answer(prompt, adapter_name="nobody"))


@pytest.fixture(scope="module")
def spoken() -> Any:
    return (
        AutoModelForCausalLM.from_pretrained(demo_model()),
        AutoTokenizer.from_pretrained(demo_model()),
    )


@pytest.mark.parametrize("drafts", [{}, {"use_mtp": True}], ids=["plain", "drafts"])
def test_a_string_ends_the_text_before_it(spoken: Any, drafts: dict[str, Any]) -> None:
    model, tokenizer = spoken
    text, options = "def read_lines(path):", {"do_sample": False, "max_new_tokens": 40, **drafts}
    with Engine(model, tokenizer, limits()) as engine:
        whole = list(engine.answer(text, **options))
        full = "".join(one.text for one in whole)
        texts = [piece for one in whole for piece in one.texts]
        ids = [token for one in whole for token in one.ids]
        assert len(texts) == len(ids)
        assert "".join(texts) == full
        assert whole[-1].stop is None
        # Each place where a string can end it, with one that never comes beside it.
        for start in range(2, 60, 7):
            for length in (1, 5, 12):
                stop = full[start : start + length]
                answers = list(engine.answer(text, stop=("\0never", stop), **options))
                before = full[: full.index(stop)]
                assert "".join(one.text for one in answers) == before
                assert answers[-1].finish_reason == "stop"
                assert answers[-1].stop == stop
                made = [token for one in answers for token in one.ids]
                # It ends with the token that completes it.
                assert made == ids[: len(made)]
                assert stop in tokenizer.decode(made)
                assert stop not in tokenizer.decode(made[:-1])
                assert answers[-1].usage is not None
                assert answers[-1].usage.completion == len(made)


def test_what_strings_can_be_looked_for() -> None:
    model = FAMILIES[0].model_of(max_position_embeddings=512)
    with Engine(model, limits=limits()) as engine:
        for wrong, told in (
            ({"stop": ("a",)}, "no tokenizer"),
            ({"stop": ("",)}, "1 to 1024"),
            ({"stop": "text"}, "list of strings"),
            ({"logprobs": -1}, "logprobs=-1"),
            ({"prompt_logprobs": True}, "prompt_logprobs=True"),
            ({"stable": (1, 5)}, "stable"),
        ):
            with pytest.raises(InputError, match=told):
                next(engine.answer([5, 6], **wrong))


def test_probabilities_of_many_rows_are_those_of_each() -> None:
    logits = torch.randn(150, 40)
    tokens = torch.randint(0, 40, (150,)).tolist()
    together = token_logprobs(logits, tokens, 3)
    assert together == [
        one for n in range(150) for one in token_logprobs(logits[n : n + 1], tokens[n : n + 1], 3)
    ]
