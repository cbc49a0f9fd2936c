"""The page in a browser, answered by a server that says what a test wants."""

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from quintet.cli.conversation import Conversation
from quintet.errors import OfflineError
from quintet.server.page import join
from quintet.server.registry import Offer
from quintet.serving import Limits
from quintet.sources.smollm2 import fetch_smollm2
from served import Running, loaded, serving
from server.scripted import Scripted, running
from server.webdriver import Browser, missing
from waiting import until

POLICY = (
    "default-src 'none'; script-src 'sha256-{script}'; style-src 'sha256-{style}'; "
    "connect-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; require-trusted-types-for 'script'"
)
ANSWERS = "[...document.querySelectorAll('.assistant .text')].map((each) => each.innerText)"
IDLE = "!document.querySelector('[aria-busy=true]') && document.querySelectorAll('.status').length"
KEPT = "Object.values(localStorage).map(JSON.parse).filter((each) => each.messages)"


# -- what is sent ----------------------------------------------------------------------------------


def hashed(body: bytes, tag: str) -> str:
    [text] = re.findall(f"<{tag}>(.*?)</{tag}>".encode(), body, re.DOTALL)
    return base64.b64encode(hashlib.sha256(text).digest()).decode()


def test_it_is_one_answer_that_holds_all_and_allows_nothing_else() -> None:
    page = join()
    assert len(page.body) <= 60_000
    policy = POLICY.format(script=hashed(page.body, "script"), style=hashed(page.body, "style"))
    assert page.headers["Content-Security-Policy"] == policy
    assert page.headers["X-Content-Type-Options"] == "nosniff"
    assert page.headers["Referrer-Policy"] == "no-referrer"
    assert b"{{" not in page.body
    # No address but the names of vocabularies, and nothing that makes HTML of a text.
    addresses = set(re.findall(rb"https?://[\w./-]+", page.body))
    assert addresses == {b"http://www.w3.org/2000/svg"}
    for sink in (b"innerHTML", b"outerHTML", b"insertAdjacent", b"document.write", b"eval("):
        assert sink not in page.body


def test_who_comes_to_the_page_needs_no_key_and_what_it_asks_does() -> None:
    with serving(keys=("secret",)) as server:
        page = server.ask("GET", "/")
        assert (page.status, page.body) == (200, join().body)
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        assert server.ask("HEAD", "/").status == 200
        assert server.ask("GET", "/page/config").status == 401
        told = server.ask("GET", "/page/config", headers={"Authorization": "Bearer secret"})
        [model] = told.json()["models"]
        assert (model["id"], model["context"], model["chat"]) == ("demo", 256, False)
        assert model["defaults"]["max_tokens"] == 256


def test_there_is_no_page_where_it_is_not_wanted() -> None:
    with serving(page=False) as server:
        assert server.ask("GET", "/").status == 404
        assert server.ask("GET", "/page/config").status == 404


# -- in a browser ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    if (reason := missing()) is not None:
        pytest.skip(reason)
    browser = Browser()
    try:
        yield browser
    finally:
        browser.close()


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[Scripted, str]]:
    script = Scripted()
    with running(script.app()) as address:
        yield script, address


@pytest.fixture
def script(served: tuple[Scripted, str]) -> Scripted:
    """Forget what a test before had the server say."""
    served[0].forget()
    return served[0]


@pytest.fixture
def page(chromium: Browser, script: Scripted, served: tuple[Scripted, str]) -> Iterator[Browser]:
    """The page as somebody sees it first; in the end, that nothing was against its policy."""
    chromium.size(1280, 800)
    chromium.open(f"{served[1]}/")
    chromium.log()
    yield chromium
    script.go.set()
    chromium.run("localStorage.clear(); sessionStorage.clear()")
    complaints = [line for line in chromium.log() if "Failed to load resource" not in line]
    assert not [line for line in complaints if "Password field" not in line]


def say(page: Browser, text: str) -> None:
    page.run("document.getElementById('box').focus()")
    page.type(text, "Enter")


def answered(page: Browser) -> list[str]:
    page.until(IDLE)
    texts: list[str] = page.run(f"return {ANSWERS}")
    return texts


