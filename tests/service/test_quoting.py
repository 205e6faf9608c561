"""Words as systemd reads them back: each example by hand, and any word by a reader that follows systemd's rules."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingle.errors import ConfigError
from ingle.service import quoting

_ESCAPES = {"n": b"\n", "t": b"\t", "r": b"\r", "\\": b"\\", '"': b'"'}


@pytest.mark.parametrize(
    ("word", "written"),
    [
        ("serve", "serve"),
        ("--port=8000", "--port=8000"),
        ("/srv/modèle", '"/srv/modèle"'),
        ("", '""'),
        ("a b", '"a b"'),
        ("100%h", '"100%%h"'),
        ("$HOME", '"$$HOME"'),
        ("${HF_TOKEN}", '"$${HF_TOKEN}"'),
        ('a"b', '"a\\"b"'),
        ("it's", '"it\'s"'),
        ("back\\slash", '"back\\\\slash"'),
        (";", '";"'),
        ("a\n[Service]\nExecStart=/bin/sh", '"a\\n[Service]\\nExecStart=/bin/sh"'),
        ("\x1b[2J", '"\\x1b[2J"'),
        ("#no", '"#no"'),
        (os.fsdecode(b"\xff"), '"\\xff"'),
    ],
)
def test_argument(word: str, written: str) -> None:
    assert quoting.argument(word) == written
    assert _read(written, dollars=True) == os.fsencode(word)


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")))
def test_any_argument_is_read_back(word: str) -> None:
    written = quoting.argument(word)
    assert written.isprintable() or not word.isascii()
    assert not set("\n\r") & set(written)
    assert _read(written, dollars=True) == word.encode()
    assert _read(quoting.assignment("A", word), dollars=False) == f"A={word}".encode()


def test_a_zero_character_is_refused() -> None:
    with pytest.raises(ConfigError, match="zero character"):
        quoting.argument("a\0b")


def test_assignment_keeps_dollars() -> None:
    assert quoting.assignment("A", "$x 5%") == '"A=$x 5%%"'


@pytest.mark.parametrize(
    ("path", "written"),
    [("/opt/x-1.2", "/opt/x-1.2"), ("/a b/c:d", '"/a b/c:d"'), ("/a:b", '"/a:b"'), ('/100%/"', '"/100%%/\\""')],
)
def test_path_in_a_list(path: str, written: str) -> None:
    assert quoting.path(path) == written


@pytest.mark.parametrize("write", [quoting.path, quoting.bare_path])
@pytest.mark.parametrize("path", ["/a\nb", "/a\x7f", os.fsdecode(b"/\xff")])
def test_paths_that_no_unit_names(write: type, path: str) -> None:
    with pytest.raises(ConfigError, match="rename it"):
        write(path)


def test_bare_path() -> None:
    assert quoting.bare_path("/etc/a b/5%.env") == "/etc/a b/5%%.env"
    for path in ("/etc/a ", "/etc/a\\"):
        with pytest.raises(ConfigError, match="rename it"):
            quoting.bare_path(path)


@pytest.mark.parametrize("program", ["python", "/opt/$X/python", '/opt/"/python', "/opt/a\\b", "/opt/a\nb"])
def test_programs_that_systemd_does_not_run(program: str) -> None:
    with pytest.raises(ConfigError, match="install ingle elsewhere"):
        quoting.program(program)


def test_program_with_a_space_and_a_percent_sign() -> None:
    assert quoting.program("/opt/my 5% env/bin/python") == '"/opt/my 5%% env/bin/python"'


def test_description_stays_one_line() -> None:
    assert quoting.text_line("a\nExecStart=/bin/sh \\") == "a/nExecStart=/bin/sh /"
    assert quoting.text_line("5%") == "5%%"


@pytest.mark.parametrize(
    ("value", "line"),
    [
        ("hf_abc", 'T="hf_abc"'),
        ('a"b\\c', 'T="a\\"b\\\\c"'),
        ("$(x) `y`", 'T="\\$(x) \\`y\\`"'),
        ("a b#c", 'T="a b#c"'),
    ],
)
def test_variable(value: str, line: str) -> None:
    assert quoting.variable("T", value) == line


def test_a_variable_of_two_lines_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^T holds a control character"):
        quoting.variable("T", "a\nLD_PRELOAD=/tmp/x.so")


def _read(written: str, *, dollars: bool) -> bytes:
    """One word as systemd.syntax(7) takes it: quotes and escapes, then `%%`, then `$$` where variables are put in."""
    if written.startswith('"'):
        assert written.endswith('"') and len(written) > 1
        written = written[1:-1]
        quoted = True
    else:
        quoted = False
    found, rest = b"", written
    while rest:
        c, rest = rest[0], rest[1:]
        if c == "\\":
            c, rest = rest[0], rest[1:]
            if c == "x":
                found, rest = found + bytes([int(rest[:2], 16)]), rest[2:]
            else:
                found += _ESCAPES[c]
            continue
        assert c != '"' and (quoted or (c not in "'#;" and not c.isspace())), "the word would end"
        found += c.encode()
    for doubled in ("%", "$") if dollars else ("%",):
        twice = doubled.encode() * 2
        assert doubled.encode() not in found.replace(twice, b""), "would be expanded"
        found = found.replace(twice, doubled.encode())
    return found
