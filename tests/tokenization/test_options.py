"""Options that Transformers' tokenizers have: each works as there, or is refused by its name."""

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from quintet.errors import InputError, QuintetError, SaveError, TokenizerError
from quintet.interop import to_transformers
from quintet.tokenization import PreTrainedTokenizer, Qwen2Tokenizer, load

TEXTS = ("the quick fox", " the", "", "\nthe", "<|im_end|>the fox", "naïve 42")
NAMED = {"image_token": "<img>", "audio_token": "<snd>"}


@pytest.fixture
def directory(trained: Path, tmp_path: Path) -> Path:
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((trained / name).read_bytes())
    say(tmp_path)
    return tmp_path


def say(directory: Path, **settings: Any) -> None:
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps({"tokenizer_class": "Qwen2Tokenizer", **settings}))


def theirs_of(directory: Path, **options: Any) -> Any:
    from transformers import Qwen2Tokenizer as Theirs

    return Theirs.from_pretrained(str(directory), **options)


def same_ids(ours: PreTrainedTokenizer, theirs: Any) -> None:
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text), text


# -- a space in front -------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", [True, False, None])
def test_a_space_in_front_is_that_of_transformers(
    trained: Path, directory: Path, tmp_path: Path, wanted: bool | None
) -> None:
    from transformers import Qwen2Tokenizer as Theirs

    theirs = Theirs(
        vocab=str(trained / "vocab.json"),
        merges=str(trained / "merges.txt"),
        add_prefix_space=wanted,
    )
    ours = Qwen2Tokenizer(trained / "vocab.json", trained / "merges.txt", add_prefix_space=wanted)
    same_ids(ours, theirs)
    same_ids(load(directory, add_prefix_space=wanted), theirs)
    ours.save_pretrained(tmp_path / "saved")
    same_ids(load(tmp_path / "saved"), theirs)
    same_ids(ours, theirs_of(tmp_path / "saved"))
    same_ids(ours, to_transformers(ours))


def test_a_bare_vocabulary_obeys_its_settings_and_a_keyword_wins(directory: Path) -> None:
    say(directory, add_prefix_space=True)
    with_space = load(directory)
    same_ids(with_space, theirs_of(directory))
    same_ids(load(directory, add_prefix_space=False), theirs_of(directory, add_prefix_space=False))
    assert with_space.encode("the") != load(directory, add_prefix_space=False).encode("the")


def test_a_pipeline_takes_a_keyword_and_the_callers_own_is_left_alone(trained: Path) -> None:
    backend = Tokenizer.from_file(str(trained / "tokenizer.json"))
    before = backend.to_str()
    ours = PreTrainedTokenizer(backend, add_prefix_space=True)
    assert ours.encode("the") == PreTrainedTokenizer(backend).encode(" the")
    assert backend.to_str() == before


def test_a_pipeline_without_a_byte_level_step_refuses() -> None:
    backend = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    for step in (None, pre_tokenizers.Sequence([pre_tokenizers.Whitespace()])):
        if step is not None:
            backend.pre_tokenizer = step
        with pytest.raises(InputError, match=r"add_prefix_space=True is for pipelines with a byte"):
            PreTrainedTokenizer(backend, add_prefix_space=True)


# -- what a pipeline decides ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value", "harmless", "said"),
    [
        ("do_lower_case", True, False, r"do_lower_case=True has no effect.*Lowercase"),
        ("pad_token_type_id", 1, 0, r"pad_token_type_id=1 has no effect.*segment 0"),
    ],
)
def test_an_option_without_effect_is_refused_unless_it_is_so_anyway(
    trained: Path, directory: Path, option: str, value: Any, harmless: Any, said: str
) -> None:
    plain = load(directory).encode("The Fox")
    for given in (harmless, None):
        assert load(directory, **{option: given}).encode("The Fox") == plain
    calls: list[Any] = [
        lambda: load(directory, **{option: value}),
        lambda: Qwen2Tokenizer.from_pretrained(directory, **{option: value}),
        lambda: Qwen2Tokenizer(trained / "vocab.json", trained / "merges.txt", **{option: value}),
        lambda: PreTrainedTokenizer(
            tokenizer_file=trained / "tokenizer.json",
            **{option: value},  # type: ignore[arg-type]
        ),
    ]
    for call in calls:
        with pytest.raises(InputError, match=said):
            call()
    # In a file it is another program's word, as for Transformers, and is written back.
    say(directory, **{option: value})
    ours = load(directory)
    assert ours.encode("The Fox") == theirs_of(directory).encode("The Fox") == plain
    ours.save_pretrained(directory / "saved")
    saved = json.loads((directory / "saved" / "tokenizer_config.json").read_text())
    assert saved[option] == value