def test_an_answer_is_shown_while_it_is_made(page: Browser, script: Scripted) -> None:
    script.answers = [["It ", "is ", None, "**late**."]]
    say(page, "What time is it?")
    page.until(f"{ANSWERS}[0] === 'It is '")
    page.until("document.querySelector('.status').innerText.startsWith('About 2 tokens')")
    assert page.run("return document.getElementById('go').getAttribute('aria-label')") == "Stop"
    assert page.run("return document.getElementById('announcer').textContent") == ""
    script.go.set()
    assert answered(page) == ["It is late."]
    assert page.run("return document.querySelector('.text strong').innerText") == "late"
    assert page.run("return document.title") == "What time is it? – Quintet"
    assert "4 tokens · " in page.text()
    assert "14 of 2,048 tokens" in page.text()
    page.until("document.getElementById('announcer').textContent === 'Answer: It is late.'")
    assert script.asked == [
        {
            "model": "script",
            "messages": [{"role": "user", "content": "What time is it?"}],
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ]


def test_esc_stops_an_answer_and_the_server(page: Browser, script: Scripted) -> None:
    script.answers = [["Once ", None, "more"]]
    say(page, "Tell me a story")
    page.until(f"{ANSWERS}[0] === 'Once '")
    page.type("", "Escape")
    assert answered(page) == ["Once "]
    assert "Stopped" in page.text()
    until(lambda: script.gone)
    script.answers = [["Twice"]]
    say(page, "Go on")
    assert answered(page) == ["Once ", "Twice"]
    assert [each["content"] for each in script.asked[-1]["messages"]] == [
        *("Tell me a story", "Once ", "Go on"),
    ]


def test_another_answer_stands_beside_the_first(page: Browser, script: Scripted) -> None:
    script.answers = [["One"], ["Two"], ["Three"]]
    say(page, "A number")
    answered(page)
    page.click(".assistant [aria-label='Answer again']")
    page.until(f"{ANSWERS}[0] === 'Two'")
    answered(page)
    assert script.asked[0] == script.asked[1]
    assert "2 of 2" in page.text()
    page.click(".assistant [aria-label='The version before']")
    assert answered(page) == ["One"]
    # The focus stays at the control.
    assert page.run("return document.activeElement.ariaLabel") == "The next version"
    say(page, "And then?")
    assert answered(page) == ["One", "Three"]
    assert [each["content"] for each in script.asked[-1]["messages"]] == [
        *("A number", "One", "And then?"),
    ]


def test_an_edited_message_begins_a_branch(page: Browser, script: Scripted) -> None:
    script.answers = [["Blue"], ["Green"]]
    say(page, "The sky?")
    answered(page)
    # In an empty box, the arrow edits the last message.
    page.type("", "ArrowUp")
    page.run("document.activeElement.select()")
    page.type("The grass?", "Enter")
    page.until(f"{ANSWERS}[0] === 'Green'")
    answered(page)
    assert script.asked[-1]["messages"] == [{"role": "user", "content": "The grass?"}]
    page.click(".user [aria-label='The version before']")
    assert answered(page) == ["Blue"]
    assert "The sky?" in page.text()


def test_conversations_are_kept_renamed_and_deleted(page: Browser, script: Scripted) -> None:
    script.answers = [["One"], ["Two"]]
    say(page, "First")
    answered(page)
    page.type("", "Control+Shift+o")
    say(page, "Second")
    answered(page)
    page.reload()
    page.until(f"{ANSWERS}[0] === 'Two'")
    listed = "[...document.querySelectorAll('#conversations button')].map((each) => each.innerText)"
    assert page.run(f"return {listed}") == ["Second", "First"]
    page.click("#menu summary")
    page.click("#rename")
    page.run("document.activeElement.select()")
    page.type("Better", "Enter")
    page.until(f"{listed}[0] === 'Better'")
    page.click("#menu summary")
    page.click("#delete")
    assert "Delete the conversation?" in page.text()
    page.click("#asked-yes")
    page.until(f"{ANSWERS}[0] === 'One'")
    page.reload()
    page.until(f"{ANSWERS}[0] === 'One'")
    assert page.run(f"return {listed}") == ["First"]
    assert len(page.run(f"return {KEPT}")) == 1


def test_answers_of_two_conversations_are_made_at_once(page: Browser, script: Scripted) -> None:
    script.answers = [["Slow", None, "ly"], ["Fast"]]
    say(page, "First")
    page.until(f"{ANSWERS}[0] === 'Slow'")
    page.type("", "Control+Shift+o")
    say(page, "Second")
    assert answered(page) == ["Fast"]
    assert page.run("return document.querySelectorAll('#conversations .dot').length") == 1
    script.go.set()
    page.until("!document.querySelector('#conversations .dot')")
    page.click("#conversations li:last-child button")
    assert answered(page) == ["Slowly"]


def test_what_there_is_of_an_answer_outlives_the_page(page: Browser, script: Scripted) -> None:
    script.answers = [["Half", None, " more"], ["Whole"]]
    say(page, "Well?")
    page.until(f"{ANSWERS}[0] === 'Half'")
    page.reload()
    page.until(f"{ANSWERS}[0] === 'Half'")
    # Whether the page saw its connection break depends on how fast it was gone.
    again = ".failure:not([hidden]) button, .assistant [aria-label='Answer again']"
    page.run("document.querySelector(arguments[0]).click()", again)
    page.until(f"{ANSWERS}[0] === 'Whole'")
    answered(page)
    assert script.asked[0] == script.asked[1]


def test_a_conversation_is_exported_and_opened(
    page: Browser, script: Scripted, tmp_path: Path
) -> None:
    script.answers = [[{"reasoning_content": "Hm."}, "*One*"], ["Two"]]
    page.type("", "Control+,")
    page.click("#system")
    page.type("Be brief.", "Escape")
    say(page, "A number")
    answered(page)
    page.run(
        "window.saved = []; const made = URL.createObjectURL;"
        "URL.createObjectURL = (blob) => { saved.push(blob); return made(blob); }"
    )
    for kind in ("markdown", "json"):
        page.click("#menu summary")
        page.click(f"#save-{kind}")
    text, saved = page.run("return Promise.all(saved.map((blob) => blob.text()))")
    assert text == (
        "# A number\n\n**System**\n\nBe brief.\n\n**You**\n\nA number\n\n**Answer**\n\n*One*\n"
    )
    # The terminal's chats go on with it.
    path = tmp_path / "talk.json"
    path.write_text(saved, encoding="utf-8")
    assert Conversation.load(path).messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "A number"},
        {"role": "assistant", "content": "*One*", "reasoning_content": "Hm."},
    ]
    open_file = (
        "const files = new DataTransfer(); files.items.add(new File([arguments[0]], 'talk.json'));"
        "const input = document.getElementById('file'); input.files = files.files;"
        "input.dispatchEvent(new Event('change'))"
    )
    page.run(open_file, saved)
    page.until(f"{KEPT}.length === 2")
    assert answered(page) == ["One"]
    say(page, "Another")
    assert answered(page) == ["One", "Two"]
    said = [(each["role"], each["content"]) for each in script.asked[-1]["messages"]]
    assert said == [
        *(("system", "Be brief."), ("user", "A number"), ("assistant", "*One*")),
        ("user", "Another"),
    ]
    for wrong in (
        "{",
        "{}",
        '{"messages": [{"role": "robot", "content": "x"}]}',
        '{"messages": []}',
    ):
        page.run(open_file, wrong)
        page.until("document.getElementById('notice').innerText.includes('holds no conversation')")
        page.click("#notice button")
    assert len(page.run(f"return {KEPT}")) == 2


