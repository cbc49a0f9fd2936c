"""`GenerationMixin`: `generate()` and its helpers."""

import functools
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, cast

import torch
from torch import Tensor

from quintet.cache import Cache, LegacyCache
from quintet.configuration.base import PreTrainedConfig
from quintet.errors import QuintetError
from quintet.generation import plan
from quintet.generation.arguments import check_arguments
from quintet.generation.beams import beam_search
from quintet.generation.caches import open_cache
from quintet.generation.compiling import Programs
from quintet.generation.config import GenerationConfig
from quintet.generation.decode import Forward, Generation, LanguageModel, Rooms, decode
from quintet.generation.guiding import guidance
from quintet.generation.healing import heal
from quintet.generation.in_turns import decode_in_turns, groups_of, in_groups, pieces_of
from quintet.generation.late import decode_late, decodes_late
from quintet.generation.outputs import Record
from quintet.generation.own_options import check_own_options, generate_each
from quintet.generation.prepared import PreparedForward, check_prepared
from quintet.generation.preparing import DecodeHelpers
from quintet.generation.processors.assemble import Processor, Setting, assemble
from quintet.generation.processors.base import LogitsProcessor
from quintet.generation.processors.words import PrefixAllowedTokens
from quintet.generation.prompt import Prompt, read_prompt
from quintet.generation.recorded import recorded_rows
from quintet.generation.requests import Served
from quintet.generation.returned import beam_output, behind_given, output
from quintet.generation.rows import Cached
from quintet.generation.sampler import Generators, RowGenerators, Sampler, row_generators
from quintet.generation.shortage import does_not_fit
from quintet.generation.speculative.candidates import Drafter
from quintet.generation.speculative.decoding import speculate
from quintet.generation.speculative.factory import (
    AssistantModel,
    check_drafting,
    make_drafter,
    make_schedule,
    warn_of_idle_drafting,
)
from quintet.generation.stopping import Criterion
from quintet.generation.streamers import Streamer
from quintet.generation.together import check_alike, check_together, running_the_model
from quintet.generation.token_buffer import TokenBuffer
from quintet.ops.device_memory import is_shortage
from quintet.parallel.agree import Agreement
from quintet.parallel.world import World
from quintet.tokenization import PreTrainedTokenizer

__all__ = ["GenerationMixin"]


