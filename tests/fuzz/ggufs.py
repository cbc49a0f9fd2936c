"""GGUF files whose heads are changed: counts, lengths, types, shapes, offsets, and whole files."""

import struct
from pathlib import Path
from random import Random

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind

import ggufwriting
from conformance.families import FAMILIES, Family
from fuzz.mutants import mutant
from fuzz.running import Target
from quintet import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from quintet.checkpoint import GGUFCheckpoint

__all__ = ["GGUFS"]

FILE = "model.gguf"
# What a count, a length, an axis, an offset or a type may be instead.
NUMBERS = (
    *(0, 1, 2, 3, 7, 8, 9, 13, 31, 32, 33, 64, 255, 256, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1),
    *(2**32, 2**40, 2**53, 2**60, 2**61, 2**62, 2**63 - 1, 2**63, 2**64 - 32, 2**64 - 1),
)


def _head(content: bytes, random: Random) -> bytes:
    """Change numbers, bits and texts before the data, or the file as bytes."""
    if random.random() < 0.2:
        return mutant(content, random)
    data = bytearray(content)
    # Where tensors are described is about the last tenth of what comes before their data.
    end = min(len(data), content.rfind(b".weight") + 64)
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        at = random.randrange(end)
        kind = random.randrange(4)
        if kind == 0:
            data[at] ^= 1 << random.randrange(8)
        elif kind == 1:
            value = random.choice(NUMBERS) & 0xFFFFFFFF
            data[at : at + 4] = struct.pack("<I", value)
        elif kind == 2:
            data[at : at + 8] = struct.pack("<Q", random.choice(NUMBERS))
        else:
            # One of the numbers that are there, a little larger or smaller.
            old = int.from_bytes(data[at : at + 4], "little")
            data[at : at + 4] = ((old + random.choice((-32, -1, 1, 32))) % 2**32).to_bytes(
                4, "little"
            )
    return bytes(data)


def _made(family: Family, *kinds: Kind) -> Target:
    def make(root: Path) -> None:
        def kind(name: str, shape: tuple[int, ...]) -> Kind:
            fitting = [one for one in kinds if shape[-1] % 32 == 0]
            return fitting[len(name) % len(fitting)] if fitting else Kind.F32

        root.mkdir(parents=True, exist_ok=True)
        model = family.model_of(num_hidden_layers=2, **({"hidden_size": 64} if kinds else {}))
        ggufwriting.write(model, root / FILE, kind=kind)

    return Target(
        name=f"gguf-{family.name}{'-blocks' if kinds else ''}",
        make=make,
        files=(FILE,),
        read=lambda root: AutoModelForCausalLM.from_pretrained(root / FILE),
        change=_head,
    )


def _with_tokens(root: Path) -> None:
    root.mkdir(parents=True, exist_ok=True)
    ggufwriting.write(
        FAMILIES[0].model_of(num_hidden_layers=1), root / FILE, more=ggufwriting.add_tokens
    )


def _read_head(root: Path) -> None:
    AutoConfig.from_pretrained(root / FILE)
    checkpoint = GGUFCheckpoint.open(root / FILE)
    for name, tensor in checkpoint.read(checkpoint.tensors):
        tensor.view(-1)[:1].clone()
        checkpoint.forget(name)
    AutoTokenizer.from_pretrained(root / FILE)


def _adapter(root: Path) -> None:
    """An adapter of queries, experts and embeddings."""
    root.mkdir(parents=True, exist_ok=True)
    config = FAMILIES[1].config()
    C, F, E, V = (
        getattr(config, key)
        for key in ("hidden_size", "moe_intermediate_size", "num_experts", "vocab_size")
    )
    shapes = {
        "blk.0.attn_q.weight": ((2, C), (config.num_attention_heads * config.head_dim, 2)),
        "blk.1.ffn_up_exps.weight": ((E, 2, C), (E, F, 2)),
        "token_embd.weight": ((V, 2), (C, 2)),
    }
    writer = gguf.GGUFWriter(root / FILE, "qwen2moe")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 4.0)
    for base, (A, B) in shapes.items():
        writer.add_tensor(f"{base}.lora_a", np.ones(A, np.float32))
        writer.add_tensor(f"{base}.lora_b", np.ones(B, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


GGUFS = (
    Target(
        name="gguf-adapter",
        make=_adapter,
        files=(FILE,),
        read=lambda root: FAMILIES[1].model_of().load_adapter(root / FILE),
        change=_head,
    ),
    Target(name="gguf-head", make=_with_tokens, files=(FILE,), read=_read_head, change=_head),
    *(_made(family) for family in FAMILIES if family.name != "zamba2"),
    _made(FAMILIES[0], Kind.Q4_0, Kind.Q8_0, Kind.Q5_1),
)
