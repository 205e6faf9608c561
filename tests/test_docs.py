"""Links between the project's pages."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ingle.hub.names import ShortName, is_hub_name, parse_name

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def _prose(page: Path) -> str:
    return re.sub(r"```.*?```", "", page.read_text(), flags=re.S)


def _anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub names them."""
    headings = re.findall(r"^#+ (.+)$", _prose(page), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_pages_and_headings(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", _prose(page)):
        if link.startswith(("http:", "https:")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in _anchors(target), link


@pytest.mark.parametrize("folder", ["decisions", "journal"])
def test_every_page_of_a_folder_is_in_its_list(folder: str) -> None:
    pages = {page.name for page in (ROOT / "docs" / folder).glob("*.md")} - {"README.md"}
    listed = set(re.findall(r"\]\(([\w-]+\.md)\)", (ROOT / "docs" / folder / "README.md").read_text()))
    assert pages == listed


def test_every_result_that_a_page_names_is_committed() -> None:
    names = {name for page in PAGES for name in re.findall(r"`(20\d\d-[\w.*-]+\.json)`", _prose(page))}
    assert names
    for name in names:
        assert list((ROOT / "benchmarks" / "results").glob(name)), name


def test_every_spelling_of_a_name_is_one() -> None:
    section = (ROOT / "docs" / "models.md").read_text().partition("## Names")[2].partition("\n## ")[0]
    names = [name for row in re.findall(r"^\| (`.+?) \|", section, re.M) for name in re.findall(r"`([^`]+)`", row)]
    assert len(names) > 20
    for name in names:
        if name.startswith((".", "/")):
            continue
        is_short = isinstance(parse_name(name), ShortName)
        assert is_short == (name == "qwen3:0.6b")
        assert is_short or "://" in name or is_hub_name(name)


def test_the_tables_of_the_api_are_what_the_code_says() -> None:
    command = [sys.executable, str(ROOT / "tools" / "api_table.py"), "--check"]
    found = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT / "src")})
    assert found.returncode == 0, found.stderr
