"""`GET /ingle/requests`: apart from what is kept, which a server has from its first moment."""

from __future__ import annotations

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from ingle.server.endpoints import Endpoint
from ingle.server.recent import Recent, RecentRequests


async def recent_requests(request: Request) -> Response:
    """The requests that run and the last that have ended, with tokens and times, without what they say."""
    recent: Recent = request.app.state.observers.recent
    body = msgspec.json.encode(recent.told())
    return Response(body, headers={"Cache-Control": "no-store"}, media_type="application/json")


ENDPOINTS = (Endpoint("GET", "/ingle/requests", recent_requests, answers=RecentRequests, guards="tells"),)
