"""Routes that are not about generation, and the errors of routing."""

from __future__ import annotations

from collections.abc import Callable

import httpx
import pytest

from ingle.version import __version__

from .fakes import MAX_MODEL_LEN, MODEL, Health, ScriptedEngine, assert_error

pytestmark = pytest.mark.anyio


async def test_models_are_listed_as_vllm_lists_them(make_client: Callable[..., httpx.AsyncClient]) -> None:
    client = make_client(default_sampling={"temperature": 0.6, "top_k": 20})
    listed = (await client.get("/v1/models")).json()
    assert listed["object"] == "list"
    assert [card["id"] for card in listed["data"]] == [MODEL, "alias"]
    card = listed["data"][0]
    permission = card.pop("permission")
    assert card == {
        "id": MODEL,
        "object": "model",
        "created": 1_700_000_000,
        "owned_by": "ingle",
        "root": "/models/tiny",
        "parent": None,
        "max_model_len": MAX_MODEL_LEN,
        "default_sampling_params": {
            "temperature": 0.6,
            "top_p": 1.0,
            "top_k": 20,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
        },
        "meta": {
            "family": "llama",
            "num_parameters": 1000,
            "stored_types": {"Q8_0": 900, "F32": 100},
            "expanded_types": ["Q8_0"],
            "dtype": "float32",
            "weight_bytes": 4000,
            "device": "cpu",
        },
    }
    assert permission[0]["object"] == "model_permission"
    assert permission[0]["id"].startswith("modelperm-")
    assert permission[0]["allow_sampling"] is True


async def test_one_model_by_name(client: httpx.AsyncClient) -> None:
    assert (await client.get(f"/v1/models/{MODEL}")).json()["id"] == MODEL
    error = assert_error(await client.get("/v1/models/nobody/else"), 404, "nobody/else", MODEL, "alias", param="model")
    assert error["code"] == "model_not_found"


async def test_health_follows_the_engine(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    response = await client.get("/health")
    assert (response.status_code, response.json()["status"]) == (200, "ok")
    engine.status = Health(False, "no step for 61 s")
    response = await client.get("/health")
    assert response.status_code == 503
    assert response.json()["detail"] == "no step for 61 s"


async def test_version(client: httpx.AsyncClient) -> None:
    assert (await client.get("/version")).json() == {"version": __version__}


async def test_unknown_paths_and_methods(client: httpx.AsyncClient) -> None:
    assert_error(await client.get("/v1/nothing"), 404, "Invalid URL (GET /v1/nothing)")
    assert_error(await client.get("/v1/models/"), 404, param="model")
    response = await client.get("/v1/completions")
    assert_error(response, 405, "GET on /v1/completions")
    assert response.headers["allow"] == "POST"


async def test_schema_describes_the_bodies(client: httpx.AsyncClient) -> None:
    schema = (await client.get("/openapi.json")).json()
    assert schema["paths"]["/v1/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"] == {
        "$ref": "#/components/schemas/CompletionRequest"
    }
    models = schema["components"]["schemas"]
    assert models["CompletionRequest"]["required"] == ["prompt"]
    assert {"ChatCompletionRequest", "ChatMessage", "StreamOptions"} <= models.keys()
    assert {"/health", "/version", "/v1/models", "/v1/models/{model}", "/v1/chat/completions"} <= schema["paths"].keys()
    for path in ("/docs", "/redoc"):
        assert "openapi.json" in (await client.get(path)).text
    assert_error(await client.post("/docs"), 405, "POST on /docs")