def test_texts_and_code_are_copied(page: Browser, script: Scripted) -> None:
    script.answers = [["See\n\n```py\nx = 1\n```"]]
    say(page, "Code")
    answered(page)
    granted = {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]}
    page.command("Browser.grantPermissions", granted)
    for button, text in (("Copy the code", "x = 1"), ("Copy", script.answers[0][0])):
        page.click(f".assistant [aria-label='{button}']")
        page.until("navigator.clipboard.readText().then((text) => text === arguments[0])", text)
    # Browsers give no clipboard to pages that come over a network without TLS.
    page.run("navigator.clipboard.writeText = () => Promise.reject(new Error('no'))")
    page.click(".user [aria-label='Copy']")
    page.until("navigator.clipboard.readText().then((text) => text === 'Code')")


def test_one_of_several_models_answers(page: Browser, script: Scripted) -> None:
    script.models = [{**script.models[0], "id": name} for name in ("small", "large")]
    script.models[1] |= {"context": 100, "thinking": True}
    page.reload()
    page.until("document.querySelectorAll('#model option').length === 2")
    page.run("document.getElementById('model').focus()")
    page.type("large", "Enter")
    page.until("document.getElementById('facts').innerText.startsWith('large reads up to 100')")
    page.type("", "Control+,")
    page.run(
        "const e = document.getElementById('thinking'); e.value = 'off';"
        "e.dispatchEvent(new Event('change'))"
    )
    page.type("", "Escape")
    say(page, "Hi")
    answered(page)
    assert (script.asked[0]["model"], script.asked[0]["reasoning_effort"]) == ("large", "none")
    assert "tokens/s · large" in page.text() or "token · large" in page.text()
    assert "11 of 100 tokens" in page.text()
    page.type("", "Control+Shift+o")
    assert page.run("return document.getElementById('model').value") == "large"


