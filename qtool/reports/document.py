"""A report as a document: plain data, and its three renderers: Markdown, a terminal, and a cell of a notebook.

A report class derives from :class:`Printable` and returns its content from ``document()``. Only this file knows the
syntax of Markdown and the classes of Rich. The HTML pages of ``html.py`` are richer and have templates of their own.
Each renderer shows names and notes as text: without control characters and secrets, and without markup in them.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from qtool.system.printable import one_line, shown

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text


@dataclass(frozen=True)
class Table:
    """Rows of text under column names; a cell that ends in `` *`` is the best of its column, and bold in a terminal."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    align: str  # one letter per column: l or r
    title: str = ""
    footnotes: Sequence[str] = ()  # numbered from 1; cells refer to them as [1]
    narrow: "Table | None" = None  # replaces this table in a terminal, where 80 columns must do


@dataclass(frozen=True)
class Code:
    """Text that is copied as it is, such as a recipe or commands."""

    title: str
    language: str  # as Markdown names it
    text: str


@dataclass(frozen=True, kw_only=True)
class Document:
    """The content of a report, in the order of the fields."""

    title: str
    name: str = ""  # heading of the Markdown page; if empty, the title is
    headline: str = ""  # the result in one sentence
    status: str = ""  # progress of work that is not finished
    facts: Sequence[tuple[str, str]] = ()  # name and text
    warnings: Sequence[str] = ()
    tables: Sequence[Table] = ()
    legend: str = ""  # explains the marks of the tables
    notes: Sequence[str] = ()
    samples: Sequence[Table] = ()  # tables of long texts; not in a terminal
    code: Sequence[Code] = ()  # not in a terminal
    environment: Mapping[str, str] = field(default_factory=dict)  # software versions; in Markdown only


class Printable(ABC):
    """Base of a report that can be printed."""

    @abstractmethod
    def document(self) -> Document:
        """Return the content of the report."""

    def markdown(self) -> str:
        """Return the report as a Markdown page."""
        return "\n\n".join(filter(None, _markdown_blocks(_shown(self.document())))) + "\n"

    def render(self, console: "Console") -> None:
        """Print the report in a terminal; ``±`` becomes ``+-`` where the encoding has no such character."""
        _print(_shown(self.document()), console)

    def _repr_html_(self) -> str:
        """Return the report as HTML without figures, for a notebook."""
        return str(Markup("\n").join(_html_blocks(_shown(self.document()))))


def _shown(value: Any) -> Any:  # Any: a document or a part of one
    """Return the same content with every text as it may be shown, in one line."""
    match value:
        case str():
            return one_line(value)
        case Code():
            return replace(value, text=shown(value.text))
        case Document() | Table():
            return replace(value, **{each.name: _shown(getattr(value, each.name)) for each in fields(value)})
        case Mapping():
            return {_shown(name): _shown(each) for name, each in value.items()}
        case list() | tuple():
            return [_shown(each) for each in value]
    return value


def as_markdown(text: str) -> str:
    """Return Markdown that shows ``text`` as it is: no code, emphasis, links, HTML or entities."""
    text = re.sub(r"\\(?=[!-/:-@\[-`{-~]|$)", r"\\\\", text)
    text = re.sub(r"[`<*]|\((?<=\]\()|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", text)
    return re.sub(r"&(?=#?\w+;)", "&amp;", text)


def _markdown_blocks(document: Document) -> Iterator[str]:
    """Yield blocks that an empty line separates; an empty block is left out."""
    yield f"# {as_markdown(document.name or document.title)}"
    yield as_markdown(document.title) if document.name else ""
    yield f"**{as_markdown(document.headline)}**" if document.headline else ""
    yield f"{as_markdown(document.status)}." if document.status else ""
    yield _bullets(f"{name}: {text}" for name, text in document.facts)
    yield from (f"> **Warning:** {as_markdown(warning)}" for warning in document.warnings)
    for table in document.tables:
        yield from _markdown_table(table)
    yield as_markdown(document.legend)
    yield _bullets(document.notes)
    for table in document.samples:
        yield from _markdown_table(table)
    for each in document.code:
        yield f"## {as_markdown(each.title)}"
        yield f"{(fence := _fence(each.text))}{each.language}\n{each.text}\n{fence}"
    if document.environment:
        software = ", ".join(f"{name} {text}" for name, text in document.environment.items())
        yield as_markdown(f"Environment: {software}.")


