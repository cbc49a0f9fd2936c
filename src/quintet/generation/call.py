"""One call of `generate()`: the decisions before anything runs, and the decoding."""

import functools
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any, Protocol, cast

from torch import Tensor

from quintet.cache import Cache
from quintet.errors import QuintetError
from quintet.generation import plan
from quintet.generation.arguments import Arguments
from quintet.generation.beams import BeamOptions, beam_search
from quintet.generation.caches import open_cache
from quintet.generation.config import GenerationConfig
from quintet.generation.decode import Generation, LanguageModel, ModelRunner, TokenLimits, decode
from quintet.generation.guiding import guidance
from quintet.generation.healing import heal
from quintet.generation.in_turns import decode_in_turns, groups_of, in_groups, pieces_of
from quintet.generation.late import decode_late, decodes_late
from quintet.generation.outputs import GenerationRecord
from quintet.generation.prepared import PreparedForward, check_prepared
from quintet.generation.processors.assemble import Setting, assemble
from quintet.generation.processors.base import LogitsProcessor, LogitsProcessorList
from quintet.generation.prompt import Prompt, read_prompt
from quintet.generation.recorded import recorded_rows
from quintet.generation.requests import Served
from quintet.generation.returned import beam_output, behind_given, output
from quintet.generation.sampler import RowGenerators, Sampler, row_generators
from quintet.generation.shortage import does_not_fit
from quintet.generation.speculative.decoding import speculate
from quintet.generation.speculative.factory import (
    check_drafting,
    make_drafter,
    make_schedule,
    warn_of_idle_drafting,
)
from quintet.generation.stopping import Stopping
from quintet.generation.together import check_together, running_the_model
from quintet.generation.token_buffer import TokenBuffer
from quintet.ops.device_memory import is_shortage
from quintet.parallel.agree import Agreement


