"""The formats of bitsandbytes, under its tensor names on disk.

They are computed here: no package is needed, and experts are quantised like everything else.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quintet.configuration.numbers import is_finite
from quintet.errors import CheckpointError, shown
from quintet.ops.codebook import (
    BLOCK_SIZES,
    NESTED_BLOCK,
    TABLES,
    NestedScales,
    dequantize_codes,
    dynamic_table,
    nest,
    quantize_codes,
)
from quintet.parallel.placement import Range, Shard
from quintet.quantization.formats import (
    Int8Format,
    Parts,
    Shape,
    TensorSpec,
    WeightFormat,
    require_finite,
)

# Written states are of 100 to 200 bytes.
MAX_STATE = 10_000


@dataclass(frozen=True)
class RowwiseFormat(Int8Format):
    """LLM.int8 (arXiv:2208.07339): int8 rows, with the largest magnitude stored as scale.

    Activations stay in 16 bits, so that none is too large for eight.
    """

    name = "bitsandbytes int8"

    @property
    def parts_of(self) -> WeightFormat:
        return Int8Format()

    def files(self, weight: str, shape: Shape) -> dict[str, tuple[str, Shape]]:
        largest = weight.removesuffix("weight") + "SCB"
        return {"": (weight, shape), "SCB": (largest, shape[:-1])}

    def pack(
        self, weight: str, parts: Parts, shape: Shape, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        names = self.files(weight, shape)
        return {names[""][0]: parts[""], names["SCB"][0]: parts["_scale"] * 127}

    def unpack(self, weight: str, found: Parts, shape: Shape) -> dict[str, Tensor]:
        """Return the parts, given the tensors on disk.

        Raises:
            CheckpointError: scales that are no finite numbers.
        """
        require_finite(found["SCB"], weight)
        return {"": found[""], "_scale": found["SCB"].to(torch.float32) / 127}


@dataclass(frozen=True)
class CodesFormat(WeightFormat):
    """NF4 or FP4.

    Attributes:
        kind: which of the two.
        nested: whether the scales are quantised once more.
        block: how many numbers share a scale.
    """

    name = "bitsandbytes 4-bit"
    kind: str = "fp4"
    nested: bool = False
    block: int = 64

    def parts(self, shape: Shape) -> dict[str, TensorSpec]:
        n = math.prod(shape)
        blocks = math.ceil(n / self.block)
        codes = {"": TensorSpec((math.ceil(n / 2), 1), torch.uint8)}
        if not self.nested:
            return codes | {"_absmax": TensorSpec((blocks,), torch.float32)}
        return codes | {
            "_absmax": TensorSpec((blocks,), torch.uint8),
            "_nested_absmax": TensorSpec((math.ceil(blocks / NESTED_BLOCK),), torch.float32),
            "_nested_offset": TensorSpec((1,), torch.float32),
        }

    @property
    def divided(self) -> "CodesFormat":
        # Scales of scales are of 256 blocks, which lie across many rows.
        return replace(self, nested=False)

    def recast(self, parts: Parts, shape: Shape, to: WeightFormat) -> dict[str, Tensor] | None:
        if self.nested and to.parts_of == self.divided:
            nested = (parts[s] for s in ("_absmax", "_nested_absmax", "_nested_offset"))
            return {"": parts[""], "_absmax": NestedScales(*nested).expand()}
        return super().recast(parts, shape, to)

    def shards(self, shard: Shard) -> dict[str, Shard] | None:
        """Return the shard of each part for a shard of the matrix, or None.

        Blocks are of neighbours, row after row: the rows of a process have to be whole blocks, or
        its columns.
        """
        (rows, columns), n = shard.shape, math.prod(shard.shape)
        flat = [(0, n)]
        if 1 in shard.ranges:
            heights = shard.ranges.get(0, ((0, rows),))
            lines = (row for first, last in heights for row in range(first, last))
            flat = [(i * columns + a, i * columns + b) for i in lines for a, b in shard.ranges[1]]
        elif 0 in shard.ranges:
            flat = [(a * columns, b * columns) for a, b in shard.ranges[0]]
        flat = [(a, b) for a, b in flat if a < b]
        if self.nested or any(a % self.block or (b % self.block and b < n) for a, b in flat):
            return None
        codes: tuple[Range, ...] = tuple((a // 2, -(-b // 2)) for a, b in flat)
        scales: tuple[Range, ...] = tuple((a // self.block, -(-b // self.block)) for a, b in flat)
        specs = self.parts(shard.shape)
        return {
            "": Shard(specs[""].shape, {0: codes}, shard.zero),
            "_absmax": Shard(specs["_absmax"].shape, {0: scales}, shard.zero),
        }

    def alone(self, shard: Shard) -> bool:
        return self.shards(shard) is not None

    def encode(self, weight: Tensor, gram: Tensor | None = None) -> dict[str, Tensor]:
        packed, absmax = quantize_codes(weight, self.kind, self.block)
        if not self.nested:
            return {"": packed, "_absmax": absmax}
        scales = nest(absmax)
        return {
            "": packed,
            "_absmax": scales.codes,
            "_nested_absmax": scales.absmax,
            "_nested_offset": scales.offset,
        }

    def decode(self, parts: Parts, shape: Shape, dtype: torch.dtype) -> Tensor:
        absmax = parts["_absmax"]
        if self.nested:
            nested = NestedScales(absmax, parts["_nested_absmax"], parts["_nested_offset"])
            absmax = nested.expand()
        return dequantize_codes(parts[""], absmax, shape, self.kind, self.block, dtype)

    # -- on disk -----------------------------------------------------------------------------

    def files(self, weight: str, shape: Shape) -> dict[str, tuple[str, Shape]]:
        """Return, for each tensor on disk, its name and shape, -1 for any size."""
        parts = self.parts(shape)
        files = {
            "": (weight, parts[""].shape),
            "absmax": (f"{weight}.absmax", parts["_absmax"].shape),
            "quant_map": (f"{weight}.quant_map", (16,)),
            "state": (f"{weight}.quant_state.bitsandbytes__{self.kind}", (-1,)),
        }
        if self.nested:
            scales = parts["_nested_absmax"].shape
            files["nested_absmax"] = (f"{weight}.nested_absmax", scales)
            files["nested_quant_map"] = (f"{weight}.nested_quant_map", (256,))
        return files

    def pack(
        self, weight: str, parts: Parts, shape: Shape, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """Name the parts as they are on disk; `dtype` is the model's."""
        names = {key: name for key, (name, _) in self.files(weight, shape).items()}
        state: dict[str, object] = {
            "quant_type": self.kind,
            "blocksize": self.block,
            "dtype": str(dtype).removeprefix("torch."),
            "shape": list(shape),
        }
        packed = {
            names[""]: parts[""],
            names["absmax"]: parts["_absmax"],
            names["quant_map"]: torch.tensor(TABLES[self.kind], dtype=torch.float32, device="cpu"),
        }
        if self.nested:
            state |= {
                "nested_blocksize": NESTED_BLOCK,
                "nested_dtype": "float32",
                "nested_offset": float(parts["_nested_offset"]),
            }
            packed[names["nested_absmax"]] = parts["_nested_absmax"]
            packed[names["nested_quant_map"]] = dynamic_table(torch.device("cpu"))
        packed[names["state"]] = torch.tensor(
            list(json.dumps(state).encode()), dtype=torch.uint8, device="cpu"
        )
        return packed

    def unpack(self, weight: str, found: Parts, shape: Shape) -> dict[str, Tensor]:
        """Return the parts, given the tensors on disk.

        Raises:
            CheckpointError: they were made of another table, block size or shape.
        """
        state = _state(weight, found["state"])
        wanted = {"quant_type": self.kind, "blocksize": self.block, "shape": list(shape)}
        if self.nested:
            wanted["nested_blocksize"] = NESTED_BLOCK
        for key, value in wanted.items():
            if state.get(key) != value:
                raise CheckpointError(
                    f"{weight}: its quant_state has {key}={shown(state.get(key))} and the model "
                    f"needs {shown(value)}"
                )
        tables = {"quant_map": torch.tensor(TABLES[self.kind], dtype=torch.float32, device="cpu")}
        if self.nested:
            tables["nested_quant_map"] = dynamic_table(torch.device("cpu"))
        for key, table in tables.items():
            if not torch.allclose(found[key].to(torch.float32), table, rtol=0, atol=1e-6):
                raise CheckpointError(f"{weight}: {key} is not the table of {self.kind}")
        parts = {"": found[""], "_absmax": found["absmax"]}
        if self.nested:
            offset = state.get("nested_offset")
            if not is_finite(offset):
                raise CheckpointError(f"{weight}: nested_offset={shown(offset)} has to be a number")
            parts["_nested_absmax"] = found["nested_absmax"]
            parts["_nested_offset"] = torch.tensor([offset], dtype=torch.float32, device="cpu")
        return parts


def block_size(numbers: int, blocks: int) -> int | None:
    """Return the block size that fits `blocks` and `numbers`, or None."""
    fitting = [size for size in BLOCK_SIZES if math.ceil(numbers / size) == blocks]
    # A matrix of a single block fits many; 64 is what everybody writes.
    return 64 if 64 in fitting else next(iter(fitting), None)


def _state(weight: str, stored: Tensor) -> Mapping[str, object]:
    if stored.numel() > MAX_STATE:
        raise CheckpointError(
            f"{weight}: its quant_state has {stored.numel():,} bytes, more than {MAX_STATE:,}"
        )
    try:
        state = json.loads(bytes(stored.tolist()))
    except (ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{weight}: its quant_state is not JSON ({error})") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{weight}: its quant_state has to be a JSON object")
    return state
