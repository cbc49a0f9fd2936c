"""The generation modes, by Transformers' names."""

from enum import StrEnum


class GenerationMode(StrEnum):
    """The values of `GenerationConfig.get_generation_mode`."""

    GREEDY_SEARCH = "greedy_search"
    SAMPLE = "sample"
    BEAM_SEARCH = "beam_search"
    BEAM_SAMPLE = "beam_sample"
    ASSISTED_GENERATION = "assisted_generation"