def test_settings_are_sent_and_defaults_are_shown(page: Browser, script: Scripted) -> None:
    page.type("", "Control+,")
    shown = page.run(
        "return Object.fromEntries([...document.querySelectorAll('#fields input')]"
        ".map((each) => [each.id, each.placeholder]))"
    )
    assert shown["set-temperature"] == "default 0.7"
    assert shown["set-top_k"] == "default 20"
    assert shown["set-min_p"] == "not set"
    page.click("#system")
    page.type("Be brief.")
    page.click("#set-temperature")
    page.type("0.25")
    page.click("#set-top_p")
    page.type("7")
    script.warnings = "min_p has no effect here"
    assert page.run("return document.getElementById('about-top_p').textContent")
    page.type("", "Escape")
    say(page, "Hi")
    answered(page)
    assert "min_p has no effect here" in page.text()
    [asked] = script.asked
    assert asked["temperature"] == 0.25
    assert "top_p" not in asked
    assert asked["messages"][0] == {"role": "system", "content": "Be brief."}
    # A new conversation draws as the last one did, and has no system message.
    page.type("", "Control+Shift+o")
    say(page, "Hi")
    answered(page)
    assert script.asked[-1]["temperature"] == 0.25
    assert len(script.asked[-1]["messages"]) == 1


def test_thoughts_are_folded_and_not_read_again(page: Browser, script: Scripted) -> None:
    thoughts = [{"reasoning_content": "Let me "}, None, {"reasoning_content": "see."}, "42"]
    script.answers = [thoughts, ["Yes"]]
    say(page, "Well?")
    page.until("document.querySelector('.reasoning summary')?.innerText === 'Thinking'")
    assert "Let me" not in page.text()
    script.go.set()
    assert answered(page) == ["42"]
    page.click(".reasoning summary")
    assert "Let me see." in page.text()
    page.until(
        r"/Thought for \d+\.\d s/.test(document.querySelector('.reasoning summary').innerText)"
    )
    say(page, "Sure?")
    answered(page)
    assert script.asked[-1]["messages"][1] == {"role": "assistant", "content": "42"}


def test_an_answer_that_was_cut_is_gone_on_with(page: Browser, script: Scripted) -> None:
    script.answers, script.ending = [["One, "], ["two."]], "length"
    say(page, "Count")
    answered(page)
    assert "Cut at its greatest length" in page.text()
    script.ending = "stop"
    page.run(
        "[...document.querySelectorAll('button')].find((b) => b.innerText === 'Go on').click()"
    )
    page.until(f"{ANSWERS}[0] === 'One, two.'")
    answered(page)
    assert script.asked[-1]["continue_final_message"] is True
    assert script.asked[-1]["messages"][-1] == {"role": "assistant", "content": "One, "}


