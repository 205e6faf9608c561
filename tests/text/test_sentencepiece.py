"""Vocabularies trained by SentencePiece itself: as folders and as GGUF files we tokenize as it does."""

from __future__ import annotations

import io
import json
import struct
import time
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import sentencepiece
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from ingle.errors import ModelError
from ingle.text.gguf_tokenizer import tokenizer_from_gguf
from ingle.text.load import load_tokenizer
from ingle.text.sentencepiece import backend_of
from ingle.text.sentencepiece_file import _fields, _model, _piece, read_sentencepiece
from ingle.text.sentencepiece_model import NORMAL
from ingle.text.tokenizer import Tokenizer
from tests.text import corpora

# As the models' makers trained them, but small.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"split_digits": True},
    "gemma": {
        "split_digits": True, "add_dummy_prefix": False, "pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3,
        "user_defined_symbols": ["<start_of_turn>", "\n", "\n\n", "\n\n\n", "▁▁", "▁▁▁", "▁▁▁▁", "\t",
                                 "<table>", "</td>"],
    },
    "unigram": {"model_type": "unigram"},
    "nfkc": {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
    "no-bytes": {"byte_fallback": False},
}  # fmt: skip


@pytest.fixture(scope="module")
def trained() -> dict[str, bytes]:
    """tokenizer.model of each family."""
    return {name: train(**options) for name, options in FAMILIES.items()}


def train(**options: Any) -> bytes:
    written = io.BytesIO()
    defaults = {
        "model_type": "bpe", "vocab_size": 1200, "byte_fallback": True, "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False, "allow_whitespace_only_pieces": True, "character_coverage": 0.98,
        "hard_vocab_limit": False, "minloglevel": 2, "num_threads": 1,
    }  # fmt: skip
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpora.SENTENCES * 4), model_writer=written, **(defaults | options)
    )
    return written.getvalue()