def _fence(text: str) -> str:
    """Return a fence of code that ``text`` does not end: longer than each run of backticks in it."""
    return "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))


def _markdown_table(table: Table) -> Iterator[str]:
    yield f"## {as_markdown(table.title)}" if table.title else ""
    rule = "| " + " | ".join("---" if side == "l" else "---:" for side in table.align) + " |"
    header, *rows = map(_markdown_row, (table.columns, *table.rows))
    yield "\n".join([header, rule, *rows])
    yield "\n".join(_numbered([as_markdown(note) for note in table.footnotes]))


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(as_markdown(cell).replace("|", "\\|") for cell in cells) + " |"


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"* {as_markdown(line)}" for line in lines)


def _numbered(lines: Sequence[str]) -> Iterator[str]:
    return (f"{number}. {line}" for number, line in enumerate(lines, 1))


def _html_blocks(document: Document) -> Iterator[Markup]:
    """Yield the parts of the document as HTML, with every text escaped."""
    yield Markup("<h3>{}</h3>").format(document.title)
    yield from (Markup("<p><b>{}</b></p>").format(line) for line in (document.headline, document.status) if line)
    yield _html_list("ul", [f"{name}: {text}" for name, text in document.facts])
    yield from (Markup("<p><b>Warning: {}</b></p>").format(warning) for warning in document.warnings)
    for table in (*document.tables, *document.samples):
        yield Markup("<h4>{}</h4>").format(table.title) if table.title else Markup("")
        head = _html_row("th", table.columns, table.align)
        rows = Markup("").join(_html_row("td", row, table.align) for row in table.rows)
        yield Markup("<table><thead>{}</thead><tbody>{}</tbody></table>").format(head, rows)
        yield _html_list("ol", table.footnotes)
    yield from (Markup("<p>{}</p>").format(line) for line in (document.legend, *document.notes) if line)
    for each in document.code:
        yield Markup("<h4>{}</h4><pre>{}</pre>").format(each.title, each.text)


def _html_row(tag: str, cells: Sequence[str], align: str) -> Markup:
    sides = ("left" if side == "l" else "right" for side in align)
    cell = Markup(f'<{tag} style="text-align: {{}}">{{}}</{tag}>')
    return Markup("<tr>{}</tr>").format(Markup("").join(map(cell.format, sides, cells)))


def _html_list(tag: str, lines: Sequence[str]) -> Markup:
    items = Markup("").join(Markup("<li>{}</li>").format(line) for line in lines)
    return Markup(f"<{tag}>{{}}</{tag}>").format(items) if lines else Markup("")


def _print(document: Document, console: "Console") -> None:
    from rich.text import Text

    plus_minus = "±" if console.encoding.startswith("utf") else "+-"

    def plain(text: str, style: str = "") -> Text:
        return Text(text.replace("±", plus_minus), style)  # a Text: Rich reads markup in a str

    lines = [plain(document.title, "bold")]
    lines += [plain(document.headline)] if document.headline else []
    lines += [plain(f"  {document.status}")] if document.status else []
    lines += [plain(f"  {name}: {text}") for name, text in document.facts]
    lines += [plain(f"warning: {warning}", "bold") for warning in document.warnings]
    console.print(*lines, sep="\n")
    for table in document.tables:
        console.print(plain(f"\n{table.title}" if table.title else ""))
        console.print(_rich_table(table.narrow or table, plain))
        if table.footnotes:
            console.print(*map(plain, ("", *_numbered(table.footnotes))), sep="\n")
    if document.tables and not document.tables[-1].footnotes:
        console.print()
    bullet = "" if document.legend else "* "  # a legend explains the mark *
    for line in filter(None, (document.legend, *(f"{bullet}{note}" for note in document.notes))):
        console.print(plain(line))


def _rich_table(table: Table, plain: "Callable[..., Text]") -> "RichTable":
    from rich.box import SIMPLE_HEAD
    from rich.table import Table as RichTable

    made = RichTable(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    for name, side in zip(table.columns, table.align, strict=True):
        made.add_column(plain(name), justify="left" if side == "l" else "right", overflow="fold")
    for row in table.rows:
        made.add_row(*(plain(cell, "bold" if cell.endswith(" *") else "") for cell in row))
    return made