HOSTILE = [
    "<script>window.hacked = 1</script><img src=x onerror='window.hacked=1'>",
    "<iframe srcdoc='<script>parent.hacked=1</script>'></iframe><svg onload=hacked=1>",
    "[run](javascript:window.hacked=1) [data](data:text/html,<script>1</script>) [f](file:///etc)",
    "[up](JaVaScRiPt:hacked=1) [x](vbscript:x) [tab](java\tscript:hacked=1) [rel](/v1/models)",
    "![pixel](http://127.0.0.1:9/track.png?secret) ![x](https://example.com/x.png 'title')",
    "[![nested](https://example.com/i.png)](https://example.com/there)",
    "[a](https://example.com/\"onmouseover='hacked=1')",
    "```html\n<script>window.hacked = 1</script>\n```",
    '```"><img src=x onerror=hacked=1>\ntext\n```',
    "| <b>a</b> | b |\n|---|---|\n| <img src=x> | [x](javascript:1) |",
    "# <style>body{display:none}</style>\n> <form action=https://example.com><button>x</button>",
    "https://example.com/<script>hacked=1</script> http://user:pass@example.com/ https://",
    "long: " + "x" * 5000 + "\n\n" + "`" + "y" * 5000 + "`\n\n```\n" + "z" * 5000 + "\n```",
    "\u202edlrow\u202c \u0000 \ufeff \u2028 " + "e\u0301\u0301" * 200,
]


def test_what_a_model_writes_does_nothing(page: Browser, script: Scripted) -> None:
    script.answers = [[{"reasoning_content": HOSTILE[0]}, "\n\n".join(HOSTILE)]]
    page.size(360, 740)
    say(page, HOSTILE[0])
    answered(page)
    assert page.run("return typeof window.hacked") == "undefined"
    for tag in ("script", "img", "iframe", "style", "form", "object", "b"):
        assert page.run(f"return document.querySelectorAll('article {tag}').length") == 0, tag
    # Only the page's own drawings are drawings.
    strange = "[...document.querySelectorAll('article svg')].filter((s) => !s.closest('button'))"
    assert page.run(f"return {strange}.length") == 0
    links = page.run(
        "return [...document.querySelectorAll('article a')].map((a) => [a.href, a.rel, a.target])"
    )
    assert len(links) >= 5
    for address, rel, target in links:
        assert address.startswith(("http://", "https://"))
        assert "noopener" in rel
        assert "noreferrer" in rel
        assert target == "_blank"
    marks = "[...document.querySelectorAll('article *')].flatMap((e) => e.getAttributeNames())"
    assert not [name for name in page.run(f"return {marks}") if name.startswith("on")]
    asked = "performance.getEntriesByType('resource').map((each) => new URL(each.name).origin)"
    assert set(page.run(f"return {asked}")) == {page.run("return location.origin")}
    assert fits(page)
    # After a reload it is made from what was kept.
    page.reload()
    page.until(f"{ANSWERS}.length")
    assert page.run("return typeof window.hacked") == "undefined"


ENDLESS = [
    "[" * 30_000,
    "*a " * 10_000,
    "**a" * 10_000 + "_" * 10_000,
    "`" * 15_001 + "a" + "`" * 15_000,
    "> " * 15_000 + "a",
    "- " * 15_000 + "a",
    "[a](" * 8_000,
    "![](" * 15_000 + "~~" * 10_000,
    "|a" * 10_000 + "\n" + "|-" * 400,
    "\n".join(["1. a", "", "   b"] * 2_000),
    "http://a" * 5_000,
]


def test_no_text_takes_long(page: Browser, script: Scripted) -> None:
    script.answers = [[text] for text in ENDLESS]
    # Of the processor, not of the clock: others may be at work.
    page.command("Performance.enable", {"timeDomain": "threadTicks"})
    for text in ENDLESS:
        page.type("", "Control+Shift+o")
        before = worked(page)
        say(page, "Go")
        page.until("document.querySelectorAll('.status').length")
        page.until(IDLE)
        assert worked(page) - before < 2, text[:8]


def worked(page: Browser) -> float:
    """Return for how many seconds the page was at work."""
    metrics = page.command("Performance.getMetrics", {})["metrics"]
    [seconds] = [each["value"] for each in metrics if each["name"] == "TaskDuration"]
    return float(seconds)


