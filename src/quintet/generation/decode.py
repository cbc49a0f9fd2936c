"""The decode loop: one forward and one token per row in each step."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from quintet.cache import Cache
from quintet.errors import InputError
from quintet.generation.outputs import ForwardOutput, GenerationRecord
from quintet.generation.prompt import Prompt
from quintet.generation.recorded import RecordedRows
from quintet.generation.sampler import Sampler
from quintet.generation.stopping import Stopping
from quintet.generation.streamers import Streamer
from quintet.generation.token_buffer import TokenBuffer
from quintet.parallel.agree import Agreement


class LanguageModel(Protocol):
    """Interface of a model that `generate()` decodes: a forward with a cache."""

    def __call__(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        past_key_values: Cache | None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        logits_to_keep: int,
        return_dict: bool,
    ) -> Any:
        """Return an output with `logits` (B, logits_to_keep, V)."""
        ...


class ModelRunner:
    """The forwards of one generation: prefill, then steps.

    Args:
        model: what is run.
        cache: what it continues from, and fills; None to run over the whole text every time.
        record: tells whether attentions and hidden states are needed.
        keeps_cache: the cache is used afterwards, so that what follows the end of a row must not
            get into it.
        program: the model as a compiled program, for steps of one token.
    """

    def __init__(
        self,
        model: LanguageModel,
        cache: Cache | None,
        *,
        record: GenerationRecord | None = None,
        keeps_cache: bool = False,
        program: LanguageModel | None = None,
    ) -> None:
        self.model = model
        self.program = model if program is None else program
        self.cache = cache
        self.keeps_cache = keeps_cache
        self._weighs = record is not None and record.attentions is not None
        self._keeps = record is not None and record.hidden_states is not None
        # Which columns so far were tokens, where weights are put into columns.
        self._columns: Tensor | None = None
        # How far a row's positions are from its slots (B,), where the caller gave some.
        self._shift: Tensor | None = None

    def prefill(
        self, prompt: Prompt, *, chunk: int | None = None, copies: int = 1
    ) -> ForwardOutput:
        """Run the part of a prompt that the cache does not hold.

        Args:
            prompt: the rows to continue.
            chunk: how many tokens to run over at once.
            copies: how often each row is gone on with, side by side.

        Raises:
            InputError: the cache holds all of a row, or a chunk is asked for without a cache.
        """
        inputs, padding, mask = prompt.inputs, prompt.padding, None
        positions = prompt.positions
        if positions is not None:
            if self.cache is None:
                raise InputError("position_ids needs a cache; leave use_cache=False out")
            lengths = prompt.width if padding is None else prompt.width - padding
            self._shift = positions[:, -1] + 1 - lengths
        if self.cache is None and (chunk is not None or inputs.ndim == 3):
            given = "inputs_embeds" if chunk is None else f"prefill_chunk_size={chunk}"
            raise InputError(f"{given} needs a cache; leave use_cache=False out")
        if self.cache is not None and self.cache.get_seq_length() and not prompt.before:
            inputs, mask = _behind(self.cache, inputs, padding)
            positions = None if positions is None else positions[:, -inputs.shape[1] :]
        elif padding is not None:
            mask = (
                torch.arange(inputs.shape[1], device=inputs.device, dtype=torch.long)
                >= padding[:, None]
            )
            self._columns = mask if self._weighs and not prompt.before else None
        output = None
        for start in range(0, inputs.shape[1], chunk or inputs.shape[1]):
            piece = slice(start, None if chunk is None else start + chunk)
            output = self._run(
                inputs[:, piece],
                None if mask is None else mask[:, piece],
                positions=None if positions is None else positions[:, piece],
            )
        assert output is not None
        if copies == 1:
            return output
        if self.cache is not None:
            self.cache.batch_repeat_interleave(copies)
        if self._columns is not None:
            self._columns = self._columns.repeat_interleave(copies, dim=0)
        if self._shift is not None:
            self._shift = self._shift.repeat_interleave(copies)
        return output.repeat(copies)

    def step(
        self, text: TokenBuffer, rows: Tensor | None = None, *, new: int = 1, keep: int = 1
    ) -> ForwardOutput:
        """Run the last `new` tokens, or the whole text without a cache.

        Args:
            text: the rows.
            rows: (B,) True for rows that still go on; None for all.
            new: how many tokens the cache does not hold.
            keep: of how many positions logits are wanted.
        """
        if self.cache is None:
            mask = None if text.padding is None else text.mask()
            return self._run(text.ids, mask, keep)
        mask = None
        if self.keeps_cache and rows is not None:
            mask = rows[:, None].expand(-1, new)
        if self._columns is not None:
            # Weights are told by column, and those of a prompt's padding are kept empty.
            added = (
                text.ids.new_ones(len(text.ids), new, dtype=torch.bool) if mask is None else mask
            )
            self._columns = mask = torch.cat((self._columns, added), dim=1)
        return self._run(
            text.ids[:, len(text) - new :], mask, keep, positions=self._positions(text, new)
        )

    def _positions(self, text: TokenBuffer, new: int) -> Tensor | None:
        """Return the positions (B, new) of the last tokens, if they differ from their slots."""
        if self._shift is None:
            return None
        from_end = torch.arange(-new, 0, device=self._shift.device, dtype=torch.long)
        return (text.lengths() + self._shift)[:, None] + from_end

    def reorder(self, rows: Tensor) -> None:
        """Reorder the rows of the cache for beam search."""
        if self.cache is not None:
            self.cache.reorder_cache(rows)
        if self._columns is not None:
            self._columns = self._columns[rows]

    def _run(
        self,
        inputs: Tensor,
        mask: Tensor | None,
        keep: int = 1,
        *,
        positions: Tensor | None = None,
    ) -> ForwardOutput:
        is_ids = inputs.ndim == 2
        # A prompt may have any length, and each would be a program of its own.
        model = self.model
        if inputs.shape[1] == 1 and isinstance(self.cache, RecordedRows):
            stepped = self.cache.step(inputs) if is_ids and mask is positions is None else None
            if stepped is not None:
                return ForwardOutput(stepped, None, None)
        if inputs.shape[1] == 1 and self.cache is not None:
            # So would each stride: these are a slice of a text that has room to grow.
            model, inputs = self.program, inputs.contiguous()
        output = model(
            input_ids=inputs if is_ids else None,
            inputs_embeds=None if is_ids else inputs,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=self.cache is not None,
            output_attentions=self._weighs,
            output_hidden_states=self._keeps,
            logits_to_keep=keep,
            return_dict=True,
        )
        return ForwardOutput(output.logits, output.attentions, output.hidden_states)


@dataclass(frozen=True, slots=True)
class TokenLimits:
    """The maximum number of new tokens, per row or for all.

    Attributes:
        most: the row that may get most.
        fewer: (B,) True for rows that may get one less; None for none.
    """

    most: int
    fewer: Tensor | None = None

    @classmethod
    def of(cls, most: int, fewer: Tensor | None, copies: int) -> "TokenLimits":
        """Return the limits of all rows, the copies of a prompt side by side."""
        return cls(most, None if fewer is None else fewer.repeat_interleave(copies))

    @property
    def per_row(self) -> int | Tensor:
        """The maximum number of new tokens, as one number or (B,)."""
        return self.most if self.fewer is None else self.most - self.fewer.long()

    def row(self, row: int) -> int:
        """Return the largest limit of any row."""
        return self.most if self.fewer is None else self.most - int(self.fewer[row])

    def last(self, step: int) -> Tensor | bool:
        """Return for which rows (B,) step `step`, from 1, is the last; one bool if all agree."""
        if step + 1 == self.most and self.fewer is not None:
            return self.fewer
        return step == self.most


@dataclass(slots=True, kw_only=True)
class Generation:
    """The state of a generation, shared by all ways of decoding.

    Attributes:
        forward: runs the model.
        output: that of the last forward.
        text: the rows, which grow.
        sampler: chooses the tokens.
        stopping: tells which rows end.
        limits: how many tokens to add at the most.
        pad: what follows the end of a row.
        record: takes the output of each step.
        streamer: gets every token.
    """

    forward: ModelRunner
    output: ForwardOutput
    text: TokenBuffer
    sampler: Sampler
    stopping: Stopping
    limits: TokenLimits
    pad: int
    record: GenerationRecord
    streamer: Streamer | None = None


def decode(run: Generation) -> None:
    """Generate token by token until all rows have ended or reached their limit."""
    unfinished: Tensor | None = None
    max_new_tokens, output = run.limits.most, run.output
    for step in range(1, max_new_tokens + 1):
        note(run, output)
        logits = output.logits[:, -1]
        if run.sampler.agreement is None:
            unfinished = add(run, logits, unfinished, step)
        else:
            unfinished = _add_agreed(run.sampler.agreement, run, logits, unfinished, step)
        if step == max_new_tokens or (unfinished is not None and not bool(unfinished.any())):
            return
        output = run.forward.step(run.text, unfinished)


def note(run: Generation, output: ForwardOutput) -> None:
    """Record a forward's output; of several processes, on the one that samples."""
    run.record.forward(output)
    agreement, logits = run.sampler.agreement, run.record.logits
    if agreement is not None and logits is not None:
        own = logits[-1]
        if own.is_meta:
            # The head is elsewhere.
            own = torch.empty(own.shape, dtype=own.dtype, device=run.text.ids.device)
        logits[-1] = agreement.broadcast(own)


