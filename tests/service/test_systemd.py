"""Files of a service as they are put in place."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from ingle.errors import ConfigError
from ingle.service import systemd
from ingle.service.unit import MARKER


def test_variables_are_for_their_owner_alone_and_what_people_wrote_stays(tmp_path: Path) -> None:
    path = tmp_path / "ingle/a.env"
    assert systemd.write_variables(path, {"HF_TOKEN": "old"}) == ["HF_TOKEN"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.write_text("# mine\nOWN=1\n HF_TOKEN = older\nHF_TOKENS=2\n#HF_TOKEN=no\n")
    path.chmod(0o644)
    names = systemd.write_variables(path, {"HF_TOKEN": "new $x", "B": ""})
    assert path.read_text() == '# mine\nOWN=1\nHF_TOKENS=2\n#HF_TOKEN=no\nHF_TOKEN="new \\$x"\nB=""\n'
    assert names == ["OWN", "HF_TOKENS", "HF_TOKEN", "B"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_file_that_is_no_text_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.env"
    path.write_bytes(b"A=\xff")
    with pytest.raises(ConfigError, match="it is not UTF-8"):
        systemd.write_variables(path, {"B": "1"})
    assert path.read_bytes() == b"A=\xff"


def test_write_replaces_a_link_and_not_what_it_leads_to(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("precious")
    (tmp_path / "unit").symlink_to("target")
    systemd.write(tmp_path / "unit", "text", 0o644)
    assert (tmp_path / "target").read_text() == "precious"
    assert not (tmp_path / "unit").is_symlink() and (tmp_path / "unit").read_text() == "text"


def test_what_cannot_be_written_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "unit").mkdir()
    with pytest.raises(ConfigError, match=f"cannot write {tmp_path}/unit: "):
        systemd.write(tmp_path / "unit", "text", 0o644)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot write"):
        systemd.write(tmp_path / "file/unit", "text", 0o644)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "unit"]


def test_units_of_others_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "ssh.service"
    assert systemd.read_own(path) is None
    path.write_text("[Unit]\n")
    with pytest.raises(ConfigError, match="was not written by ingle"):
        systemd.read_own(path)
    path.write_text(f"{MARKER}\n")
    assert systemd.read_own(path) == f"{MARKER}\n"


def test_remove(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    assert systemd.remove(tmp_path / "a") and not systemd.remove(tmp_path / "a")
    with pytest.raises(ConfigError, match="cannot remove"):
        systemd.remove(tmp_path)