def test_padding_is_of_the_segment_that_is_said(tokenizer: Qwen2Tokenizer, oracle: Any) -> None:
    assert tokenizer.pad_token_type_id == oracle.pad_token_type_id == 0
    options = {"padding": True, "return_token_type_ids": True}
    texts = ["the", "the quick fox"]
    assert tokenizer(texts, **options).data == oracle(texts, **options).data  # type: ignore[arg-type]


# -- special tokens beyond the usual roles ----------------------------------------------------


def assert_same_tokens(ours: PreTrainedTokenizer, theirs: Any) -> None:
    assert ours.extra_special_tokens == theirs.extra_special_tokens
    assert ours.extra_special_tokens_ids == theirs.extra_special_tokens_ids
    assert ours.additional_special_tokens == theirs.extra_special_tokens
    assert ours.special_tokens_map == theirs.special_tokens_map
    assert ours.all_special_tokens == theirs.all_special_tokens
    assert ours.all_special_ids == theirs.all_special_ids
    text = "".join(["the", *ours.all_special_tokens, "fox"])
    assert ours.encode(text) == theirs.encode(text)
    ids = ours.encode(text)
    assert ours.decode(ids, skip_special_tokens=True) == theirs.decode(
        ids, skip_special_tokens=True
    )


@pytest.mark.parametrize(
    "options",
    [
        {"extra_special_tokens": ["<a>", "<b>"]},
        {"additional_special_tokens": ["<a>", "<b>"]},
        {"additional_special_tokens": [AddedToken("<a>", lstrip=True)]},
        {"extra_special_tokens": NAMED},
        {"extra_special_tokens": []},
        {"extra_special_tokens": None},
    ],
)
def test_tokens_without_a_usual_role_are_those_of_transformers(
    trained: Path, directory: Path, options: dict[str, Any]
) -> None:
    from transformers import Qwen2Tokenizer as Theirs

    files = {"vocab": str(trained / "vocab.json"), "merges": str(trained / "merges.txt")}
    ours = Qwen2Tokenizer(trained / "vocab.json", trained / "merges.txt", **options)
    assert_same_tokens(ours, Theirs(**files, **copy.deepcopy(options)))
    assert_same_tokens(load(directory, **options), theirs_of(directory, **copy.deepcopy(options)))
    # Both ways through files, and over the bridge.
    ours.save_pretrained(directory / "ours")
    assert_same_tokens(load(directory / "ours"), theirs_of(directory / "ours"))
    theirs_of(directory, **copy.deepcopy(options)).save_pretrained(str(directory / "theirs"))
    assert_same_tokens(load(directory / "ours"), theirs_of(directory / "theirs"))
    assert_same_tokens(ours, to_transformers(ours))


