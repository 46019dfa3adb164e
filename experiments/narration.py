"""A narration of running code: paragraphs, lines of source, tables and pictures, as text or a page.

The lines of source are looked up, so they are always those that run.
"""
import ast
import html
import inspect
import re
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.report import encode_png

ROOT = Path(__file__).parent.parent
WIDTH = 100                                         # of the screen, in letters


# ---------------------------------------------------------------- the parts

class Heading(NamedTuple):
    text: str


class Paragraph(NamedTuple):
    text: str                       # with `code` between backticks; line breaks do not count


class Code(NamedTuple):
    place: str                      # file:line
    name: str                       # of the function
    source: str


class Table(NamedTuple):
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]


class Pictures(NamedTuple):
    labelled: Sequence[tuple[np.ndarray, str]]      # (h, w, 3) uint8 each
    width: int = 8                                  # of one on the page, in letters


Part = Heading | Paragraph | Code | Table | Pictures


# ---------------------------------------------------------------- lines of source

def code(function: Callable, number: int, source: str) -> Code:
    file = Path(inspect.getsourcefile(inspect.unwrap(function))).relative_to(ROOT)
    return Code(f"{file}:{number}", f"{function.__module__}.{function.__qualname__}", source)


def statement(function: Callable, fragment: str) -> Code:
    """Look up the statement of a function that holds a fragment of code.

    Raises ValueError unless there is exactly one.
    """
    lines, first = inspect.getsourcelines(function)
    found = []
    for node in ast.walk(ast.parse(textwrap.dedent("".join(lines)))):
        is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if isinstance(node, ast.stmt) and not is_text and not hasattr(node, "body"):
            source = "".join(lines[node.lineno - 1:node.end_lineno])
            if fragment in source:
                found.append((first + node.lineno - 1, source))
    if len(found) != 1:
        raise ValueError(f"{function.__qualname__}: {len(found)} statements hold {fragment!r}, "
                         "expected one; adapt experiments/walkthrough.py")
    [(number, source)] = found
    return code(function, number, re.sub(" +#", "  #", textwrap.dedent(source)).rstrip())


def equation(function: Callable) -> Code:
    """Look up the first line of a function's docstring."""
    lines, first = inspect.getsourcelines(function)
    start = next(i for i, line in enumerate(lines) if '"""' in line)
    return code(function, first + start, inspect.getdoc(function).splitlines()[0])


# ---------------------------------------------------------------- on the screen and as a page

def table_text(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table for the screen; its last column is broken into lines."""
    cells = [[str(cell) for cell in row] for row in (columns, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells)][:-1]
    lines = []
    for *row, last in cells:
        start = "".join(f"{cell:{width}}  " for cell, width in zip(row, widths))
        broken = textwrap.wrap(last, max(20, WIDTH - 4 - len(start))) or [""]
        lines += [start + broken[0], *(" " * len(start) + line for line in broken[1:])]
    return "\n".join(line.rstrip() for line in lines)


def as_text(part: Part) -> str:
    """A part for the screen."""
    match part:
        case Heading(text):
            return f"\n{text}\n{'-' * len(text)}"
        case Paragraph(text):
            return textwrap.fill(" ".join(text.replace("`", "").split()), WIDTH)
        case Code(place, name, source):
            above = f"  {place}  {name}".rstrip() + "\n" if place else ""
            return above + textwrap.indent(source, "    | ")
        case Table(columns, rows):
            return textwrap.indent(table_text(columns, rows), "    ")
        case Pictures(labelled):
            return f"    [in walkthrough.html: {'; '.join(label for _, label in labelled)}]"


STYLE = """
:root { color-scheme: light dark; --line: #8886; }
body { font: 17px/1.5 system-ui, sans-serif; max-width: 46rem; margin: auto; padding: 1rem;
       background: light-dark(#fff, #181818); color: light-dark(#222, #ddd); }
h2 { margin-top: 2.5rem; }
pre, code { font: 14px/1.4 ui-monospace, monospace; }
pre { background: light-dark(#f2f2f0, #262626); padding: .6rem; margin: .3rem 0;
      white-space: pre-wrap; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; margin: .8rem 0; }
.place { font-size: 14px; opacity: .75; margin: .8rem 0 0; overflow-wrap: anywhere; }
table { border-collapse: collapse; font-size: 15px; }
td, th { text-align: left; vertical-align: top; padding: .2rem .8rem .2rem 0;
         border-bottom: 1px solid var(--line); }
td:not(:last-child) { white-space: nowrap; }
.pictures { display: flex; flex-wrap: wrap; gap: .6rem; margin: .8rem 0; }
figure { margin: 0; max-width: 100%; }
figcaption { font-size: 13px; line-height: 1.3; }
img { width: 100%; image-rendering: pixelated; border: 1px solid var(--line); }
"""


def figure(picture: np.ndarray, label: str, width: int) -> str:
    """A picture (h, w, 3) with its label; the file is part of the page."""
    label, data = html.escape(label), encode_png(picture)
    return (f'<figure style="width: {width}rem"><img alt="{label}" '
            f'src="data:image/png;base64,{data}"><figcaption>{label}</figcaption></figure>')


def as_html(part: Part) -> str:
    """A part for the page."""
    def row(tag: str, cells: Sequence[object]) -> str:
        inside = "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells)
        return f"<tr>{inside}</tr>"

    match part:
        case Heading(text):
            return f"<h2>{html.escape(text)}</h2>"
        case Paragraph(text):
            return "<p>" + re.sub("`(.+?)`", r"<code>\1</code>", html.escape(text)) + "</p>"
        case Code(place, name, source):
            above = f'<p class="place">{html.escape(f"{place}  {name}")}</p>' if place else ""
            return f"{above}<pre>{html.escape(source)}</pre>"
        case Table(columns, rows):
            lines = row("th", columns) + "".join(row("td", cells) for cells in rows)
            return f'<div class="scroll"><table>{lines}</table></div>'
        case Pictures(labelled, width):
            figures = "".join(figure(*pair, width) for pair in labelled)
            return f'<div class="pictures">{figures}</div>'


def page(title: str, parts: Sequence[Part]) -> str:
    """One HTML file, with its pictures inside."""
    body = "\n".join(map(as_html, parts))
    return (f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<style>{STYLE}</style></head>\n<body><h1>{title}</h1>\n{body}\n</body></html>\n")