def add(run: Generation, logits: Tensor, unfinished: Tensor | None, step: int) -> Tensor | None:
    """Append a token to every row; return which rows (B,) continue, or None for all."""
    text, record = run.text, run.record
    if record.scores is None:
        tokens = run.sampler.choose(text, logits, unfinished, step=step)
    else:
        record.scores.append(run.sampler.scores(text, logits, unfinished))
        tokens = run.sampler.take(record.scores[-1], unfinished, step=step)
    if unfinished is not None:
        tokens = torch.where(unfinished, tokens, run.pad)
    text.append(tokens)
    if run.streamer is not None:
        run.streamer.put(tokens.cpu())
    full = run.limits.last(step)
    if isinstance(full, Tensor):
        unfinished = ~full if unfinished is None else unfinished & ~full
        if not bool(unfinished.any()):
            return unfinished
    if run.stopping:
        ended = run.stopping(text.ids, record.seen_scores(), text.padding)
        if unfinished is not None or bool(ended.any()):
            unfinished = ~ended if unfinished is None else unfinished & ~ended
    return unfinished


def added(run: Generation, going: Tensor | None) -> Tensor:
    """Pack tokens and unfinished rows for broadcasting, (2, B)."""
    tokens = run.text.ids[:, -1]
    return torch.stack((tokens, torch.ones_like(tokens) if going is None else going.long()))


