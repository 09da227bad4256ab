"""Helpers for tests of HTML pages: a parser that is strict about tags, and a hostile name."""

from html.parser import HTMLParser

HOSTILE = "</style><script>alert(1)</script>\"'><img src=x onerror=alert(2)>&amp; $\\frac{a}$ {{ 7 * 7 }}"
VOID = {"meta", "img", "link", "br", "hr", "input", "wbr"}


class Tree(HTMLParser):
    """The tags, attributes and text of a page; parsing fails if tags are not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.style = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open, self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, (tag, self.getpos())

    def handle_data(self, data: str) -> None:
        if "style" in self._open:
            self.style += data
        else:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())