def test_a_token_with_a_name_is_an_attribute(trained: Path, tmp_path: Path) -> None:
    from transformers import Qwen2Tokenizer as Theirs

    paths = (str(trained / "vocab.json"), str(trained / "merges.txt"))
    ours, theirs = (kind(*paths, extra_special_tokens=NAMED) for kind in (Qwen2Tokenizer, Theirs))
    for tokenizer in (ours, pickle.loads(pickle.dumps(ours)), copy.deepcopy(ours)):
        assert tokenizer.image_token == theirs.image_token == "<img>"
        assert tokenizer.audio_token_id == theirs.audio_token_id
    ours.image_token = "t"
    assert ours.special_tokens_map["image_token"] == "t"
    with pytest.raises(TokenizerError, match=r"image_token='<new>' is not in the vocabulary"):
        ours.image_token = "<new>"
    with pytest.raises(InputError, match="image_token=None has to be a token"):
        ours.image_token = None
    with pytest.raises(AttributeError, match="no attribute 'video_token'"):
        _ = ours.video_token
    for one in (ours, theirs):
        assert one.add_special_tokens({"audio_token": "<new>"}) == 1
    assert ours.audio_token_id == theirs.audio_token_id
    ours.chat_template = "{{ image_token }}"
    assert ours.apply_chat_template([{"role": "user", "content": ""}], tokenize=False) == "t"
    both = Qwen2Tokenizer(*paths, extra_special_tokens=NAMED, additional_special_tokens=["<a>"])
    both.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert again.special_tokens_map == both.special_tokens_map
    assert again.additional_special_tokens == ["<a>"]


@pytest.mark.parametrize("key", ["extra_special_tokens", "additional_special_tokens"])
@pytest.mark.parametrize("replace", [True, False])
def test_adding_takes_the_place_or_goes_behind(
    tokenizer: Qwen2Tokenizer, trained: Path, key: str, replace: bool
) -> None:
    theirs = to_transformers(tokenizer)
    given = {key: ["<a>", "<|im_end|>"], "pad_token": "<p>"}
    assert tokenizer.add_special_tokens(
        given, replace_extra_special_tokens=replace
    ) == theirs.add_special_tokens(dict(given), replace_extra_special_tokens=replace)
    assert_same_tokens(tokenizer, theirs)
    for one in (tokenizer, theirs):
        one.extra_special_tokens = ["<|im_end|>"]
    assert_same_tokens(tokenizer, theirs)


def test_wrong_special_tokens_are_refused(tokenizer: Qwen2Tokenizer) -> None:
    lists = {"extra_special_tokens": ["<a>"], "additional_special_tokens": ["<b>"]}
    with pytest.raises(InputError, match="are names of one list"):
        tokenizer.add_special_tokens(lists)
    for wrong in ({"extra_special_tokens": "<a>"}, {"extra_special_tokens": [3]}, {"x": "<a>"}):
        with pytest.raises(QuintetError):
            tokenizer.add_special_tokens(wrong)  # type: ignore[arg-type]
    with pytest.raises(TokenizerError, match="'<new>' is not in the vocabulary"):
        tokenizer.extra_special_tokens = ["<new>"]


# -- where templates are written --------------------------------------------------------------


@pytest.mark.parametrize(
    "template", ["{{ 1 }}", {"default": "{{ 1 }}", "tool_use": "{{ 2 }}"}, None]
)
def test_templates_are_written_into_the_settings_where_asked(
    tokenizer: Qwen2Tokenizer, tmp_path: Path, template: Any
) -> None:
    tokenizer.chat_template = template
    paths = tokenizer.save_pretrained(tmp_path, save_jinja_files=False)
    assert not list(tmp_path.rglob("*.jinja"))
    assert {Path(path).name for path in paths} == {path.name for path in tmp_path.iterdir()}
    theirs = to_transformers(tokenizer)
    theirs.save_pretrained(str(tmp_path / "theirs"), save_jinja_files=False)
    said, expected = (
        json.loads((root / "tokenizer_config.json").read_text()).get("chat_template")
        for root in (tmp_path, tmp_path / "theirs")
    )
    assert said == expected
    assert load(tmp_path).chat_template == theirs_of(tmp_path).chat_template == template


def test_a_template_file_that_would_win_is_not_left_beside(
    tokenizer: Qwen2Tokenizer, tmp_path: Path
) -> None:
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(SaveError, match=r"chat_template\.jinja would be read in place"):
        tokenizer.save_pretrained(tmp_path, save_jinja_files=False)


def test_a_directory_is_not_downloaded_again(directory: Path) -> None:
    assert load(directory, force_download=True).encode("the") == load(directory).encode("the")
    with pytest.raises(InputError, match="force_download=True and local_files_only=True"):
        load("owner/name", force_download=True, local_files_only=True)