class GenerationMixin(DecodeHelpers):
    """Adds `generate()` to a model with a language-modelling head."""

    config: PreTrainedConfig
    generation_config: GenerationConfig
    world: World | None = None

    def new_cache(self) -> Cache:
        """Return an empty cache of the kind the model grows."""
        raise NotImplementedError

    def fused_session(self, cache: Cache | None) -> AbstractContextManager[None]:
        """Collect the layers' weights for the fused step once, for all steps inside."""
        return nullcontext()

    def each_row(
        self, adapter_names: Sequence[str | None], *, copied: bool = False
    ) -> AbstractContextManager[None]:
        """Use an adapter per row inside, in this thread."""
        raise NotImplementedError

    def check_adapted_rows(self, rows: int) -> None:
        """Check that there is one adapter per row, if rows have their own."""

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | Mapping[str, Tensor] | None = None,
        generation_config: plan.Configuring | Sequence[plan.Configuring] | None = None,
        logits_processor: Sequence[Processor] | None = None,
        stopping_criteria: Sequence[Criterion] | None = None,
        prefix_allowed_tokens_fn: PrefixAllowedTokens | None = None,
        *,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | LegacyCache | None = None,
        negative_prompt_ids: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        tokenizer: PreTrainedTokenizer | None = None,
        assistant_model: AssistantModel | None = None,
        assistant_tokenizer: PreTrainedTokenizer | None = None,
        streamer: Streamer | None = None,
        generator: Generators | None = None,
        labels: object = None,
        token_type_ids: object = None,
        logits_to_keep: int | None = None,
        adapter_names: Sequence[str | None] | None = None,
        **options: Any,
    ) -> Any:
        """Continue each row of a prompt and return prompt and continuation, (B, T + new).

        Rows that end early are filled with the pad token.

        Args:
            inputs: (B, T) ids, or what the tokenizer returns; without any prompt, the text begins
                with `bos_token_id`.
            generation_config: how to generate; what it does not set is as in the model's own. One
                of Transformers is read, too. A list has one for each row.
            logits_processor: further processors, behind those that the options ask for.
            stopping_criteria: what else ends a row.
            prefix_allowed_tokens_fn: the ids that may come next, from a row's index and its ids.
            input_ids: the other name of `inputs`.
            inputs_embeds: (B, T, C) to run over in place of the ids; without ids, what is
                returned begins behind it.
            attention_mask: (B, T), 0 for padding, on either side; without it, nothing is.
            position_ids: (B, T) a position for each token of the prompt; those of the text follow.
            past_key_values: the cache of an earlier call that has run over the beginning of these
                rows; or, with an attention_mask of all, over what comes before them.
            negative_prompt_ids: (B, T) what `guidance_scale` leads away from; the last token of
                the prompt if not given.
            negative_prompt_attention_mask: (B, T), 0 for padding.
            tokenizer: what `stop_strings` and `token_healing` need.
            assistant_model: a smaller model of the same tokens, which drafts what this one checks.
            assistant_tokenizer: shows, beside `tokenizer`, that they are the same.
            streamer: gets the prompt and then every token as it is made.
            generator: the source of randomness, one or one for each row; seeded, it makes
                sampling repeatable, each row whatever the others are.
            labels: taken, as trainers give what a batch has, and not used; `token_type_ids`
                likewise, which tokenizers of pairs make.
            logits_to_keep: taken, as it changes no text: what follows needs the last alone.
            adapter_names: an adapter for each row; None, or "__base__", for none.
            **options: fields of `GenerationConfig` that go before both configs; None lifts what
                they set.

        Returns:
            The ids; or with `return_dict_in_generate` a `GenerateDecoderOnlyOutput`, of beams a
            `GenerateBeamDecoderOnlyOutput`.

        Raises:
            InputError: no prompt, an unknown option, or a value that breaks its rule.
            ContextLengthError: the prompt fills the model's context.
            DoesNotFitError: there was not enough memory; it says how many rows there is room for.
        """
        drafter: Drafter | None = None
        rows = ExitStack()
        agreement = Agreement.of(self.world)
        needed: tuple[int, int, GenerationConfig] | None = None
        cache: Cache | None = None
        prompt_of = functools.partial(
            read_prompt, vocab_size=self.config.vocab_size, device=self._device()
        )
        try:
            if agreement is not None:
                rows.enter_context(agreement.undisturbed())
                asked = {
                    "inputs": inputs if input_ids is None else input_ids,
                    "inputs_embeds": inputs_embeds,
                    "attention_mask": attention_mask,
                    "position_ids": position_ids,
                    "negative_prompt_ids": negative_prompt_ids,
                    "negative_prompt_attention_mask": negative_prompt_attention_mask,
                    "logits_processor": logits_processor,
                    "stopping_criteria": stopping_criteria,
                    "prefix_allowed_tokens_fn": prefix_allowed_tokens_fn,
                    "tokenizer": tokenizer,
                    "assistant_model": assistant_model,
                    "adapter_names": adapter_names,
                    "model.generation_config": self.generation_config,
                    "generation_config": generation_config,
                    "options": options,
                }
                check_alike(agreement, asked, past_key_values)
            if adapter_names is not None:
                rows.enter_context(self.each_row(adapter_names, copied=True))
            check_arguments(
                logits_processor=logits_processor,
                stopping_criteria=stopping_criteria,
                prefix_allowed_tokens_fn=prefix_allowed_tokens_fn,
                tokenizer=tokenizer,
                assistant_model=assistant_model,
                assistant_tokenizer=assistant_tokenizer,
                streamer=streamer,
                logits_to_keep=logits_to_keep,
            )
            if isinstance(generation_config, list | tuple):
                check_own_options(
                    inputs_embeds=inputs_embeds,
                    position_ids=position_ids,
                    past_key_values=past_key_values,
                    negative_prompt_ids=negative_prompt_ids,
                    negative_prompt_attention_mask=negative_prompt_attention_mask,
                    streamer=streamer,
                    adapter_names=adapter_names,
                )
                return generate_each(
                    cast("Served", self),
                    prompt_of(inputs, input_ids, None, attention_mask, None, None),
                    generation_config,
                    logits_processor,
                    stopping_criteria,
                    prefix_allowed_tokens_fn,
                    tokenizer=tokenizer,
                    assistant_model=assistant_model,
                    assistant_tokenizer=assistant_tokenizer,
                    generator=generator,
                    options=options,
                )
            config = plan.configured(self.generation_config, generation_config, options)
            if inputs is None and input_ids is None and inputs_embeds is None:
                inputs = plan.beginning(config, position_ids, self._device())
            if agreement is not None:
                check_together(config)
            warn_of_idle_drafting(config, options, assistant_model, assistant_tokenizer)
            layers = self.config.num_hidden_layers
            past = plan.check_cache(config, options, past_key_values, attention_mask, layers)
            prompt = prompt_of(inputs, input_ids, inputs_embeds, attention_mask, past, position_ids)
            self.check_adapted_rows(len(prompt.given))
            criteria = list(stopping_criteria or ())
            context = self.config.max_position_embeddings
            room = plan.room(prompt, config, plan.longest(criteria), context)
            plan.check_least(config, room, self.config.vocab_size)
            first: list[LogitsProcessor] = []
            as_given: Tensor | None = None
            if config.guidance_scale not in (None, 1) or negative_prompt_ids is not None:
                first += guidance(self, config, negative_prompt_ids, negative_prompt_attention_mask)
            if config.token_healing:
                healing = heal(prompt, tokenizer, self.config.vocab_size)
                prompt, as_given = healing.prompt, healing.as_given
                first += healing.processors
                room += len(healing.processors)
            search = plan.beam_options(config, streamer)
            copies = search.num_beams if search else config.num_return_sequences or 1
            speculates = check_drafting(
                self,
                config,
                assistant_model,
                tokenizer,
                assistant_tokenizer,
                rows=len(prompt.given) * copies,
                padded=prompt.padding is not None,
                has_ids=prompt.inputs.ndim == 2,
            )

            needed = len(prompt.given) * copies, prompt.length + room, config
            record = Record.of(config)
            prepared = self.prepares_otherwise()
            plain = not any((past, search, speculates, prepared, record.wanted, adapter_names))
            if prepared:
                check_prepared(config, prompt, speculates=speculates)
            chooses = agreement is None or agreement.decides
            heard = streamer if chooses else None
            if heard is not None:
                heard.put(prompt.given.repeat_interleave(copies, dim=0).cpu())
            each = 1 if search else copies
            generators = row_generators(generator, len(prompt.given), each, self._device())
            stops = plan.stopping(config, criteria, tokenizer, self._device())
            program = self._programs.of(self, config) if config.compiles else None

            def new_cache() -> Cache | None:
                own = recorded_rows(cast("Cached", self), *needed, room) if plain else None
                if own is not None or past is not None or config.use_cache is False:
                    return own or past
                return open_cache(config, self.config, self.new_cache, prompt.length + room)

            def begin(part: Prompt, cache: Cache | None, own: RowGenerators) -> Generation:
                """Prefill prompts, and return the generation that continues them."""
                forward = (PreparedForward if prepared else Forward)(
                    cast("LanguageModel", self),
                    cache,
                    record=record,
                    keeps_cache=past is not None or record.wanted,
                    program=program,
                )
                if isinstance(forward, PreparedForward):
                    forward.prepare = self.prepare_inputs_for_generation
                text = TokenBuffer(part.ids, part.text_padding(), room=room, copies=copies)
                rooms = Rooms.of(room, as_given, copies)
                setting = Setting(
                    prompt=text.cut(len(text)),
                    room=rooms.each,
                    vocab_size=self.config.vocab_size,
                    num_beams=copies if search else 1,
                    prefix_allowed_tokens_fn=prefix_allowed_tokens_fn,
                    first=first,
                )
                chunk = config.prefill_chunk_size
                if not (chunk or prepared or record.wanted or cache is None):
                    chunk = pieces_of(self.world, *part.inputs.shape[:2])
                run = Generation(
                    forward=forward,
                    text=text,
                    output=forward.prefill(part, chunk=chunk, copies=copies),
                    sampler=Sampler(
                        assemble(config, setting, logits_processor or ())
                        if chooses
                        else running_the_model((*first, *(logits_processor or ()))),
                        do_sample=bool(config.do_sample),
                        generators=own,
                        agreement=agreement,
                    ),
                    stopping=stops,
                    rooms=rooms,
                    pad=plan.pad_token(config),
                    record=record,
                    streamer=heard,
                )
                rows.enter_context(self.fused_session(cache))
                return run

            groups = groups_of(self.world, len(prompt.given))
            # What sees all rows of a step at once has them go together.
            whole = any((search, speculates, prepared, past, streamer, criteria, logits_processor))
            whole |= any((first, prefix_allowed_tokens_fn, record.wanted, adapter_names))
            if agreement is not None and len(groups) > 1 and not whole:
                begins = [
                    functools.partial(begin, part, new_cache(), own)
                    for part, own in in_groups(prompt, generators, groups, copies)
                ]
                return behind_given(decode_in_turns(begins, agreement), prompt, copies)
            cache = new_cache()
            if speculates:
                V = self.config.vocab_size
                drafter = make_drafter(self, config, assistant_model, cache, V)
            run = begin(prompt, cache, generators)
            if search:
                return beam_output(run, prompt, beam_search(run, search))
            if drafter is None:
                (decode_late if decodes_late(run) else decode)(run)
                return output(run, prompt, copies)
            schedule = make_schedule(self, config, assistant_model)
            return output(run, prompt, copies, speculate(run, drafter, schedule))
        except (MemoryError, RuntimeError) as error:
            if needed is None or isinstance(error, QuintetError) or not is_shortage(error):
                raise
            held, short = None if cache is past else cache, error.with_traceback(None)
            raise does_not_fit(cast("Cached", self), *needed, held) from short
        finally:
            rows.close()
            if drafter is not None:
                drafter.close()
            # Whoever reads what is streamed must not wait for what will never come.
            if isinstance(streamer, Streamer):
                streamer.end()

    @functools.cached_property
    def _programs(self) -> Programs:
        return Programs()

    def _device(self) -> torch.device:
        device: torch.device = cast("Any", self).device
        return device
