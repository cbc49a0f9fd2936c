"""Properties of a config that are views of other keys."""

from typing import TYPE_CHECKING, Any

from quintet.configuration.labels import labels
from quintet.configuration.rope import RopeParameters, merge_rope

if TYPE_CHECKING:
    import torch


class ConfigViews:
    """Further names of a config's keys."""

    if TYPE_CHECKING:
        # Declared by `PreTrainedConfig`, in its order.
        dtype: str | None
        id2label: dict[int, str] | None
        label2id: dict[str, int] | None
        max_position_embeddings: int
        return_dict: bool
        rope_parameters: dict[str, Any]

    @property
    def torch_dtype(self) -> "torch.dtype | None":
        """`dtype` as torch's own object."""
        import torch

        return None if self.dtype is None else getattr(torch, self.dtype)

    @property
    def num_labels(self) -> int:
        """The number of classes of a classification head."""
        return len(self.id2label or {})

    @num_labels.setter
    def num_labels(self, value: int) -> None:
        self.id2label, self.label2id = labels(type(self).__name__, {"num_labels": value})

    @property
    def use_return_dict(self) -> bool:
        """The name by which older code reads `return_dict`."""
        return self.return_dict

    @property
    def rope_theta(self) -> float:
        """The base of the rotary frequencies."""
        theta: float = self.rope_parameters["rope_theta"]
        return theta

    @rope_theta.setter
    def rope_theta(self, value: float) -> None:
        self.rope_parameters["rope_theta"] = value

    @property
    def rope_scaling(self) -> dict[str, Any] | None:
        """None for plain rotary positions, otherwise the same mapping as `rope_parameters`."""
        return None if self.rope_parameters["rope_type"] == "default" else self.rope_parameters

    @rope_scaling.setter
    def rope_scaling(self, value: dict[str, Any] | None) -> None:
        self.rope_parameters = merge_rope({"rope_scaling": value}, self.rope_theta)

    def rope(self) -> RopeParameters:
        """Return the rotary parameters, checked and with the defaults of their kind."""
        return RopeParameters.parse(
            self.rope_parameters, max_position_embeddings=self.max_position_embeddings
        )