def _add_agreed(
    agreement: Agreement, run: Generation, logits: Tensor, unfinished: Tensor | None, step: int
) -> Tensor | None:
    """Do the same in several processes, one of which samples."""

    def choose() -> Tensor:
        return added(run, add(run, logits, unfinished, step))

    if not agreement.decides:
        run.sampler.accompany(run.text, logits)
    tokens, going = agreement.decided(choose, run.text.ids.device)
    if not agreement.decides:
        run.text.append(tokens)
    if run.record.scores is not None:
        if not agreement.decides:
            # Where the head is elsewhere, logits have no data.
            scores = torch.empty(logits.shape, dtype=torch.float32, device=tokens.device)
            run.record.scores.append(scores)
        run.record.scores[-1] = agreement.broadcast(run.record.scores[-1])
    return None if bool(going.all()) else going.bool()


def _behind(cache: Cache, inputs: Tensor, padding: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Drop the columns of a prompt that a cache holds; return a mask if rows differ."""
    B, T = inputs.shape[:2]
    cached = cache.lengths(B, inputs.device)
    lengths = torch.full_like(cached, T) if padding is None else T - padding
    new = lengths - cached
    if bool((new < 1).any()):
        raise InputError(
            f"past_key_values holds {cached.tolist()} tokens of rows that have {lengths.tolist()}; "
            "give the whole text, of which the cache holds the beginning, or the new tokens alone "
            "with an attention_mask of all"
        )
    width = int(new.max())
    inputs = inputs[:, T - width :]
    if bool((new == width).all()):
        return inputs, None
    return inputs, torch.arange(width, device=new.device, dtype=torch.long) >= width - new[:, None]