def fits(page: Browser) -> bool:
    wide: int = page.run("return document.documentElement.scrollWidth - innerWidth")
    inner: int = page.run(
        "const s = document.getElementById('scroll'); return s.scrollWidth - s.clientWidth"
    )
    return wide <= 0 and inner <= 0


def test_a_narrow_window_shows_all_of_it(page: Browser, script: Scripted) -> None:
    text = ["# " + "Wide" * 40, "```python\n" + "x = 1; " * 40 + "\n```"]
    text += ["| a | b |\n|---|---|\n| " + "cell " * 9 + " | " + "c" * 60 + " |"]
    script.answers = [["\n\n".join([*text, "- [ ] " + "item" * 30])]]
    page.size(360, 740)
    page.click("#box")
    say(page, "w" * 120)
    answered(page)
    assert fits(page)
    page.click("#toggle")
    assert page.run("return document.querySelector('main').inert") is True
    assert fits(page)
    page.type("", "Escape")
    page.click("#tune")
    assert fits(page)
    overflow = (
        "[...document.querySelectorAll('dialog[open] *')]"
        ".filter((each) => each.getBoundingClientRect().right > innerWidth)"
    )
    assert page.run(f"return {overflow}.length") == 0


def test_everything_is_reached_and_named_by_keys(page: Browser, script: Scripted) -> None:
    script.answers = [["Hello\n\n```\ncode\n```"]]
    page.type("one", "Shift+Enter")
    page.type("two", "Enter")
    answered(page)
    assert script.asked[0]["messages"][0]["content"] == "one\ntwo"
    page.run("document.activeElement.blur(); getSelection().collapse(document.body, 0)")
    reached = []
    for _ in range(24):
        page.type("", "Tab")
        reached.append(
            page.run("const e = document.activeElement; return e.ariaLabel || e.innerText || e.id")
        )
    order = ["To the message box", "New conversation", "Conversations", "Settings", "Edit"]
    order += ["Copy the code", "Code", "Answer again", "Message", "model"]
    places = [next(i for i, each in enumerate(reached) if each == name) for name in order[:-1]]
    assert places == sorted(places), reached
    tree = page.command("Accessibility.getFullAXTree", {})["nodes"]
    roles = {"button", "textbox", "combobox", "link", "spinbutton", "DisclosureTriangle"}
    for node in tree:
        if not node["ignored"] and node["role"]["value"] in roles:
            assert node["name"]["value"], node
    page.type("", "Control+b")
    assert page.run("return document.getElementById('drawer').inert") is True
    page.type("", "Control+b")
    page.type("", "Control+/")
    assert "stop the answer, or close what is open" in page.text()
    page.type("", "Escape")


def ratio(one: str, other: str) -> float:
    def light(color: str) -> float:
        parts = [int(part) / 255 for part in re.findall(r"\d+", color)[:3]]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((light(one), light(other)))
    return (high + 0.05) / (low + 0.05)


def test_text_stands_out_in_both_themes(page: Browser) -> None:
    pairs = [
        *((ink, paper) for ink in ("ink", "soft") for paper in ("paper", "side", "raised", "tint")),
        *(("accent", "paper"), ("on-accent", "accent"), ("danger", "paper"), ("danger", "raised")),
    ]
    probe = (
        "const e = document.body.appendChild(document.createElement('i'));"
        "e.style.color = `var(--${arguments[0]})`; const c = getComputedStyle(e).color;"
        "e.remove(); return c"
    )
    themes = []
    for _ in range(2):
        page.click("#theme")
        themes.append(page.run("return document.documentElement.dataset.theme"))
        for one, other in pairs:
            colors = page.run(probe, one), page.run(probe, other)
            assert ratio(*colors) >= 4.5, (themes[-1], one, other, colors)
    assert themes == ["light", "dark"]
    page.reload()
    assert page.run("return document.documentElement.dataset.theme") == "dark"


def test_the_key_is_asked_for_and_forgotten_with_the_tab(page: Browser, script: Scripted) -> None:
    script.key = "sesame"
    page.reload()
    page.until("document.getElementById('asked').open")
    page.type("wrong", "Enter")
    page.until(
        "document.getElementById('asked').open && !document.getElementById('asked-value').value"
    )
    page.type("sesame", "Enter")
    page.until("!document.getElementById('asked').open")
    page.until("document.getElementById('model').value === 'script'")
    say(page, "Hi")
    assert answered(page) == ["Hello"]
    assert script.keys == ["Bearer sesame"]
    assert "sesame" not in json.dumps(page.run("return {...localStorage}"))
    assert "sesame" in json.dumps(page.run("return {...sessionStorage}"))


