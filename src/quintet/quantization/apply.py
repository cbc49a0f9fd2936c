"""Replaces modules by quantised ones and fills them one by one."""

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quintet.errors import CheckpointError, InputError
from quintet.layers.moe import Experts
from quintet.parallel.placement import Shard
from quintet.quantization.formats import Parts, Shape, WeightFormat
from quintet.quantization.modules import (
    Quantized,
    QuantizedEmbedding,
    QuantizedLinear,
    experts_like,
)
from quintet.quantization.scheme import Scheme, is_named

# Of a matrix that goes from one format into another, so many are there as numbers at once.
NUMBERS = 2**23
STACKS = ("gate_up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class EncodedWeight:
    """A matrix (O, I), or a stack (E, O, I), encoded in a format."""

    format: WeightFormat
    parts: Parts
    shape: Shape

    def decode(self, dtype: torch.dtype) -> Tensor:
        """Return the decoded numbers."""
        return self.format.decode(self.parts, self.shape, dtype)

    def slice(self, expert: int) -> "EncodedWeight":
        """Return one matrix of a stack."""
        parts = {suffix: part[expert] for suffix, part in self.parts.items()}
        return EncodedWeight(self.format, parts, self.shape[1:])

    def part(self, shard: Shard) -> "EncodedWeight | None":
        """Return a process's shard, or None if that would cut a block."""
        if shard.whole:
            return self
        shards = self.format.shards(shard)
        if shards is None:
            return None
        parts = {suffix: shards[suffix].of(part) for suffix, part in self.parts.items()}
        return EncodedWeight(self.format, parts, shard.local_shape)

    def numbers(self, shard: Shard, dtype: torch.dtype, source: str) -> Tensor:
        """Decode a process's shard; `source` names it in errors."""
        own = self.part(shard)
        if own is not None:
            return own.checked(source).decode(dtype)
        return shard.of(self.checked(source).decode(dtype))

    def checked(self, source: str) -> "EncodedWeight":
        """Return it if it can be decoded.

        Raises:
            CheckpointError: it is damaged.
        """
        return EncodedWeight(
            self.format, self.format.checked(source, self.parts, self.shape), self.shape
        )


@dataclass(frozen=True, slots=True)
class Slot:
    """The place of a matrix, or stack, in a quantised model."""

    module: Quantized
    name: str

    def take(
        self,
        weight: Tensor | EncodedWeight,
        place: tuple[int, slice] | None,
        device: torch.device,
        source: str,
        shard: Shard,
    ) -> None:
        """Store a matrix, a stack, or one expert's rows of a stack.

        Args:
            place: this process's index of the expert, and of the rows.
            source: what errors call it.
            shard: what this process has of it.

        Raises:
            CheckpointError: it has numbers that are not finite.
        """
        shape, stack = self.module.matrices[self.name]
        if place is not None:
            expert, rows = place
            self._put(weight, (expert, rows.start // shape[0]), device, source, shard)
        elif not stack:
            self._put(weight, None, device, source, shard)
        else:
            for expert in range(shard.shape[0]):
                self._take_expert(weight, expert, device, source, shard)

    def _take_expert(
        self,
        weight: Tensor | EncodedWeight,
        expert: int,
        device: torch.device,
        source: str,
        shard: Shard,
    ) -> None:
        _, rows, columns = shard.shape
        count = self.module.matrices[self.name][1][1]
        height = rows // count
        places = [slice(number * height, (number + 1) * height) for number in range(count)]
        own = [shard.piece(expert, place) for place in places]
        if any(found is None for found in own):
            return
        whole = weight[expert] if isinstance(weight, Tensor) else weight.slice(expert)
        parts = cut(whole, (height, columns), count)
        for number, (part, found) in enumerate(zip(parts, own, strict=True)):
            assert found is not None
            self._put(part, (found[1][0], number), device, source, found[0])

    def _put(
        self,
        weight: Tensor | EncodedWeight,
        place: tuple[int, int] | None,
        device: torch.device,
        source: str,
        shard: Shard,
    ) -> None:
        parts = self._shard_of(weight, source, device, shard)
        if not shard.whole and place is None:
            # A view would hold on to what the other processes have.
            parts = {s: part.to(device, copy=True).contiguous() for s, part in parts.items()}
        self.module.put(self.name, parts, place, device)

    def _shard_of(
        self, weight: Tensor | EncodedWeight, source: str, device: torch.device, shard: Shard
    ) -> Parts:
        """Return a shard of a matrix in encoded form."""
        ours = self.module.formats[self.name]
        if shard.whole:
            return self.encoded(weight, source, device)
        if isinstance(weight, EncodedWeight):
            own = weight.part(shard)
            if own is not None and ours.alone(shard):
                return self.encoded(own, source, device)
            same = None if own is None else own.format.recast(own.parts, own.shape, ours)
            if own is not None and same is not None:
                own.checked(source)
                return same
            if ours.alone(shard):
                return self.encoded(weight.numbers(shard, torch.float32, source), source, device)
        elif ours.alone(shard):
            return self.encoded(shard.of(weight), source, device)
        whole = EncodedWeight(ours, self.encoded(weight, source, device), shard.shape)
        part = whole.part(shard)
        assert part is not None, f"{source} cannot be cut"
        return part.parts

    def encoded(
        self, weight: Tensor | EncodedWeight, source: str, device: torch.device | None = None
    ) -> Parts:
        """Encode one matrix in this slot's format.

        Raises:
            CheckpointError: it has numbers that are not finite.
        """
        ours = self.module.formats[self.name]
        if isinstance(weight, EncodedWeight):
            weight = weight.checked(source)
            same = weight.format.recast(weight.parts, weight.shape, ours)
            if same is not None:
                return same
        # As exact as the source: rounding to a dtype in between would be one loss more.
        try:
            if isinstance(weight, EncodedWeight):
                return _encoded_again(weight, ours, device)
            return ours.encode(weight.to(device or weight.device))
        except InputError as error:
            raise CheckpointError(f"{source}: {error}") from error


def _encoded_again(
    weight: EncodedWeight, target: WeightFormat, device: torch.device | None
) -> Parts:
    """Re-encode a matrix in another format, via float32."""
    (rows, columns), source = weight.shape, weight.parts[""]
    specs = target.parts(weight.shape)
    # Where each row is by itself in both, not all of them have to be there as numbers at once.
    alone = all(spec.shape[0] == rows for spec in specs.values()) and weight.format.cuts(1)
    height = max(NUMBERS // columns, 1) if alone else rows
    if height >= rows:
        plain = weight.decode(torch.float32)
        return target.encode(plain.to(device or plain.device))
    encoded = {
        suffix: torch.empty(spec.shape, dtype=spec.dtype, device=device or source.device)
        for suffix, spec in specs.items()
    }
    for start in range(0, rows, height):
        end = min(start + height, rows)
        parts = {suffix: part[start:end] for suffix, part in weight.parts.items()}
        plain = weight.format.decode(parts, (end - start, columns), torch.float32)
        for suffix, part in target.encode(plain.to(device or plain.device)).items():
            encoded[suffix][start:end] = part
    return encoded


def apply(
    model: nn.Module,
    scheme: Scheme,
    *,
    keep: Sequence[str],
    embedding: nn.Module | None,
    head: nn.Module | None,
    tied: bool,
    dtype: torch.dtype,
    divided: bool = False,
) -> dict[str, Slot]:
    """Replace linear maps and experts by empty quantised ones.

    Args:
        keep: modules of this family that stay as they are, named as in `modules_to_not_convert`.
        embedding: the module that turns ids into vectors.
        head: the module that turns vectors into logits of ids.
        tied: whether the two share their weight; then both are quantised, or none is.
        dtype: of the vectors that a quantised embedding returns.
        divided: whether the matrices are those of one of several processes.

    Returns where the weights of the former modules go, by their names.
    """
    formats = _formats(model, scheme, (*keep, *scheme.skip), embedding, head, tied)
    replaced: dict[nn.Module, Quantized] = {}
    slots: dict[str, Slot] = {}
    for module, found in formats.items():
        chosen = tuple(one.divided for one in found) if divided else found
        replacement: Quantized
        if isinstance(module, nn.Embedding):
            replacement = QuantizedEmbedding(
                module.num_embeddings,
                module.embedding_dim,
                padding_idx=module.padding_idx,
                weight_format=chosen[0],
                dtype=dtype,
                device=module.weight.device,
                rows=module.weight.shape[0],
            )
        elif isinstance(module, nn.Linear):
            replacement = QuantizedLinear(
                module.in_features,
                module.out_features,
                bias=module.bias,
                weight_format=chosen[0],
                compute_dtype=scheme.compute_dtype,
                device=module.weight.device,
                shape=tuple(module.weight.shape),
            )
        else:
            assert isinstance(module, Experts)
            replacement = experts_like(module, (chosen[0], chosen[1]), scheme.compute_dtype)
        replaced[module] = replacement.train(module.training)
    # A module that several share has several names, and any may be the one it is saved under.
    for path, module in model.named_modules(remove_duplicate=False):
        if module in replaced:
            replacement = replaced[module]
            slots |= {f"{path}.{name}": Slot(replacement, name) for name in replacement.matrices}
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in replaced:
                parent._modules[name] = replaced[child]
    return slots


def _formats(
    model: nn.Module,
    scheme: Scheme,
    keep: Sequence[str],
    embedding: nn.Module | None,
    head: nn.Module | None,
    tied: bool,
) -> dict[nn.Module, tuple[WeightFormat, ...]]:
    """Choose the format of each matrix to be replaced; see `apply`."""
    found: dict[nn.Module, tuple[WeightFormat | None, ...]] = {}
    rows = scheme.head if tied else None
    # What several share has several names, and any may be the one that is meant.
    named = list(model.named_modules(remove_duplicate=False))
    unquantized = {module for path, module in named if is_named(path, keep)}
    for path, module in named:
        if module in unquantized or None not in found.get(module, (None,)):
            continue
        if isinstance(module, nn.Embedding) and module is embedding:
            found[module] = (scheme.of(f"{path}.weight", rows),)
        elif isinstance(module, nn.Linear):
            usual = scheme.head if module is head else scheme.weights
            found[module] = (scheme.of(f"{path}.weight", usual),)
        elif isinstance(module, Experts):
            found[module] = tuple(scheme.of(f"{path}.{name}", scheme.weights) for name in STACKS)
    if tied and embedding is not None and head is not None:
        # One weight: a head by itself has no name of its own.
        shared = (None,) if head in unquantized else found.get(embedding, (None,))
        found |= {embedding: shared, head: shared}
    chosen = {module: tuple(f for f in one if f is not None) for module, one in found.items()}
    return {module: one for module, one in chosen.items() if len(one) == len(found[module])}


def freeze(model: nn.Module) -> None:
    """Disable gradients of all parameters."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)


def tie(alias: nn.Module, source: nn.Module) -> bool:
    """Share a quantised embedding's rows with the quantised head; return whether both are such."""
    if not (isinstance(alias, QuantizedLinear) and isinstance(source, QuantizedEmbedding)):
        return False
    for suffix in source.suffixes("weight"):
        alias._buffers["weight" + suffix] = source._buffers["weight" + suffix]
    return True


def cut(weight: Tensor | EncodedWeight, shape: Shape, P: int) -> list[Tensor | EncodedWeight]:
    """Split a matrix (P · O, I) into P matrices."""
    if isinstance(weight, Tensor):
        return list(torch.split(weight, shape[0]))
    if weight.format.cuts(shape[0]):
        halves = {suffix: part.chunk(P) for suffix, part in weight.parts.items()}
        return [
            EncodedWeight(weight.format, {suffix: halves[suffix][i] for suffix in halves}, shape)
            for i in range(P)
        ]
    # Blocks reach over the border between two of them.
    return list(torch.split(weight.decode(torch.float32), shape[0]))


def part_state(
    model: nn.Module, tensors: Mapping[str, Tensor], tied: Container[str]
) -> tuple[dict[str, Tensor], dict[str, tuple[Quantized, str, dict[str, Tensor]]]]:
    """Split a state dict into plain tensors, and the parts of quantised matrices.

    Names in `tied` are second ones, and matrices under them are left out.
    """
    plain, parted = dict(tensors), {}
    seen: set[Quantized] = set()
    for path, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, Quantized):
            continue
        for name in module.matrices:
            suffixes = module.suffixes(name)
            weight = f"{path}.{name}"
            parts = {s: plain.pop(weight + s) for s in suffixes if weight + s in plain}
            if weight not in tied and module not in seen and len(parts) == len(suffixes):
                parted[weight] = (module, name, parts)
        if not any(f"{path}.{name}" in tied for name in module.matrices):
            seen.add(module)
    return plain, parted
