"""`quintet verify`: whether the files of a model are whole, and belong together."""

import hashlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quintet.cli.output import show
from quintet.errors import CheckpointError, InputError, QuintetError, listed
from quintet.files import MAX_LISTING_BYTES, read_text
from quintet.hub import CONFIG_PATTERNS, locate, locate_weights

if TYPE_CHECKING:
    from torch import Tensor

    from quintet.checkpoint import Checkpoint, GGUFCheckpoint
    from quintet.quantization.stored import Stored

# How many numbers are looked at together.
SLICE = 1 << 24
_SHA256 = re.compile(r"[0-9a-f]{64}")


@click.command("verify")
@click.argument("model")
@click.option("--variant", help="Which weights, where there are several: fp16, …")
@click.option(
    "--hashes", type=click.Path(dir_okay=False), help="What sha256sum wrote of the files."
)
@click.option("--quick", is_flag=True, help="Names and sizes alone; read no data.")
@click.option("--revision", help="Branch, tag or commit of a hub id.")
@click.option("--cache-dir", help="Where downloads are kept.")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def command(
    model: str,
    variant: str | None,
    hashes: str | None,
    quick: bool,
    revision: str | None,
    cache_dir: str | None,
    as_json: bool,
) -> None:
    """Check a directory, or a hub id that has been downloaded.

    Files that are whole, tensors of the names and shapes that config.json asks for, numbers that
    are finite, a tokenizer that fits; and the files' SHA-256, where the hub cache or --hashes says
    what it has to be. Ends with 4 if something is wrong, and names all of it.
    """
    where: dict[str, Any] = {
        "revision": revision,
        "cache_dir": cache_dir,
        "local_files_only": True,
    }
    locate(model, CONFIG_PATTERNS, **where)
    root = locate_weights(model, variant, **where)
    expected = _expected_hashes(root, hashes)
    problems: list[str] = []
    facts: dict[str, Any] = {"model": model, "directory": str(root)}
    try:
        facts |= _weights(root, variant, quick, problems)
    except QuintetError as error:
        problems.append(str(error))
    facts["hashes"] = "not read" if quick else _hashes(root, expected, problems)
    _tokenizer(root, problems)
    facts["problems"] = problems
    facts["ok"] = not problems
    show({key: value for key, value in facts.items() if key != "problems" or as_json}, as_json)
    if problems:
        raise CheckpointError(f"{model}: {len(problems)} problem(s)\n{listed(problems, 50)}")


def _weights(root: Path, variant: str | None, quick: bool, problems: list[str]) -> dict[str, Any]:
    from quintet.auto import AutoConfig, family
    from quintet.checkpoint import open_weights, read_consistently
    from quintet.modeling.init_on_meta import init_on_meta
    from quintet.modeling.key_mapping import map_keys
    from quintet.quantization.request import read

    config, checkpoint = read_consistently(
        root,
        lambda: (AutoConfig.from_pretrained(root), open_weights(root, variant=variant)),
        variant=variant,
    )
    settings = vars(config).get("quantization_config")
    mapping = map_keys(
        init_on_meta(_class(family(config.model_type), config.architectures), config),
        checkpoint.tensors,
        stored_as=read(settings) if settings else None,
    )
    try:
        mapping.difference.raise_if_incomplete(str(root))
        # Blocks of a GGUF file are looked into below, all of them.
        if not quick and not root.is_file():
            _unpack(checkpoint, mapping.stored)
    except CheckpointError as error:
        problems.append(str(error))
    problems += [f"{name} is no tensor of this model" for name in mapping.lost]
    if not quick:
        problems += _not_finite(checkpoint)
        problems += _aliases(checkpoint, mapping.aliases)
    return {
        "family": config.model_type,
        "tensors": len(checkpoint.tensors),
        "bytes": checkpoint.total_bytes,
        "files": len({info.file for info in checkpoint.tensors.values()}),
    }


def _class(found: Any, architectures: list[str] | None) -> Any:
    """Return the class that was saved, a language model where that is not said."""
    for name in architectures or []:
        suffix = name.removeprefix(found.prefix)
        if suffix != name and suffix in (
            *("Model", "ForCausalLM", "ForSequenceClassification"),
            *("ForTokenClassification", "ForQuestionAnswering"),
        ):
            return found.find(suffix)
    return found.find("ForCausalLM")


def _unpack(checkpoint: "Checkpoint | GGUFCheckpoint", found: "Mapping[str, Stored]") -> None:
    """Check that the tensors of each quantised matrix belong together.

    Raises:
        CheckpointError: those of one do not.
    """
    from quintet.quantization.stored import read

    quantised = {name: one for name, one in found.items() if one.format is not None}
    for name, _ in read(checkpoint, quantised):
        for file, _ in quantised[name].files.values():
            checkpoint.forget(file)


