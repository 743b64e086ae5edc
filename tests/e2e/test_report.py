"""`kalmagrove report` of a real run, looked at in a real browser."""

import fcntl
import json
import os
import re
import select
import shutil
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import pytest

from tests.e2e.conftest import command, run

pytestmark = pytest.mark.e2e
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FOUND = (shutil.which(name) for name in (os.environ.get("CHROMIUM", ""), *NAMES) if name)
CHROMIUM = next((path for path in FOUND if path), None)
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None,
    reason="no Chromium: neither on the PATH nor in CHROMIUM; on Debian: apt-get install chromium",
)
# What the browser is asked about the page as it lays it out.
PROBE = """(() => {
const shown = svg => getComputedStyle(svg).display !== "none";
const charts = [...document.querySelectorAll("svg.chart")].filter(shown), cut = [], covered = [];
for (const svg of charts) {
  const box = svg.getBoundingClientRect();
  for (const text of svg.querySelectorAll("text")) {
    const t = text.getBoundingClientRect();
    if (t.left < box.left - 1 || t.right > box.right + 1 || t.top < box.top - 1 ||
        t.bottom > box.bottom + 1) cut.push(text.textContent);
  }
  const words = [...svg.querySelectorAll("text")].map(text => [text, text.getBoundingClientRect()]);
  words.forEach(([one, a], i) => words.slice(i + 1).forEach(([two, b]) => {
    if (Math.min(a.right, b.right) - Math.max(a.left, b.left) > 2 &&
        Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 5)
      covered.push(one.textContent + " | " + two.textContent);
  }));
}
const first = charts.find(svg => svg.dataset.x), at = first.getBoundingClientRect();
first.dispatchEvent(new PointerEvent("pointermove",
  {clientX: at.left + at.width / 2, clientY: at.top + at.height / 2}));
const told = {
  titles: charts.map(svg => document.getElementById(svg.getAttribute("aria-labelledby")).innerText),
  small: charts.filter(svg => svg.getBoundingClientRect().width < 200 ||
    svg.getBoundingClientRect().height < 50).length,
  scrolled: charts.filter(svg => svg.parentElement.scrollWidth > svg.parentElement.clientWidth)
    .length,
  letters: [Math.min, Math.max].map(end => end(...charts.flatMap(svg => {
    const scale = svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
    const size = text => scale * parseFloat(getComputedStyle(text).fontSize);
    return [...svg.querySelectorAll("text")].map(size);
  }))),
  cut, covered, wider: document.documentElement.scrollWidth - document.documentElement.clientWidth,
  read: first.closest(".figure").querySelector(".read").innerText,
  ground: getComputedStyle(document.body).backgroundColor,
  line: getComputedStyle(document.querySelector("path.line")).stroke,
};
return told;
})()"""