class Generating(Served, Protocol):
    """Interface of a model that `generate()` is called of."""

    def new_cache(self) -> Cache:
        """Return an empty cache of the kind the model grows."""
        ...

    def fused_session(self, cache: Cache | None) -> AbstractContextManager[None]:
        """Collect the layers' weights for the fused step once, for all steps inside."""
        ...

    def check_adapted_rows(self, rows: int) -> None:
        """Check that there is one adapter per row, if rows have their own."""
        ...

    def prepares_otherwise(self) -> bool:
        """Return whether `prepare_inputs_for_generation` was replaced."""
        ...

    def prepare_inputs_for_generation(self, input_ids: Tensor, **others: Any) -> dict[str, Any]:
        """Return the forward's arguments for the next token."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Decided:
    """The decisions that follow from the arguments of a call and its model.

    Attributes:
        config: the options.
        past: the cache to continue from, if one was given.
        prompt: the rows, without the tokens that are to be healed.
        max_new_tokens: the maximum number of new tokens.
        as_given: (B,) True for rows that get a token less than that; None for none.
        first: the processors that come before those of the options.
        search: the options of a beam search, if there is one.
        speculates: whether tokens are drafted.
        prepared: whether the caller's method prepares every forward.
        stopping: what ends a row.
        record: takes what is returned beside the ids.
    """

    config: GenerationConfig
    past: Cache | None
    prompt: Prompt
    max_new_tokens: int
    as_given: Tensor | None
    first: Sequence[LogitsProcessor]
    search: BeamOptions | None
    speculates: bool
    prepared: bool
    stopping: Stopping
    record: GenerationRecord

    @property
    def copies(self) -> int:
        """The number of continuations of each prompt."""
        return self.search.num_beams if self.search else self.config.num_return_sequences or 1

    @property
    def rows(self) -> int:
        """The number of rows that are continued."""
        return len(self.prompt.given) * self.copies

    @property
    def tokens(self) -> int:
        """The maximum number of tokens of a row, its prompt included."""
        return self.prompt.length + self.max_new_tokens


def prompt_of(
    model: Served, given: Arguments, config: GenerationConfig, past: Cache | None
) -> Prompt:
    """Read the prompt; without one it is the token that texts begin with.

    Raises:
        InputError: there is none, two contradict each other, or one is of another shape.
    """
    inputs = given.inputs
    if inputs is None and given.input_ids is None and given.inputs_embeds is None:
        inputs = plan.beginning(config, given.position_ids, model.device)
    return read_prompt(
        inputs,
        given.input_ids,
        given.inputs_embeds,
        given.attention_mask,
        past,
        given.position_ids,
        vocab_size=model.config.vocab_size,
        device=model.device,
    )


def decide(
    model: Generating, given: Arguments, agreement: Agreement | None, *, exchanges: bool = False
) -> Decided:
    """Decide how a call is answered; nothing is run.

    Args:
        model: what is run.
        given: the arguments.
        agreement: of the processes with the same text, if these are several.
        exchanges: whether experts are elsewhere, among processes with other texts.

    Raises:
        InputError: no prompt, an unknown option, or a value that breaks its rule.
        ContextLengthError: the prompt fills the model's context.
    """
    V = model.config.vocab_size
    config = plan.configured(model.generation_config, given.generation_config, given.options)
    check_together(config, agrees=agreement is not None, exchanges=exchanges)
    warn_of_idle_drafting(config, given.options, given.assistant_model, given.assistant_tokenizer)
    past = plan.check_cache(
        config,
        given.options,
        given.past_key_values,
        given.attention_mask,
        model.config.num_hidden_layers,
    )
    prompt = prompt_of(model, given, config, past)
    model.check_adapted_rows(len(prompt.given))
    criteria = list(given.stopping_criteria or ())
    context = model.config.max_position_embeddings
    max_new_tokens = plan.max_new_tokens_of(prompt, config, plan.longest(criteria), context)
    plan.check_least(config, max_new_tokens, V)
    first: list[LogitsProcessor] = []
    as_given: Tensor | None = None
    if config.guidance_scale not in (None, 1) or given.negative_prompt_ids is not None:
        away, mask = given.negative_prompt_ids, given.negative_prompt_attention_mask
        first += guidance(model, config, away, mask)
    if config.token_healing:
        healing = heal(prompt, given.tokenizer, V)
        prompt, as_given = healing.prompt, healing.as_given
        first += healing.processors
        max_new_tokens += len(healing.processors)
    search = plan.beam_options(config, given.streamer)
    speculates = check_drafting(
        model,
        config,
        given.assistant_model,
        given.tokenizer,
        given.assistant_tokenizer,
        rows=len(prompt.given) * (config.num_return_sequences or 1),
        padded=prompt.padding is not None,
        has_ids=prompt.inputs.ndim == 2,
    )
    prepared = model.prepares_otherwise()
    if prepared:
        check_prepared(config, prompt, speculates=speculates)
    return Decided(
        config=config,
        past=past,
        prompt=prompt,
        max_new_tokens=max_new_tokens,
        as_given=as_given,
        first=first,
        search=search,
        speculates=speculates,
        prepared=prepared,
        stopping=plan.stopping(config, criteria, given.tokenizer, model.device),
        record=GenerationRecord.of(config),
    )


class Call:
    """The forwards of a call, and the choice of their tokens.

    Args:
        model: what is run.
        given: the arguments.
        decided: what follows from them.
        agreement: of the processes that share the model, if several do.
        program: the model as a compiled program, for steps of one token.
        exit_stack: closes what the call has opened.
    """

    def __init__(
        self,
        model: Generating,
        given: Arguments,
        decided: Decided,
        agreement: Agreement | None,
        program: LanguageModel | None,
        exit_stack: ExitStack,
    ) -> None:
        self.model, self.given, self.decided = model, given, decided
        self.agreement, self.program, self.exit_stack = agreement, program, exit_stack
        self.chooses = agreement is None or agreement.decides
        self.streamer = given.streamer if self.chooses else None

    def run(self) -> Any:
        """Return the result of `generate()`.

        Raises:
            DoesNotFitError: there was not enough memory.
        """
        decided, cache = self.decided, None
        prompts, copies = decided.prompt.given, decided.copies
        try:
            if self.streamer is not None:
                self.streamer.put(prompts.repeat_interleave(copies, dim=0).cpu())
            copies_of_each = 1 if decided.search else copies
            generators = row_generators(
                self.given.generator, len(prompts), copies_of_each, self.model.device
            )
            groups = groups_of(self.model.world, len(prompts))
            if self.agreement is not None and len(groups) > 1 and not self._sees_all_rows():
                begins = [
                    functools.partial(self.begin, part, self.new_cache(), own)
                    for part, own in in_groups(decided.prompt, generators, groups, copies)
                ]
                ids = decode_in_turns(begins, self.agreement)
                return behind_given(ids, decided.prompt, copies)
            cache = self.new_cache()
            return self.decode(cache, generators)
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, QuintetError) or not is_shortage(error):
                raise
            own, short = None if cache is decided.past else cache, error.with_traceback(None)
            rows, tokens = decided.rows, decided.tokens
            raise does_not_fit(self.model, rows, tokens, decided.config, own) from short

    def decode(self, cache: Cache | None, generators: RowGenerators) -> Any:
        """Continue all rows together, and return the requested values."""
        decided, given = self.decided, self.given
        prompt, copies = decided.prompt, decided.copies
        if decided.search:
            run = self.begin(prompt, cache, generators)
            return beam_output(run, prompt, beam_search(run, decided.search))
        if not decided.speculates:
            run = self.begin(prompt, cache, generators)
            (decode_late if decodes_late(run) else decode)(run)
            return output(run, prompt, copies)
        V, config, assistant = self.model.config.vocab_size, decided.config, given.assistant_model
        # It begins to listen before the prompt is run.
        drafter = make_drafter(self.model, config, assistant, cache, V)
        self.exit_stack.callback(drafter.close)
        run = self.begin(prompt, cache, generators)
        schedule = make_schedule(self.model, config, assistant)
        return output(run, prompt, copies, speculate(run, drafter, schedule))

    def begin(self, part: Prompt, cache: Cache | None, own: RowGenerators) -> Generation:
        """Prefill prompts, and return the generation that continues them."""
        decided, record = self.decided, self.decided.record
        config, max_new_tokens, copies = decided.config, decided.max_new_tokens, decided.copies
        forward = (PreparedForward if decided.prepared else ModelRunner)(
            cast("LanguageModel", self.model),
            cache,
            record=record,
            keeps_cache=decided.past is not None or record.wanted,
            program=self.program,
        )
        if isinstance(forward, PreparedForward):
            forward.prepare = self.model.prepare_inputs_for_generation
        text = TokenBuffer(part.ids, part.text_padding(), reserve=max_new_tokens, copies=copies)
        limits = TokenLimits.of(max_new_tokens, decided.as_given, copies)
        chunk = config.prefill_chunk_size
        if not (chunk or decided.prepared or record.wanted or cache is None):
            chunk = pieces_of(self.model.world, *part.inputs.shape[:2])
        run = Generation(
            forward=forward,
            text=text,
            output=forward.prefill(part, chunk=chunk, copies=copies),
            sampler=Sampler(
                self._processors(text, limits),
                do_sample=bool(config.do_sample),
                generators=own,
                agreement=self.agreement,
            ),
            stopping=decided.stopping,
            limits=limits,
            pad=plan.pad_token(config),
            record=record,
            streamer=self.streamer,
        )
        self.exit_stack.enter_context(self.model.fused_session(cache))
        return run

    def new_cache(self) -> Cache | None:
        """Return the cache to fill: that of the caller, recorded rows, or a new one."""
        decided, config = self.decided, self.decided.config
        own = None
        if not self._sees_steps():
            rows, tokens, max_new_tokens = decided.rows, decided.tokens, decided.max_new_tokens
            own = recorded_rows(self.model, rows, tokens, config, max_new_tokens)
        if own is not None or decided.past is not None or config.use_cache is False:
            return own or decided.past
        return open_cache(config, self.model.config, self.model.new_cache, decided.tokens)

    def _processors(self, text: TokenBuffer, limits: TokenLimits) -> LogitsProcessorList:
        decided, given = self.decided, self.given
        if not self.chooses:
            return running_the_model((*decided.first, *(given.logits_processor or ())))
        setting = Setting(
            prompt=text.cut(len(text)),
            max_new_tokens=limits.per_row,
            vocab_size=self.model.config.vocab_size,
            num_beams=decided.copies if decided.search else 1,
            prefix_allowed_tokens_fn=given.prefix_allowed_tokens_fn,
            first=decided.first,
        )
        return assemble(decided.config, setting, given.logits_processor or ())

    def _sees_steps(self) -> bool:
        """Return whether something needs more of a step than its logits."""
        decided = self.decided
        ways = (decided.past, decided.search, decided.speculates, decided.prepared)
        return any((*ways, decided.record.wanted, self.given.adapter_names))

    def _sees_all_rows(self) -> bool:
        """Return whether something looks at all rows of a step at once."""
        given = self.given
        own = (given.streamer, given.stopping_criteria, given.logits_processor)
        return self._sees_steps() or any((*own, self.decided.first, given.prefix_allowed_tokens_fn))
