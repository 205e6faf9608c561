"""A model that is not on this machine, looked at without its weights: a stand-in of its files in a temporary folder,
which says of itself what the model would, and what a pull would bring."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from ingle.description import Download, Offer
from ingle.errors import IngleError, ModelError, Refusals
from ingle.hub.download import PART
from ingle.hub.fetch import find
from ingle.hub.headers import take_gguf_header, take_gguf_numbers, take_safetensors, take_torch
from ingle.hub.http import Http, HubError, Refused, shown_url
from ingle.hub.listing import Listing, Origin, RemoteFile
from ingle.hub.names import RepoRef, UrlRef
from ingle.hub.origins import origin_of
from ingle.hub.pieces import Hollow, Pieces
from ingle.hub.quantizations import variants
from ingle.hub.selection import Selection, folder_weights, select, weight_files
from ingle.hub.source import ModelSource
from ingle.hub.store import Store
from ingle.hub.urls import url_files

MAX_WEIGHT_FILES = 2000
_MAX_SMALL_BYTES = 256 << 20
_CONFIGURATION = re.compile(r"(config|modules|generation_config|quantize_config|quant_config)\.json|.*\.index\.json")
"""What says how large a model is, and of which kind."""

For = Literal["plan", "show"]
"""A plan needs configuration and headers; what shows a model reads what a start does, so tokenizer and template too."""


@dataclass(frozen=True)
class Remote:
    """A model of a hub."""

    name: str
    """What it is typed as; where one of several was chosen for the user, with which."""
    choice: str | None
    """Which that is."""
    source: ModelSource
    """Its stand-in, there for as long as it is looked at."""
    folder: Path
    """Of the stand-in."""
    where: str
    """What people call the folder."""
    download: Download
    license: str | None
    """As the hub writes it."""
    refusal: IngleError | None = None
    """Why its files cannot be read: its terms are not accepted. Then there is no stand-in."""

    def named(self, text: str) -> str:
        """`text` about the stand-in as one about the model."""
        return text.replace(str(self.folder), self.where)


@contextmanager
def looked_at(
    name: str, reference: RepoRef | UrlRef, purpose: For, note: Callable[[str], None], free: int | None = None
) -> Iterator[Remote]:
    """The model that the user calls `name`, for as long as the context lasts; errors raised within name it and not its
    stand-in.

    `note` is told what makes it take long. A GGUF file is chosen for `free` bytes of memory, None for this machine's.
    Raises `ModelError`.
    """
    with tempfile.TemporaryDirectory(prefix="ingle-", ignore_cleanup_errors=True) as created:
        folder = Path(created).resolve()
        with _told_of(folder, _where(reference)):
            try:
                if isinstance(reference, RepoRef):
                    remote = _repository(reference, folder, purpose, note, free)
                else:
                    remote = _url(reference, folder, note)
                if remote.choice is None:
                    remote = replace(remote, name=name)
            except OSError as error:
                raise ModelError(
                    f"{reference}: what describes it cannot be kept in {tempfile.gettempdir()}: {error.strerror}",
                    alternative="point TMPDIR to another disk",
                ) from error
            yield remote


def _where(reference: RepoRef | UrlRef) -> str:
    """What people call the folder that the model lies in."""
    return reference.repo if isinstance(reference, RepoRef) else shown_url(reference.url).rpartition("/")[0]


@contextmanager
def _told_of(folder: Path, where: str) -> Iterator[None]:
    try:
        yield
    except IngleError as error:
        if str(folder) not in str(error):
            raise
        raise _renamed(error, str(folder), where) from error


def _renamed(error: IngleError, folder: str, where: str) -> IngleError:
    if isinstance(error, Refusals):
        return Refusals([_renamed(each, folder, where) for each in error.errors])
    alternative = None if error.alternative is None else error.alternative.replace(folder, where)
    kind = ModelError if isinstance(error, HubError) else type(error)  # whose own kinds take other arguments
    return kind(error.what.replace(folder, where), alternative=alternative)


def _repository(ref: RepoRef, folder: Path, purpose: For, note: Callable[[str], None], free: int | None) -> Remote:
    origin = origin_of(ref, note)
    with origin.http:
        listing = find(origin, ref)
        selection = select(listing, ref.choice, free)
        pieces = Pieces(origin.http, note)
        looking, refusal = _Looking(origin, listing, selection, folder, pieces, purpose), None
        try:
            weights = looking.everywhere()
        except Refused as error:
            if purpose == "plan" or error.status not in (401, 403):
                raise
            refusal = error
            weights = (
                selection.files if selection.kind == "gguf" else next(iter(folder_weights(listing.files).values()))
            )
    files = selection.files if selection.kind == "gguf" else (*selection.files, *weights)
    choice = selection.label if selection.note else None
    main = folder if selection.kind == "folder" else folder / selection.main.path
    return Remote(
        name=str(ref) if choice is None else f"{ref}:{choice}",
        choice=choice,
        source=ModelSource(ref.name, main, selection.kind),
        folder=folder,
        where=_where(ref),
        download=_download(origin, listing, selection, files, weights),
        license=listing.license.name or None,
        refusal=refusal,
    )


@dataclass(frozen=True)
class _Looking:
    """At a repository."""

    origin: Origin
    listing: Listing
    selection: Selection
    folder: Path
    pieces: Pieces
    purpose: For

    def everywhere(self) -> tuple[RemoteFile, ...]:
        """Takes what there is to take; returns the files of weights."""
        if self.selection.kind == "folder":
            self.small_files()
            weights = weight_files(self.listing, self.folder)
        else:
            weights = self.selection.files
        self.headers(weights)
        return weights

    def small_files(self) -> None:
        files = self.selection.files
        if self.purpose == "plan":
            files = tuple(file for file in files if _CONFIGURATION.fullmatch(file.path))
        else:
            files = tuple(file for file in files if not file.path.lower().endswith((".md", ".py")))
        self._all([partial(self._small, file) for file in files], "configuration")

    def headers(self, weights: Sequence[RemoteFile]) -> None:
        if len(weights) > MAX_WEIGHT_FILES:
            raise ModelError(f"{self.listing.repo} has {len(weights)} files of weights, more than any model has")
        hollow = [self._hollow(file) for file in weights]
        if self.selection.kind == "gguf":
            self._all([partial(take_gguf_header, self.pieces, file, is_first=not at) for at, file in enumerate(hollow)])
            take_gguf_numbers(self.pieces, hollow)
            return
        if hollow[0].name.endswith(".safetensors"):
            self._all([partial(take_safetensors, self.pieces, file) for file in hollow])
        else:
            take = partial(take_torch, self.pieces) if self.purpose == "show" else self._size_alone
            self._all([partial(take, file) for file in hollow])

    def _all(self, work: Sequence[Callable[[], None]], what: str = "headers") -> None:
        self.pieces.side_by_side(work, f"reading the {what} of {self.listing.repo}")

    def _hollow(self, file: RemoteFile) -> Hollow:
        return Hollow(self.origin.url(self.listing, file), self.folder / file.path, file.path, file.size)

    def _size_alone(self, file: Hollow) -> None:
        self.pieces.take(file, 0, 1)

    def _small(self, file: RemoteFile) -> None:
        """From what a pull has left on this machine, else from the hub."""
        hollow = self._hollow(file)
        for place in _places(self.origin, self.listing, file):
            if place.is_file() and place.stat().st_size == file.size:
                hollow.path.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(place, hollow.path)
                return
        self.pieces.whole(hollow, _MAX_SMALL_BYTES)


def _places(origin: Origin, listing: Listing, file: RemoteFile) -> tuple[Path, Path]:
    """Where a pull leaves its bytes; the second on a file system without links."""
    return origin.blob(listing, file), origin.folder(listing) / file.path


def _download(
    origin: Origin, listing: Listing, selection: Selection, files: Sequence[RemoteFile], weights: Sequence[RemoteFile]
) -> Download:
    destination = origin.folder(listing)
    name, url = listing.license.name, listing.license.url
    return Download(
        page=listing.page,
        revision=listing.commit,
        num_files=len(files),
        num_bytes=sum(file.size or 0 for file in files),
        num_bytes_here=sum(_bytes_here(_places(origin, listing, file), file.size or 0) for file in files),
        destination=str(destination / selection.main.path if selection.kind == "gguf" else destination),
        offers=tuple(_offers(listing, selection, weights)),
        choice=selection.note.partition(";")[0].removeprefix("taking ") or None,
        gated=listing.gated if listing.ref.hub == "huggingface" else None,
        terms=(url or listing.page) if name else None,
    )


def _offers(listing: Listing, selection: Selection, weights: Sequence[RemoteFile]) -> Iterator[Offer]:
    if listing.find("config.json") is not None:
        for name, files in folder_weights(listing.files).items():
            taken = selection.kind == "folder" and set(files) <= set(weights)
            yield Offer(name, sum(file.size or 0 for file in files), taken)
    for variant in variants(listing.files):
        taken = selection.kind == "gguf" and variant.files == selection.files
        yield Offer(variant.label, variant.size, taken, variant.refusal)


def _bytes_here(places: Sequence[Path], size: int) -> int:
    for place in (*places, *(path.with_name(path.name + PART) for path in places)):
        if place.is_file():
            return min(place.stat().st_size, size)
    return 0


def _url(ref: UrlRef, folder: Path, note: Callable[[str], None]) -> Remote:
    places = list(url_files(ref, Store()))
    hollow = [Hollow(url, folder / path.name, path.name) for path, url in places]
    with Http(on_wait=note) as http:
        pieces = Pieces(http, note)
        pieces.side_by_side(
            [partial(take_gguf_header, pieces, file, is_first=not at) for at, file in enumerate(hollow)],
            f"reading the header of {ref.file}",
        )
        take_gguf_numbers(pieces, hollow)
    sizes = [file.size or 0 for file in hollow]
    return Remote(
        name=str(ref),
        choice=None,
        source=ModelSource(hollow[0].path.stem, hollow[0].path, "gguf"),
        folder=folder,
        where=_where(ref),
        download=Download(
            page=shown_url(ref.url),
            revision=None,
            num_files=len(sizes),
            num_bytes=sum(sizes),
            num_bytes_here=sum(_bytes_here([path], size) for (path, _), size in zip(places, sizes, strict=True)),
            destination=str(places[0][0]),
        ),
        license=None,
    )