@pytest.fixture(scope="module")
def trained(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a short run with groves."""
    place = tmp_path_factory.mktemp("report")
    words = [*settings, "ffn=grove", "launch.nproc=1", "steps=6", "name=groves", "eval.every=3"]
    words.append("budget.hours=1")
    done = run("train", *words, cwd=place)
    assert done.returncode == 0, done.stderr
    return place / "runs" / "groves"


class Browser:
    """Chromium without a window, asked through a pipe: its DevTools' JSON, each with a zero byte.

    problems: what the console and the page's scripts complained about.
    """

    def __init__(self, place: Path) -> None:
        assert CHROMIUM is not None
        ends = [os.pipe(), os.pipe()]
        (theirs_in, self._to), (self._from, theirs_out) = ends
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (theirs_in, theirs_out)]

        def as_three_and_four() -> None:
            for fd, wanted in zip(high, (3, 4), strict=True):
                os.dup2(fd, wanted)

        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        flags += ["--remote-debugging-pipe", f"--user-data-dir={place / 'user'}"]
        self._process = subprocess.Popen(
            [CHROMIUM, *flags],
            preexec_fn=as_three_and_four,
            pass_fds=(3, 4),
            stderr=subprocess.DEVNULL,
        )
        for fd in (theirs_in, theirs_out, *high):
            os.close(fd)
        self._number, self._read, self._session = 0, b"", ""
        self.problems: list[str] = []

    def __enter__(self) -> Self:
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        attached = self.send("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.send(f"{domain}.enable")
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.wait()
        for fd in (self._to, self._from):
            os.close(fd)

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """The answer to a command."""
        self._number += 1
        asked = {"id": self._number, "method": method, "params": params}
        if self._session:
            asked["sessionId"] = self._session
        os.write(self._to, json.dumps(asked).encode() + b"\0")
        while True:
            told = self._next()
            if told.get("id") == self._number:
                return told.get("result", {})

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._read:
            ready, _, _ = select.select([self._from], [], [], 60)
            assert ready, "the browser is silent"
            self._read += os.read(self._from, 1 << 16)
        told, _, self._read = self._read.partition(b"\0")
        message: dict[str, Any] = json.loads(told)
        if message.get("method") in (
            "Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded",
        ):  # fmt: skip
            self.problems.append(told.decode())
        return message

    def open(self, url: str) -> None:
        self.send("Page.navigate", url=url)
        self.wait("document.readyState === 'complete'")

    def ask(self, script: str) -> Any:
        """The value of an expression; None while one page is exchanged for another."""
        answer = self.send("Runtime.evaluate", expression=script, returnByValue=True)
        return answer.get("result", {}).get("value")

    def wait(self, script: str, seconds: float = 40) -> None:
        end = time.monotonic() + seconds
        while not self.ask(script):
            assert time.monotonic() < end, f"it never came to {script}"
            time.sleep(0.05)


def look(browser: Browser, page: Path, width: int, scheme: str = "light") -> dict[str, Any]:
    """What the browser makes of the page; its console must be silent."""
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.send("Emulation.setDeviceMetricsOverride", **size)
    wanted = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.send("Emulation.setEmulatedMedia", features=wanted)
    browser.open(page.as_uri())
    told = browser.ask(PROBE)
    assert browser.problems == []
    return told


@needs_chromium
def test_a_browser_shows_the_report(trained: Path, tmp_path: Path) -> None:
    done = run("report", str(trained), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    page = trained / "report.html"
    assert f"written to {page}" in done.stdout
    with Browser(tmp_path) as browser:
        for width in (1280, 900, 420):
            seen = look(browser, page, width)
            assert set(seen["titles"]) >= {
                "Loss against tokens", "Loss against time", "Loss against dollars", "Throughput",
                "Time of a step", "Peak memory", "Tokens of each grove", "Fullest grove",
                "Edge activity", "Learned edge functions", "Budget", "Dollars spent and projected",
                "Where the time went",
            }  # fmt: skip
            assert seen["small"] == 0
            assert seen["cut"] == [], "no text leaves its drawing"
            assert seen["covered"] == [], "no text covers another"
            assert (seen["wider"], seen["scrolled"]) == (0, 0), "nothing scrolls sideways"
            assert 8 < seen["letters"][0] <= seen["letters"][1] < 16
            assert re.match(r"tokens [\d.]+\ntraining  [\d.]+", seen["read"])
        light, dark = (look(browser, page, 1280, scheme) for scheme in ("light", "dark"))
        assert (light["ground"], dark["ground"]) == ("rgb(255, 255, 255)", "rgb(20, 23, 28)")
        assert light["line"] != dark["line"]
        picture = browser.send("Page.captureScreenshot")["data"]
        assert len(picture) > 50_000, "a page with figures on it"


@needs_chromium
def test_a_browser_shows_a_comparison(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "other")
    config = tmp_path / "other" / "config.yaml"
    config.write_text(config.read_text().replace("seed: 0", "seed: 4711", 1))
    done = run("report", str(trained), "other", "--no-edges", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    page = tmp_path / "report.html"
    assert "4711" in page.read_text()
    with Browser(tmp_path) as browser:
        seen = look(browser, page, 1280)
    assert "Fullest grove, other" in seen["titles"]
    assert (seen["cut"], seen["covered"], seen["small"], seen["wider"]) == ([], [], 0, 0)


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address at which the run is followed."""
    with subprocess.Popen(
        command("report", str(folder), "--serve", "0", "--no-edges"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as server:
        assert server.stdout is not None
        try:
            words = server.stdout.readline().split()
            assert words[0].startswith("http://127.0.0.1:")
            assert words[1:4] == ["follows", "1", "run;"]
            yield words[0]
            server.send_signal(signal.SIGINT)
            _, error = server.communicate(timeout=30)
            assert (server.returncode, error) == (0, "")
        finally:
            server.kill()


def test_a_live_run_is_followed(trained: Path, tmp_path: Path) -> None:
    live = tmp_path / "live"
    shutil.copytree(trained, live)
    ledger = live / "ledger.jsonl"
    lines = ledger.read_bytes().splitlines(keepends=True)
    ledger.write_bytes(b"".join(lines[:4]))
    (live / "summary.json").unlink()
    with served(live) as url:
        page = get(url)
        assert "running, or killed" in page
        assert ">unigram</text>" in page, "known before there is a summary"
        assert re.search(r">parameters</th><td>[\d.]+[kM]<", page)
        version = get(url + "version")
        ledger.write_bytes(b"".join(lines))
        assert get(url + "version") != version
        assert "6 of 6" in get(url)


@needs_chromium
def test_an_open_page_follows_its_run(trained: Path, tmp_path: Path) -> None:
    live = tmp_path / "live"
    shutil.copytree(trained, live)
    ledger = live / "ledger.jsonl"
    lines = ledger.read_bytes().splitlines(keepends=True)
    ledger.unlink()
    with served(live) as url, Browser(tmp_path) as browser:
        browser.open(url)
        assert "live is starting up" in browser.ask("document.body.innerText")
        # Each change comes right after the page was loaded, before it has asked once.
        for count, words in ((4, "running, or killed"), (len(lines) - 1, "6 of 6"), (None, "done")):
            browser.ask("window.old = true")
            ledger.write_bytes(b"".join(lines[:count]))
            browser.wait("window.old === undefined && document.readyState === 'complete'")
            assert words in browser.ask("document.body.innerText"), words
            folds = "[...document.querySelectorAll('figure details')].map(fold => fold.open)"
            if count == 4:
                browser.ask("document.querySelectorAll('figure details')[1].open = true")
                browser.ask("document.querySelectorAll('figure summary')[1].focus()")
                browser.ask("scrollTo(0, 700)")
            assert browser.ask(folds)[:3] == [False, True, False]
            assert browser.ask(
                "document.activeElement === document.querySelectorAll('figure summary')[1]"
            )
            assert browser.ask("scrollY") == 700
        assert browser.problems == []


def get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=30) as answer:
        return answer.read().decode()
