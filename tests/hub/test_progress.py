from __future__ import annotations

import io

from ingle.hub.progress import show_progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_plain_lines_off_a_terminal() -> None:
    out = io.StringIO()
    with show_progress(out) as progress:
        progress.note("hello")
        progress.stage("downloading", 2_000_000)
        for done in range(0, 2_000_001, 10_000):
            progress.update(done)
    assert out.getvalue().splitlines() == [
        "hello",
        "downloading: 2.0 MB",
        "downloading: 25 %",
        "downloading: 50 %",
        "downloading: 75 %",
        "downloading: 100 %",
    ]


def test_a_bar_on_a_terminal() -> None:
    out = Terminal()
    with show_progress(out) as progress:
        progress.note("[hello]")
        progress.stage("downloading", 2_000_000)
        progress.update(2_000_000)
    assert "[hello]" in out.getvalue()
    assert "2.0/2.0 MB" in out.getvalue()
