"""What a service is shown of home directories, and what keeps its user from reading it."""

from __future__ import annotations

from pathlib import Path

import pytest

from ingle.errors import ConfigError
from ingle.service import reach

NOBODY = reach.Reader("nobody")


def test_a_folder_of_a_hubs_cache_brings_the_files_behind_its_links(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots/abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    (blobs / "1").touch()
    (snapshot / "config.json").symlink_to("../../blobs/1")
    (snapshot / "plain").touch()
    assert reach.of_model(snapshot) == {snapshot, blobs}


def test_a_linked_folder_is_shown_by_both_names(tmp_path: Path) -> None:
    (tmp_path / "v2").mkdir()
    (tmp_path / "current").symlink_to("v2")
    assert reach.of_model(tmp_path / "current") == {tmp_path / "current", tmp_path / "v2"}


def test_all_parts_of_a_split_file_and_nothing_beside_them(tmp_path: Path) -> None:
    names = ["m[1]-00001-of-00002.gguf", "m[1]-00002-of-00002.gguf"]
    for name in [*names, "other.gguf", "m1-00002-of-00002.gguf"]:
        (tmp_path / name).touch()
    assert reach.of_model(tmp_path / names[0]) == {tmp_path / name for name in names}
    assert reach.of_model(tmp_path / "other.gguf") == {tmp_path / "other.gguf"}


def test_python_brings_its_environment_and_this_package() -> None:
    places = reach.of_python()
    assert reach.package() in places and (reach.package() / "ingle/service/reach.py").is_file()
    assert any((place / "bin").is_dir() for place in places)


def test_hidden_places_without_those_below_others() -> None:
    places = [Path(name) for name in ("/usr", "/home/a/venv", "/home/a/venv/lib", "/root/x", "/homes/b", "/srv/m")]
    assert reach.hidden(places) == (Path("/home/a/venv"), Path("/root/x"))


@pytest.mark.parametrize("place", ["/root", "/home", "/home/alice", "/tmp"])
def test_a_whole_home_is_not_shown(place: str) -> None:
    with pytest.raises(ConfigError, match=f"all of {place}:"):
        reach.hidden([Path(place)])


def test_what_keeps_a_reader_away(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    folder = tmp_path / "models/m"
    folder.mkdir(parents=True)
    folder.parent.chmod(0o755)
    folder.chmod(0o755)
    file = folder / "config.json"
    file.touch(0o644)
    file.chmod(0o644)
    shown = [folder]
    assert reach.first_unreadable(folder, NOBODY, shown) is None
    assert reach.first_unreadable(folder, NOBODY, []) in (tmp_path, *tmp_path.parents)
    file.chmod(0o640)
    assert reach.first_unreadable(folder, NOBODY, shown) == file
    assert reach.first_unreadable(file, NOBODY, shown) == file
    found = file.stat()
    assert reach.first_unreadable(folder, reach.Reader("g", found.st_uid + 1, frozenset({found.st_gid})), shown) is None
    assert reach.first_unreadable(folder, reach.Reader("owner", found.st_uid), shown) is None
    folder.chmod(0o750)
    assert reach.first_unreadable(folder, NOBODY, shown) == folder
    assert reach.first_unreadable(folder, reach.Reader("root", 0), shown) is None


def test_a_link_that_leads_nowhere_is_no_obstacle(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    (tmp_path / "link").symlink_to("gone")
    assert reach.first_unreadable(tmp_path, NOBODY, [tmp_path]) is None
