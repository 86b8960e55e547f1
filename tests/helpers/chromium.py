"""A headless Chromium that tests talk to over a pipe, in its own debugging protocol."""

import base64
import io
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from PIL import Image

_NAMES = ("chromium", "chromium-browser", "google-chrome")
_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--hide-scrollbars", "--remote-debugging-pipe",
)  # fmt: skip


def browser() -> str | None:
    """The path of a browser: `TWINFLOW_CHROMIUM`, or one in the path."""
    return os.environ.get("TWINFLOW_CHROMIUM") or next(filter(None, map(shutil.which, _NAMES)), None)


class Tab:
    """A page in a browser of its own; a context manager.

    Args:
        path: of the page.
        folder: for the browser's files, new.
    """

    def __init__(self, path: Path, folder: Path, width: int = 1280, height: int = 1600) -> None:
        ours_in, theirs_out = os.pipe()
        theirs_in, ours_out = os.pipe()
        command = [
            str(browser()),
            *_FLAGS,
            f"--user-data-dir={folder}",
            f"--window-size={width},{height}",
            "about:blank",
        ]
        self._process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}', "-", *command],
            pass_fds=(theirs_in, theirs_out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(theirs_in), os.close(theirs_out)
        self._in, self._out, self._left, self._number = ours_in, ours_out, b"", 0
        self._session: str | None = None
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call("Page.navigate", url=path.absolute().as_uri())
        self._until(lambda event: event.get("method") == "Page.loadEventFired")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """What a method of the protocol answers."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        number = self._number
        answer = self._until(lambda event: event.get("id") == number)
        assert "error" not in answer, answer
        return answer["result"]

    def ask(self, expression: str) -> Any:
        """The value of an expression on the page, waited for where it is a promise."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def press(self, key: str) -> None:
        """A key, as a person presses it."""
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key)

    def move(self, x: float, y: float) -> None:
        """The pointer, to a place in the window."""
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def prefer(self, scheme: str) -> None:
        """light or dark."""
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def picture(self) -> Image.Image:
        """What is seen in the window."""
        return Image.open(io.BytesIO(base64.b64decode(self.call("Page.captureScreenshot")["data"]))).convert("RGB")

    def _until(self, wanted: Any, seconds: float = 30.0) -> dict[str, Any]:
        end = time.monotonic() + seconds
        while True:
            *messages, self._left = self._left.split(b"\0")
            match = None
            for message in map(json.loads, messages):
                self.events.append(message)
                match = message if match is None and wanted(message) else match
            if match is not None:
                return match
            assert select.select([self._in], [], [], max(0.0, end - time.monotonic()))[0], "the browser is silent"
            data = os.read(self._in, 1 << 20)
            assert data, "the browser has ended"
            self._left += data

    def __enter__(self) -> "Tab":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        os.close(self._out), os.close(self._in)  # it ends when nobody talks to it any more
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
