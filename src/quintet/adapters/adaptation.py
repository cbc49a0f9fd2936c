"""The changes of one adapter to one module."""

from collections.abc import Mapping

from torch import Tensor, nn

from quintet.adapters.lowrank import Addition, LowRank, NewRows

# The stacks of a layer's experts, and the matrices of one expert that are on top of each other.
EXPERT_STACKS: Mapping[str, tuple[str, ...]] = {
    "gate_up_proj": ("gate_proj", "up_proj"),
    "down_proj": ("down_proj",),
}


class Adaptation(nn.Module):
    """The changes of one adapter to one module.

    Attributes:
        instead: tensors of the module that are others under this adapter, by name.
        added: what is added to a matrix, by the name of its tensor.
        experts: what is added to the matrices of single experts: "3/gate_proj" is the fourth's.
        rows: vectors of ids in place of the module's; None for none.
    """

    def __init__(self) -> None:
        super().__init__()
        self.instead = nn.ParameterDict()
        self.added = nn.ModuleDict()
        self.experts = nn.ModuleDict()
        self.rows: NewRows | None = None

    def addition(self, name: str) -> Addition | None:
        """Return the low-rank addition to the matrix `name`."""
        found = self.added._modules.get(name)
        assert found is None or isinstance(found, Addition)
        return found

    def replacement(self, name: str) -> Tensor | None:
        """Return the tensor that replaces the one called `name`."""
        return self.instead._parameters.get(name)

    def of_expert(self, expert: int, part: str) -> LowRank | None:
        """Return the low-rank addition to one matrix of one expert."""
        name = expert_name(expert, part)
        found = self.experts._modules.get(name)
        assert found is None or isinstance(found, LowRank)
        return found


def expert_name(expert: int, part: str) -> str:
    """Return the module name of an expert's matrix, without dots."""
    return f"{expert}/{part}"
