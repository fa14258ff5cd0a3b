"""The site of the documentation, built strictly, and its notebook, run."""

import html.parser
import json
import os
import subprocess
import sys
import urllib.parse
from pathlib import Path

import pytest

PROJECT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow


class Links(html.parser.HTMLParser):
    """The addresses and the anchors of a page."""

    def __init__(self, page):
        super().__init__()
        self.addresses, self.anchors = [], set()
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.addresses += [given[name] for name in ("href", "src") if given.get(name)]
        self.anchors |= {given["id"]} if given.get("id") else set()


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=PROJECT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    return folder


def test_every_page_of_the_documentation_is_in_the_site(site):
    pages = {path.parent.name for path in site.rglob("index.html")}
    assert {path.stem for path in (PROJECT / "docs").glob("*.md")} - {"index"} <= pages


def test_every_link_of_the_site_leads_somewhere(site):
    pages = {path: Links(path) for path in site.rglob("index.html")}
    followed = 0
    for page, links in pages.items():
        for address in links.addresses:
            parts = urllib.parse.urlsplit(address)
            if parts.scheme or parts.netloc:
                continue
            target = (page.parent / urllib.parse.unquote(parts.path)).resolve() if parts.path else page
            target = target / "index.html" if target.is_dir() else target
            assert target.is_file(), f"{page.relative_to(site)}: {address}"
            if parts.fragment and target in pages and parts.fragment != "__skip":
                assert urllib.parse.unquote(parts.fragment) in pages[target].anchors, f"{page}: {address}"
            followed += 1
    assert followed > 500


def test_the_reference_has_every_public_name(site):
    import dino_lightning

    anchors = Links(site / "reference" / "python" / "index.html").anchors
    assert {f"dino_lightning.{name}" for name in dino_lightning.__all__} <= anchors


def test_options_do_not_break_and_commands_wrap(site):
    page = (site / "train" / "index.html").read_text(encoding="utf-8")
    assert '<code><span class="option">--ckpt_path</span> <span class="word">last</span></code>' in page
    block, command = (
        '<pre class="command"><span></span><code>',
        'python <span class="option">-m</span> dino_lightning fit ',
    )
    assert f'{block}{command}<span class="option">--config</span> configs/room_detection.yaml ' in page
    remark = '<span class="c1"># the newest run; options you give win over stored ones</span>\n'
    assert f'{block}{remark}{command}<span class="option">--ckpt_path</span> last' in page


def test_what_is_said_beside_a_command_stands_above_it(site):
    page = (site / "index.html").read_text(encoding="utf-8")
    remark = '<pre class="command"><span></span><code><span class="c1"># what is wrong with the data</span>\n'
    assert f'{remark}python <span class="option">-m</span> dino_lightning inspect ' in page


def test_the_style_sheet_is_used(site):
    page = (site / "train" / "index.html").read_text(encoding="utf-8")
    assert (site / "site.css").is_file() and 'href="../site.css"' in page


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*TCP without encryption")
@pytest.mark.timeout(900)  # it trains and exports
def test_the_notebook_runs(tmp_path):
    import nbformat
    from nbclient import NotebookClient

    text = (PROJECT / "docs" / "quickstart.ipynb").read_text(encoding="utf-8")
    assert all(not cell.get("outputs") for cell in json.loads(text)["cells"]), "stored outputs"
    # As on the page, but for the seconds: fewer plans, one epoch.
    text = text.replace("--num_train 120 --num_val 30", "--num_train 16 --num_val 8")
    text = text.replace("--run_dir runs/rooms", "--run_dir runs/rooms --trainer.max_epochs 1")
    notebook = nbformat.reads(text, 4)
    kernel = tmp_path / "share" / "kernels" / "python3"
    kernel.mkdir(parents=True)
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (kernel / "kernel.json").write_text(json.dumps({"argv": command, "display_name": "Python 3", "language": "python"}))
    work = tmp_path / "work"
    work.mkdir()
    environment = {
        **os.environ,
        "JUPYTER_PATH": str(tmp_path / "share"),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(PROJECT),
    }
    client = NotebookClient(notebook, timeout=250, resources={"metadata": {"path": str(work)}})
    client.execute(env=environment)
    printed = "".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []) if "text" in output
    )
    pictures = [output for cell in notebook.cells for output in cell.get("outputs", []) if "data" in output]
    assert "error:" not in printed and "Traceback" not in printed, printed
    assert "best epoch" in printed and "rooms.onnx" in printed
    assert sum("image/png" in picture["data"] for picture in pictures) >= 4
    assert "application/vnd.jupyter.widget-view+json" not in str(notebook)
