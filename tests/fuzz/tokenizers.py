"""The readers of a tokenizer's files: loaded, a text there and back, a chat, saved."""

import io
import tempfile
from collections.abc import Callable
from pathlib import Path

import sentencepiece
from tokenizers import Tokenizer

from fuzz.running import Target
from quintet import AutoTokenizer
from quintet.tokenization import PreTrainedTokenizer
from tiny import TEXT

__all__ = ["TOKENIZERS"]

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "there"}]
TEMPLATE = (
    "{% set ns = namespace(text='') %}{% for message in messages %}"
    "{% if loop.first %}<s>{% endif %}{% set ns.text = ns.text ~ message['content'] | trim %}"
    "<|{{ message.role | upper }}|>{{ message['content'].split('</think>')[-1] + '\n' }}"
    "{% endfor %}{{ tools | tojson(indent=2) }}{% if add_generation_prompt %}"
    "{{ '%s: %d' % ('a', 3) }}{{ [1, 2][::-1] | join('-') }}{% endif %}"
)


def _use(root: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(root)
    ids = tokenizer.encode("Hello there, it's <s> 42 你好")
    tokenizer.decode(ids, skip_special_tokens=True)
    tokenizer.apply_chat_template(CHAT, add_generation_prompt=True)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)


def _byte_level(root: Path) -> PreTrainedTokenizer:
    from tokenizers import decoders, pre_tokenizers, trainers
    from tokenizers.models import BPE

    backend = Tokenizer(BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, show_progress=False, special_tokens=["<s>"]
    )
    backend.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizer(
        backend,
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<x>"],
        model_max_length=512,
        chat_template=TEMPLATE,
    )


def _whole(root: Path) -> None:
    tokenizer = _byte_level(root)
    tokenizer.save_pretrained(root)
    added = {"<late>": len(tokenizer), "<x>": tokenizer.convert_tokens_to_ids("<x>")}
    (root / "added_tokens.json").write_text(str(added).replace("'", '"'))


def _vocabulary(root: Path) -> None:
    _byte_level(root).save_vocabulary(root)
    (root / "chat_template.jinja").write_text(TEMPLATE)
    (root / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer"}')


def _sentencepiece(kind: str) -> Callable[[Path], None]:
    def make(root: Path) -> None:
        root.mkdir(parents=True, exist_ok=True)
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(line for text in TEXT * 4 for line in text.splitlines()),
            model_writer=model,
            vocab_size=330,
            hard_vocab_limit=False,
            byte_fallback=True,
            model_type=kind,
            minloglevel=9,
        )
        (root / "tokenizer.model").write_bytes(model.getvalue())
        (root / "chat_template.jinja").write_text(TEMPLATE)

    return make


TOKENIZERS = (
    *(
        Target(name=f"tokenizer-{name}", make=_whole, files=(file,), read=_use)
        for name, file in (
            ("pipeline", "tokenizer.json"),
            ("settings", "tokenizer_config.json"),
            ("roles", "special_tokens_map.json"),
            ("added", "added_tokens.json"),
            ("template", "chat_template.jinja"),
        )
    ),
    Target(
        name="tokenizer-vocabulary", make=_vocabulary, files=("vocab.json", "merges.txt"), read=_use
    ),
    *(
        Target(
            name=f"tokenizer-{kind}",
            make=_sentencepiece(kind),
            files=("tokenizer.model",),
            read=_use,
        )
        for kind in ("bpe", "unigram")
    ),
)
