"""Names by which Transformers' tools read a config."""

import json
import os
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from quintet.files import write_text
from quintet.folder import checked_path


class ConfigContract:
    """Methods and attributes that tools expect of any config.

    Attributes:
        is_encoder_decoder: these models have no encoder.
        is_composition: nor are they made of several.
    """

    is_encoder_decoder: ClassVar[bool] = False
    is_composition: ClassVar[bool] = False
    attn_implementation: str
    name_or_path: str

    def to_dict(self) -> dict[str, Any]:
        """Return every key."""
        raise NotImplementedError

    def to_json_string(self) -> str:
        """Return the content of `config.json`."""
        raise NotImplementedError

    def check(self) -> None:
        """Check the type and bounds of every key, as they are now."""
        raise NotImplementedError

    def to_diff_dict(self) -> dict[str, Any]:
        """Return the keys of `config.json`: those not at their default."""
        values: dict[str, Any] = json.loads(self.to_json_string())
        return values

    def to_json_file(self, json_file_path: str | os.PathLike[str]) -> None:
        """Write the content of `config.json` to a file.

        Raises:
            SaveError: it could not be written.
        """
        write_text(checked_path(json_file_path, "json_file_path"), self.to_json_string())

    def update(self, config_dict: Mapping[str, Any]) -> None:
        """Set keys, and check them all.

        Raises:
            ConfigError: a value breaks its rule.
        """
        for key, value in config_dict.items():
            setattr(self, key, value)
        self.check()

    def __contains__(self, key: str) -> bool:
        return key in self.to_dict()

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> Self:
        """Return the config itself: it describes only text."""
        return self

    @property
    def _attn_implementation(self) -> str:
        return self.attn_implementation

    @_attn_implementation.setter
    def _attn_implementation(self, value: str) -> None:
        self.attn_implementation = value

    @property
    def _name_or_path(self) -> str:
        return self.name_or_path

    @_name_or_path.setter
    def _name_or_path(self, value: str) -> None:
        self.name_or_path = value
