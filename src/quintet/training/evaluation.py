"""Measuring a model while it is trained: on texts that it does not learn from, and by its own.

Nothing of the training is touched by it, neither the modules' modes nor the randomness: the next
step is the same whether one looked or not.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quintet.errors import InputError
from quintet.layers.router import ExpertRouter
from quintet.modeling.balance import ExpertLoads
from quintet.modeling.heads import CausalLMHead
from quintet.tokenization import BatchEncoding, PreTrainedTokenizer
from quintet.training.bounds import at_least, at_most
from quintet.training.data.interface import Document
from quintet.training.evaluating import evaluating
from quintet.training.records import Evaluation, GeneratedSample
from quintet.training.scoring import score


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationSettings:
    """The `[evaluation]` table: the measures along the way, and their interval.

    Attributes:
        every: after how many steps, and at the end; 0 for at the end alone.
        documents: at most how many of the held-out documents are read, spread evenly over all;
            None for all of them.
        context: how many tokens a window has; None for as many as a row of the data.
        prompts: texts that the model continues, to be looked at.
        chat: whether these are what somebody asks, and the model answers by its chat template.
        max_new_tokens: how many tokens a continuation has at most.
        temperature: how its tokens are drawn; 0 for the likeliest each.
        seed: what the draws follow from; the same in every evaluation.
    """

    every: int = 0
    documents: int | None = None
    context: int | None = None
    prompts: tuple[str, ...] = ()
    chat: bool = False
    max_new_tokens: int = 64
    temperature: float = 0.8
    seed: int = 0

    def __post_init__(self) -> None:
        at_least(self, every=0, documents=1, context=2, max_new_tokens=1, temperature=0, seed=0)
        at_most(self, seed=2**63 - 1)

    @property
    def measures(self) -> bool:
        """Whether held-out texts are needed."""
        return self.documents is not None or (self.every > 0 and not self.prompts)

    def chosen(self, documents: Sequence[Document]) -> Sequence[Document]:
        """Return those of the held-out documents that are read."""
        most = self.documents
        if most is None or len(documents) <= most:
            return documents
        return [documents[i * len(documents) // most] for i in range(most)]

    def is_due(self, step: int) -> bool:
        """Return whether an evaluation is due after this many steps, the last aside."""
        return self.every > 0 and step % self.every == 0


def evaluate(
    model: CausalLMHead,
    documents: Sequence[Document],
    context: int | None = None,
    *,
    step: int = 0,
    tokens: int = 0,
    of_layers: Callable[[Tensor], Tensor] = lambda own: own,
) -> Evaluation:
    """Measure a model on texts, each alone and from its first token on.

    Args:
        model: the model, which is afterwards as it was.
        documents: texts of which every token counts, or conversations of which some do.
        context: how many tokens a window has; None for as many as the model has positions for.
        step: how many steps it has been trained.
        tokens: how many tokens it has learned from.
        of_layers: adds up what processes find in their layers, where these are not all here; what
            is measured of texts is then found where the last layer is.

    Raises:
        InputError: there is no token to predict.
    """
    started = time.perf_counter()
    has_experts = any(isinstance(module, ExpertRouter) for module in model.modules())
    balance: dict[str, float] = {}
    with evaluating(model):
        if has_experts:
            with ExpertLoads(model) as loads:
                found = score(model, documents, context)
                balance = loads.violations(of_layers(loads.loads()))
        else:
            found = score(model, documents, context)
    if not found.scored:
        raise InputError(
            f"{len(documents)} held-out documents have no token to predict; hold out more, or "
            "evaluate never"
        )
    return Evaluation(
        step=step,
        tokens=tokens,
        seconds=time.perf_counter() - started,
        scored=found.scored,
        bits_per_token=found.bits_per_token,
        bits_per_byte=found.bits_per_byte,
        agreement=found.agreement,
        balance=balance,
    )


def samples(
    model: CausalLMHead,
    tokenizer: PreTrainedTokenizer,
    settings: EvaluationSettings,
    *,
    step: int = 0,
    tokens: int = 0,
) -> Iterator[GeneratedSample]:
    """Yield a model's continuations of the prompts, each with the same seed; it is left unchanged.

    A text may be shorter than asked for, where the model ends it or its context does.
    """
    for prompt in settings.prompts:
        generator = torch.Generator(model.device).manual_seed(settings.seed)
        with evaluating(model):
            inputs = _encoded_prompt(tokenizer, prompt, settings.chat).to(model.device)
            drawn = settings.temperature > 0
            written = model.generate(
                inputs,
                max_new_tokens=settings.max_new_tokens,
                do_sample=drawn,
                temperature=settings.temperature if drawn else None,
                generator=generator,
                return_dict_in_generate=False,
            )
        new = written[0, inputs["input_ids"].shape[1] :]
        text = tokenizer.decode(new, skip_special_tokens=settings.chat)
        yield GeneratedSample(
            step=step, tokens=tokens, prompt=prompt, text=text, seed=settings.seed
        )


def _encoded_prompt(tokenizer: PreTrainedTokenizer, prompt: str, chat: bool) -> BatchEncoding:
    """Return the ids of a prompt, (1, T), as a conversation or as plain text."""
    if not chat:
        return tokenizer(prompt, return_tensors="pt")
    encoding: BatchEncoding = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    return encoding
