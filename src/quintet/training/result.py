"""The result of a training."""

from dataclasses import dataclass
from pathlib import Path

from quintet.modeling.heads import CausalLMHead
from quintet.tokenization import PreTrainedTokenizer
from quintet.training.records import Evaluation


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingResult:
    """The result of a training.

    Attributes:
        model: the model as it is after the last step, in eval mode; of several processes this
            one's part, and `path` has the whole.
        tokenizer: its tokenizer.
        folder: the folder of the run.
        path: the last checkpoint.
        best: the checkpoint of the lowest score, or None if there was nothing to measure by.
        step: how many steps were taken, those before a resumption included.
        tokens: how many tokens were read.
        seconds: how long the steps took.
        loss: of the last step that was not left out; None without one.
        evaluation: the last one, or None.
    """

    model: CausalLMHead
    tokenizer: PreTrainedTokenizer
    folder: Path
    path: Path
    best: Path | None
    step: int
    tokens: int
    seconds: float
    loss: float | None
    evaluation: Evaluation | None
