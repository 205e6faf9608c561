"""What models there are, as Anthropic's clients ask for it."""

from __future__ import annotations

from datetime import datetime, timezone

from ingle.server.anthropic.answers import ModelInfo, ModelPage
from ingle.server.models import ModelPool, ServedModel


def model_page(pool: ModelPool) -> ModelPage:
    infos = [model_info(model, name) for name, model in pool.named()]
    first, last = (infos[0].id, infos[-1].id) if infos else (None, None)
    return ModelPage(data=infos, has_more=False, first_id=first, last_id=last)


def model_info(model: ServedModel, name: str) -> ModelInfo:
    return ModelInfo(
        id=name,
        display_name=name,
        created_at=datetime.fromtimestamp(model.created, timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        max_input_tokens=model.info.max_model_len,
        max_tokens=model.info.max_model_len,
    )
