"""The endpoints as FastAPI describes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from pydantic.json_schema import models_json_schema

from ingle.server.endpoints import Endpoint
from ingle.server.openai.protocol import SCHEMA_REF, body_schema
from ingle.version import __version__


def describing_app(endpoints: Sequence[Endpoint]) -> FastAPI:
    """An application whose schema, and viewers of it, are of `endpoints`."""
    bodies = [endpoint.body for endpoint in endpoints if endpoint.body is not None]

    class Described(FastAPI):
        """Knows the request bodies, which the endpoints read and validate themselves."""

        def openapi(self) -> dict[str, Any]:
            schema = super().openapi()
            _, definitions = models_json_schema([(body, "validation") for body in bodies], ref_template=SCHEMA_REF)
            schema.setdefault("components", {}).setdefault("schemas", {}).update(definitions["$defs"])
            return schema

    app = Described(title="ingle", version=__version__)
    for endpoint in endpoints:
        body = None if endpoint.body is None else body_schema(endpoint.body)
        app.add_api_route(endpoint.path, endpoint.answer, methods=[endpoint.method], openapi_extra=body)
    return app
