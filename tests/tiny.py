"""A whole model small enough to be made on the spot: random weights, a trained tokenizer."""

from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE

from quintet import DeepseekV3Config, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

__all__ = ["END", "build", "predicting_config", "trained_tokenizer"]

END = "<|im_end|>"
SPECIAL = ["<|endoftext|>", "<|im_start|>", END]
TEXT = [
    "system\nuser\nassistant\nYou are a helpful assistant.\nBe brief, please.\n",
    "Hello there, how are you today? The quick brown fox jumps over the lazy dog.\n",
    "def fibonacci(n):\n    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)\n",
    "Ünïcödé: naïve café, 你好,世界。 🙂🙃 1234567890\n",
]
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def build(root: Path, *, chat: bool = True, context: int = 256, vocab_size: int = 0) -> Path:
    """Write a checkpoint with its tokenizer into `root`, and return it.

    Its greedy text never ends by itself. `vocab_size` is the model's, the tokenizer's if 0.
    """
    tokenizer = trained_tokenizer(chat=chat)
    torch.manual_seed(7)
    config = Qwen2Config(
        vocab_size=vocab_size or len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.4,
    )
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        # A logit of 0 is never the largest, so these are not chosen greedily.
        model.lm_head.weight[: len(SPECIAL)] = 0
    model.generation_config = model.generation_config.replace(pad_token_id=0)
    model.save_pretrained(root)
    tokenizer.save_pretrained(root)
    return root


def predicting_config(*, vocab_size: int, context: int) -> DeepseekV3Config:
    """A DeepSeek-V3 with a prediction layer, whose greedy text never ends by itself."""
    return DeepseekV3Config(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        num_hidden_layers=2,
        num_nextn_predict_layers=1,
        num_attention_heads=2,
        q_lora_rank=None,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
        max_position_embeddings=context,
        bos_token_id=None,
        eos_token_id=[],
        tie_word_embeddings=True,
        initializer_range=0.1,
    )


def trained_tokenizer(*also: str, chat: bool = True) -> PreTrainedTokenizerFast:
    """A tokenizer of 360 ids, with or without a chat template, that has also seen some texts."""
    return PreTrainedTokenizerFast(
        _pipeline([*TEXT, *also]),
        eos_token=END,
        pad_token=SPECIAL[0],
        chat_template=CHATML if chat else None,
    )


def _pipeline(texts: list[str]) -> Tokenizer:
    pipeline = Tokenizer(BPE())
    pipeline.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    pipeline.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    pipeline.train_from_iterator(texts * 4, trainer)
    return pipeline
