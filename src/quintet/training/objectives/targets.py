"""The token that each position has to predict."""

from torch import Tensor

from quintet.modeling.packing import own_labels
from quintet.ops.documents import documents_of
from quintet.ops.labels import IGNORED, following_tokens
from quintet.training.batch import Batch


def targets(batch: Batch, ahead: int = 1) -> Tensor:
    """Return at each place the label of the token `ahead` further in its text, (B, T).

    It is -100 where there is none: behind the end of a text, at padding, where nothing is learned.
    """
    texts = None if batch.seq_idx is None else documents_of(batch.seq_idx)
    labels = own_labels(batch.labels, texts, ahead)
    return following_tokens(labels, batch.attention_mask, ahead)


def counted(labels: Tensor) -> int:
    """Count the labels that are not -100."""
    return int((labels != IGNORED).sum())
