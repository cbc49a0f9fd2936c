"""A model in this process that answers."""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from quintet.cli.conversation import Message
from quintet.cli.options import Opened, choose, open_model, with_default_length
from quintet.cli.partner import Outcome
from quintet.cli.results import counted, cut, draft_summary, speculation_of
from quintet.cli.settings import applied, describe, drawn, seed_of
from quintet.cli.shaping import AnswerShape
from quintet.errors import ChatTemplateError, InputError

if TYPE_CHECKING:
    from quintet.cli.answer import AnswerPrinter
    from quintet.cli.reading import Reading
    from quintet.generation.config import GenerationConfig
    from quintet.tokenization import PreTrainedTokenizer

# Tokens of an answer where nothing says how many.
LONGEST_ANSWER = 1024


class Local:
    """Answers with a model that is loaded for it.

    Args:
        name: of the model.
        seed: of what is drawn; drawn itself where it is None.
        sampling: options of generate(); None for what nobody asked for.
        settings: words NAME=VALUE, which go before them.
        quiet: nothing but the answers.
        where: how the model is to be opened.
        shape: what form answers are to have.

    Raises:
        QuintetError: whatever keeps it from loading; ChatTemplateError without a template.
    """

    def __init__(
        self,
        name: str,
        seed: int | None,
        sampling: Mapping[str, Any],
        settings: Sequence[str],
        quiet: bool,
        where: Mapping[str, Any],
        shape: AnswerShape,
    ) -> None:
        self.opened: Opened = open_model(name, quiet=quiet, **where)
        if not self.opened.tokenizer.chat_template:
            raise ChatTemplateError(
                f"{name!r} has no chat template: it continues texts and was not trained to "
                "answer; use `quintet generate`, or the chat version of the model"
            )
        model = self.opened.model
        options, self._generator, self._seed = choose(model.device, seed, sampling, settings)
        self._config: GenerationConfig = applied(model.generation_config, options)
        self._processors = shape.maker(self.opened)
        self._reading: Reading | None = None

    @property
    def name(self) -> str:
        """The model's."""
        return self.opened.name

    @property
    def context(self) -> int | None:
        """The maximum number of tokens of prompt and answer."""
        most: int = self.opened.model.config.max_position_embeddings
        return most

    def describe(self) -> str:
        """Describe the model and its sampling in a line."""
        config = self._config
        limited = config.max_new_tokens is not None or config.max_length is not None
        most = "" if limited else f", at most {LONGEST_ANSWER:,} tokens an answer"
        return f"{self.opened.describe()}; {describe(config, self._seed)}{most}"

    def answer(self, messages: Sequence[Message], answer: "AnswerPrinter") -> Outcome:
        """Answer messages."""
        import torch

        from quintet.cli.reading import Reading, common
        from quintet.cli.streaming import AnswerStreamer

        tokenizer, context = self.opened.tokenizer, self.context
        assert context is not None
        plain = list(messages)
        prompt = tokenizer.apply_chat_template(plain, add_generation_prompt=True, tokenize=False)
        ids = _ids(tokenizer, plain, add_generation_prompt=True)
        answer.prompt = length = len(ids)
        config = with_default_length(self.opened, self._config, length, LONGEST_ANSWER)
        self._reading = reading = self._reading or Reading(self.opened)
        answer.waiting.text = f"reading {counted(length - reading.cached_length(ids, config))}"

        def stable() -> int:
            # What asks for an answer is in no later prompt, where the answer itself stands.
            return common(ids, _ids(tokenizer, plain, add_generation_prompt=False))

        answer.begin()
        with reading.turn(ids, config, stable) as turn:
            output = self.opened.generator_model.generate(
                torch.tensor([ids], dtype=torch.long, device="cpu"),
                config,
                past_key_values=turn.cache,
                logits_processor=self._processors(prompt),
                tokenizer=tokenizer,
                streamer=AnswerStreamer(tokenizer, prompt, answer),
                generator=self._generator,
                return_dict_in_generate=True,
            )
            text = output.sequences[0]
            turn.ids = text.tolist()
        ended = cut(config, text[length:], context - length)
        return Outcome(ended, draft_summary(speculation_of(output)))

    def set(self, given: dict[str, Any]) -> str:
        """Set options of generate(), and say in a line which hold."""
        seed = seed_of(given.pop("seed", None))
        given = drawn(given)
        usual = self.opened.model.generation_config
        config = applied(self._config, given)
        # None is the checkpoint's own choice again.
        own = {name: getattr(usual, name) for name, value in given.items() if value is None}
        self._config = dataclasses.replace(config, **own)
        if seed is not None:
            self._generator.manual_seed(seed)
        return describe(self._config)

    def take(self, model: str) -> str:
        """Return the name of the model; there is no other.

        Raises:
            InputError: another one is asked for.
        """
        if model and model != self.name:
            raise InputError(
                f"the model is in this process; leave, and begin with another: quintet chat {model}"
            )
        return self.name


def _ids(
    tokenizer: "PreTrainedTokenizer", messages: list[Message], *, add_generation_prompt: bool
) -> list[int]:
    """Return a conversation in ids; a message that spells a control token stays text."""
    write = partial(
        tokenizer.apply_chat_template, messages, add_generation_prompt=add_generation_prompt
    )
    try:
        ids: list[int] = write(sanitize_control_tokens=True)
    except ChatTemplateError:
        # Some templates look into what was said, and then it cannot be told apart from theirs.
        ids = write()
    return ids