@pytest.mark.parametrize(
    ("answer", "shown"),
    [
        (
            (503, {"error": {"message": "too many wait"}}, {"Retry-After": "5"}),
            "too many wait. Try again in 5 seconds.",
        ),
        (
            (400, {"error": {"message": "the prompt has 999 tokens"}}, {}),
            "the prompt has 999 tokens",
        ),
        ((500, {}, {}), "The server answered with status 500."),
        (["Half", {"error": {"message": "it broke"}}], "it broke"),
    ],
)
def test_errors_of_the_server_are_told(
    page: Browser, script: Scripted, answer: object, shown: str
) -> None:
    script.answers = [answer, ["Better"]]
    say(page, "Hi")
    page.until("document.querySelector('.failure:not([hidden])')")
    assert page.run("return document.querySelector('.failure p').innerText") == shown
    assert page.run("return document.querySelector('.failure').getAttribute('role')") == "alert"
    if "999" not in shown:
        page.run("document.querySelector('.failure button').click()")
        page.until(f"{ANSWERS}.includes('Better')")
        answered(page)
        assert script.asked[-1]["messages"] == [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def talking(chat_model: Path) -> Iterator[Running]:
    """A server with a model that talks: SmolLM2 where it is, else a tiny one."""
    try:
        source = fetch_smollm2(local_files_only=True)
    except OfflineError:
        source = chat_model
    model = loaded(Limits(rows=2, capacity=256), source)
    with serving(Offer("talks", lambda: model, loaded=model)) as server:
        yield server


def test_it_talks_with_a_real_model(chromium: Browser, talking: Running) -> None:
    chromium.open(f"{talking.url}/")
    chromium.run("localStorage.clear(); sessionStorage.clear()")
    chromium.size(1280, 800)
    chromium.reload()
    chromium.until("document.getElementById('model').value === 'talks'")
    assert "talks reads up to 256 tokens" in chromium.text()
    chromium.type("", "Control+,")
    for name, value in (("max_tokens", "5"), ("temperature", "0")):
        chromium.click(f"#set-{name}")
        chromium.type(value)
    chromium.type("", "Escape")
    say(chromium, "What is the capital of France?")
    answered(chromium)
    question = {"role": "user", "content": "What is the capital of France?"}
    body = {"model": "talks", "messages": [question], "max_tokens": 5, "temperature": 0}
    whole = talking.ask("POST", "/v1/chat/completions", body).json()
    told, used = whole["choices"][0], whole["usage"]
    shown = f"Object.values({KEPT}[0].messages).filter((each) => each.role === 'assistant')"
    [kept] = chromium.run(f"return {shown}")
    assert kept["content"] == told["message"]["content"]
    assert kept["figures"]["tokens"] == used["completion_tokens"]
    assert f"{used['total_tokens']} of 256 tokens" in chromium.text()
    assert told["finish_reason"] == "length"
    chromium.run(
        "[...document.querySelectorAll('button')].find((b) => b.innerText === 'Go on').click()"
    )
    chromium.until(f"{shown}[0].content.length > arguments[0]", len(kept["content"]))
    answered(chromium)
    # An answer without an end is stopped, and its row is free.
    chromium.type("", "Control+,")
    chromium.click("#set-max_tokens")
    chromium.type("", "Control+a")
    chromium.type("200")
    chromium.type("", "Escape")
    chromium.type("", "Control+Shift+o")
    say(chromium, "Write a long story about a fox.")
    chromium.until("document.querySelector('.text').innerText.length > 20")
    chromium.type("", "Escape")
    answered(chromium)
    chromium.until(
        "document.querySelector('.message:last-child .status').innerText.includes('Stopped')"
    )
    model = talking.service.registry.engines["talks"]
    until(lambda: not model.state.running)
    assert not [line for line in chromium.log() if "Policy" in line or "Trusted" in line]
