"""What a server answers and logs until its model is loaded: that it is not ready, what it does, and for how long."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from http import HTTPStatus

import msgspec
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from ingle.server.access import HEALTH_PATHS, LIVE_PATH
from ingle.server.errors import error_body, error_response

logger = logging.getLogger("ingle")

_OF_A_MODEL = ("/tokenize", "/tokenizer_info", "/detokenize", "/rerank", "/v2/rerank", "/score")
"""Paths that ask for a model, beside those below /v1/."""
_SILENT_S = 2.5
"""After which the log says once more what is done."""
_TICK_S = 0.25
_LONG_S = 10.0
"""A start that has taken this long is not asked again each second."""
_SHARE = re.compile(r"(\d+) of (\d+)|(\d+) ?%")
_NUMBER = re.compile(r"\d+")


class LoadingStatus(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What `/health` answers meanwhile."""

    status: str
    detail: str
    stage: str
    seconds: float
    """Since the start."""
    percent: int | None = None
    """Of the stage, where it is known."""


class Loading:
    """How far it is. Stages that differ in numbers only, such as "12 of 20 files" or "40 %", are one stage."""

    def __init__(self) -> None:
        self.done = False
        self.stage = "starting"
        self._started_s = time.monotonic()
        self._logged_s = self._started_s

    def report(self, stage: str) -> None:
        is_new = _NUMBER.sub("", stage) != _NUMBER.sub("", self.stage)
        self.stage = stage
        if is_new:
            self._log(f"engine: {stage}")

    async def watch(self) -> None:
        """Until all is loaded, nothing is silent for long."""
        while not self.done:
            await asyncio.sleep(_TICK_S)
            if not self.done and time.monotonic() - self._logged_s >= _SILENT_S:
                self._log(f"engine: still {self.stage} ({self.seconds:.0f} s since the start)")

    def _log(self, line: str) -> None:
        self._logged_s = time.monotonic()
        logger.info("%s", line)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started_s

    @property
    def percent(self) -> int | None:
        """Of the stage, where its words say so."""
        share = _SHARE.search(self.stage)
        if share is None:
            return None
        return int(share[3]) if share[3] else 100 * int(share[1]) // max(int(share[2]), 1)

    @property
    def retry_after_s(self) -> int:
        return 1 if self.seconds < _LONG_S else 5

    def status(self) -> LoadingStatus:
        seconds = round(self.seconds, 1)
        detail = f"the model is being loaded: {self.stage} ({seconds:g} s since the start)"
        return LoadingStatus(status="loading", detail=detail, stage=self.stage, seconds=seconds, percent=self.percent)


class LoadingGate:
    """Answers 503 for the model until it is loaded. What asks for no model is answered as ever."""

    def __init__(self, app: ASGIApp, loading: Loading) -> None:
        self._app = app
        self._loading = loading

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._loading.done or scope["type"] != "http" or scope["path"] == LIVE_PATH:
            await self._app(scope, receive, send)
        elif scope["path"] in HEALTH_PATHS:
            await self._health()(scope, receive, send)
        elif scope["path"].startswith("/v1/") or scope["path"] in _OF_A_MODEL:
            await self._refusal()(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    @property
    def _headers(self) -> dict[str, str]:
        return {"Retry-After": str(self._loading.retry_after_s)}

    def _health(self) -> Response:
        body, status = msgspec.json.encode(self._loading.status()), HTTPStatus.SERVICE_UNAVAILABLE
        return Response(body, status, self._headers, media_type="application/json")

    def _refusal(self) -> Response:
        status, detail = HTTPStatus.SERVICE_UNAVAILABLE, self._loading.status().detail
        message = f"T{detail[1:]}; try again in a moment, /health says how far it is."
        return error_response(status, error_body(status, message, code="model_loading"), self._headers)
