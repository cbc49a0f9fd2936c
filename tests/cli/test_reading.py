"""A conversation goes on from what was read of it, with the text of one that is read anew."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from conformance.families import FAMILIES, Family
from quintet.cli.reading import PLACES, Reading
from quintet.generation.config import GenerationConfig

NEW = 5
# What a template writes behind a question to ask for an answer.
ASKS = [3, 4]


class Talk:
    """Turns with a small model, each beside a generation that knows nothing of the others."""

    def __init__(self, family: Family, **options: Any) -> None:
        self.model = family.model_of()
        opened: Any = SimpleNamespace(model=self.model, generator_model=self.model)
        self.reading = Reading(opened)
        self.recurrent = any(self.model.new_cache().states)
        self.config = GenerationConfig(max_new_tokens=NEW, do_sample=False, **options)

    def say(self, asked: list[int], *, streamer: Any = None) -> tuple[list[int], int]:
        """Return the text so far, and how many tokens were run over to get it."""
        prompt = [*asked, *ASKS]
        held, run = self.reading.cached_length(prompt, self.config), 0

        def count(_: Any, given: Any, named: Any) -> None:
            nonlocal run
            run += (given[0] if given else named["input_ids"]).shape[1]

        hook = self.model.register_forward_pre_hook(count, with_kwargs=True)
        try:
            with self.reading.turn(prompt, self.config, lambda: len(asked)) as turn:
                text = self.generate(prompt, past_key_values=turn.cache, streamer=streamer)
                turn.ids = text
        finally:
            hook.remove()
        assert text == self.generate(prompt)
        assert run >= len(text) - held - 1
        return text, run

    def generate(self, prompt: list[int], **options: Any) -> list[int]:
        ids: list[int] = self.model.generate(torch.tensor([prompt]), self.config, **options)[
            0
        ].tolist()
        return ids


def ids(count: int, seed: int) -> list[int]:
    made = torch.Generator().manual_seed(seed)
    return torch.randint(5, 60, (count,), generator=made).tolist()


@pytest.fixture(params=FAMILIES, ids=lambda family: family.name)
def family(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.mark.parametrize("options", [{}, {"cache_dtype": "int8"}, {"prompt_lookup_num_tokens": 2}])
def test_a_turn_reads_only_what_is_new(family: Family, options: dict[str, Any]) -> None:
    talk = Talk(family, **options)
    first, run = talk.say(ids(30, 1))
    assert run >= 30 + len(ASKS) + NEW - 1 or options
    second, run = talk.say(first + ids(8, 2))
    if not options:
        # The last token of the answer, what is new, and the answer to it.
        assert run == 1 + 8 + len(ASKS) + NEW - 1
    third, run = talk.say(second + ids(5, 3))
    # The same again, another question instead, and one turn before that.
    assert talk.say(second + ids(5, 3))[0] == third
    talk.say(second + ids(7, 4))
    talk.say(first + ids(9, 5))
    # Another conversation, and one that only begins alike.
    talk.say(ids(12, 6))
    talk.say(ids(6, 6) + ids(6, 7))


def test_answering_again_reads_what_asks_for_an_answer(family: Family) -> None:
    talk = Talk(family)
    asked = ids(30, 1)
    talk.say(asked)
    _, run = talk.say(asked)
    assert run == (len(ASKS) if talk.recurrent else 1) + NEW - 1
    assert len(talk.reading._snapshots) == (1 if talk.recurrent else 0)
    text = asked
    for turn in range(3):
        text, _ = talk.say(text + ids(4, turn))
    assert len(talk.reading._snapshots) == (PLACES if talk.recurrent else 0)


def test_an_answer_that_is_cut_short_leaves_its_question(family: Family) -> None:
    class Stops:
        tokens = -1

        def put(self, value: Any) -> None:
            self.tokens += 1
            if self.tokens == 3:
                raise KeyboardInterrupt

        def end(self) -> None: ...

    talk = Talk(family)
    first, _ = talk.say(ids(20, 1))
    with pytest.raises(KeyboardInterrupt):
        talk.say(first + ids(10, 2), streamer=Stops())
    _, run = talk.say(first + ids(10, 2))
    assert run == (len(ASKS) if talk.recurrent else 1) + NEW - 1


def test_a_prompt_that_is_stopped_while_it_is_read_is_read_again(family: Family) -> None:
    talk = Talk(family)
    first, _ = talk.say(ids(20, 1))

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    layers = (one for one in talk.model.modules() if isinstance(one, torch.nn.ModuleList))
    inside = next(layers)[-1]
    hook = inside.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        talk.say(first + ids(40, 2))
    hook.remove()
    talk.say(first + ids(40, 2))
    talk.say(first + ids(3, 3))


@pytest.mark.parametrize("index", [0, -1], ids=["qwen2", "zamba2"])
def test_options_that_want_another_cache_read_everything(index: int) -> None:
    talk = Talk(FAMILIES[index])
    first, _ = talk.say(ids(20, 1))
    for options in ({"num_beams": 2}, {"use_cache": False}, {"cache_implementation": "static"}):
        plain, talk.config = talk.config, talk.config.replace(**options)
        assert talk.reading.cached_length(first, talk.config) == 0
        talk.say(first + ids(3, 2))
        talk.config = plain
        talk.say(first + ids(3, 2))
