"""ModelScope on this machine, as its package sees it: revisions, files, descriptions, searches; and what goes wrong.

Proven with the package itself (1.19.2, 1.31.0 and 1.40.2): its `snapshot_download` took whole models from here, by
branch and by tag, with names such as `数据/a b#c?.json`, and refused what is private. The file layouts that it left
are those in `test_modelscope.py`. What the package hides is after records of the hub's answers that people published:

* a range of a small file comes with status 200, and an open one is not taken: the whole file comes;
* under 404 come both `record not found` and the troubles of its database;
* a listing is cut at 3000 entries without a word, a page of a search has 50 models at most.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.hub.server import LFS_SUFFIXES, Fault, Hub, HubHandler, Repo

CHANGED_S = 1_726_842_501
"""When all files were changed last."""
NOT_FOUND = {"Code": 10010205001, "Message": "获取模型信息失败，信息：record not found", "Success": False}


@dataclass
class Model(Repo):
    revisions: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """Files of tags, beside those of master."""
    tasks: list[str] = field(default_factory=lambda: ["text-generation"])

    def at(self, revision: str) -> dict[str, bytes] | None:
        return self.files if revision == "master" else self.revisions.get(revision)


@dataclass
class Scope(Hub):
    limit: int = 3000
    """Of entries that a listing shows."""


def listed(files: Mapping[str, bytes], root: str, *, recursive: bool) -> Iterator[dict[str, Any]]:
    """Folders and files below `root`, as the hub shows them."""
    folders = set[str]()
    for path, data in files.items():
        if root and not path.startswith(f"{root}/"):
            continue
        parts = path[len(root) + 1 if root else 0 :].split("/")
        for depth in range(1, len(parts)):
            folder = "/".join(filter(None, [root, *parts[:depth]]))
            if folder not in folders and (recursive or depth == 1):
                folders.add(folder)
                yield {"Name": parts[depth - 1], "Path": folder, "Type": "tree", "Size": 0, "Revision": "b" * 40}
        if recursive or len(parts) == 1:
            yield {
                "Name": parts[-1],
                "Path": path,
                "Type": "blob",
                "Size": len(data),
                "Sha256": hashlib.sha256(data).hexdigest(),
                "IsLFS": path.endswith(LFS_SUFFIXES),
                "InCheck": False,
                "Mode": "33188",
                "Revision": hashlib.sha1(data).hexdigest(),
                "CommittedDate": CHANGED_S,
                "CommitMessage": "upload",
                "CommitterName": "tiny",
            }


class ScopeHandler(HubHandler):
    state: Scope
    small = False
    """Whether a file is sent that is no LFS object, of which ranges are answered in their own way."""

    def do_POST(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub, parts = self.state, urlsplit(self.path)
        path, query = unquote(parts.path), {key: value[0] for key, value in parse_qs(parts.query).items()}
        shown = " ".join(filter(None, [path, query.get("FilePath") or query.get("Root")]))
        hub.asked.append(f"{self.command} {shown}")
        hub.tokens.append((path, self.headers.get("Authorization") or self.headers.get("Cookie")))
        fault = hub.taken(shown)
        self.small = False
        if fault is not None and fault.status:
            self._answer(fault.status, fault.body, **{key.replace("-", "_"): v for key, v in fault.headers.items()})
        elif path == "/openapi/v1/models":
            self._search_page(query)
        elif match := re.fullmatch(r"/openapi/v1/models/([^/]+/[^/]+)", path):
            if (model := self._readable(match[1], open_api=True)) is not None:
                self._json({"success": True, "request_id": "1", "data": _facts(match[1], model)})
        elif match := re.fullmatch(r"/api/v1/models/([^/]+/[^/]+)(/revisions|/repo/files|/repo|)", path):
            if (model := self._readable(match[1])) is not None:
                self._legacy(match[1], model, match[2], query, fault)
        elif match := re.fullmatch(r"/lfs/([^/]+/[^/]+)/([^/]+)/(.+)", path):
            files = hub.repos[match[1]].at(match[2])
            self._file(files[match[3]], fault)
        else:
            self._json({"Code": 404, "Message": "404 page not found", "Success": False}, 404)

    def _readable(self, name: str, *, open_api: bool = False) -> Model | None:
        """Answers itself where there is none to read."""
        model = self.state.repos.get(name)
        if model is None:
            absent = {"success": False, "code": "ResourceNotFound", "message": "record not found"}
            self._json(absent if open_api else {**NOT_FOUND, "RequestId": "1"}, 404)
            return None
        given = (self.headers.get("Authorization"), self.headers.get("Cookie"))
        if (
            model.token is not None
            and given[0] != f"Bearer {model.token}"
            and f"={model.token}" not in (given[1] or "")
        ):
            self._json({"Code": 10010403001, "Message": "无权访问", "Success": False}, 401 if any(given) else 403)
            return None
        assert isinstance(model, Model)
        return model

    def _legacy(self, name: str, model: Model, what: str, query: Mapping[str, str], fault: Fault | None) -> None:
        revision = query.get("Revision", "master")
        files = model.at(revision)
        if what == "":
            path, _, last = name.partition("/")
            self._data({"Path": path, "Name": last, "License": model.card["license"], "Revision": "master"})
        elif what == "/revisions":
            tags = [{"Revision": tag, "CreatedAt": CHANGED_S} for tag in model.revisions]
            self._data({"RevisionMap": {"Branches": [{"Revision": "master", "CreatedAt": CHANGED_S}], "Tags": tags}})
        elif files is None:
            self._json({"Code": 10010205002, "Message": f"revision {revision} not exist", "Success": False}, 404)
        elif what == "/repo/files":
            recursive = query.get("Recursive", "").lower() == "true"
            entries = list(listed(files, query.get("Root", ""), recursive=recursive))
            self._data({"Files": entries[: self.state.limit], "LatestCommitter": {"Id": "c" * 40}})
        elif query.get("FilePath") not in files:
            self._json({"Code": 10010205003, "Message": "file not found", "Success": False}, 404)
        elif query["FilePath"].endswith(LFS_SUFFIXES):
            place = f"{self.state.url.replace('127.0.0.1', 'localhost')}/lfs/{name}/{revision}/{query['FilePath']}"
            self._answer(302, b"", Location=f"{place}?auth_key=secret")
        else:
            self._small_file(files[query["FilePath"]], fault)

    def _small_file(self, data: bytes, fault: Fault | None) -> None:
        self.small = True
        if self.headers.get("Range", "").endswith("-"):
            del self.headers["Range"]
        self._file(data, fault)

    def send_response(self, code: int, message: str | None = None) -> None:
        super().send_response(200 if self.small and code == 206 else code, message)

    def _search_page(self, query: Mapping[str, str]) -> None:
        page, size = int(query.get("page_number", "1")), int(query.get("page_size", "10"))
        if size > 50:
            self._json({"success": False, "code": "InputParameterError", "message": "page_size"}, 400)
            return
        words, owner = query.get("search", "").lower(), query.get("owner")
        found = [
            _facts(name, model)
            for name, model in self.state.repos.items()
            if words in name.lower() and owner in (None, name.partition("/")[0])
        ]
        models = found[(page - 1) * size : page * size]
        data = {"models": models, "total_count": len(found), "page_number": page, "page_size": size}
        self._json({"success": True, "request_id": "1", "data": data})

    def _data(self, data: object) -> None:
        self._json({"Code": 200, "Data": data, "Message": "", "RequestId": "1", "Success": True})

    def _json(self, value: object, status: int = 200) -> None:
        self._answer(status, json.dumps(value).encode(), Content_Type="application/json; charset=utf-8")


def _facts(name: str, model: Model) -> dict[str, Any]:
    license = model.card["license"]
    return {
        "id": name,
        "owner": name.partition("/")[0],
        "repo_name": name.partition("/")[2],
        "license": license,
        "tasks": model.tasks,
        "tags": [f"license:{license}", *(f"task:{task}" for task in model.tasks), *model.tags],
        "private": model.token is not None and not model.gated,
        "gated": bool(model.gated),
        "downloads": 100,
        "likes": 3,
        "file_size": sum(map(len, model.files.values())),
    }
