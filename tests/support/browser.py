"""A headless Chromium for tests, driven over the DevTools protocol through a pair of pipes: no port, no library.

    with Browser(find_chromium(), folder) as browser:
        page = browser.page(1280, 800, dark=True)
        page.open(folder / "report.html")
        page.evaluate("document.title")
        page.screenshot(folder / "report.png")
        page.console, page.requests     # what it said, and what it asked for besides the page itself

As a program, it takes a picture of a page:

    python3 tests/support/browser.py PAGE.html PICTURE.png [WIDTH HEIGHT [dark] [whole]]
"""

from __future__ import annotations

import base64
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "device"))

from vmbus.errors import EnvironmentProblem, WaitTimeout
from vmbus.provision.chromium import ChromiumProgram
from vmbus.util.launcher import tied

PATIENCE = 60.0
"""Seconds for an answer: two cores may be busy with virtual machines."""

SWITCHES = (
    "--headless",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",  # containers give it 64 MB
    "--disable-extensions",
    "--font-render-hinting=none",
    "--force-color-profile=srgb",
    "--host-resolver-rules=MAP * ~NOTFOUND",
    "--hide-scrollbars",
    "--mute-audio",
    "--remote-debugging-pipe",
)


class Browser:
    """One Chromium with an empty profile in `folder`; use it in a `with` block. Nothing of it outlives that."""

    def __init__(self, program: ChromiumProgram, folder: Path) -> None:
        self._program = program
        self._folder = folder
        self._last = 0
        self._input = b""
        self._answers: dict[int, dict[str, Any]] = {}
        self._pages: dict[str, Page] = {}

    def __enter__(self) -> Browser:
        self._profile = tempfile.TemporaryDirectory(prefix="chromium-", dir=self._folder, ignore_cleanup_errors=True)
        to_read, self._commands = os.pipe()
        self._events, to_write = os.pipe()
        for inherited in (to_read, to_write):
            os.set_inheritable(inherited, True)
        self._log = Path(self._profile.name) / "chromium.log"
        switches = [*SWITCHES, f"--user-data-dir={self._profile.name}/profile"]
        if os.geteuid() == 0 or not _user_namespaces():
            switches.append("--no-sandbox")  # it has no sandbox for root, and the only pages here are our own
        # Chromium speaks on descriptors 3 and 4.
        shell = f'exec "$@" 3</proc/self/fd/{to_read} 4>/proc/self/fd/{to_write}'
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                tied(["/bin/sh", "-c", shell, "sh", str(self._program.path), *switches, "about:blank"]),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(to_read, to_write),
                process_group=0,
                env={**os.environ, **self._program.environment, "HOME": self._profile.name},
            )
        os.close(to_read)
        os.close(to_write)
        try:
            self.call("Browser.getVersion")
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(EnvironmentProblem, WaitTimeout):
            self.call("Browser.close")
        self._end()

    def _end(self) -> None:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(PATIENCE)
        os.close(self._commands)
        os.close(self._events)
        self._profile.cleanup()

    def call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """Give a command and return its result.

        Raises EnvironmentProblem if Chromium refuses it or has ended, WaitTimeout.
        """
        self._last += 1
        number = self._last
        message: dict[str, Any] = {"id": number, "method": method, "params": parameters}
        if session is not None:
            message["sessionId"] = session
        try:
            os.write(self._commands, json.dumps(message).encode() + b"\0")
        except BrokenPipeError:
            self._ended(method)
        deadline = time.monotonic() + PATIENCE
        while number not in self._answers:
            self.receive(deadline, f"Chromium's answer to {method}")
        answer = self._answers.pop(number)
        if "error" in answer:
            raise EnvironmentProblem(f"Chromium refused {method}: {answer['error'].get('message')}")
        result: dict[str, Any] = answer["result"]
        return result

    def receive(self, deadline: float, what: str) -> None:
        """Take in what comes until `deadline`, at least one piece of it."""
        if not select.select([self._events], [], [], max(0.0, deadline - time.monotonic()))[0]:
            raise WaitTimeout(what, PATIENCE)
        data = os.read(self._events, 1 << 20)
        if not data:
            self._ended(what)
        *messages, self._input = (self._input + data).split(b"\0")
        for text in messages:
            message = json.loads(text)
            if "id" in message:
                self._answers[message["id"]] = message
            elif message.get("sessionId") in self._pages:
                self._pages[message["sessionId"]].take(message["method"], message["params"])

    def _ended(self, what: str) -> None:
        said = self._log.read_text(errors="replace")[-1500:]
        raise EnvironmentProblem(f"Chromium ended while {what} was waited for; it said:\n{said}")

    def page(self, width: int, height: int, *, dark: bool = False, scripts: bool = True, scale: float = 1.0) -> Page:
        """Return a new, empty page with a window of this size."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = self._pages[session] = Page(self, session)
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.call(f"{domain}.enable")
        page.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=False
        )
        scheme = "dark" if dark else "light"
        page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        if not scripts:
            page.call("Emulation.setScriptExecutionDisabled", value=True)
        return page


class Page:
    """One page. See `Browser.page`."""

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser = browser
        self._session = session
        self._loaded = False
        self.console: list[str] = []
        """Messages, errors and exceptions, also the browser's own about this page."""
        self.requests: list[str] = []
        """Addresses that it asked for."""

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self._browser.call(method, self._session, **parameters)

    def take(self, method: str, parameters: dict[str, Any]) -> None:
        """An event of this page."""
        if method == "Page.loadEventFired":
            self._loaded = True
        elif method == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"])
        elif method == "Runtime.consoleAPICalled":
            said = " ".join(str(one.get("value", one.get("description"))) for one in parameters["args"])
            self.console.append(f"{parameters['type']}: {said}")
        elif method == "Runtime.exceptionThrown":
            self.console.append(f"exception: {parameters['exceptionDetails']}")
        elif method == "Log.entryAdded":
            entry = parameters["entry"]
            self.console.append(f"{entry['level']}: {entry['text']} {entry.get('url', '')}")

    def open(self, path: Path) -> None:
        """Load a file, and wait until it is there as a whole. Its own address is no request of the page."""
        address = path.resolve().as_uri()
        self._loaded = False
        self.call("Page.navigate", url=address)
        deadline = time.monotonic() + PATIENCE
        while not self._loaded:
            self._browser.receive(deadline, f"the page {path.name}")
        if address in self.requests:
            self.requests.remove(address)

    def evaluate(self, expression: str) -> Any:
        """Return the value of an expression (or what its promise comes to).

        Raises AssertionError if it throws.
        """
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def screenshot(self, path: Path, whole: bool = False) -> None:
        """Write a picture (PNG) of the window, or of the whole page."""
        answer = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(answer["data"]))


def _user_namespaces() -> bool:
    try:
        result = subprocess.run(["unshare", "--user", "true"], capture_output=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return result.returncode == 0


def main(arguments: list[str]) -> None:
    from vmbus.provision.chromium import find_chromium
    from vmbus.provision.report import PlainReporter

    source, target, *rest = arguments
    numbers = [int(one) for one in rest if one.isdigit()] or [1280, 800]
    with (
        tempfile.TemporaryDirectory() as folder,
        Browser(find_chromium(reporter=PlainReporter()), Path(folder)) as browser,
    ):
        page = browser.page(numbers[0], numbers[1], dark="dark" in rest)
        page.open(Path(source))
        page.screenshot(Path(target), whole="whole" in rest)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(sys.argv[1:])
