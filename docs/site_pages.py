"""Pages of the site that are no files of docs/: those of the project's root, and the reference of public names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
FROM_ROOT = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/RESULTS.md")
LONGEST = 44  # characters of a name that is kept on one line
REFERENCE = {
    "reference/python.md": ("Python", ["dino_lightning"]),
    "reference/callbacks.md": ("Callbacks", ["dino_lightning.callbacks"]),
    "reference/parts.md": (
        "Layers and losses",
        ["dino_lightning.model", "dino_lightning.losses", "dino_lightning.data", "dino_lightning.metrics"],
    ),
}


def on_files(files: Files, config: Any) -> Files:
    """Add the generated pages."""
    for name in FROM_ROOT:
        text = (ROOT / name).read_text(encoding="utf-8")
        files.append(File.generated(config, Path(name).name, content=_moved(text)))
    for name, (title, modules) in REFERENCE.items():
        files.append(File.generated(config, name, content=_reference(title, modules)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links to files of the root lead to their pages."""
    return re.sub(r"\]\(\.\./(?:benchmarks/)?(README|CHANGELOG|CONTRIBUTING|RESULTS)\.md", r"](\1.md", markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Options and names do not break at their hyphens, and commands may wrap below their remarks; see docs/site.css."""
    return re.sub(r"<pre.*?</pre>|(<code>)([^<]*)(</code>)", _unbroken, html, flags=re.DOTALL)


def _unbroken(found: re.Match[str]) -> str:
    if found[1] is None:
        block, command = re.subn(
            r"^<pre>(?=(<span></span>)?<code>(python -m|curl) )", '<pre class="command">', found[0]
        )
        if command:
            block = re.sub(
                r"(<code>|^(?!<pre))(\S.*?) {2,}(# .*)", r'\1<span class="c1">\3</span>\n\2', block, flags=re.MULTILINE
            )
        return re.sub(
            r"<[^>]*>|(?<![\w-])--?[a-z][\w.-]*", lambda part: part[0] if "<" in part[0] else _word(part[0]), block
        )
    words = re.sub(r"\S+", lambda word: word[0] if len(word[0]) > LONGEST else _word(word[0]), found[2])
    return f"{found[1]}{words}{found[3]}"


def _word(text: str) -> str:
    return f'<span class="{"option" if text.startswith("-") else "word"}">{text}</span>'


def _moved(text: str) -> str:
    """A page of the root as if it were in docs/."""
    text = re.sub(r"\]\((?:\.\./)?docs/", "](", text).replace("](index.md)", "](README.md)")
    return re.sub(r"\[([^]]+)\]\(LICENSE\)", r"\1", text)


def _reference(title: str, modules: list[str]) -> str:
    """One entry for each public name of modules, in the order of their `__all__`."""
    import importlib

    names = [f"{module}.{name}" for module in modules for name in importlib.import_module(module).__all__]
    return "\n".join([f"# {title}", "", *(f"::: {name}\n" for name in names)])
