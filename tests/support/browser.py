"""A headless Chromium, driven by its DevTools protocol over a pipe: no port, no driver, no package.

The browser is `chromium` on the PATH, or what INTACT_CHROMIUM names. `axe` is the source of axe-core, as `make browser`
installs it.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from runtime_tests.workers.install import NpmPackages

__all__ = ["AXE", "KEYS", "Browser", "Page", "chromium"]

AXE = NpmPackages("axe", ("axe-core@4.14.1",))

PATIENCE_S = 60.0
NAMES = ("chromium", "chromium-browser", "google-chrome")
QUIET = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-extensions"),
    *("--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--hide-scrollbars", "--force-color-profile=srgb", "--remote-debugging-pipe", "--mute-audio"),
)
KEYS = {"Tab": 9, "Enter": 13, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, " ": 32}
"""Codes of the keys that a page is sent; Enter and space carry text."""


def chromium() -> str | None:
    """Return the path of the browser, None where there is none."""
    names = [given] if (given := os.environ.get("INTACT_CHROMIUM")) else NAMES
    return next(filter(None, map(shutil.which, names)), None)


class Browser:
    """A running browser; its pages share nothing but the process."""

    def __init__(self, program: str) -> None:
        self._profile = tempfile.TemporaryDirectory(prefix="intact-browser-", ignore_cleanup_errors=True)
        (theirs_in, ours_out), (ours_in, theirs_out) = os.pipe(), os.pipe()
        theirs = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in (theirs_in, theirs_out)]

        def numbered() -> None:  # the protocol reads from 3 and writes to 4
            os.dup2(theirs[0], 3)
            os.dup2(theirs[1], 4)

        self._process = subprocess.Popen(
            [program, *QUIET, f"--user-data-dir={self._profile.name}"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=numbered,
            pass_fds=(3, 4),
        )
        for end in (theirs_in, theirs_out, *theirs):
            os.close(end)
        self._in, self._out = os.fdopen(ours_in, "rb"), os.fdopen(ours_out, "wb")
        os.set_blocking(self._in.fileno(), False)
        self._number, self._buffer = 0, b""
        self.events: list[dict[str, Any]] = []

    def __enter__(self) -> Browser:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        self._in.close()
        with suppress(BrokenPipeError):
            self._out.close()
        self._profile.cleanup()

    def call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol and return its result; events that come before it are kept."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if session is not None:
            message["sessionId"] = session
        self._out.write(json.dumps(message).encode() + b"\0")
        self._out.flush()
        while (answer := self._next()).get("id") != self._number:
            self.events.append(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        found: dict[str, Any] = answer["result"]
        return found

    def _next(self) -> dict[str, Any]:
        end = time.monotonic() + PATIENCE_S
        while b"\0" not in self._buffer:
            if self._process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"the browser does not answer (exit code {self._process.poll()})")
            self._buffer += self._in.read(1 << 20) or b""
            time.sleep(0.002)
        message, _, self._buffer = self._buffer.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found

    @contextmanager
    def page(self, path: Path, width: int = 1280, *, dark: bool = False) -> Iterator[Page]:
        """Open a file in a page of a width, and close it afterwards."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session)
        page.open(path, width, dark=dark)
        yield page
        self.call("Target.closeTarget", targetId=target)


class Page:
    """One open page."""

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser, self._session = browser, session

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self._browser.call(method, self._session, **parameters)

    def open(self, path: Path, width: int, *, dark: bool) -> None:
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=scheme)
        self.resize(width)
        self.call("Page.navigate", url=path.as_uri())
        end = time.monotonic() + PATIENCE_S
        while self.run("document.readyState + location.protocol") != "completefile:":
            assert time.monotonic() < end, "the page does not load"
            time.sleep(0.01)

    def resize(self, width: int, height: int = 900) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )

    def print_media(self) -> None:
        """Show the page as it is printed, its details opened."""
        self.call("Emulation.setEmulatedMedia", media="print")
        self.run("dispatchEvent(new Event('beforeprint'))")

    def run(self, script: str) -> Any:
        """Return the value of an expression in the page; promises are awaited."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(found["exceptionDetails"])
        return found["result"].get("value")

    def press(self, key: str) -> None:
        """Press and release a key of KEYS, or type a character."""
        code: dict[str, Any] = {"windowsVirtualKeyCode": KEYS[key]} if key in KEYS else {}
        text = {"text": "\r" if key == "Enter" else key} if len(key) == 1 or key == "Enter" else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, **code, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key, **code)

    def screenshot(self) -> bytes:
        """Return the whole page as PNG."""
        return base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"])

    @property
    def errors(self) -> list[Any]:
        """Messages of the console of level warning or error, exceptions, and requests for anything but the page."""
        own = [event for event in self._browser.events if event.get("sessionId") == self._session]
        bad: list[Any] = []
        for event in own:
            found, name = event["params"], event["method"]
            if name == "Runtime.exceptionThrown" or (
                name == "Log.entryAdded" and found["entry"]["level"] in ("warning", "error")
            ):
                bad.append(found)
            if name == "Runtime.consoleAPICalled" and found["type"] in ("warning", "error"):
                bad.append(found)
            if name == "Network.requestWillBeSent" and not found["request"]["url"].startswith(("file:", "data:")):
                bad.append(found["request"]["url"])
        return bad
