import errno
import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models

from quintet.errors import InputError, ModelNotFoundError, SaveError, TokenizerError
from quintet.files import locked
from quintet.tokenization import PreTrainedTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer

TEXT = "It's the naïve fox<|im_end|>\n 42 你好"


@pytest.fixture
def directory(trained: Path, tmp_path: Path) -> Path:
    """A directory with the pipeline, and with settings that each test changes."""
    (tmp_path / "tokenizer.json").write_bytes((trained / "tokenizer.json").read_bytes())
    return tmp_path


def settings(directory: Path, **values: Any) -> Path:
    (directory / "tokenizer_config.json").write_text(json.dumps(values), encoding="utf-8")
    return directory


def test_there_is_one_class_under_two_names() -> None:
    assert PreTrainedTokenizerFast is PreTrainedTokenizer


@pytest.mark.parametrize("name", ["LlamaTokenizerFast", "LlamaTokenizer", "BertTokenizer", "X"])
def test_the_class_name_never_changes_the_pipeline(directory: Path, name: str) -> None:
    settings(
        directory, tokenizer_class=name, legacy=True, sp_model_kwargs={}, add_prefix_space=True
    )
    ours = PreTrainedTokenizer.from_pretrained(directory)
    plain = Tokenizer.from_file(str(directory / "tokenizer.json"))
    assert ours.encode(TEXT) == plain.encode(TEXT).ids
    assert ours.decode(ours.encode(TEXT)) == plain.decode(ours.encode(TEXT), False)


def test_settings_become_attributes_and_keywords_win(directory: Path) -> None:
    settings(
        directory,
        padding_side="left",
        model_max_length=77,
        eos_token={"content": "<|im_end|>", "__type": "AddedToken"},
        pad_token="<|endoftext|>",
        bos_token=None,
        extra_special_tokens={"image_token": "<|im_start|>"},
    )
    ours = PreTrainedTokenizer.from_pretrained(directory, model_max_length=99)
    assert ours.padding_side == "left"
    assert ours.model_max_length == 99
    assert ours.eos_token == "<|im_end|>"
    assert ours.bos_token is None
    assert ours.special_tokens_map["image_token"] == "<|im_start|>"
    assert ours.additional_special_tokens == []
    assert ours.name_or_path == str(directory)
    assert ours.is_fast


def test_special_tokens_map_fills_what_the_settings_leave_open(directory: Path) -> None:
    settings(directory, eos_token="<|im_end|>")
    roles = {"eos_token": "<|endoftext|>", "pad_token": {"content": "<|endoftext|>"}}
    (directory / "special_tokens_map.json").write_text(json.dumps(roles), encoding="utf-8")
    ours = PreTrainedTokenizer.from_pretrained(directory)
    assert ours.special_tokens_map == {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}


def test_tokens_missing_from_the_pipeline_are_added_with_their_ids(directory: Path) -> None:
    size = Tokenizer.from_file(str(directory / "tokenizer.json")).get_vocab_size()
    late = {str(size): {"content": "<tool>", "special": True}}
    settings(directory, added_tokens_decoder=late)
    (directory / "added_tokens.json").write_text(json.dumps({"<next>": size + 1}))
    ours = PreTrainedTokenizer.from_pretrained(directory)
    assert ours.convert_tokens_to_ids(["<tool>", "<next>"]) == [size, size + 1]
    assert ours.decode([size, size + 1], skip_special_tokens=True) == "<next>"


def test_an_added_token_with_another_id_is_an_error(directory: Path) -> None:
    settings(directory, added_tokens_decoder={"9999": {"content": "<tool>"}})
    with pytest.raises(TokenizerError, match=r"'<tool>' has the id 9999"):
        PreTrainedTokenizer.from_pretrained(directory)


