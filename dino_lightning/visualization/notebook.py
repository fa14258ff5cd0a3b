"""Pictures put before the user's eyes: in a notebook, in a window, or as a file where there is no screen."""

from __future__ import annotations

import base64
import html
import io
import os
import sys
import tempfile
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from PIL import Image, ImageShow

HEADER = ("name", "score", "x1", "y1", "x2", "y2")


def show_page(page: Image.Image) -> Path | None:
    """Show a picture in the notebook, or in a window; without a screen, write it to a file, whose path is given."""
    if _in_notebook():
        import_module("IPython.display").display(page)
        return None
    has_screen = sys.platform in ("win32", "darwin") or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    if has_screen and ImageShow.show(page):
        return None
    handle, name = tempfile.mkstemp(prefix="detections_", suffix=".png")
    with os.fdopen(handle, "wb") as file:
        page.save(file, format="PNG")
    return Path(name)


def png(page: Image.Image) -> bytes:
    """A picture as the content of a PNG file."""
    content = io.BytesIO()
    page.save(content, format="PNG")
    return content.getvalue()


def as_html(heading: str, page: Image.Image | None, rows: Sequence[Sequence[object]], more: int) -> str:
    """A picture and a table for a notebook.

    Args:
        heading: above them.
        page: the picture, if there is one.
        rows: cells below `HEADER`.
        more: how many rows are left out.
    """
    parts = [f"<p>{html.escape(heading)}</p>"]
    if page is not None:
        source = base64.b64encode(png(page)).decode()
        parts.append(f'<img src="data:image/png;base64,{source}" style="max-width:100%" alt="detections">')
    if rows:
        lines = [_row("th", HEADER), *(_row("td", row) for row in rows)]
        parts.append(f"<table>{''.join(lines)}</table>")
    if more:
        parts.append(f"<p>... and {more} more</p>")
    return "\n".join(parts)


def _row(cell: str, values: Sequence[object]) -> str:
    return "<tr>" + "".join(f"<{cell}>{html.escape(str(value))}</{cell}>" for value in values) + "</tr>"


def _in_notebook() -> bool:
    ipython = sys.modules.get("IPython")
    return ipython is not None and hasattr(ipython.get_ipython(), "kernel")
