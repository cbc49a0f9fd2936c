"""The names by which tools read a config."""

from pathlib import Path

from conformance.families import Family, each


@each
def test_what_tools_ask_of_a_config(family: Family, tmp_path: Path) -> None:
    config = family.config(attn_implementation="eager")
    assert config.get_text_config() is config.get_text_config(decoder=True) is config
    assert config.is_encoder_decoder is False
    assert config._attn_implementation == "eager"
    config._attn_implementation = "sdpa"
    assert config.attn_implementation == "sdpa"
    config.save_pretrained(tmp_path)
    read = type(config).from_pretrained(tmp_path, is_encoder_decoder=False)
    assert read.get_text_config().vocab_size == config.vocab_size
    assert read._name_or_path == read.name_or_path == str(tmp_path)
    assert "_name_or_path" not in read.to_dict()
