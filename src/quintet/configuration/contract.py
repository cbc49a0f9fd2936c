"""The names by which tools made for Transformers read a config."""

from typing import ClassVar, Self

__all__ = ["ConfigContract"]


class ConfigContract:
    """What tools ask of any config.

    Attributes:
        is_encoder_decoder: these models have no encoder.
        is_composition: nor are they made of several.
    """

    is_encoder_decoder: ClassVar[bool] = False
    is_composition: ClassVar[bool] = False
    attn_implementation: str

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> Self:
        """Return the config of the part that reads text, which is all of it."""
        return self

    @property
    def _attn_implementation(self) -> str:
        return self.attn_implementation

    @_attn_implementation.setter
    def _attn_implementation(self, value: str) -> None:
        self.attn_implementation = value
