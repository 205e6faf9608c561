"""A model of a hub onto this machine: what to take, told first, then brought into the hub's own cache."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from ingle import facts
from ingle.errors import ModelError
from ingle.hub.disk import delete, disk_errors, locked
from ingle.hub.download import Job, download
from ingle.hub.http import HubError, Refused
from ingle.hub.listing import Listing, Origin, RemoteFile
from ingle.hub.names import RepoRef
from ingle.hub.origins import origin_of
from ingle.hub.progress import Progress
from ingle.hub.selection import filtered, refuse_config, select, weight_files
from ingle.hub.source import ModelSource, Wanted

_SEARCHED = 30
_MAX_CONFIG_BYTES = 16 << 20


def fetch(ref: RepoRef, progress: Progress, wanted: Wanted | None = None) -> ModelSource:
    """The model `ref`, of which what is missing here is downloaded.

    What an interrupted call brought is kept. A second process that fetches of the same repository waits for the first.
    Raises `ModelError`, before anything of weight is downloaded where ingle does not serve such a model.
    """
    origin = origin_of(ref, progress.note)
    with origin.http:
        listing = find(origin, ref)
        if listing.repo.lower() != ref.repo.lower():
            progress.note(f"{ref.repo} is called {listing.repo} now")

        def waiting() -> None:
            progress.note(f"another process is pulling {listing.repo}: waiting for it")

        with disk_errors(f"pull {ref}", origin.cache_setting), locked(origin.lock(listing), waiting):
            source = _Fetch(origin, listing, progress).run(wanted or Wanted())
            origin.complete(listing)
            return source


def find(origin: Origin, ref: RepoRef) -> Listing:
    """What the hub says of a model. Raises `HubError`; of a name that is not there, with near ones that are."""
    try:
        return origin.listing(ref)
    except Refused as error:
        if error.status not in (401, 404) or error.alternative is not None:
            raise
        near = _near_names(origin, ref)
        if ref.repo in near or not near:
            raise
        typed = [str(RepoRef(ref.hub, name)) for name in near]
        raise Refused(error.what, error.status, alternative=f"did you mean {' or '.join(typed)}?") from error


def _near_names(origin: Origin, ref: RepoRef) -> list[str]:
    """Models of the same makers that are called nearly so, or models of others that have the name."""
    try:
        found = [*origin.by(ref.repo.partition("/")[0]), *origin.search(ref.repo.rpartition("/")[2], _SEARCHED)]
    except HubError:  # nothing is lost: what matters has been said
        return []
    names = {each.name.lower(): each.name for each in found}
    if ref.repo.lower() in names:
        return [names[ref.repo.lower()]]
    near = difflib.get_close_matches(ref.repo.lower(), names, n=3, cutoff=0.8)
    same = [name for name in names.values() if name.rpartition("/")[2].lower() == ref.repo.rpartition("/")[2].lower()]
    return list(dict.fromkeys([*(names[each] for each in near), *same]))[:3]


class _Fetch:
    def __init__(self, origin: Origin, listing: Listing, progress: Progress) -> None:
        self._origin, self._listing, self._progress = origin, listing, progress
        self._folder = origin.folder(listing)

    def run(self, wanted: Wanted) -> ModelSource:
        listing, ref = self._listing, self._listing.ref
        if wanted.include:
            files = filtered(listing.files, wanted.include, wanted.exclude)
            if not files:
                patterns = ", ".join(map(repr, wanted.include))
                raise ModelError(f"{listing.repo} holds no file that matches {patterns}, of {len(listing.files)}")
            self._download(files)
            return ModelSource(ref.name, self._folder, "folder")
        selection = select(listing, ref.choice)
        if selection.note:
            self._progress.note(selection.note)
        first = filtered(selection.files, (), wanted.exclude)
        if selection.kind == "gguf":
            if not first:
                raise ModelError(f"--exclude leaves nothing of {ref}, of which {selection.main.path} is to be taken")
            self._download(first)
            return ModelSource(ref.name, self._folder / selection.main.path, "gguf")
        self._download(first, quietly=True)
        self._check_config()
        self._download(filtered(weight_files(listing, self._folder), (), wanted.exclude))
        return ModelSource(ref.name, self._folder, "folder")

    def _check_config(self) -> None:
        file = self._folder / "config.json"
        try:
            config = json.loads(file.read_bytes()[:_MAX_CONFIG_BYTES])
        except (OSError, ValueError, RecursionError) as error:
            raise ModelError(f"{self._listing.repo}: its config.json cannot be read: {error}") from error
        if not isinstance(config, dict):
            raise ModelError(f"{self._listing.repo}: its config.json holds no object")
        refuse_config(Path(self._listing.repo), config)

    def _download(self, files: Sequence[RemoteFile], *, quietly: bool = False) -> None:
        """Tells first how much comes, where from and under which terms."""
        origin, listing = self._origin, self._listing
        missing = {origin.blob(listing, file): file for file in files if not origin.has(listing, file)}
        for path in missing:
            delete(path)  # of another state of the branch
        jobs = [self._job(file, path) for path, file in missing.items()]
        if jobs and not quietly:
            for line in told(listing, list(missing.values())):
                self._progress.note(line)
        title = f"getting ready to pull {listing.repo}" if quietly else f"pulling {listing.ref.name}"
        download(origin.http, jobs, title, self._progress, origin.cache_setting)
        origin.finish(listing, files)

    def _job(self, file: RemoteFile, path: Path) -> Job:
        origin, listing = self._origin, self._listing
        return Job(origin.url(listing, file), path, file.path, file.size, file.digest)


def told(listing: Listing, files: Sequence[RemoteFile]) -> Iterator[str]:
    """What somebody should know before a download begins."""
    size = sum(file.size or 0 for file in files)
    many = f"{len(files)} files" if len(files) > 1 else files[0].name
    yield f"{listing.repo}: {facts.decimal_size(size)} to download ({many}) from {listing.page}"
    yield terms(listing)


def terms(listing: Listing) -> str:
    """One line about the licence."""
    name, url = listing.license.name, listing.license.url
    if not name:
        return f"terms: its page names no licence; read {listing.page} before you rely on it"
    return f"terms: {name}, {url or listing.page}"
