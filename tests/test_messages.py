"""Errors in one line, long lists cut short, and names that a terminal can show."""

import pytest

from san_hf.messages import escape_markdown, for_terminal, join_some, one_line, printable, without_passwords


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("It is broken."), "It is broken"),
        (RuntimeError("first line\nsecond line"), "first line"),
        (RuntimeError("\n\n  indented\n"), "indented"),
        (OSError(28, "No space left on device", "a.txt"), "No space left on device"),
        (ValueError(), "ValueError"),
        (ValueError(" \n "), "ValueError"),
        (OSError(), "OSError"),
        (KeyError("x"), "'x'"),
        (ConnectionError(None), "None"),
        (ValueError("..."), "ValueError"),
        (
            TypeError("Error of a field:\n    in a check:\n  too large.\n  more"),
            "Error of a field: in a check: too large",
        ),
        (ValueError("Expected:"), "Expected:"),
    ],
)
def test_one_line(error, expected):
    """Catches messages over several lines, and errors without a message, for which there is no first line."""
    assert one_line(error) == expected


def test_join_some():
    """Catches lists that fill the screen, and a wrong number of those that are left out."""
    assert join_some([1, 2, 3]) == "1, 2, 3"
    assert join_some(range(10), 3) == "0, 1, 2 and 7 more"
    assert join_some((name for name in "ab"), 2) == "a, b" and join_some([]) == ""


def test_printable():
    """Catches names that move the cursor, break the line, or can't be encoded."""
    assert printable("a\nb\x1b[0m\udcff.png") == "a\ufffdb\ufffd[0m\ufffd.png"
    assert printable("straße 猫.png") == "straße 猫.png"
    assert printable("a\u202eb\u2066c\u200ed\x9be") == "a\ufffdb\ufffdc\ufffdd\ufffde"
    joined = "می\u200cخواهم क्\u200dष 👩\u200d🚀\u3000x"
    assert printable(joined) == joined


def test_texts_for_a_terminal():
    """Catches lines that are joined, sequences in one of several lines, and a password in an address."""
    assert for_terminal("a\nb\x1b[2J\n\r") == "a\nb\ufffd[2J\n\ufffd"
    address = "GET https://me:s%40cret@hub.example:8080/x?y=1 and http://token@h/"
    shown = "GET https://***@hub.example:8080/x?y=1 and http://***@h/"
    assert without_passwords(address) == for_terminal(address) == one_line(ValueError(address)) == shown
    assert without_passwords("https://hub.example/@me/a@b") == "https://hub.example/@me/a@b"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("day|night", r"day\|night"),
        ("<b>sky</b> &amp;", r"\<b\>sky\</b\> \&amp;"),
        ("*a* `b` ~~c~~ [d](e) $f$", r"\*a\* \`b\` \~\~c\~\~ \[d\](e) \$f\$"),
        ("__init__ a_b _c_", r"\_\_init\_\_ a_b \_c\_"),
        ("back\\slash\nand line", r"back\\slash and line"),
        ("天空: it's 1.5 %", "天空: it's 1.5 %"),
    ],
)
def test_escape_markdown(text, expected):
    """Catches names that Markdown takes for HTML, emphasis, code, links or cells, and plain ones that change."""
    assert escape_markdown(text) == expected
