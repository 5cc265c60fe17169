"""The site: Sphinx over the Markdown of the whole checkout, so that links between README.md and docs/ lead to pages.

`make docs` builds it. A warning is an error, and so is a page that loads something from another host.
"""

import re
from pathlib import Path
from typing import Any

from docutils import nodes
from pygments.lexers.special import TextLexer
from sphinx import addnodes
from sphinx.application import Sphinx

ROOT = Path(__file__).parent.parent

project = "notecase"
html_title = "notecase"
html_theme = "furo"
html_copy_source = False
html_show_copyright = False
extensions = ["myst_parser"]
root_doc = "docs/index"
include_patterns = ["*.md", "docs/*.md"]
exclude_patterns = [".*", "build", "**/node_modules"]
myst_heading_anchors = 4
pygments_style = "default"


def add_contents(app: Sphinx, docname: str, source: list[str]) -> None:
    """Adds to the index the contents for the sidebar, in the order of its links."""
    if docname == root_doc:
        pages = dict.fromkeys(re.findall(r"\]\(([\w./]+)\.md\)", source[0]))
        lines = ["", "```{toctree}", ":hidden:", "", *(page.replace("../", "/") for page in pages), "```", ""]
        source[0] += "\n".join(lines)


def show_folders(app: Sphinx, doctree: nodes.document) -> None:
    """Leaves of a link to a folder its text: a site has no page for it. A link to a file downloads the file."""
    for link in list(doctree.findall(addnodes.pending_xref)):
        if (Path(doctree["source"]).parent / link["reftarget"]).is_dir():
            link.replace_self(link.children)


def check_loads(app: Sphinx, error: Exception | None) -> None:
    """Raises ValueError when a built page loads a script, a style, a font or a picture from another host."""
    loads = re.compile(
        r"""<(?:script|img|iframe|source)\b[^>]*\bsrc="(?:https?:)?//|<link\b[^>]*\bhref="(?:https?:)?//"""
    )
    styles = re.compile(r"""(?:@import|url\()\s*["']?(?:https?:)?//""")
    for page in Path(app.outdir).rglob("*"):
        pattern = {".html": loads, ".css": styles, ".svg": styles}.get(page.suffix)
        if pattern and (found := pattern.search(page.read_text())):
            raise ValueError(f"{page} loads from another host: {found.group()}")


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_lexer("mermaid", TextLexer)  # GitHub draws it; the site shows its text
    app.connect("source-read", add_contents)
    app.connect("doctree-read", show_folders)
    app.connect("build-finished", check_loads)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
