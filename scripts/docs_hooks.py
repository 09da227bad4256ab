"""Hooks of MkDocs (``mkdocs.yml``): add the pages that are not written by hand, and lead their links into the site.

Pages made from the code come from ``docs_pages.py``. Files of the repository that are pages of the site, such as
CONTRIBUTING.md, are in ``BESIDE``. A link from a page in ``docs/`` to one of them, as it works in the repository,
becomes one to its page, and links of these files become relative to their page.
"""

import posixpath
import re
import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
# the script that lets the search of a page run where the page is a file; the theme takes it from the network
SHIM, OWN_SHIM = "https://unpkg.com/iframe-worker/shim", "javascripts/iframe-worker.js"
LOADED = re.compile(
    r"""(?:\bsrc=|<link [^>]*href=)["']?((?:https?:)?//[^"'>\s]+)"""
)  # what a page loads from the network
ROLE = re.compile(r":(?:func|class|meth|mod|attr|data):(?=<code>)")  # marks of Sphinx in docstrings
LINK = re.compile(r"(\]\()([^)\s]+)(\))")
# files of the repository that are pages, by their place in docs/
BESIDE = {
    "inside/contributing.md": "CONTRIBUTING.md",
    "inside/changes.md": "CHANGELOG.md",
    "inside/built-in-model.md": "qtool/models/builtin/wiki-llama-3m/README.md",
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made."""
    sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
    import docs_pages

    for place, make in docs_pages.PAGES.items():
        files.append(File.generated(config, place, content=make()))
    for place, source in BESIDE.items():
        files.append(File.generated(config, place, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Return a page with the links of the repository turned into those of the site."""
    place = page.file.src_uri
    return LINK.sub(lambda found: found[1] + turned(found[2], place) + found[3], markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Return a page without the marks that tools other than this one read in docstrings."""
    return ROLE.sub("", html)


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Return a page of HTML that takes the script of the search from the site itself.

    Raises:
        PluginError: the page still loads something from the network.
    """
    output = output.replace(SHIM, posixpath.relpath(OWN_SHIM, posixpath.dirname(page.file.dest_uri) or "."))
    if found := LOADED.search(output):
        raise PluginError(f"{page.file.src_uri} loads {found[1]} from the network; put it into docs/")
    return output


def on_post_template(output_content: str, template_name: str, config: MkDocsConfig) -> str:
    """Return the page of a missing address with the same change; it is shown at any depth, from a server."""
    return output_content.replace(SHIM, f"/{OWN_SHIM}")


def turned(link: str, place: str) -> str:
    """Return a link of the page at ``place`` in the repository as one of the site."""
    path, mark, anchor = link.partition("#")
    if not path or ":" in path:
        return link
    source = BESIDE.get(place, f"docs/{place}")
    target = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
    pages = {file: page for page, file in BESIDE.items()}
    inside = pages.get(target) or (target.removeprefix("docs/") if target.startswith("docs/") else None)
    if inside is None:
        return link
    return posixpath.relpath(inside, posixpath.dirname(place) or ".") + mark + anchor
