"""The page in a real browser: Chromium without a window runs its script, filters, enlarges, sorts."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest

from dino_lightning.report import load_report, write_report
from tests.report.evaluations import evaluate, write_images

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")]

# Runs in the page, in a frame of a given width, and leaves what it saw in the page around it.
DRIVER = """
const say = (seen) => (parent.document.getElementById("seen").textContent = JSON.stringify(seen));
addEventListener("unhandledrejection", (event) => say({error: String(event.reason)}));
addEventListener("load", async () => {
  const seen = {};
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const visible = () => all(".shot").filter((shot) => shot.checkVisibility());
  const root = document.documentElement;
  seen.overflow = root.scrollWidth - root.clientWidth;
  seen.width = innerWidth;
  seen.broken = all("img").filter((image) => !image.naturalWidth).length;
  seen.shots = visible().length;
  seen.unreachable = all("a, button, select, .scroll").filter((one) => one.tabIndex < 0).length;
  const missed = all("button[data-kind=missed]")[0];
  missed.click();
  seen.missed = visible().length;
  seen.with_missed = all(".shot").filter((shot) => shot.querySelector("rect.missed")).length;
  seen.dimmed = all("rect.found[data-k]:not(.dim)").length;
  seen.said = document.getElementById("shown").textContent;
  const select = all(".filters select")[0];
  select.value = "0";
  select.dispatchEvent(new Event("change"));
  seen.missed_of_class = visible().length;
  seen.with_missed_of_class = all(".shot").filter((shot) => shot.querySelector('rect.missed[data-l="0"]')).length;
  document.getElementById("reset").click();
  seen.after_reset = visible().length;
  const opener = all(".shot .open")[1];
  opener.click();
  const dialog = all("dialog")[0];
  seen.open = dialog.open;
  seen.focus_inside = dialog.contains(document.activeElement);
  const large = all(".canvas", dialog)[0].getBoundingClientRect();
  seen.larger = large.width > opener.getBoundingClientRect().width;
  seen.fits = large.right <= root.clientWidth + 1;
  seen.captions = all("text", dialog).filter((text) => text.checkVisibility()).length;
  seen.lines = all(".details li", dialog).filter((line) => line.checkVisibility()).length;
  const first = all("figcaption", dialog)[0].textContent;
  dialog.dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowRight", bubbles: true}));
  seen.moved = all("figcaption", dialog)[0].textContent !== first;
  dialog.dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowLeft", bubbles: true}));
  seen.moved_back = all("figcaption", dialog)[0].textContent === first;
  document.getElementById("close").click();
  await new Promise((resolve) => setTimeout(resolve, 50));
  seen.closed = !dialog.open;
  seen.focus_back = document.activeElement === opener;
  const table = all('[aria-label="Classes"] table')[0];
  const head = [...table.tHead.rows[0].cells].find((cell) => cell.textContent === "AP");
  head.querySelector("button").click();
  seen.sorted = [...table.tBodies[0].rows].map((row) => row.cells[head.cellIndex].textContent);
  seen.sort = head.getAttribute("aria-sort");
  say(seen);
});
"""


class Handler(SimpleHTTPRequestHandler):
    """Remembers what was asked for."""

    asked: list[str] = []  # noqa: RUF012  # one server for each test

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.asked.append(self.path)
        super().do_GET()


@pytest.fixture
def browse(tmp_path):
    """Serves a folder; gives the document that Chromium makes of a file in it, and what was asked for."""
    handler = type("OwnHandler", (Handler,), {"asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def load(name):
        command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
        command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
        command += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1400,1000"]
        command += ["--virtual-time-budget=20000", "--dump-dom"]
        command += [f"http://127.0.0.1:{server.server_port}/{name}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        return done.stdout, handler.asked

    yield load
    server.shutdown()
    server.server_close()


@pytest.fixture(params=[1, 80], ids=["one class", "eighty classes"])
def report(request, tmp_path):
    names = ["room"] if request.param == 1 else [f"a class with a longer name {number}" for number in range(80)]
    folder = write_images(tmp_path / "images", names, num_images=40, boxes=12)
    before, source = evaluate(folder, spread=0.15)
    threshold = before.values["F1_threshold"]
    write_report(before, source, tmp_path / "other", threshold=threshold)
    other = load_report(tmp_path / "other/report.json")
    after, source = evaluate(folder, seed=1, spread=0.1)
    write_report(after, source, tmp_path / "report", threshold=threshold, against=("other", other))
    return tmp_path / "report"


def test_its_own_script_runs_and_nothing_else_is_loaded(report, browse):
    document, asked = browse("report/index.html")
    assert set(asked) <= {"/report/index.html", "/favicon.ico"}
    assert re.search(r'<span id="shown" role="status">(\d+) of \1 images</span>', document)
    assert '<div class="filters" role="group"' in document  # shown by the script


@pytest.mark.parametrize("width", [400, 1280])
def test_filters_large_view_and_layout(report, browse, width, tmp_path):
    content = (report / "index.html").read_text()
    content = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", content)  # or the driver could not run
    (report / "driven.html").write_text(content.replace("</body>", f"<script>{DRIVER}</script></body>"))
    frame = f'<iframe width="{width}" height="900" style="border: 0" src="driven.html"></iframe><pre id="seen"></pre>'
    (report / "frame.html").write_text(f"<!doctype html><body>{frame}</body>")
    document, _ = browse("report/frame.html")
    found = re.search(r'<pre id="seen">(.*?)</pre>', document, re.S)
    assert found is not None and found[1], "the driver did not get to its end"
    seen = json.loads(html.unescape(found[1]))
    assert "error" not in seen, seen
    assert seen["width"] == width
    assert seen["overflow"] <= 0
    assert seen["broken"] == seen["unreachable"] == 0
    assert 30 <= seen["shots"] == seen["after_reset"]
    assert 0 < seen["missed"] == seen["with_missed"]
    assert seen["said"] == f"{seen['missed']} of {seen['shots']} images"
    assert seen["dimmed"] == 0
    assert seen["missed_of_class"] == seen["with_missed_of_class"] <= seen["missed"]
    for name in ("open", "focus_inside", "larger", "fits", "moved", "moved_back", "closed", "focus_back"):
        assert seen[name], name
    assert seen["captions"] > 0
    assert seen["lines"] > 0
    assert seen["sort"] == "descending"
    numbers = [float(text) for text in seen["sorted"] if text != "\N{EN DASH}"]
    assert numbers == sorted(numbers, reverse=True)
    assert all(text == "\N{EN DASH}" for text in seen["sorted"][len(numbers) :])