@pytest.mark.parametrize(("begin", "end"), [(True, False), (True, True), (None, True)])
def test_bos_and_eos_are_added_where_the_caller_asks(
    directory: Path, begin: bool | None, end: bool
) -> None:
    from transformers import PreTrainedTokenizerFast as Theirs

    roles = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    settings(directory, add_bos_token=True, add_eos_token=True, **roles)
    untouched = PreTrainedTokenizer.from_pretrained(directory)
    bare = untouched.encode("the fox", add_special_tokens=False)
    assert untouched.encode("the fox") == bare, "the pipeline's file has the say"
    asked = {"add_bos_token": begin, "add_eos_token": end}
    ours = PreTrainedTokenizer.from_pretrained(directory, **asked)
    theirs = Theirs(
        tokenizer_object=Tokenizer.from_file(str(directory / "tokenizer.json")),
        add_bos_token=bool(begin),
        add_eos_token=end,
        **roles,
    )
    assert ours.encode("the fox") == theirs("the fox")["input_ids"] != bare
    assert ours.encode("the", "fox") == theirs("the", "fox")["input_ids"]
    assert ours.encode("the fox", add_special_tokens=False) == bare


def test_add_bos_token_needs_one(directory: Path) -> None:
    with pytest.raises(InputError, match="needs a bos_token"):
        PreTrainedTokenizer.from_pretrained(directory, add_bos_token=True)


def test_what_we_save_loads_here_and_in_transformers(
    tokenizer: Qwen2Tokenizer, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer
    from transformers import PreTrainedTokenizerFast as Theirs

    tokenizer.add_tokens([AddedToken("quick fox", lstrip=True)])
    tokenizer.padding_side = "left"
    tokenizer.eos_token = "<|im_end|>"
    paths = tokenizer.save_pretrained(tmp_path / "new")
    assert {Path(path).name for path in paths} == {
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "chat_template.jinja",
    }
    chat = [{"role": "user", "content": "the quick fox"}]
    for kind in (Qwen2Tokenizer, PreTrainedTokenizer, Theirs, AutoTokenizer):
        again = kind.from_pretrained(tmp_path / "new")
        assert again(TEXT + " quick fox")["input_ids"] == tokenizer.encode(TEXT + " quick fox")
        assert again.special_tokens_map == tokenizer.special_tokens_map
        assert again.padding_side == "left"
        assert again.chat_template == tokenizer.chat_template
        assert again.apply_chat_template(chat, tokenize=False) == tokenizer.apply_chat_template(
            chat, tokenize=False
        )


def test_what_transformers_saves_loads_here(oracle: Any, tmp_path: Path) -> None:
    oracle.save_pretrained(tmp_path)
    for kind in (Qwen2Tokenizer, PreTrainedTokenizer):
        ours = kind.from_pretrained(tmp_path)
        assert ours.encode(TEXT) == oracle(TEXT)["input_ids"]
        assert ours.special_tokens_map == oracle.special_tokens_map
        assert ours.additional_special_tokens == ["<|im_start|>", "<|im_end|>"]
        assert ours.chat_template == oracle.chat_template


def test_saving_keeps_stored_cutting_and_padding_and_unknown_keys(
    directory: Path, tmp_path: Path
) -> None:
    stored = Tokenizer.from_file(str(directory / "tokenizer.json"))
    stored.enable_truncation(7)
    stored.enable_padding(pad_token="<|endoftext|>")
    stored.save(str(directory / "tokenizer.json"))
    settings(directory, use_default_system_prompt=False)
    PreTrainedTokenizer.from_pretrained(directory).save_pretrained(tmp_path / "new")
    saved = json.loads((tmp_path / "new" / "tokenizer.json").read_text(encoding="utf-8"))
    assert saved == json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    kept = json.loads((tmp_path / "new" / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert kept["use_default_system_prompt"] is False


def test_named_templates_are_files_of_their_own(tokenizer: Qwen2Tokenizer, tmp_path: Path) -> None:
    tokenizer.chat_template = {"default": "a", "tool_use": "b"}
    tokenizer.save_pretrained(tmp_path)
    assert (tmp_path / "chat_template.jinja").read_text() == "a"
    assert (tmp_path / "additional_chat_templates" / "tool_use.jinja").read_text() == "b"
    again = Qwen2Tokenizer.from_pretrained(tmp_path)
    assert again.chat_template == {"default": "a", "tool_use": "b"}
    tokenizer.chat_template = {"../out": "c"}
    with pytest.raises(SaveError, match=r"'\.\./out'"):
        tokenizer.save_pretrained(tmp_path)


def test_templates_in_the_settings_are_read(directory: Path) -> None:
    settings(directory, chat_template="one")
    assert PreTrainedTokenizer.from_pretrained(directory).chat_template == "one"
    settings(
        directory,
        chat_template=[{"name": "default", "template": "a"}, {"name": "rag", "template": "b"}],
    )
    both = {"default": "a", "rag": "b"}
    assert PreTrainedTokenizer.from_pretrained(directory).chat_template == both
    (directory / "chat_template.jinja").write_text("file")
    assert PreTrainedTokenizer.from_pretrained(directory).chat_template == {
        **both,
        "default": "file",
    }


def test_a_directory_without_a_tokenizer_names_the_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelNotFoundError, match=r"tokenizer\.json, for vocab\.json"):
        PreTrainedTokenizer.from_pretrained(tmp_path)


def test_a_bare_vocabulary_needs_its_familys_class(trained: Path, tmp_path: Path) -> None:
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((trained / name).read_bytes())
    with pytest.raises(TokenizerError, match="Qwen2Tokenizer"):
        PreTrainedTokenizer.from_pretrained(tmp_path)
    ours = Qwen2Tokenizer.from_pretrained(tmp_path)
    assert ours.decode(ours.encode(TEXT)) == TEXT
    assert ours.eos_token == "<|endoftext|>"


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "added_tokens.json"])
@pytest.mark.parametrize("damage", ["{", "[]", '{"version": "9"'])
def test_damaged_files_are_named(directory: Path, name: str, damage: str) -> None:
    (directory / name).write_text(damage, encoding="utf-8")
    with pytest.raises(TokenizerError, match=name.replace(".", r"\.")):
        PreTrainedTokenizer.from_pretrained(directory)


