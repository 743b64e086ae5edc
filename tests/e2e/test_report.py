"""`kalmagrove report` of a real run, looked at in a real browser."""

import json
import os
import re
import shutil
import signal
import subprocess
import urllib.request
from pathlib import Path
from typing import Any

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
PROBE = """<script>
const charts = [...document.querySelectorAll("svg.chart")], cut = [], covered = [];
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
const first = document.querySelector("svg[data-x]"), at = first.getBoundingClientRect();
first.dispatchEvent(new PointerEvent("pointermove",
  {clientX: at.left + at.width / 2, clientY: at.top + at.height / 2}));
const told = {
  titles: charts.map(svg => document.getElementById(svg.getAttribute("aria-labelledby")).innerText),
  small: charts.filter(svg => svg.getBoundingClientRect().width < 200 ||
    svg.getBoundingClientRect().height < 50).length,
  cut, covered, wider: document.documentElement.scrollWidth - document.documentElement.clientWidth,
  read: first.closest(".figure").querySelector(".read").innerText,
  ground: getComputedStyle(document.body).backgroundColor,
  line: getComputedStyle(document.querySelector("path.line")).stroke,
};
const pre = document.createElement("pre");
pre.id = "probe"; pre.textContent = JSON.stringify(told); document.body.append(pre);
</script></body>"""


@pytest.fixture(scope="module")
def trained(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a short run with groves."""
    place = tmp_path_factory.mktemp("report")
    words = [*settings, "ffn=grove", "launch.nproc=1", "steps=6", "name=groves", "eval.every=3"]
    done = run("train", *words, cwd=place)
    assert done.returncode == 0, done.stderr
    return place / "runs" / "groves"


def browse(*flags: str, page: Path, place: Path) -> subprocess.CompletedProcess[str]:
    """Chromium without a window; what it logs of the page's console is on stderr."""
    assert CHROMIUM is not None
    fixed = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    fixed += ["--hide-scrollbars", "--enable-logging=stderr", f"--user-data-dir={place / 'user'}"]
    return subprocess.run(
        [CHROMIUM, *fixed, *flags, page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )


def look(page: Path, place: Path, *flags: str) -> dict[str, Any]:
    """What the browser makes of the page; its console must be silent."""
    probed = place / "probed.html"
    probed.write_text(page.read_text().replace("</body>", PROBE))
    done = browse("--dump-dom", *flags, page=probed, place=place)
    assert "CONSOLE" not in done.stderr, done.stderr
    found = re.search(r'<pre id="probe">(.*?)</pre>', done.stdout, re.S)
    assert found is not None, "the page's scripts ran to their end"
    return json.loads(found[1].replace("&gt;", ">").replace("&lt;", "<").replace("&amp;", "&"))


@needs_chromium
def test_a_browser_shows_the_report(trained: Path, tmp_path: Path) -> None:
    done = run("report", str(trained), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    page = trained / "report.html"
    assert f"written to {page}" in done.stdout
    for width in (1280, 500):
        seen = look(page, tmp_path, f"--window-size={width},900")
        assert set(seen["titles"]) >= {
            "Loss against tokens", "Loss against time", "Loss against dollars", "Throughput",
            "Time of a step", "Peak memory", "Tokens of each grove", "Fullest grove",
            "Edge activity", "Learned edge functions", "Budget", "Where the time went",
        }  # fmt: skip
        assert seen["small"] == 0
        assert seen["cut"] == [], "no text leaves its drawing"
        assert seen["covered"] == [], "no text covers another"
        assert seen["wider"] == 0, "the page does not scroll sideways"
        assert re.match(r"tokens [\d.]+\ntraining  [\d.]+", seen["read"])
    dark = look(page, tmp_path, "--blink-settings=preferredColorScheme=0")
    light = look(page, tmp_path, "--blink-settings=preferredColorScheme=1")
    assert (light["ground"], dark["ground"]) == ("rgb(255, 255, 255)", "rgb(20, 23, 28)")
    assert light["line"] != dark["line"]
    picture = tmp_path / "page.png"
    browse(f"--screenshot={picture}", "--window-size=1280,3000", page=page, place=tmp_path)
    assert picture.stat().st_size > 50_000, "a page with figures on it"


@needs_chromium
def test_a_browser_shows_a_comparison(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "other")
    config = tmp_path / "other" / "config.yaml"
    config.write_text(config.read_text().replace("seed: 0", "seed: 4711", 1))
    done = run("report", str(trained), "other", "--no-edges", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    page = tmp_path / "report.html"
    assert "4711" in page.read_text()
    seen = look(page, tmp_path, "--window-size=1280,900")
    assert "Fullest grove, other" in seen["titles"]
    assert (seen["cut"], seen["covered"], seen["small"], seen["wider"]) == ([], [], 0, 0)


def test_a_live_run_is_followed(trained: Path, tmp_path: Path) -> None:
    live = tmp_path / "live"
    shutil.copytree(trained, live)
    ledger = live / "ledger.jsonl"
    lines = ledger.read_bytes().splitlines(keepends=True)
    ledger.write_bytes(b"".join(lines[:4]))
    with subprocess.Popen(
        command("report", str(live), "--serve", "0", "--no-edges"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as server:
        assert server.stdout is not None
        try:
            url = server.stdout.readline().split()[0]
            assert url.startswith("http://127.0.0.1:")
            assert "running, or killed" in get(url)
            version = get(url + "version")
            ledger.write_bytes(b"".join(lines))
            assert get(url + "version") != version
            assert "6 of 6" in get(url)
            server.send_signal(signal.SIGINT)
            _, error = server.communicate(timeout=30)
            assert (server.returncode, error) == (0, "")
        finally:
            server.kill()


def get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=30) as answer:
        return answer.read().decode()