def _not_finite(checkpoint: "Checkpoint | GGUFCheckpoint") -> Iterator[str]:
    from quintet.ops.blocks import has_odd_scales

    for name, tensor in checkpoint.read(checkpoint.tensors):
        kind = checkpoint.tensors[name].blocks
        if kind is not None and has_odd_scales(tensor, kind):
            file = checkpoint.tensors[name].file.name
            yield f"{file}: {name} has blocks of {kind.name} with a scale that is not finite"
        elif tensor.is_floating_point() and (count := _count_not_finite(tensor)):
            file = checkpoint.tensors[name].file.name
            yield f"{file}: {name} has {count:,} numbers that are not finite"
        checkpoint.forget(name)


def _count_not_finite(tensor: "Tensor") -> int:
    import torch

    count = 0
    for part in torch.split(tensor.reshape(-1), SLICE):
        # Numbers of one byte have no such test.
        numbers = part.to(torch.float32) if part.dtype.itemsize == 1 else part
        count += int((~torch.isfinite(numbers)).sum())
    return count


def _aliases(
    checkpoint: "Checkpoint | GGUFCheckpoint", aliases: Mapping[str, str]
) -> Iterator[str]:
    from quintet.modeling.weight_loader import identical

    for second, first in aliases.items():
        pair = dict(checkpoint.read([first, second]))
        if not identical(pair[first], pair[second]):
            yield f"{second} and {first} are one tensor of the model, with different values"


def _tokenizer(root: Path, problems: list[str]) -> None:
    from quintet.auto import AutoConfig, AutoTokenizer
    from quintet.errors import ModelNotFoundError

    try:
        tokenizer = AutoTokenizer.from_pretrained(root)
        vocab_size = AutoConfig.from_pretrained(root).vocab_size
    except ModelNotFoundError:
        return
    except QuintetError as error:
        problems.append(str(error))
        return
    largest = max(tokenizer.get_vocab().values(), default=0)
    if largest >= vocab_size:
        problems.append(
            f"the tokenizer has the id {largest}, and the model a vocabulary of {vocab_size}"
        )


def _expected_hashes(root: Path, hashes: str | None) -> dict[str, str]:
    """Return the SHA-256 each file should have, from a list or from the hub's own notes."""
    if hashes is not None:
        return _listed_hashes(Path(hashes))
    found = {}
    for path in _weight_files(root):
        # In the hub cache, a file is a link to a blob that is named by its hash.
        blob = path.resolve().name.removeprefix("sha256-")
        note = path.parent / ".cache" / "huggingface" / "download" / f"{path.name}.metadata"
        if _SHA256.fullmatch(blob):
            found[path.name] = blob
        elif note.is_file():
            _, etag, *_ = [*note.read_text(encoding="utf-8", errors="replace").split(), "", ""]
            if _SHA256.fullmatch(etag):
                found[path.name] = etag
    return found


def _weight_files(root: Path) -> list[Path]:
    """Return the files of weights in a directory, or those of a model in GGUF."""
    from quintet.gguf import read_gguf

    if not root.is_file():
        return sorted(root.glob("*.safetensors"))
    try:
        return [*read_gguf(root).files]
    except QuintetError:
        return [root]


def _listed_hashes(path: Path) -> dict[str, str]:
    try:
        lines = read_text(path, MAX_LISTING_BYTES).splitlines()
    except (OSError, CheckpointError) as error:
        raise InputError(f"--hashes {path} cannot be read: {error}") from error
    found = {}
    for line in filter(str.strip, lines):
        match = re.fullmatch(r"([0-9a-fA-F]{64})[ \t]+\*?(?:\./)?([^/\\]+)", line.strip())
        if match is None:
            raise InputError(
                f"--hashes {path}: {line[:80]!r} has to be a SHA-256 and the name of a file, as "
                "sha256sum writes them"
            )
        found[match[2]] = match[1].lower()
    return found


def _hashes(root: Path, expected: Mapping[str, str], problems: list[str]) -> str:
    right = 0
    for name, wanted in sorted(expected.items()):
        path = (root.parent if root.is_file() else root) / name
        if not path.is_file():
            problems.append(f"{name} is not there, and has a hash")
            continue
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found == wanted:
            right += 1
        else:
            problems.append(f"{name} has the SHA-256 {found}, expected {wanted}")
    return f"{right} of {len(expected)} right" if expected else "none known"
