"""The ways to generate, by the names of Transformers."""

from enum import StrEnum


class GenerationMode(StrEnum):
    """What `GenerationConfig.get_generation_mode` returns."""

    GREEDY_SEARCH = "greedy_search"
    SAMPLE = "sample"
    BEAM_SEARCH = "beam_search"
    BEAM_SAMPLE = "beam_sample"
    ASSISTED_GENERATION = "assisted_generation"