def test_unknown_options_name_the_nearest(directory: Path) -> None:
    with pytest.raises(InputError, match="did you mean 'padding_side'"):
        PreTrainedTokenizer.from_pretrained(directory, pading_side="left")
    with pytest.raises(InputError, match="padding_side='top'"):
        PreTrainedTokenizer.from_pretrained(directory, padding_side="top")
    with pytest.raises(InputError, match="use from_pretrained"):
        PreTrainedTokenizer()


def test_inert_options_change_nothing(directory: Path) -> None:
    ours = PreTrainedTokenizer.from_pretrained(
        directory, trust_remote_code=True, use_fast=False, legacy=True
    )
    assert ours.encode(TEXT) == PreTrainedTokenizer.from_pretrained(directory).encode(TEXT)


def test_a_role_without_a_token_in_the_vocabulary_adds_it() -> None:
    ours = PreTrainedTokenizer(Tokenizer(models.WordLevel({"a": 0})), pad_token="[PAD]")
    assert ours.pad_token_id == 1
    assert ours.vocab_size == 1


def test_saving_into_a_file_is_refused(tokenizer: Qwen2Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SaveError, match="is a file"):
        tokenizer.save_pretrained(tmp_path / "file")


def test_a_full_disk_leaves_the_old_files_and_a_second_process_waits(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = PreTrainedTokenizer.from_pretrained(trained)
    tokenizer.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    tokenizer.model_max_length = 77
    calls: list[int] = []

    def full(handle: int) -> None:
        calls.append(handle)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("quintet.files.os.fsync", full)
        with pytest.raises(SaveError, match="No space left"):
            tokenizer.save_pretrained(tmp_path)
    assert len(calls) == 3
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before

    saver = threading.Thread(target=tokenizer.save_pretrained, args=(tmp_path,))
    with locked(tmp_path):
        saver.start()
        time.sleep(0.1)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    saver.join()
    assert b"77" in (tmp_path / "tokenizer_config.json").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == before.keys()
