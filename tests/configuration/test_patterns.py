"""Regular expressions of files: what people write is taken, what could run for ever is not."""

import pytest

from quintet.configuration.patterns import is_plain


@pytest.mark.parametrize(
    "text",
    [
        r".*\.(?:18|19)\..*(?:gate|up).*",
        r"model\.layers\.\d+\.mlp\.experts\.[0-9]+\.(gate|up|down)_proj",
        r".*layers\.[0-9]+\.mlp\.experts\.\d{1,3}\..*_proj.*",
        r"^(?!.*\.mlp\.gate$).*self_attn.*",
        r"model\.layers\.(?:[0-9]|[1-9][0-9])\.mlp.*",
        "|".join(f"layers.{n}.*" for n in range(60)),
        # As Unsloth writes the targets of an adapter.
        r"(?:.*?(?:vision|image|visual|patch|language|text).*?(?:self_attn|attention|attn|mlp|"
        r"feed_forward|ffn|dense).*?(?:k_proj|v_proj|q_proj|o_proj|gate_proj|up_proj|down_proj)"
        r".*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp)\.(?:(?:q_proj)))",
    ],
)
def test_what_people_write_is_taken(text: str) -> None:
    assert is_plain(text)


@pytest.mark.parametrize(
    "text",
    [
        "(a+)+b",
        "(?:.|.)" * 40 + "!",
        ".?" * 40 + "!",
        "(?:.?.?.?.?)" * 10 + "!",
        ".*" * 5,
        "(.*.*.*.*.*|a)",
        r"\d*" * 11,
        "(",
        "(" * 2000 + ")" * 2000,
        "a" * 10_001,
    ],
)
def test_what_could_run_for_ever_is_not(text: str) -> None:
    assert not is_plain(text)
