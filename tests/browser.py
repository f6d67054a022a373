"""A headless Chromium for tests, driven by its DevTools protocol over a pair of pipes: no package is needed for it."""

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

LOCAL = ("file:", "data:", "blob:")
NAMES = ("chromium", "chromium-browser", "google-chrome")
OPTIONS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
    "--disable-extensions", "--disable-background-networking", "--remote-debugging-pipe",
)  # fmt: skip
# Chromium reads commands from 3 and writes answers to 4.
START = "import os, sys; a, b, *c = sys.argv[1:]; os.dup2(int(a), 3); os.dup2(int(b), 4); os.execv(c[0], c)"
KEYS = {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Escape": 27, "Enter": 13}


def chromium() -> str | None:
    """The program, None if there is none on this machine."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One tab. `problems` collects console errors, uncaught exceptions and requests for anything but files."""

    def __init__(self, program: str, profile: Path, timeout: float = 60.0):
        self.timeout, self.problems, self._sent, self._rest = timeout, [], 0, b""
        read, theirs_out = os.pipe()
        theirs_in, write = os.pipe()
        self._read, self._write = read, write
        theirs = [fcntl.fcntl(number, fcntl.F_DUPFD, 10) for number in (theirs_in, theirs_out)]
        command = [program, *OPTIONS, f"--user-data-dir={profile}"]
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", START, *map(str, theirs), *command],
            pass_fds=theirs, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        for number in (theirs_in, theirs_out, *theirs):
            os.close(number)
        self._session: dict[str, str] = {}
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = {"sessionId": attached["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_) -> None:
        os.close(self._write)
        self.process.terminate()
        self.process.wait(self.timeout)
        os.close(self._read)

    def call(self, method: str, **parameters: Any) -> dict:
        """Send a command and wait for its result."""
        self._sent += 1
        message = {"id": self._sent, "method": method, "params": parameters, **self._session}
        os.write(self._write, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + self.timeout
        while True:
            answer = self._message(deadline)
            if answer.get("id") == self._sent:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]
            self._note(answer)

    def _message(self, deadline: float) -> dict:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._read], [], [], max(0.0, deadline - time.monotonic()))
            data = os.read(self._read, 1 << 20) if ready else b""
            assert data, "the browser does not answer"
            self._rest += data
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def _note(self, event: dict) -> None:
        method, what = event.get("method"), event.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.problems.append(what["exceptionDetails"].get("exception", {}).get("description", str(what)))
        elif (method == "Log.entryAdded" and what["entry"]["level"] == "error") or (
            method == "Runtime.consoleAPICalled" and what["type"] in ("error", "assert")
        ):
            self.problems.append(str(what))
        elif method == "Network.requestWillBeSent" and not what["request"]["url"].startswith(LOCAL):
            self.problems.append(what["request"]["url"])

    def run(self, code: str) -> Any:
        """The value of a JavaScript expression, a promise's once it is there."""
        result = self.call("Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def until(self, code: str) -> Any:
        """Wait until an expression is true."""
        deadline = time.monotonic() + self.timeout
        while not (value := self.run(code)):
            assert time.monotonic() < deadline, f"{code}: still {value!r}"
            time.sleep(0.05)
        return value

    def open(self, path: Path, fragment: str = "") -> None:
        """Load a page and wait until its script is ready."""
        self.call("Page.navigate", url=path.resolve().as_uri() + fragment)
        self.until("document.readyState === 'complete' && document.body.dataset.ready === 'yes'")

    def click(self, selector: str) -> None:
        """Press the mouse in the middle of an element."""
        found = json.dumps(selector)
        box = self.run(
            f"(() => {{ const e = document.querySelector({found}); e.scrollIntoView({{block: 'center'}});"
            " const b = e.getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left", clickCount=1)

    def press(self, key: str) -> None:
        """Press a key."""
        text = {"text": key} if len(key) == 1 else {}
        code = KEYS.get(key, ord(key[0]))
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, windowsVirtualKeyCode=code, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key, windowsVirtualKeyCode=code)

    def look(self, path: Path, width: int, height: int, dark: bool = False) -> None:
        """A screenshot of a window of this size."""
        self.size(width, height, dark)
        picture = self.call("Page.captureScreenshot", format="png")["data"]
        path.write_bytes(base64.b64decode(picture))

    def size(self, width: int, height: int, dark: bool = False) -> None:
        """Set the window's size and the colour scheme."""
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=scheme)
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
