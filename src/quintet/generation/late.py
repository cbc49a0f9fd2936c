"""The decode loop for accelerators: the host reads a step's tokens while the next one runs.

A step is launched from tokens that the host has not seen. What it looks at meanwhile are those of
the step before: they go to the streamer, and tell whether all rows have ended. If they have, what
was launched is not used.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from quintet.generation.choice import Chosen
from quintet.generation.decode import Generation
from quintet.generation.fetching import Fetched
from quintet.ops.sampling import check_left


def decodes_late(run: Generation) -> bool:
    """Return whether a generation can read its tokens one step late."""
    on_device = run.text.ids.device.type != "cpu"
    return on_device and run.sampler.agreement is None and not run.forward.keeps_cache


@torch.no_grad()
def decode_late(run: Generation) -> None:
    """Generate as `decode` does, reading tokens one step late."""
    unfinished: Tensor | None = None
    max_new_tokens, output = run.limits.most, run.output
    for step in range(1, max_new_tokens + 1):
        new_tokens = _NewTokens.launch(run, output.logits[:, -1], unfinished, step)
        if step < max_new_tokens:
            unfinished = new_tokens.going
            output = run.forward.step(run.text, unfinished)
        if new_tokens.ends_all(run):
            return


@dataclass(frozen=True, slots=True)
class _NewTokens:
    """The tokens of a step, on their way to the host.

    Attributes:
        step: which one, from 1.
        going: (B,) True for rows that go on, on the device; None for all.
        tokens: what was added to each row, and the largest of the scores it was taken of.
        flags: which rows needed a token, and `going`; nothing where that is all.
    """

    step: int
    going: Tensor | None
    tokens: Fetched
    flags: Fetched | None

    @classmethod
    def launch(
        cls, run: Generation, logits: Tensor, unfinished: Tensor | None, step: int
    ) -> "_NewTokens":
        """Append a token to every row."""
        text = run.text
        chosen: Chosen = run.sampler.launch(text, logits, unfinished)
        tokens = chosen.tokens
        if unfinished is not None:
            tokens = torch.where(unfinished, tokens, run.pad)
        text.append(tokens)
        going = unfinished
        full = run.limits.last(step)
        if isinstance(full, Tensor):
            going = ~full if going is None else going & ~full
        if run.stopping:
            ended = run.stopping(text.ids, None, text.padding)
            going = ~ended if going is None else going & ~ended
        flags = None
        if going is not None:
            needed = torch.ones_like(going) if unfinished is None else unfinished
            flags = Fetched(torch.stack((needed, going)))
        return cls(step, going, Fetched(tokens, chosen.best), flags)

    def ends_all(self, run: Generation) -> bool:
        """Read and stream the tokens; return whether all rows have ended.

        Raises:
            NothingLeftError: a row had no token to take.
        """
        tokens, best = self.tokens.read()
        needed = going = None
        if self.flags is not None:
            needed, going = self.flags.read()[0]
        check_left(best.tolist(), needed, self.step)
        if run.streamer is not None:
            run.streamer.put(tokens)
        return going is not None and not bool(going.any())
