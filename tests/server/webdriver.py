"""A browser without a window, driven by the WebDriver protocol: JSON over HTTP."""

import base64
import http.client
import json
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

from waiting import PATIENCE

__all__ = ["Browser", "missing"]

ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
ARGUMENTS = ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "lang=en")
# Keys that are no characters.
KEYS = {
    "Enter": "\ue007",
    "Escape": "\ue00c",
    "Tab": "\ue004",
    "Shift": "\ue008",
    "Control": "\ue009",
    "ArrowUp": "\ue013",
    "Backspace": "\ue003",
}


def missing() -> str | None:
    """Say what there is not, or return None where there is a browser and its driver."""
    absent = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    return f"no {' and no '.join(absent)} on this machine" if absent else None


class Browser:
    """A session of a headless Chromium, with a driver of its own."""

    def __init__(self, width: int = 1280, height: int = 800) -> None:
        self._driver = subprocess.Popen(
            ["chromedriver", "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        assert self._driver.stdout is not None
        for line in self._driver.stdout:
            if found := re.search(rb"started successfully on port (\d+)", line):
                self._port = int(found[1])
                break
        else:
            raise OSError("chromedriver did not start")
        options = {
            "args": [f"--{each}" for each in (*ARGUMENTS, f"window-size={width},{height}")],
            "binary": shutil.which("chromium"),
        }
        capabilities = {
            "browserName": "chrome",
            "goog:chromeOptions": options,
            "goog:loggingPrefs": {"browser": "ALL"},
            "unhandledPromptBehavior": "ignore",
        }
        self._session = ""
        asked = {"capabilities": {"alwaysMatch": capabilities}}
        self._session = f"/session/{self._ask('POST', '/session', asked)['sessionId']}"

    def close(self) -> None:
        """End the browser and its driver."""
        try:
            if self._session:
                self._ask("DELETE", "")
        finally:
            self._driver.terminate()
            self._driver.wait()
            assert self._driver.stdout is not None
            self._driver.stdout.close()

    def open(self, address: str) -> None:
        """Load a page."""
        self._ask("POST", "/url", {"url": address})

    def reload(self) -> None:
        """Load the page again."""
        self._ask("POST", "/refresh", {})

    def run(self, script: str, *arguments: Any) -> Any:
        """Run statements in the page, and return what they do."""
        return self._ask("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def type(self, text: str, *keys: str) -> None:
        """Type a text into what has the focus, then press keys by name; "Shift+Enter" is both."""
        presses: list[tuple[str, str]] = []
        for letter in text:
            presses += [("keyDown", letter), ("keyUp", letter)]
        for chord in keys:
            values = [KEYS.get(key, key) for key in chord.split("+")]
            presses += [("keyDown", value) for value in values]
            presses += [("keyUp", value) for value in reversed(values)]
        actions = [{"type": kind, "value": value} for kind, value in presses]
        self._ask("POST", "/actions", {"actions": [{"type": "key", "id": "k", "actions": actions}]})

    def click(self, css: str) -> None:
        """Click the first element of a selector, where it is visible and nothing lies over it."""
        found = self._ask("POST", "/element", {"using": "css selector", "value": css})
        self._ask("POST", f"/element/{found[ELEMENT]}/click", {})

    def until(self, script: str, *arguments: Any, seconds: float = PATIENCE) -> Any:
        """Wait until an expression of the page is true, and return it."""
        deadline = time.monotonic() + seconds
        while not (value := self.run(f"return ({script})", *arguments)):
            assert time.monotonic() < deadline, f"never true: {script}\n{self.text()[-2000:]}"
            time.sleep(0.02)
        return value

    def text(self) -> str:
        """Return what a reader of the page sees."""
        return str(self.run("return document.body.innerText"))

    def size(self, width: int, height: int) -> None:
        """Have the page so many pixels wide and high, as on a phone if need be."""
        values = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.command("Emulation.setDeviceMetricsOverride", values)

    def command(self, name: str, values: dict[str, Any]) -> Any:
        """Send a command of Chromium's own protocol."""
        return self._ask("POST", "/goog/cdp/execute", {"cmd": name, "params": values})

    def log(self) -> list[str]:
        """Return what the browser complained of since the last time."""
        return [line["message"] for line in self._ask("POST", "/se/log", {"type": "browser"})]

    def picture(self, path: Path) -> None:
        """Write what the page looks like as a PNG."""
        path.write_bytes(base64.b64decode(self._ask("GET", "/screenshot")))

    def _ask(self, method: str, path: str, body: Any = None) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=PATIENCE)
        try:
            data = None if body is None else json.dumps(body)
            connection.request(method, self._session + path, data)
            value = json.loads(connection.getresponse().read())["value"]
        finally:
            connection.close()
        if isinstance(value, dict) and "error" in value:
            raise AssertionError(f"{value['error']}: {value['message'].splitlines()[0]}")
        return value
