from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from starlette.applications import Starlette
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, pre_tokenizers, processors

from ingle.server.models import ServedModel
from ingle.text.chat_template import ChatTemplate
from ingle.text.load import TextSide, load_tokenizer
from ingle.text.tokenizer import Tokenizer

from .fakes import GREETING, MAX_MODEL_LEN, MODEL, TEMPLATE, Info, ScriptedEngine, app_for, client_of


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """One token per byte, so that characters outside ASCII span several; <s> goes before a text, </s> ends one."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<s>", "</s>", *letters])}
    raw = RawTokenizer(models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens(["<s>", "</s>"])
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    raw.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return load_tokenizer(folder)


@pytest.fixture
def engine(tokenizer: Tokenizer) -> ScriptedEngine:
    engine = ScriptedEngine(tokenizer, Info(MAX_MODEL_LEN, tokenizer.vocab_size), lambda request: ())
    engine.say(GREETING)
    return engine


@pytest.fixture
def model(engine: ScriptedEngine, tokenizer: Tokenizer) -> ServedModel:
    return ServedModel(
        engine=engine,  # type: ignore[arg-type]
        text=TextSide(tokenizer, ChatTemplate(TEMPLATE, tokenizer.special_tokens), {}),
        names=(MODEL, "alias"),
        root="/models/tiny",
        created=1_700_000_000,
    )


@pytest.fixture
def app(model: ServedModel) -> Starlette:
    return app_for(model)


@pytest.fixture
def client(app: Starlette) -> httpx.AsyncClient:
    return client_of(app)


@pytest.fixture
def make_client(model: ServedModel) -> Callable[..., httpx.AsyncClient]:
    """A client of a server that differs in what `app_for` takes."""
    return lambda **changes: client_of(app_for(model, **changes))
