"""GPTQ (arXiv:2210.17323), as AutoGPTQ, GPTQModel and AutoRound write it."""

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from quintet.checkpoint import TensorInfo
from quintet.configuration.patterns import PLAIN, is_plain
from quintet.errors import CheckpointError, ConfigError, UnsupportedModelError, shown
from quintet.ops.groups import group_count
from quintet.ops.words import WORD
from quintet.quantization.foreign import ELSEWHERE, FileConfig, dtype_of, filled_up, group_or_all
from quintet.quantization.formats import Parts, Shape, WeightFormat
from quintet.quantization.grouped import GroupedFormat, numbers_in

BITS = (4, 8)
VERSIONS = ("gptq", "gptq_v2")
# What says that a module is not quantised.
PLAIN_BITS = (16, 32)
KNOWN = (
    *("bits", "group_size", "sym", "desc_act", "checkpoint_format", "pack_dtype", "dynamic"),
    "is_marlin_format",
)


class ZeroPointWarning(UserWarning):
    """Zero points look damaged by old versions of a packer."""


@dataclass(frozen=True, slots=True)
class PackedLayout:
    """The quantisation of a matrix; `dynamic` overrides it per module."""

    bits: int
    group: int | None
    symmetric: bool
    ordered: bool


@dataclass(frozen=True)
class GPTQFormat(GroupedFormat):
    """32-bit words along the inputs, groups by index, zero points in two versions.

    Attributes:
        padded: the rows and columns that the file has, filled up to whole words and groups.
        second: whether the label says that zero points are stored as they are, not less one.
        present: the tensors beside the words.
        doubtful: names of matrices with zero points that may be damaged.
    """

    name = "GPTQ"
    padded: tuple[int, int] = (0, 0)
    second: bool = False
    present: tuple[str, ...] = ("qzeros", "scales", "g_idx")
    doubtful: list[str] = field(default_factory=list, compare=False, repr=False)

    def files(self, weight: str, shape: Shape) -> dict[str, tuple[str, Shape]]:
        (rows, columns), words = self.padded, WORD // self.bits
        groups = group_count(columns, self.group)
        shapes: dict[str, Shape] = {
            "qzeros": (groups, rows // words),
            "scales": (groups, rows),
            # As long as the inputs, or filled up with them.
            "g_idx": (-1,),
            # What the map has no bias for may be there, full of zeros.
            "bias": (shape[0],),
        }
        path = weight.removesuffix("weight")
        others = {name: (path + name, shapes[name]) for name in self.present}
        return {"": (path + "qweight", (columns // words, rows)), **others}

    def unpack(self, weight: str, found: Parts, shape: Shape) -> dict[str, Tensor]:
        """Return the parts, given the tensors on disk.

        Raises:
            CheckpointError: zero points, groups or scales that cannot be.
        """
        rows, columns = shape
        if "bias" in found and bool(found["bias"].any()):
            raise CheckpointError(
                f"{weight.removesuffix('weight')}bias is not zero, and the model has no place for "
                "it; check that config.json belongs to these weights"
            )
        levels = numbers_in(found[""].mT, self.bits, weight)[:rows, :columns]
        zero = None
        if "qzeros" in found:
            zero = self._zeros(weight, found["qzeros"], rows)
        index = None
        if "g_idx" in found:
            index = found["g_idx"].reshape(-1)[:columns]
            if index.numel() != columns or index.is_floating_point():
                raise CheckpointError(
                    f"{weight}: g_idx is {index.dtype} {list(found['g_idx'].shape)}, and has to be "
                    f"an integer for each of {columns} inputs; fetch the file again"
                )
        return self.meant(levels, found["scales"].mT[:rows], zero, index, weight)

    def _zeros(self, weight: str, words: Tensor, rows: int) -> Tensor | None:
        """Return the zero points (O, G), or None for the middle."""
        stored = numbers_in(words, self.bits, weight).mT[:rows]
        if self.symmetric:
            # Some files have those of the second version under the first one's label.
            if any(bool((stored == z).all()) for z in (self.middle, self.middle - 1)):
                return None
            raise CheckpointError(
                f"{weight}: quantization_config says sym=true, and zero points from "
                f"{int(stored.min())} to {int(stored.max())} are not all {self.middle} (or one "
                "less, as the first version stores them); set sym to false in config.json if the "
                "model was quantised so, or fetch it again"
            )
        if self.second:
            return stored
        # Stored less one, so that a zero point of 0 borrows from all that is above it in its word.
        top = stored[WORD // self.bits - 1 :: WORD // self.bits]
        if bool((top == 2**self.bits - 1).any()) and weight not in self.doubtful:
            self.doubtful.append(weight)
            if len(self.doubtful) == 1:
                warnings.warn(
                    f"{weight} has zero points that are damaged if they were 0 when an old "
                    "version of a packer subtracted one; other programs read them the same way. "
                    "A release by GPTQModel with checkpoint_format=gptq_v2 would not have it",
                    ZeroPointWarning,
                    stacklevel=2,
                )
        return stored.to(torch.int32) + 1


@dataclass(kw_only=True)
class GPTQConfig(FileConfig):
    """GPTQ files; settings that do not affect reading are accepted.

    Attributes:
        bits: 4 or 8.
        group_size: inputs that share a scale; -1 for all.
        sym: whether zero is in the middle.
        desc_act: whether groups are by an index; None to go by whether there is one.
        checkpoint_format: "gptq", or "gptq_v2" for zero points that are stored as they are.
        dynamic: what other modules have, by regular expressions of their paths.
    """

    quant_method: ClassVar[str] = "gptq"

    bits: int = 4
    group_size: int = 128
    sym: bool = True
    desc_act: bool | None = None
    checkpoint_format: str = "gptq"
    pack_dtype: str = "int32"
    dynamic: Mapping[str, Mapping[str, Any]] | None = None
    is_marlin_format: bool = False

    def __post_init__(self) -> None:
        self._require(self.bits in BITS and type(self.bits) is int, "bits", f"4 or 8; {ELSEWHERE}")
        self._require_group("group_size")
        self._require_true_or_false("sym", "is_marlin_format")
        self._require(self.desc_act in (None, True, False), "desc_act", "true or false")
        self._require(
            self.checkpoint_format in VERSIONS and not self.is_marlin_format,
            "checkpoint_format" if not self.is_marlin_format else "is_marlin_format",
            f"one of {', '.join(VERSIONS)}: others are of a particular device; {ELSEWHERE}",
        )
        dtype = str(self.pack_dtype).removeprefix("torch.")
        self._require(dtype in ("int32", "uint32"), "pack_dtype", f"int32; {ELSEWHERE}")
        self._rules = self._read_dynamic()
        self._doubtful: list[str] = []

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build a configuration from a mapping.

        Raises:
            ConfigError: a value is not usable.
        """
        # Its writers have "format" in their programs, and take it in files, too.
        given = {"checkpoint_format": values.get("format"), **values}
        return cls(**{k: v for k, v in given.items() if k in KNOWN and v is not None})

    def usual(self) -> WeightFormat | None:
        return GroupedFormat(
            self.bits, group_or_all(self.group_size), self.sym, bool(self.desc_act)
        ).model_format

    def stored(
        self, weight: str, shape: Shape, tensors: Mapping[str, TensorInfo]
    ) -> WeightFormat | None:
        path = weight.removesuffix("weight")
        words = tensors.get(path + "qweight")
        if len(shape) != 2 or (words is None and path + "scales" not in tensors):
            return None
        one = self._layout(path.rstrip("."))
        indexed = path + "g_idx" in tensors
        present = ["scales"]
        present += ["qzeros"] if path + "qzeros" in tensors or not one.symmetric else []
        present += ["g_idx"] if indexed or one.ordered else []
        present += ["bias"] if path + "bias" in tensors else []
        return GPTQFormat(
            one.bits,
            one.group,
            one.symmetric,
            one.group is not None and (one.ordered or (self.desc_act is None and indexed)),
            dtype_of(tensors, path + "scales"),
            padded=_padded(shape, one, None if words is None else words.shape),
            second=self.checkpoint_format == "gptq_v2",
            present=tuple(present),
            doubtful=self._doubtful,
        )

    def _layout(self, path: str) -> PackedLayout:
        usual = PackedLayout(
            self.bits, group_or_all(self.group_size), self.sym, bool(self.desc_act)
        )
        for pattern, changes in self._rules:
            if pattern.match(path):
                return replace(usual, **changes)
        return usual

    def _read_dynamic(self) -> list[tuple[re.Pattern[str], dict[str, Any]]]:
        """Return the patterns and their overrides, in order."""
        given = {} if self.dynamic is None else self.dynamic
        self._require(isinstance(given, Mapping), "dynamic", "a mapping")
        rules = []
        for text, changes in given.items():
            bare = text[2:] if text[:2] in ("+:", "-:") else text
            if not is_plain(bare):
                raise ConfigError(f"GPTQConfig: dynamic has {shown(text)}, which is no {PLAIN}")
            pattern = re.compile(bare)
            self._require(
                changes is None or isinstance(changes, Mapping), "dynamic", "a mapping of mappings"
            )
            rules.append((pattern, _changes(changes or {})))
        return rules


@dataclass(kw_only=True)
class AutoRoundConfig(GPTQConfig):
    """AutoRound (arXiv:2309.05516) in GPTQ's layout; its `extra_config` is GPTQ's `dynamic`.

    Attributes:
        packing_format: has to be that of AutoGPTQ.
    """

    quant_method: ClassVar[str] = "auto-round"

    packing_format: str = "auto_round:auto_gptq"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build a configuration from a mapping.

        Raises:
            ConfigError: a value is not usable.
            UnsupportedModelError: another layout.
        """
        packing = values.get("packing_format", cls.packing_format)
        if packing not in ("auto_round:auto_gptq", "auto_gptq", "auto_round:gptq"):
            raise UnsupportedModelError(
                f"quantization_config: packing_format={shown(packing)} of auto-round is not read; "
                f"there is 'auto_round:auto_gptq'; {ELSEWHERE}"
            )
        extra = values.get("extra_config") or {}
        if not isinstance(extra, Mapping) or not all(
            isinstance(v, Mapping) for v in extra.values()
        ):
            raise ConfigError(
                f"AutoRoundConfig: extra_config={shown(extra)} has to be a mapping of mappings"
            )
        return super().from_dict({**values, "dynamic": _by_patterns(extra)})


def _by_patterns(extra: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Return the settings of modules by regular expression; single names go first."""
    quantised = {name: own for name, own in extra.items() if own.get("bits") not in PLAIN_BITS}
    single = {name: own for name, own in quantised.items() if re.fullmatch(r"[\w.-]+", name)}
    named = {f"{re.escape(name)}$": own for name, own in single.items()}
    return named | {name: own for name, own in quantised.items() if name not in single}


def _changes(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the overrides in a mapping."""
    changes: dict[str, Any] = {}
    for key, name in (
        *(("bits", "bits"), ("group_size", "group"), ("sym", "symmetric")),
        ("desc_act", "ordered"),
    ):
        if (value := given.get(key)) is None:
            continue
        whole = type(value) is int
        if not {
            "bits": whole and value in BITS,
            "group_size": whole and (value == -1 or value > 0),
        }.get(key, isinstance(value, bool)):
            raise ConfigError(f"GPTQConfig: dynamic has {key}={shown(value)}, which cannot be")
        changes[name] = group_or_all(value) if key == "group_size" else value
    return changes


def _padded(shape: Shape, one: PackedLayout, words: Shape | None) -> tuple[int, int]:
    """Return the file's padded rows and columns if it is padding, else the expected ones."""
    (rows, columns), per_word = shape, WORD // one.bits
    filled = filled_up(rows, per_word), filled_up(columns, per_word)
    grouped = filled_up(columns, one.group or 1)
    word_shape = words if words is not None and len(words) == 2 else (0, 0)
    return (
        filled[0] if word_shape[1] == filled[0] else rows,
        grouped if word_shape[0] * per_word == grouped else filled[1],
    )
