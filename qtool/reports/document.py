"""A report as a document: plain data, and its three renderers: Markdown, a terminal, and a cell of a notebook.

A report class derives from :class:`Printable` and returns its content from ``document()``. Only this file knows the
syntax of Markdown and the classes of Rich. The HTML pages of ``html.py`` are richer and have templates of their own.
Each renderer shows names and notes as text: without control characters and secrets, and without markup in them.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from qtool.system.printable import one_line, shown
from qtool.system.wrapping import folded

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
    legend: str = ""  # explains the marks of cells
    narrow: "Table | None" = None  # replaces this table in a terminal, where 80 columns must do
    keys: int = 1  # number of first columns that name a row; each part of a table that is split has them
    beside: Collection[int] = ()  # indices of columns that are never split from the one before


GAP = 2  # blanks between columns
LONGEST_WORD = 20  # characters; a longer word of a column of text is broken


def parts(table: Table, width: int) -> list[Table]:
    """Return ``table`` in parts of at most ``width`` characters; each begins with the columns that name a row.

    Columns of numbers are at least as wide as their longest cell; other columns, and all headers, wrap at blanks. One
    that does not fit beside the names is a part of its own.
    """
    widths = _least_widths(table)
    if sum(_whole_widths(table)) + GAP * (len(widths) - 1) <= width:
        return [table]
    groups: list[list[int]] = []
    for index in range(table.keys, len(table.columns)):
        if groups and index in table.beside:
            groups[-1].append(index)
        else:
            groups.append([index])
    names = list(range(table.keys))
    chosen = [list(names)]
    for group in groups:
        wide = sum(widths[index] + GAP for index in (*chosen[-1], *group)) - GAP
        if wide > width and chosen[-1] != names:
            chosen.append(list(names))
        chosen[-1] += group
    return [_part(table, columns, index, len(chosen)) for index, columns in enumerate(chosen)]


def _part(table: Table, columns: Sequence[int], index: int, count: int) -> Table:
    """Return the part ``index`` of ``count``.

    The first has the title and all rows, others no rows that are empty there; the last has footnotes and legend.
    """
    rows = [[row[each] for each in columns] for row in table.rows]
    return replace(
        table,
        columns=[table.columns[each] for each in columns],
        rows=[row for row in rows if index == 0 or any(row[table.keys :])],
        align="".join(table.align[each] for each in columns),
        title=table.title if index == 0 else "",
        footnotes=table.footnotes if index == count - 1 else (),
        legend=table.legend if index == count - 1 else "",
        beside=[place for place, each in enumerate(columns) if each in table.beside],
    )


def _whole_widths(table: Table) -> list[int]:
    """Return the widths of the columns without any wrapping."""
    return [max(map(len, column)) for column in zip(table.columns, *table.rows, strict=True)]


def _least_widths(table: Table) -> list[int]:
    """Return the widths of the columns with headers, and cells of text, wrapped at blanks."""
    found = []
    for index, column in enumerate(zip(table.columns, *table.rows, strict=True)):
        words = max((len(word) for cell in column for word in cell.split()), default=0)
        header = max(map(len, column[0].split()), default=0)
        wraps = table.align[index] == "l" and index >= table.keys
        found.append(max(min(words, LONGEST_WORD), header) if wraps else max(header, *map(len, column[1:]), 0))
    return found


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
        return "\n\n".join(filter(None, _markdown_blocks(_mapped(self.document(), one_line)))) + "\n"

    def render(self, console: "Console") -> None:
        """Print the report in a terminal; ``±`` becomes ``+-`` where the encoding has no such character."""
        plain = one_line if console.encoding.startswith("utf") else lambda text: one_line(text).replace("±", "+-")
        _print(_mapped(self.document(), plain), console)

    def _repr_html_(self) -> str:
        """Return the report as HTML without figures, for a notebook."""
        return str(Markup("\n").join(_html_blocks(_mapped(self.document(), one_line))))


def _mapped(value: Any, change: Callable[[str], str]) -> Any:  # Any: a document or a part of one
    """Return the same content with every text as ``change`` makes it."""
    match value:
        case str():
            return change(value)
        case Code():
            return replace(value, text=shown(value.text))
        case Document() | Table():
            return replace(value, **{each.name: _mapped(getattr(value, each.name), change) for each in fields(value)})
        case Mapping():
            return {_mapped(name, change): _mapped(each, change) for name, each in value.items()}
        case list() | tuple():
            return [_mapped(each, change) for each in value]
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


def markdown_table(table: Table) -> str:
    """Return a table in Markdown, with its title, footnotes and legend."""
    return "\n\n".join(filter(None, _markdown_table(_mapped(table, one_line))))


def _markdown_table(table: Table) -> Iterator[str]:
    yield f"## {as_markdown(table.title)}" if table.title else ""
    rule = "| " + " | ".join("---" if side == "l" else "---:" for side in table.align) + " |"
    header, *rows = map(_markdown_row, (table.columns, *table.rows))
    yield "\n".join([header, rule, *rows])
    yield "\n".join(_numbered([as_markdown(note) for note in table.footnotes]))
    yield as_markdown(table.legend)


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
        yield Markup("<p>{}</p>").format(table.legend) if table.legend else Markup("")
    yield from (Markup("<p>{}</p>").format(line) for line in document.notes)
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

    plain = Text  # Rich reads markup in a str

    lines = [plain(document.title, "bold")]
    lines += [plain(document.headline)] if document.headline else []
    lines += [plain(f"  {document.status}")] if document.status else []
    lines += [plain(folded(f"  {name}: {text}", console.width)) for name, text in document.facts]
    lines += [plain(f"warning: {warning}", "bold") for warning in document.warnings]
    console.print(*lines, sep="\n")
    for table in (part for each in document.tables for part in parts(_for_terminal(each), console.width)):
        console.print(plain(f"\n{table.title}" if table.title else ""))
        console.print(_rich_table(table, plain, console.width))
        if table.footnotes:
            console.print(*map(plain, ("", *_numbered(table.footnotes))), sep="\n")
        if table.legend:
            console.print(plain(f"\n{table.legend}"))
    if document.notes and document.tables and not document.tables[-1].footnotes:
        console.print()
    bullet = "" if any(table.legend for table in document.tables) else "* "  # a legend explains the mark *
    for note in document.notes:
        console.print(plain(folded(f"{bullet}{note}", console.width)))


def _for_terminal(table: Table) -> Table:
    """Return the narrow table, if there is one, with the title and the footnotes of ``table``."""
    narrow = table.narrow
    return table if narrow is None else replace(narrow, title=table.title, footnotes=table.footnotes)


def _rich_table(table: Table, plain: "Callable[..., Text]", width: int) -> "RichTable":
    from rich.box import SIMPLE_HEAD
    from rich.table import Table as RichTable

    made = RichTable(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    whole, least = _whole_widths(table), _least_widths(table)
    fits = sum(whole) + GAP * (len(whole) - 1) <= width
    small = sum(least) + GAP * (len(least) - 1) <= width
    for index, (name, side) in enumerate(zip(table.columns, table.align, strict=True)):
        wraps = side == "l" and index >= table.keys
        fixed = None if fits or wraps or not small else least[index]
        made.add_column(plain(name), justify="left" if side == "l" else "right", overflow="fold", width=fixed)
    for row in table.rows:
        made.add_row(*(plain(cell, "bold" if cell.endswith(" *") else "") for cell in row))
    return made
