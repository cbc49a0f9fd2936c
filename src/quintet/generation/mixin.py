"""`GenerationMixin`: `generate()` and its helpers."""

import functools
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, cast

import torch
from torch import Tensor

from quintet.cache import Cache, LegacyCache
from quintet.configuration.base import PreTrainedConfig
from quintet.generation import plan
from quintet.generation.arguments import Arguments, check_logits_to_keep
from quintet.generation.call import Call, Generating, decide
from quintet.generation.compiling import Programs
from quintet.generation.config import GenerationConfig
from quintet.generation.own_options import generate_each
from quintet.generation.preparing import DecodeHelpers
from quintet.generation.processors.assemble import Processor
from quintet.generation.processors.words import PrefixAllowedTokens
from quintet.generation.sampler import Generators
from quintet.generation.speculative.factory import AssistantModel
from quintet.generation.stopping import Criterion
from quintet.generation.streamers import Streamer
from quintet.generation.together import check_alike
from quintet.parallel.agree import Agreement
from quintet.parallel.experts import lockstep_of
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
            RankFailedError: of several processes that hold the model, another one failed.
        """
        given = Arguments(
            inputs=inputs,
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            negative_prompt_ids=negative_prompt_ids,
            negative_prompt_attention_mask=negative_prompt_attention_mask,
            generation_config=generation_config,
            options=options,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            prefix_allowed_tokens_fn=prefix_allowed_tokens_fn,
            tokenizer=tokenizer,
            assistant_model=assistant_model,
            assistant_tokenizer=assistant_tokenizer,
            streamer=streamer,
            generator=generator,
            adapter_names=adapter_names,
        )
        model = cast("Generating", self)
        with ExitStack() as exit_stack:
            agreement = Agreement.of(self.world)
            lockstep = None if self.world is None else lockstep_of(self)
            if lockstep is not None:
                # Behind it nothing is made any more: what is open here is closed before.
                exit_stack.enter_context(lockstep.until_all_are_done(agreement))
            if isinstance(streamer, Streamer):
                # Whoever reads what is streamed must not wait for what will never come.
                exit_stack.callback(streamer.end)
            if agreement is not None:
                exit_stack.enter_context(agreement.agreed_interrupts())
                check_alike(agreement, given, self.generation_config)
            if adapter_names is not None:
                exit_stack.enter_context(self.each_row(adapter_names, copied=True))
            given.check()
            check_logits_to_keep(logits_to_keep)
            if isinstance(generation_config, list | tuple):
                return generate_each(model, given, generation_config)
            decided = decide(model, given, agreement, exchanges=lockstep is not None)
            config = decided.config
            program = self._programs.of(self, config) if config.compiles else None
            return Call(model, given, decided, agreement, program, exit_stack).run()

    @functools.cached_property
    def _programs(self) -> Programs:
        return Programs()
