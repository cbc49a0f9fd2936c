"""Files to batches, in an order that is a function of the seed and the step alone."""

from quintet.training.data.building import build_data
from quintet.training.data.interface import Data, Document
from quintet.training.data.settings import ContextPhase, DataSettings, FieldNames, SourceSettings
from quintet.training.data.tokens import TokenData

__all__ = [
    "ContextPhase",
    "Data",
    "DataSettings",
    "Document",
    "FieldNames",
    "SourceSettings",
    "TokenData",
    "build_data",
]
