"""Models that write text and were trained to judge: of a query and a text, whether the one answers the other.

Such a model reads both in a prompt of its own, and the score is how likely it is to go on with its word for yes rather
than with that for no.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from ingle.errors import ConfigError, RequestError
from ingle.request import Pooling
from ingle.text.tokenizer import Tokenizer

_MAX_BYTES = 1 << 20
_SAYS_SO = re.compile(rb"^\s*(pipeline_tag\s*:\s*|-\s*)[\"']?text-ranking[\"']?\s*$", re.MULTILINE)


class Judgement(msgspec.Struct, frozen=True):
    """A kind of reranker: data of its makers'."""

    model_type: str
    before: str
    asked: str
    """With {instruction}, {query} and {document}: what is cut where it is too long."""
    after: str
    instruction: str
    yes: str
    no: str


JUDGEMENTS: Mapping[str, Judgement] = {
    "qwen3": Judgement(
        model_type="qwen3",
        before=(
            "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
            'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
        ),
        asked="<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {document}",
        after="<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
        instruction="Given a web search query, retrieve relevant passages that answer the query",
        yes="yes",
        no="no",
    ),
}
"""By the value of `--rerank-template`. Source: the model cards of Qwen3-Reranker."""


@dataclass(frozen=True)
class Reranker:
    judgement: Judgement
    tokenizer: Tokenizer
    before: tuple[int, ...]
    after: tuple[int, ...]
    pooling: Pooling
    """Of a request for a score: the logits of no and of yes."""

    def prompt(self, query: str, document: str, instruction: str | None = None, most: int | None = None) -> list[int]:
        """Token ids, of which the document's last are left out where there would be more than `most`.

        What is asked is a client's: it is read as plain text, so that no `<|im_end|>` in it ends the question.
        """
        judgement = self.judgement
        given = {"instruction": instruction or judgement.instruction, "query": query, "document": document}
        # One pass, so that what is filled in is not looked at again.
        asked = re.sub(r"\{(instruction|query|document)\}", lambda match: given[match[1]], judgement.asked)
        ids = self.tokenizer.encode_plain(asked)
        if most is not None:
            room = most - len(self.before) - len(self.after)
            if room < 1:
                raise RequestError(f"truncate_prompt_tokens {most} leaves no room for a text: the prompt around it has "
                                   f"{most - room} tokens", param="truncate_prompt_tokens")  # fmt: skip
            ids = ids[:room]
        return [*self.before, *ids, *self.after]


def score(logits: Sequence[float]) -> float:
    """How likely yes is, of no and yes."""
    no, yes = logits
    return 1.0 / (1.0 + math.exp(min(no - yes, 700.0)))


def pairs_of(queries: str | Sequence[str], documents: str | Sequence[str]) -> list[tuple[str, str]]:
    """One query for all documents, or one for each. Raises `RequestError` where they are neither."""
    asking = [queries] if isinstance(queries, str) else list(queries)
    texts = [documents] if isinstance(documents, str) else list(documents)
    asking = asking * len(texts) if len(asking) == 1 else asking
    if len(asking) != len(texts):
        raise RequestError(f"{len(asking)} queries and {len(texts)} documents: give one query for all or one each")
    return list(zip(asking, texts, strict=True))


def reranker_of(
    wanted: Literal["auto", "qwen3", "none"], path: Path, metadata: Mapping[str, Any] | None, tokenizer: Tokenizer
) -> Reranker | None:
    """That of the model at `path`: what is `wanted`, or what its files say. `metadata`: of a GGUF file.

    Raises `ConfigError` for one whose words the tokenizer does not have.
    """
    if wanted == "none" or (wanted == "auto" and not _says_so(path, metadata)):
        return None
    model_type = _model_type(path) if metadata is None else metadata.get("general.architecture")
    name = wanted if wanted != "auto" else next((n for n, j in JUDGEMENTS.items() if j.model_type == model_type), None)
    if name is None:
        return None
    judgement = JUDGEMENTS[name]
    words = [tokenizer.encode(word, add_special_tokens=False) for word in (judgement.no, judgement.yes)]
    if any(len(ids) != 1 for ids in words):
        if wanted == "auto":
            return None
        raise ConfigError(f"--rerank-template {wanted}: the model's vocabulary has no single token for "
                          f"{judgement.yes!r} and {judgement.no!r}: it is no such reranker")  # fmt: skip
    before, after = (tokenizer.encode(part, add_special_tokens=False) for part in (judgement.before, judgement.after))
    pooling = Pooling(kind="logits", normalize=False, token_ids=tuple(ids[0] for ids in words))
    return Reranker(judgement, tokenizer, tuple(before), tuple(after), pooling)


def _says_so(path: Path, metadata: Mapping[str, Any] | None) -> bool:
    """By the model card's head, or by the tags that a GGUF file has of it."""
    if metadata is not None:
        tags = metadata.get("general.tags")
        return isinstance(tags, Sequence) and "text-ranking" in tags
    if b"LogitScore" in _head(path / "modules.json"):
        return True
    card = _head(path / "README.md")
    return card.startswith(b"---") and _SAYS_SO.search(card[: card.find(b"\n---", 3)]) is not None


def _model_type(folder: Path) -> str | None:
    try:
        config = json.loads(_head(folder / "config.json"))
    except (ValueError, RecursionError):
        return None  # whoever reads the model says what is wrong with it
    return config.get("model_type") if isinstance(config, dict) else None


def _head(file: Path) -> bytes:
    try:
        with file.open("rb") as opened:
            return opened.read(_MAX_BYTES)
    except OSError:
        return b""
