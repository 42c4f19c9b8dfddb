"""A headless Chromium over the WebDriver protocol, with nothing but the standard library."""

from __future__ import annotations

import base64
import importlib.util
import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
PATIENCE = 240  # seconds for an answer: an audit of a large page on a busy machine takes long
ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-quic",
    "--hide-scrollbars",
]

OWN = ("data:", "chrome:", "chrome-untrusted:")

AXE = """
const done = arguments[arguments.length - 1];
axe.run(document, { resultTypes: ['violations'] }).then(
  (found) => done(found.violations.map((v) => [v.impact, v.id, v.nodes.map((n) => n.html.slice(0, 120))])),
  (error) => done([['critical', String(error), []]]));
"""


class Browser:
    """One browser; ``open`` a page at a width, then ``run`` scripts in it."""

    def __init__(self, profile: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._address = f"http://127.0.0.1:{free.getsockname()[1]}"
        self._driver = subprocess.Popen(
            [DRIVER, f"--port={self._address.rsplit(':', 1)[1]}"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            self._wait()
            options = {
                "binary": CHROMIUM,
                "args": [*ARGUMENTS, f"--user-data-dir={profile}"],
            }
            wanted = {
                "browserName": "chrome",
                "goog:chromeOptions": options,
                "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
            }
            value = self._post("/session", {"capabilities": {"alwaysMatch": wanted}})
            self._session = f"/session/{value['sessionId']}"
            self._post(f"{self._session}/timeouts", {"script": 1000 * PATIENCE})
        except BaseException:
            self._driver.kill()
            self._driver.wait()
            raise

    def open(self, page: Path, *, width: int, height: int = 900, dark: bool = False) -> None:
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.devtools("Emulation.setEmulatedMedia", {"features": [scheme]})
        self.resize(width, height)
        self._post(f"{self._session}/url", {"url": page.resolve().as_uri()})

    def resize(self, width: int, height: int = 900) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.devtools("Emulation.setDeviceMetricsOverride", size)

    def run(self, script: str):
        return self._post(f"{self._session}/execute/sync", {"script": script, "args": []})

    def run_async(self, script: str):
        """Run a script whose last argument is to be called with its result."""
        return self._post(f"{self._session}/execute/async", {"script": script, "args": []})

    def audit(self) -> list:
        """Return what axe-core finds serious or critical in the page; skip where it is missing.

        A package that drives another browser brings it along.
        """
        found = importlib.util.find_spec("axe_playwright_python")
        if found is None or found.origin is None:
            pytest.skip("axe-playwright-python, which has axe-core, is not installed")
        self.run((Path(found.origin).parent / "axe.min.js").read_text(encoding="utf-8"))
        return [each for each in self.run_async(AXE) if each[0] in {"serious", "critical"}]

    def press(self, *keys: str) -> None:
        for key in keys:
            for kind in ("keyDown", "keyUp"):
                event = {"type": kind, "key": key, "code": key}
                codes = {"Tab": 9, "Enter": 13, "Escape": 27, "ArrowRight": 39, "ArrowLeft": 37}
                event["windowsVirtualKeyCode"] = codes[key]
                if key == "Enter":
                    event["text"] = "\r"
                self.devtools("Input.dispatchKeyEvent", event)

    def hover(self, x: float, y: float) -> None:
        self.devtools("Input.dispatchMouseEvent", {"type": "mouseMoved", "x": x, "y": y})

    def console(self) -> list[str]:
        """Return warnings and errors since the last call."""
        entries = self._post(f"{self._session}/se/log", {"type": "browser"})
        return [entry["message"] for entry in entries if entry["level"] in ("WARNING", "SEVERE")]

    def requests(self) -> list[str]:
        """Return the addresses that pages asked for since the last call.

        What is within a page is left out, and so is what the browser's own first page asks for.
        """
        entries = self._post(f"{self._session}/se/log", {"type": "performance"})
        events = [json.loads(entry["message"])["message"] for entry in entries]
        asked = [
            event["params"]["request"]["url"]
            for event in events
            if event["method"] == "Network.requestWillBeSent"
        ]
        return [address for address in asked if not address.startswith(OWN)]

    def screenshot(self, path: Path, *, whole: bool = True) -> None:
        shot = self.devtools(
            "Page.captureScreenshot", {"format": "png", "captureBeyondViewport": whole}
        )
        path.write_bytes(base64.b64decode(shot["data"]))

    def devtools(self, command: str, parameters: dict):
        body = {"cmd": command, "params": parameters}
        return self._post(f"{self._session}/goog/cdp/execute", body)

    def close(self) -> None:
        try:
            request = urllib.request.Request(self._address + self._session, method="DELETE")
            urllib.request.urlopen(request, timeout=20).close()
        finally:
            self._driver.terminate()
            self._driver.wait(timeout=20)

    def _wait(self) -> None:
        for _ in range(100):
            try:
                urllib.request.urlopen(f"{self._address}/status", timeout=2).close()
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.1)
            else:
                return
        raise RuntimeError("chromedriver did not start")

    def _post(self, path: str, body: dict):
        request = urllib.request.Request(
            self._address + path,
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(error.read().decode()) from error
