"""The options of watermarking, without torch."""

from dataclasses import asdict, dataclass
from typing import Annotated, Any, Self

from quintet.configuration.constraints import Bounds, Count, check
from quintet.errors import InputError, shown

__all__ = ["WatermarkingConfig"]

SCHEMES = ("lefthash", "selfhash")
_RULES: dict[str, Any] = {
    "greenlist_ratio": float,
    "bias": Annotated[float, Bounds(-1e30, 1e30)],
    # What seeds a generator.
    "hashing_key": Annotated[int, Bounds(0, 2**63 - 1)],
    "seeding_scheme": str,
    "context_width": Count,
}


@dataclass(kw_only=True)
class WatermarkingConfig:
    """Watermarks text by favouring tokens chosen by a hash (arXiv:2306.04634).

    Attributes:
        greenlist_ratio: the share of the vocabulary that is favoured at each step.
        bias: what is added to their logits.
        hashing_key: who has it can tell a marked text.
        seeding_scheme: "lefthash" (algorithm 2) hashes the token before, "selfhash" (algorithm 3)
            the token itself, too.
        context_width: how many tokens "selfhash" looks back.
    """

    greenlist_ratio: float = 0.25
    bias: float = 2.0
    hashing_key: int = 15485863
    seeding_scheme: str = "lefthash"
    context_width: int = 1

    def __post_init__(self) -> None:
        for name, rule in _RULES.items():
            try:
                check("WatermarkingConfig", name, getattr(self, name), rule)
            except ValueError as error:
                raise InputError(str(error)) from None
        if not 0 < self.greenlist_ratio < 1:
            raise InputError(
                f"WatermarkingConfig: greenlist_ratio={shown(self.greenlist_ratio)} has to be "
                "between 0 and 1, both excluded"
            )
        if self.seeding_scheme not in SCHEMES:
            raise InputError(
                f"WatermarkingConfig: seeding_scheme={shown(self.seeding_scheme)} has to be one of "
                f"{', '.join(SCHEMES)}"
            )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Build from the content of a file.

        Raises:
            InputError: there is no such option.
        """
        try:
            return cls(**values)
        except TypeError:
            raise InputError(
                f"watermarking_config={shown(values)} has other keys than greenlist_ratio, bias, "
                "hashing_key, seeding_scheme and context_width"
            ) from None

    def to_dict(self) -> dict[str, Any]:
        """Return all options."""
        return asdict(self)
