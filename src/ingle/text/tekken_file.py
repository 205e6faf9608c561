"""Reader of `tekken.json`, Mistral's tokenizer since Nemo: tiktoken's ranks as JSON, behind a block of special tokens.

The format is that of `Tekkenizer` in https://github.com/mistralai/mistral-common.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import processors

from ingle.errors import ModelError
from ingle.text.pretokenizers import PreTokenizer
from ingle.text.tiktoken_file import byte_level_bpe

MAX_BYTES = 128 << 20

_MAX_SPECIAL = 1 << 16
_FIRST_SPECIALS = (
    "<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]",
    "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]",
)  # fmt: skip
"""Of files from before they listed them."""
SPECIAL_NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}


def read_tekken(path: Path) -> tokenizers.Tokenizer:
    """Puts BOS before a text. Raises `ModelError` for a file that cannot be read or contradicts itself."""
    try:
        if (size := path.stat().st_size) > MAX_BYTES:
            raise ModelError(f"{path}: it has {size} bytes, more than the {MAX_BYTES} that are taken")
        backend = _backend(json.loads(path.read_bytes()))
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        why = f"it has no {error}" if isinstance(error, KeyError) else error
        raise ModelError(f"{path}: not a tekken vocabulary: {why}") from error
    except Exception as error:  # all that `tokenizers` raises, of the pattern for instance
        raise ModelError(f"{path}: its tokenizer cannot be built: {error}") from error
    bos = SPECIAL_NAMES["bos_token"]
    if (bos_id := backend.token_to_id(bos)) is not None:
        backend.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, bos_id)])
    return backend


def _backend(file: Any) -> tokenizers.Tokenizer:
    config = file["config"]
    num_special, size = config["default_num_special_tokens"], config["default_vocab_size"]
    if type(num_special) is not int or not 0 <= num_special <= _MAX_SPECIAL:
        raise ValueError(f"default_num_special_tokens is {num_special!r:.40}, not a number up to {_MAX_SPECIAL}")
    if type(size) is not int or size <= num_special:
        raise ValueError(f"default_vocab_size is {size!r:.40}, not a number above {num_special}")
    listed = [entry for entry in file["vocab"] if entry["rank"] < size - num_special]
    by_rank = {entry["rank"]: base64.b64decode(entry["token_bytes"], validate=True) for entry in listed}
    if sorted(by_rank) != list(range(len(listed))):
        raise ValueError("its ranks are not 0, 1, 2 and so on, a token to each")
    tokens = [by_rank[rank] for rank in range(len(by_rank))]
    return byte_level_bpe(
        tokens, PreTokenizer((config["pattern"],)), _specials(file.get("special_tokens"), num_special)
    )


def _specials(listed: Any, count: int) -> list[str]:
    """By id; those that have no name yet are called as Mistral calls them."""
    if listed is None:
        listed = [{"rank": rank, "token_str": token} for rank, token in enumerate(_FIRST_SPECIALS)]
    named = {entry["rank"]: entry["token_str"] for entry in listed}
    specials = [named.get(rank, f"<SPECIAL_{rank}>") for rank in range(count)]
    if not all(isinstance(token, str) and token for token in specials):
        raise ValueError("a special token is no text")
    return specials
