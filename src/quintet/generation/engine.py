"""The engine: one forward for any mix of sequences, and their next tokens."""

import logging
from collections import abc
from typing import Any, cast

import torch
from torch import Tensor

from quintet.adapters.rows import ByRow
from quintet.errors import InputError
from quintet.generation import plan
from quintet.generation.ahead import Ahead, gathered
from quintet.generation.arguments import Arguments
from quintet.generation.choosing import Choosing
from quintet.generation.engine_rows import EngineRows
from quintet.generation.fixed_step import Recording
from quintet.generation.following import check_led, leading, rows_of
from quintet.generation.graphs import graphs_of
from quintet.generation.observing import ROWS
from quintet.generation.processors.assemble import Processor
from quintet.generation.processors.words import PrefixAllowedTokens
from quintet.generation.requests import Served, sequence_of
from quintet.generation.rows import Piece
from quintet.generation.sequence import Sequence
from quintet.generation.speculative.drafting import PredictedDrafting
from quintet.generation.speculative.factory import AssistantModel
from quintet.generation.speculative.pacing import room_for_drafts
from quintet.generation.speculative.pooled import PooledPrediction
from quintet.generation.stopping import Criterion
from quintet.generation.streamers import Streamer
from quintet.ops.sending import sent
from quintet.quantization.modules import Quantized
from quintet.tokenization import PreTrainedTokenizer

log = logging.getLogger("quintet.generation")


