"""Strings that end a text: against a search in all of it."""

from hypothesis import given
from hypothesis import strategies as st

from quintet import AutoTokenizer, demo_model
from quintet.serving.transcript import StopStrings, Transcript

TOKENIZER = AutoTokenizer.from_pretrained(demo_model())
SHORT = st.text("ab", min_size=1, max_size=4)


@given(st.lists(st.text("abc", max_size=4), max_size=12), st.lists(SHORT, max_size=3))
def test_any_cut_of_a_text_ends_at_the_same_place(parts: list[str], strings: list[str]) -> None:
    whole, finder = "".join(parts), StopStrings(strings)
    told = ""
    for end, part in enumerate(parts, 1):
        told += finder.feed(part)
        given_so_far = "".join(parts[:end])
        # Nothing is told that a string to come could still take back.
        assert given_so_far.startswith(told)
        held = given_so_far[len(told) :]
        if finder.found is None:
            assert not held or any(one.startswith(held) and one != held for one in strings)
    found = any(one in given_so_far for one in strings) if parts else False
    assert (finder.found is not None) == found
    told += finder.flush()
    if not found:
        assert told == whole
    else:
        # The first that was complete with its part, and of those the one that begins first.
        end = next(
            n for n in range(1, len(parts) + 1) if any(one in "".join(parts[:n]) for one in strings)
        )
        seen = "".join(parts[:end])
        assert told == seen[: min(at for one in strings if (at := seen.find(one)) >= 0)]


@given(st.text(st.characters(codec="utf-8"), min_size=1, max_size=20), st.data())
def test_also_within_characters_of_several_tokens(text: str, data: st.DataObject) -> None:
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    decoded = TOKENIZER.decode(ids)
    if not decoded:
        return
    start = data.draw(st.integers(0, len(decoded) - 1))
    stop = decoded[start : start + data.draw(st.integers(1, 4))]
    transcript = Transcript(TOKENIZER, (stop,))
    taken = next((n for n, token in enumerate(ids, 1) if transcript.take(token, False)), len(ids))
    transcript.finish()
    texts = transcript.take_texts()
    assert len(texts) == taken
    assert "".join(texts) == decoded[: decoded.index(stop)]
    assert transcript.stop == stop


def test_special_tokens_are_shown_where_asked_for_and_ends_never() -> None:
    special = TOKENIZER.all_special_ids[0]
    ids = [*TOKENIZER("a b", add_special_tokens=False)["input_ids"], special]
    for keep, shown in ((True, TOKENIZER.decode(ids)), (False, "a b")):
        transcript = Transcript(TOKENIZER, keep_special=keep)
        assert not any(transcript.take(token, False) for token in ids)
        assert not transcript.take(special, True)
        transcript.finish()
        assert "".join(transcript.take_texts()) == shown


def test_a_text_does_not_end_before_it_may() -> None:
    ids = TOKENIZER("one two one two one two", add_special_tokens=False)["input_ids"]
    pieces = [TOKENIZER.decode([token]) for token in ids]
    for least in range(len(ids) + 2):
        transcript = Transcript(TOKENIZER, ("two",), least=least)
        ended = [transcript.take(token, False) for token in ids]
        transcript.finish()
        before = "".join(pieces[: max(least - 1, 0)])
        rest = "".join(pieces)[len(before) :]
        assert "".join(transcript.take_texts()) == before + rest.partition("two")[0]
        assert any(ended) == ("two" in rest)
        assert True not in ended[: max(least - 1, 0)]