def folder(path: Path, model: bytes, **config: Any) -> Tokenizer:
    (path / "tokenizer.model").write_bytes(model)
    (path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return load_tokenizer(path)


def gguf_metadata(model: bytes, user_defined: Sequence[str] = ()) -> dict[str, Any]:
    """The keys that llama.cpp's `convert_hf_to_gguf.py` writes."""
    original = sentencepiece.SentencePieceProcessor(model_proto=model)
    tokens, scores, types = [], [], []
    for i in range(original.vocab_size()):
        piece, kind = original.id_to_piece(i), 1
        if original.is_unknown(i):
            kind = 2
        elif original.is_control(i):
            kind = 3
        elif original.is_byte(i):
            kind = 6
        elif piece in user_defined:
            piece, kind = piece.replace("▁", " "), 4
        tokens.append(piece)
        scores.append(original.get_score(i))
        types.append(kind)
    prefix = original.encode("a", out_type=str)[0].startswith("▁")
    keys = {"model": "llama", "pre": "default", "tokens": tokens, "scores": scores, "token_type": types,
            "bos_token_id": original.bos_id(), "eos_token_id": original.eos_id(), "unknown_token_id": original.unk_id(),
            "add_space_prefix": prefix}  # fmt: skip
    return {f"tokenizer.ggml.{key}": value for key, value in keys.items()}


def user_defined(family: str) -> Sequence[str]:
    pieces: Sequence[str] = FAMILIES[family].get("user_defined_symbols", ())
    return pieces


def is_mark(character: str) -> bool:
    return unicodedata.category(character).startswith("M")


def is_control(char: str) -> bool:
    return unicodedata.category(char) == "Cc" and char not in "\t\n\r"


def comparable(text: str, family: str) -> bool:
    """Not where text spells a special token, which SentencePiece alone takes for plain text."""
    if family == "nfkc" and (not unicodedata.is_normalized("NFC", text) or any(map(is_mark, text))):
        return False  # see SentencePieceModel.charsmap
    return not any(token in text for token in ("<s>", "</s>", "<unk>"))


@pytest.mark.parametrize("family", FAMILIES)
def test_folders_with_tokenizer_model(family: str, trained: dict[str, bytes], tmp_path: Path) -> None:
    original = sentencepiece.SentencePieceProcessor(model_proto=trained[family])
    ours = folder(tmp_path, trained[family])
    for text in (text for text in corpora.texts() if comparable(text, family)):
        token_ids, expected = ours.encode(text, add_special_tokens=False), original.encode(text)
        if family == "unigram" and token_ids != expected:  # as likely, read in another order
            assert sorted(token_ids) == sorted(expected) and ours.decode(token_ids) == ours.decode(expected)
        else:
            assert token_ids == expected, repr(text)
    assert ours.encode("hello") == [original.bos_id(), *original.encode("hello")]


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_gguf_files(family: str, trained: dict[str, bytes]) -> None:
    original = sentencepiece.SentencePieceProcessor(model_proto=trained[family])
    ours = tokenizer_from_gguf(gguf_metadata(trained[family], user_defined(family)), Path("model.gguf"))
    for text in (text for text in corpora.texts(seed=1) if comparable(text, family)):
        token_ids = ours.encode(text, add_special_tokens=False)
        assert token_ids == original.encode(text), repr(text)
        assert ours.decode(token_ids) == original.decode(token_ids)
        detokenizer = ours.detokenizer(skip_special_tokens=True)
        assert "".join([*map(detokenizer.push, token_ids), detokenizer.flush()]) == ours.decode(token_ids)
    assert (ours.bos_token_id, ours.eos_token_ids) == (original.bos_id(), (original.eos_id(),))


def test_gguf_files_with_equal_scores(trained: dict[str, bytes]) -> None:
    """As vocabularies are that were extended with pieces of score 0."""
    model = with_scores(trained["llama"], lambda piece, score: score + 0.0 if piece.strip("▁").isascii() else 0.0)
    original = sentencepiece.SentencePieceProcessor(model_proto=model)
    ours = tokenizer_from_gguf(gguf_metadata(model), Path("model.gguf"))
    for text in (text for text in corpora.texts(seed=2) if comparable(text, "llama")):
        assert ours.encode(text, add_special_tokens=False) == original.encode(text), repr(text)


def test_user_defined_pieces_of_older_converters(trained: dict[str, bytes]) -> None:
    """They wrote runs of spaces as SentencePiece spells them."""
    metadata = gguf_metadata(trained["gemma"], user_defined("gemma"))
    tokens = metadata["tokenizer.ggml.tokens"]
    older = metadata | {"tokenizer.ggml.tokens": [t.replace(" ", "▁") if not t.strip(" ") else t for t in tokens]}
    ours = tokenizer_from_gguf(older, Path("model.gguf"))
    original = sentencepiece.SentencePieceProcessor(model_proto=trained["gemma"])
    text = "a  b   c\n\n    d"
    assert ours.encode(text, add_special_tokens=False) == original.encode(text)


def test_flags_and_added_tokens(trained: dict[str, bytes], tmp_path: Path) -> None:
    size = sentencepiece.SentencePieceProcessor(model_proto=trained["llama"]).vocab_size()
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<tool>": size, "<|im_end|>": size + 1}))
    ours = folder(
        tmp_path,
        trained["llama"],
        add_bos_token=False,
        add_eos_token=True,
        eos_token="<|im_end|>",
        chat_template="{{ 1 }}",
    )
    ids = ours.encode("<tool>a</s>")
    assert ids[0] == size and ids[-2:] == [2, size + 1]
    assert (ours.eos_token_ids, ours.special_tokens["bos_token"]) == ((size + 1,), "<s>")
    assert ours.decode(ids) == "<tool> a"
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<far>": size + 50}))
    with pytest.raises(ModelError, match=r"added_tokens\.json: token '<far>' cannot have the id"):
        load_tokenizer(tmp_path)


def test_space_prefix_after_special_tokens_as_the_folder_says(trained: dict[str, bytes], tmp_path: Path) -> None:
    each = folder(tmp_path, trained["llama"])
    assert "".join(each.token(i) for i in each.encode("a</s>a")) == "<s> a</s> a"
    first = folder(tmp_path, trained["llama"], legacy=False)
    assert "".join(first.token(i) for i in first.encode("a</s>a")) == "<s> a</s>a"


def test_phi3_swallows_white_space_after_turn_markers(trained: dict[str, bytes]) -> None:
    metadata = gguf_metadata(trained["llama"])
    metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"], "<|user|>"]
    metadata["tokenizer.ggml.scores"] = [*metadata["tokenizer.ggml.scores"], -1000.0]
    metadata["tokenizer.ggml.token_type"] = [*metadata["tokenizer.ggml.token_type"], 3]
    marker = len(metadata["tokenizer.ggml.tokens"]) - 1

    def encode(architecture: str, text: str) -> list[int]:
        tokenizer = tokenizer_from_gguf(metadata | {"general.architecture": architecture}, Path("m.gguf"))
        return tokenizer.encode(text, add_special_tokens=False)

    plain = encode("llama", "a")
    assert encode("phi3", "<|user|> \n a") == [marker, *plain]
    assert encode("llama", "<|user|> \n a") != [marker, *plain]
    assert encode("phi3", "<s> a") == encode("llama", "<s> a")


def with_scores(model: bytes, score_of: Callable[[str, float], float]) -> bytes:
    """The model with other scores; all else in it stays."""
    written = b""
    for field, value in _fields(model):
        assert isinstance(value, bytes)
        if field == 1:
            piece, score, kind = _piece(value)
            score = score_of(piece, score) if kind == NORMAL else score
            text = piece.encode()
            value = b"\x0a" + varint(len(text)) + text + b"\x15" + struct.pack("<f", score) + b"\x18" + varint(kind)
        written += varint(field << 3 | 2) + varint(len(value)) + value
    return written


def varint(value: int) -> bytes:
    more, low = value >> 7, value & 127
    return bytes([low | 128]) + varint(more) if more else bytes([low])


def crafted(pieces: dict[str, float], symbols: Sequence[str] = (), **normalizer: bool) -> bytes:
    """A BPE model of these pieces and their scores."""
    model = train(vocab_size=700, byte_fallback=False, user_defined_symbols=list(symbols))
    kept = [(field, value) for field, value in _fields(model) if field != 1 or _piece(value)[2] != NORMAL]  # type: ignore[arg-type]
    messages = [(1, b"\x0a" + varint(len(piece.encode())) + piece.encode()) for piece in pieces]
    raw = b"".join(
        varint(field << 3 | 2) + varint(len(value)) + value  # type: ignore[arg-type]
        for field, value in [*kept, *messages]
    )
    return with_scores(raw, lambda piece, _: pieces[piece])


def encode(model: bytes, text: str, folder_: Path) -> list[str]:
    ours = folder(folder_, model)
    tokens = [ours._backend.id_to_token(token_id) for token_id in ours.encode(text, add_special_tokens=False)]
    assert tokens == sentencepiece.SentencePieceProcessor(model_proto=model).encode(text, out_type=str)
    return tokens


def test_equal_scores_merge_leftmost_first(tmp_path: Path) -> None:
    pieces = {"▁": -3.0, "a": -3.0, "b": -3.0, "c": -3.0, "bc": -1.0, "ab": -1.0}
    assert encode(crafted(pieces), "abc", tmp_path) == ["▁", "ab", "c"]
    assert encode(crafted(pieces | {"bc": -0.5}), "abc", tmp_path) == ["▁", "a", "bc"]


def test_user_defined_pieces_get_no_space_of_their_own(tmp_path: Path) -> None:
    model = crafted({"▁": -1.0, "a": -2.0, "b": -3.0}, ["<sep>"])
    assert encode(model, "a<sep>b", tmp_path) == ["▁", "a", "<sep>", "b"]
    assert encode(model, "<sep>b", tmp_path) == ["▁", "<sep>", "b"]


def test_a_user_defined_piece_may_end_an_answer(tmp_path: Path) -> None:
    model = crafted({"▁": -1.0, "a": -2.0}, ["<|im_end|>", "<|user|>"])
    template = "{% for m in messages %}<|user|>{{ m.content }}<|im_end|>{% endfor %}"
    assert folder(tmp_path, model, chat_template=template).eos_token_ids == (2, 3)


OPTIONS = {
    "suffix": {"treat_whitespace_as_suffix": True},
    "symbols": {"user_defined_symbols": ["<sep>", "<se", "▁▁", "\n\n", "ing"]},
    "trims": {"remove_extra_whitespaces": True},
    "no prefix": {"add_dummy_prefix": False},
    "no bytes": {"byte_fallback": False},
    "unigram": {"model_type": "unigram"},
    "nfkc": {"normalization_rule_name": "nmt_nfkc"},
}


@lru_cache
def variant(names: tuple[str, ...], tied: int) -> tuple[Tokenizer, sentencepiece.SentencePieceProcessor]:
    """A model with these options, whose scores are rounded so that some `tied` of them are equal."""
    model = train(vocab_size=700, **{key: value for name in names for key, value in OPTIONS[name].items()})
    if "unigram" not in names and tied > 1:
        model = with_scores(model, lambda _, score: float(score // tied))
    with TemporaryDirectory() as path:
        return folder(Path(path), model), sentencepiece.SentencePieceProcessor(model_proto=model)


SNIPPETS = [
    "a",
    "b",
    " ",
    "  ",
    "   ",
    "the ",
    "<sep>",
    "<se",
    "<s",
    "\n",
    "\n\n",
    "你好",
    "天天",
    "é",
    "ing",
    "\t",
    "1",
    "😀",
    "▁",
]


@given(
    names=st.sets(st.sampled_from(sorted(OPTIONS)), max_size=3).map(lambda names: tuple(sorted(names))),
    tied=st.sampled_from([1, 3, 100, 10**6]),
    text=st.one_of(
        st.lists(st.sampled_from(SNIPPETS), max_size=12).map("".join),
        st.sampled_from([text for text in corpora.SENTENCES if len(text) < 200]),
        st.text(max_size=12),
    ),
)
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_text_with_any_options_as_sentencepiece(names: tuple[str, ...], tied: int, text: str) -> None:
    assume("nfkc" not in names or ("\r\n" not in text and comparable(text, "nfkc")))  # see SentencePieceModel.charsmap
    assume("nfkc" not in names or not text or not all(map(is_control, text)))  # it prefixes the nothing that is left
    assume(not any(token in text for token in ("<s>", "</s>", "<unk>", "\0")))
    assume("▁" not in text or not {"suffix", "trims"}.intersection(names))  # its own sign is trimmed in odd ways
    ours, original = variant(names, tied)
    token_ids, expected = ours.encode(text, add_special_tokens=False), original.encode(text)
    if "unigram" in names and token_ids != expected:  # as likely, read in another order
        assert sorted(token_ids) == sorted(expected) and ours.decode(token_ids) == ours.decode(expected)
    else:
        assert token_ids == expected
    if "no bytes" not in names:  # SentencePiece writes its own sign for what it does not know
        assert ours.decode(expected) == original.decode(expected)


def test_offsets_are_those_of_merges_by_rank() -> None:
    """The same model by both ways of merging."""
    model = _model(SMALL)
    by_rank, by_score = backend_of(model), backend_of(replace(model, symbols_within=True, types=[*model.types[:-1], 4]))
    for text in corpora.texts():
        expected, encoded = by_rank.encode(text), by_score.encode(text)
        assert (encoded.ids, encoded.offsets) == (expected.ids, expected.offsets)


def test_merging_by_score_takes_time_in_proportion_to_the_text() -> None:
    model = _model(with_scores(SMALL, lambda _, score: 0.0))
    backend = backend_of(model)
    for unit in ("the ", "a", "天"):
        seconds = []
        for count in (20_000, 80_000):
            start = time.perf_counter()
            backend.encode(unit * count)
            seconds.append(time.perf_counter() - start)
        assert seconds[1] < 10 * seconds[0] + 0.05, unit


SMALL = train(vocab_size=600)


@given(
    cut=st.integers(0, len(SMALL)),
    flips=st.lists(st.tuples(st.integers(0, len(SMALL) - 1), st.integers(0, 255)), max_size=8),
)
@settings(max_examples=200, deadline=5000, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_models_give_one_error(tmp_path: Path, cut: int, flips: list[tuple[int, int]]) -> None:
    raw = bytearray(SMALL)
    for position, value in flips:
        raw[position] = value
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer.model").write_bytes(raw if flips else raw[:cut])
    try:
        load_tokenizer(tmp_path).encode("hello wörld 你好")
    except ModelError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    "raw, message",
    [
        (b"", "it has 0 pieces"),
        (b"\x0a\xff\xff\xff\xff\x0f", "cut off"),
        (b"\x0a" + b"\x80" * 20, "does not end"),
        (b"\x0b", "wire type 3"),
        (b"\x08\x05", "a number where text should be"),
        (b"\x0a\x03\x0a\x01\xff", "utf-8"),
        (b"\x0a\x05\x15\x00\x00\xc0\x7f", "no number"),
        (b"\x0a\x02\x18\x09", "type 9"),
        (b"\x0a\x03\x0a\x01a\x12\x02\x18\x03", "of kind 3"),
        (b"\x0a\x03\x0a\x01a", "no piece for what it does not know"),
    ],
    ids=lambda value: None if isinstance(value, bytes) else value,
)
def test_crafted_models(tmp_path: Path, raw: bytes, message: str) -> None:
    (tmp_path / "tokenizer.model").write_bytes(raw)
    with pytest.raises(ModelError, match=rf"tokenizer\.model: not a SentencePiece model: .*{message}"):
        read_sentencepiece(tmp_path / "tokenizer.model")