class Engine(EngineRows):
    """Generates for sequences that join and leave between steps.

    It belongs to one thread. Nothing of it is kept with the model, which any number of engines and
    calls of `generate()` may share.

    Args:
        model: a model with a language-modelling head.
        rows: how many sequences there is room for at once.
        capacity: how many tokens a row holds: a sequence's prompt, and what it gets but the last.
        nbits: 8, 6 or 4 bits a number of keys, values and latents, as `cache_dtype` of
            `generate()` has them; None to keep them as they are.
        paces_drafts: whether rows draft no more than a step has room for, and not where few hold.
        recording: how steps of one token a row are recorded; if not given, as CUDA graphs where the
            model is on such a device, and not at all elsewhere.

    Raises:
        InputError: there is no row, the capacity is beyond the model's context, or another number
            of bits.
    """

    def __init__(
        self,
        model: Served,
        rows: int,
        capacity: int,
        *,
        nbits: int | None = None,
        paces_drafts: bool = False,
        recording: Recording | None = None,
    ) -> None:
        context = model.config.max_position_embeddings
        if rows < 1 or not 1 <= capacity <= context:
            raise InputError(
                f"an engine with rows={rows} of capacity={capacity} cannot be: it has at least "
                f"one row, and the model's context is {context} (max_position_embeddings)"
            )
        self.model = model
        self.capacity = capacity
        if recording is None and (graphs := graphs_of(model.device)) is not None:
            recording = Recording(graphs)
        self._rows = rows_of(model, rows, capacity, nbits, recording)
        # Which row of the cache each sequence has.
        self._placed: dict[Sequence, int] = {}
        self._choosing = Choosing([])
        # How many drafted tokens the last step checked.
        self.drafted = 0
        # What prediction layers keep, once a sequence wants drafts of theirs.
        self._prediction: PooledPrediction | None = None
        self._paces_drafts = paces_drafts
        module = cast("torch.nn.Module", model)
        self._few_bits = any(isinstance(one, Quantized) for one in module.modules())

    @property
    def exchanges(self) -> bool:
        """Whether other engines' tokens come to experts of this process, and its to theirs."""
        return self._rows.exchanges

    def attend(self) -> bool:
        """Take part in other engines' step, with nothing to run; return whether there was one.

        An engine that exchanges tokens has to be asked for steps, or for this, all the time.

        Raises:
            RankFailedError: another process failed.
        """
        return self._rows.attend()

    def close(self, why: BaseException | None = None) -> None:
        """Release the other processes of a sharded model from `follow`.

        Where engines exchange tokens, all are closed together: this one attends until then.

        Args:
            why: this engine has failed, and all end.
        """
        with leading(self.model):
            if self._rows.exchanges:
                self._rows.leave(why)
            self._rows.end()

    def sequence(
        self,
        inputs: Tensor | abc.Sequence[int],
        generation_config: plan.Configuring | None = None,
        logits_processor: abc.Sequence[Processor] | None = None,
        stopping_criteria: abc.Sequence[Criterion] | None = None,
        prefix_allowed_tokens_fn: PrefixAllowedTokens | None = None,
        *,
        tokenizer: PreTrainedTokenizer | None = None,
        assistant_model: AssistantModel | None = None,
        assistant_tokenizer: PreTrainedTokenizer | None = None,
        streamer: Streamer | None = None,
        generator: torch.Generator | None = None,
        adapter_name: str | None = None,
        **options: Any,
    ) -> Sequence:
        """Return a sequence that will get the tokens `generate()` would, given its arguments.

        Args:
            inputs: the ids of the prompt, (T,) or (1, T) or a list.
            generation_config: as for `generate()`, like all that follows.
            logits_processor: further processors, which get this row alone.
            stopping_criteria: what else ends it.
            prefix_allowed_tokens_fn: the ids that may come next, from 0 and the ids so far.
            tokenizer: what `stop_strings` needs.
            assistant_model: a smaller model of the same tokens, which drafts; what it keeps of
                this sequence goes with the sequence.
            assistant_tokenizer: shows, beside `tokenizer`, that they are the same.
            streamer: gets the prompt, and then every token as it is made.
            generator: the source of its randomness; torch's own if not given.
            adapter_name: the adapter that it is made with, "__base__" for none; what the model
                uses if not given.
            **options: fields of `GenerationConfig`.

        Raises:
            InputError: no prompt, an unknown option, a value that breaks its rule, or an option
                that is no affair of one sequence.
            ContextLengthError: the prompt fills the model's context.
        """
        if adapter_name is not None:
            # That there is one is found out before a step has others to think of.
            with cast("ByRow", self.model).each_row([adapter_name]):
                pass
        given = Arguments(
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
        )
        sequence = sequence_of(self.model, inputs, given)
        sequence.adapter_name = adapter_name
        check_led(self.model, assistant_model)
        return sequence

    def can_adapt(self, sequence: Sequence) -> bool:
        """Return whether the sequence's adapter is loaded."""
        if sequence.adapter_name is None:
            return True
        try:
            with cast("ByRow", self.model).each_row([sequence.adapter_name]):
                return True
        except InputError:
            return False

    # -- a step ------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, sequences: abc.Sequence[Sequence], piece: int | None = None) -> list[list[int]]:
        """Run one forward over the sequences, and return each one's new tokens.

        One whose prompt is not run over to its end gets none, and so does one that has ended. What
        goes wrong with one sequence ends that one, with its `error`. Where steps are recorded, the
        next one of the same sequences begins before the tokens of this one are waited for.

        Args:
            sequences: some of those in the engine.
            piece: how many tokens of a prompt to run over at the most; all if not given.

        Raises:
            InputError: a sequence is not in the engine, or named twice.
            Exception: what the forward raised; then no sequence has moved, and the step can be
                done again.
        """
        rows = [self._row(sequence) for sequence in sequences]
        if len(set(rows)) < len(rows) or (piece is not None and piece < 1):
            raise InputError(
                f"a step over {len(rows)} sequences in pieces of {piece} has to name each "
                "sequence once, and a piece of at least one token"
            )
        for sequence in sequences:
            sequence.apply_cancellation()
        stepping = [one for one in sequences if one.waiting == 1 and not one.finished]
        self._pace(stepping)
        if self._prediction is not None:
            self._prediction.draft(stepping)
        going, pieces = [], []
        for sequence in sequences:
            next_piece = None if sequence.finished else self._next_piece(sequence, piece)
            # What drafts for it may have failed.
            if next_piece is not None and not sequence.finished:
                going.append(sequence)
                pieces.append(next_piece)
        self.drafted = 0
        if not pieces:
            return [[] for _ in sequences]
        try:
            logits = self._run(going, pieces)
        except BaseException:
            for sequence in going:
                self._rewind(sequence)
            raise
        self.drafted = sum(max(one.checked - 1, 0) for one in pieces)
        before = {one: len(one.ids) for one in going}
        for sequence, ran in zip(going, pieces, strict=True):
            sequence.computed += len(ran.ids)
        self._choose(going, pieces, logits)
        return [one.ids[before.get(one, len(one.ids)) :] for one in sequences]

    def _pace(self, stepping: list[Sequence]) -> None:
        """Limit drafts to the number that a step of this many rows can check."""
        limit = room_for_drafts(len(stepping), few_bits=self._few_bits)
        for sequence in stepping:
            drafting = sequence.drafting
            if drafting is None or drafting.pacing is None:
                continue
            drafting.pacing.limit = limit
            if self._prediction is not None and isinstance(drafting, PredictedDrafting):
                self._prediction.pace(sequence)

    def _run(self, going: list[Sequence], pieces: list[Piece]) -> Tensor:
        """Return the logits that pieces keep; of steps that began ahead, those there are."""
        ahead = {one: one.ahead for one in going if one.ahead is not None}
        if not ahead:
            return self._run_now(going, pieces)
        begun = gathered(ahead.values())
        if len(ahead) < len(going):
            numbers = [number for number, one in enumerate(going) if one not in ahead]
            rest = [pieces[number] for number in numbers]
            logits = self._run_now([going[number] for number in numbers], rest)
            own = iter(torch.split(begun, 1))
            others = iter(torch.split(logits, [piece.keep for piece in rest]))
            begun = torch.cat([next(own if one in ahead else others) for one in going])
        for one in ahead:
            one.ahead = None
        return begun

    def _run_now(self, going: list[Sequence], pieces: list[Piece]) -> Tensor:
        """Run the pieces, and pass their states to drafters and observers."""
        predicting = [_predicting(one) for one in going]
        pooling = [one.watched is not None and one.watched.pooling is not None for one in going]
        if not any(predicting) and not any(pooling):
            return self._rows.run(pieces)
        logits, seen = self._rows.watch(pieces)
        for one, drafting, piece, states in zip(going, predicting, pieces, seen, strict=True):
            if drafting is not None:
                drafting.saw(states, piece.checked)
            if one.watched is not None and one.watched.pooling is not None:
                one.watched.saw_states(states.states)
        return logits

    def _choose(self, going: list[Sequence], pieces: list[Piece], logits: Tensor) -> None:
        """Append each sequence's tokens, from the logits (N, V) that pieces kept."""
        single: list[Sequence] = []
        places: list[int] = []
        end = 0
        for sequence, piece in zip(going, pieces, strict=True):
            end += piece.keep
            if sequence.watched is not None:
                self._take_down(sequence, piece, logits[end - piece.keep : end])
            if piece.checked and sequence.only_reads:
                sequence.has_read()
            if not piece.checked or sequence.finished:
                continue
            if not sequence.checks:
                single.append(sequence)
                places.append(end - 1)
                continue
            before, checked = len(sequence.ids), logits[end - piece.checked : end]
            sequence.take_checked(checked)
            sequence.note(checked, sequence.ids[before:])
            self._take_back(sequence)
        if not single:
            return
        if len(places) < len(logits):
            logits = logits[sent(places, torch.long, logits.device)]
        samplers = tuple(sequence.sampler for sequence in single)
        if samplers != self._choosing.samplers:
            self._choosing = Choosing(samplers)
        steps = [len(one.ids) - one.prompt_length + 1 for one in single]
        taken = self._choosing.choose(lambda row: single[row].text, logits, steps)
        try:
            if len(single) == len(going):
                self._run_ahead(single, taken.tokens)
            for row, (sequence, token) in enumerate(zip(single, taken.read(), strict=True)):
                if isinstance(token, Exception):
                    sequence.fail(token)
                    continue
                sequence.note(logits[row : row + 1], [token])
                if sequence.finished:
                    continue
                sequence.take(token)
                if sequence.drafting is not None:
                    sequence.drafting.taken(1, 0)
        finally:
            for sequence in single:
                if sequence.waiting < 1 and sequence.ahead is not None:
                    # What ran ahead follows a token that it did not get.
                    self._rewind(sequence)

    def _run_ahead(self, sequences: list[Sequence], tokens: Tensor) -> None:
        """Begin the next step of sequences that do not end with these tokens (N,) for certain.

        Whether one ends all the same is read meanwhile; then what was run over is of no use.
        """
        # Behind a prompt, the next step is likely to be one beside others.
        if not all(one.steps_singly and one.computed > one.prompt_length for one in sequences):
            return
        places = [place for place, one in enumerate(sequences) if one.left > 1]
        if not places:
            return
        going = [sequences[place] for place in places]
        if len(going) < len(sequences):
            tokens = tokens[sent(places, torch.long, tokens.device)]
        rows = [self._placed[one] for one in going]
        try:
            logits = self._rows.step_ahead(rows, tokens)
        except Exception as error:
            # It is done again when it is its turn, and raises there if it fails again.
            log.warning("a step that began ahead failed, and is done in its turn: %r", error)
            for one in going:
                self._rewind(one)
            return
        if logits is not None:
            for row, one in enumerate(going):
                one.ahead = Ahead(logits, row)

    @staticmethod
    def _take_down(sequence: Sequence, piece: Piece, logits: Tensor) -> None:
        """Record the log-probabilities of a piece of a prompt."""
        observed = sequence.watched
        assert observed is not None
        try:
            if observed.prompt_logprobs is not None:
                begin = sequence.computed - len(piece.ids)
                following = sequence.ids[begin + 1 : sequence.computed + 1]
                observed.saw_logits(logits, following)
        except Exception as error:
            sequence.fail(error)
        observed.reads = sequence.waiting > 0

    def _next_piece(self, sequence: Sequence, most: int | None) -> Piece:
        self._take_back(sequence)
        row, begin = self._placed[sequence], sequence.computed
        end = len(sequence.ids) if most is None else min(begin + most, len(sequence.ids))
        scored = sequence.watched is not None and sequence.watched.prompt_logprobs is not None
        if scored and end - begin > 2.5 * ROWS:
            # Logits of the whole prompt could be more than there is memory for.
            end = begin + 2 * ROWS
        ids = sequence.ids[begin:end]
        if end < len(sequence.ids):
            return Piece(row, ids, len(ids) if scored else 0, 0, sequence.adapter_name)
        draft = sequence.draft()
        checked = len(draft) + 1
        keep = len(ids) if scored else checked
        return Piece(row, ids + draft, keep, checked, sequence.adapter_name)


def _predicting(sequence: Sequence) -> PredictedDrafting | None:
    """Return the sequence's drafting by prediction layers, if active."""
    drafting = sequence.drafting
    return drafting if isinstance(drafting, PredictedDrafting) and drafting.awake else None
