"""experiments/narration.py: lines of source are found where they are; text and page show all."""
import inspect
import re

import numpy as np
import pytest
from conftest import ParsedPage

from experiments import narration
from experiments.narration import Code, Heading, Paragraph, Pictures, Table


def example(x):
    """Equation (0):  y = x + 1.

    y = x stands here, too.
    """
    if x:
        y = (x +    # a sum
             1)
    return [y, y]


def test_a_statement_is_shown_whole_with_its_place():
    first = inspect.getsourcelines(example)[1]
    found = narration.statement(example, "1)")
    assert found.source == "y = (x +  # a sum\n     1)"
    assert found.place == f"tests/experiments/test_narration.py:{first + 6}"
    assert found.name.endswith("test_narration.example")
    assert narration.statement(example, "y = ") == found        # not in the docstring, not the if
    assert narration.equation(example) == found._replace(
        place=f"tests/experiments/test_narration.py:{first + 1}",
        source="Equation (0):  y = x + 1.")


@pytest.mark.parametrize("fragment, count", [("z = ", 0), ("stands here", 0), ("y", 2)])
def test_a_fragment_that_is_not_there_once(fragment, count):
    with pytest.raises(ValueError, match=f"example: {count} statements hold '{fragment}'"):
        narration.statement(example, fragment)


PICTURE = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
PARTS = [
    Heading("A < B"), Paragraph("The sign `<s>` is\n        <b>."),
    Code("a.py:1", "a.f", "x < y\nz"), Code("", "", "bare"),
    Table(["name", "text"], [["n", 1], ["longer", "words " * 30]]),
    Pictures([(PICTURE, 'a "label"'), (PICTURE, "b")], 5)]


def test_text():
    heading, paragraph, code, bare, table, pictures = map(narration.as_text, PARTS)
    assert heading == "\nA < B\n-----" and paragraph == "The sign <s> is <b>."
    assert code == "  a.py:1  a.f\n    | x < y\n    | z" and bare == "    | bare"
    first, second, *broken = table.splitlines()
    assert (first, second) == ("    name    text", "    n       1")
    assert max(map(len, broken)) <= narration.WIDTH and len(broken) == 3
    assert broken[0].startswith("    longer  words words") and broken[1].startswith(" " * 12 + "w")
    assert pictures == '    [in walkthrough.html: a "label"; b]'


def test_page():
    page = narration.page("Title", PARTS)
    parsed = ParsedPage(page)
    assert not parsed.open and not re.search("https?:", page)
    assert [image["alt"] for image in parsed.images] == ['a "label"', "b"]
    assert all((picture == PICTURE).all() for picture in parsed.pictures())
    for text in ("A < B", "<s>", "<b>", "x < y\nz", "bare", "longer", "words " * 30, 'a "label"'):
        assert text in parsed.text
    assert "<code>&lt;s&gt;</code>" in page and page.count("<tr>") == 3
    assert "color-scheme: light dark" in page and 'name="viewport"' in page
