from __future__ import annotations

import logging
import random
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from ingle.errors import ModelError
from ingle.text.gguf_tokenizer import tokenizer_from_gguf
from ingle.text.load import load_tokenizer
from ingle.text.pretokenizers import NOT_BYTES, PRE_TOKENIZERS
from ingle.text.tokenizer import Tokenizer
from tests.text import toys

PATH = Path("model.gguf")


def byte_level(**changes: Any) -> Tokenizer:
    return tokenizer_from_gguf(toys.byte_level_metadata(**changes), PATH)


def sentence_piece(**changes: Any) -> Tokenizer:
    return tokenizer_from_gguf(toys.sentence_piece_metadata(**changes), PATH)


def test_byte_level_is_the_tokenizer_it_was_converted_from() -> None:
    ours, original = byte_level(), toys.byte_level()
    for text in toys.CORPUS:
        assert ours.encode(text) == original.encode(text).ids
        assert ours.decode(ours.encode(text)) == text
    assert (ours.vocab_size, ours.bos_token_id, ours.eos_token_ids) == (400, 1, (2,))
    assert ours.special_tokens == {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    assert ours.special_token_ids == {0, 1, 2}
    assert ours.encode("<|im_end|>") == [2]


@pytest.mark.parametrize(
    ("pre", "text", "words"),
    [
        ("gpt-2", "It's 1234  ok\n\n x", ["It", "'s", "Ġ1234", "Ġ", "Ġok", "ĊĊ", "Ġx"]),
        ("smollm", "It's 12", ["It", "'s", "Ġ", "1", "2"]),
        ("llama-bpe", "It'S 1234567", ["It", "'S", "Ġ", "123", "456", "7"]),
        ("qwen2", "It'S 12", ["It", "'S", "Ġ", "1", "2"]),
        ("tekken", "FooBar's 12", ["Foo", "Bar", "'s", "Ġ", "1", "2"]),
        ("gpt-4o", "FooBar's 1234", ["Foo", "Bar's", "Ġ", "123", "4"]),
        ("deepseek-v3", "1234 a_b", ["123", "4", "Ġa", "_b"]),
        ("deepseek-coder", "x 12\n", ["x", "Ġ", "1", "2", "Ċ"]),
        ("falcon", "a 1234", ["a", "Ġ", "123", "4"]),
        ("default", "a 1234.", ["a", "Ġ", "123", "4", "."]),
        ("jina-v2-es", "It's 1234", ["It", "'s", "Ġ1234"]),
        ("bloom", "It's 1234, x", ["It's", "Ġ1234", ",", "Ġx"]),
        ("chameleon", "It's 12\n", ["It", "'", "s", "Ġ", "1", "2", "Ċ"]),
        ("superbpe", "a b 1234567 c", ["aĠbĠ", "1", "234", "567", "Ġc"]),
        ("exaone-moe", "it is so 12", ["itĠisĠso", "Ġ", "1", "2"]),
        ("kimi-k2", "FooBar's 1234你a", ["Foo", "Bar's", "Ġ", "123", "4", "ä½ł", "a"]),
        ("afmoe", "x 1234567", ["x", "Ġ", "1", "234", "567"]),
        ("tiny_aya", "x 1234567", ["x", "Ġ", "1", "234", "567"]),
        ("jais-2", "a    b 1234", ["a", "ĠĠ", "Ġ", "Ġb", "Ġ", "123", "4"]),
        ("spark2_5", "a.\n\n12", ["a", ".", "Ċ", "Ċ", "1", "2"]),
        ("ufakzeka", "Ali'sin 12", ["Ali", "'sin", "Ġ", "1", "2"]),
        ("minicpm5", "a 12345", ["a", "Ġ", "123", "45"]),
    ],
)
def test_pre_tokenizers(pre: str, text: str, words: list[str]) -> None:
    split = byte_level(pre=pre)._backend.pre_tokenizer.pre_tokenize_str(text)
    assert [word for word, _ in split] == words


LLAMA_CPP = """
default minicpm5 llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano deepseek-llm
deepseek-coder deepseek-v3 youtu falcon mpt starcoder gpt-2 phi-2 jina-es jina-de gigachat jina-v2-es jina-v2-de
a.x-4.0 mellum modern-bert jais-2 gemma4 granite-embed-multi-311m sarvam-moe jina-v1-en jina-v2-code roberta-bpe
whitespace refact command-r qwen2 deepseek-r1-qwen kormo f2llmv2 qwen35 stablelm2 olmo dbrx smaug-bpe poro-chat glm4
chatglm-bpe viking jais tekken smollm codeshell bloom gpt3-finnish exaone exaone4 exaone-moe chameleon minerva-7b
megrez gpt-4o llama4 kanana2 talkie granite-embed-multi-97m tiny_aya cohere2moe superbpe trillion granite-docling
bailingmoe bailingmoe2 llada-moe seed-coder hunyuan hunyuan-dense joyai-llm kimi-k2 grok-2 afmoe laguna minimax-m2
solar-open mellum2 glm5
hy_v4 spark2_5 ufakzeka
"""


def test_every_name_that_llama_cpp_knows_is_known_or_refused() -> None:
    assert set(LLAMA_CPP.split()) <= PRE_TOKENIZERS.keys() | NOT_BYTES
    for name in NOT_BYTES:
        with pytest.raises(ModelError, match=f"those of {name}, of characters"):
            byte_level(pre=name)


def test_an_unknown_pre_tokenizer_is_llama_cpps_default_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        ours = byte_level(pre="from-the-future")
    assert "from-the-future" in caplog.text
    assert ours.encode(toys.CORPUS[1]) == byte_level(pre="default").encode(toys.CORPUS[1])


def test_llama_3_takes_whole_words_whether_merges_lead_there_or_not() -> None:
    tokens = [*toys.byte_level_metadata()["tokenizer.ggml.tokens"], "zzyzx"]
    for pre, num_tokens in (("llama-bpe", 2), ("gpt-2", 5)):  # BOS and the word; each letter
        ours = byte_level(pre=pre, tokens=tokens, token_type=[3] * 3 + [1] * 398)
        assert len(ours.encode("zzyzx")) == num_tokens


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, (0, 0)),
        ({"add_bos_token": True}, (1, 0)),
        ({"add_bos_token": True, "add_eos_token": True}, (1, 1)),
        ({"pre": "llama-bpe"}, (1, 0)),
        ({"pre": "llama-bpe", "add_bos_token": False}, (0, 0)),
        ({"pre": "llama-bpe", "bos_token_id": None}, (0, 0)),
    ],
)
def test_bos_and_eos_as_the_flags_say(changes: dict[str, Any], expected: tuple[int, int]) -> None:
    ours = byte_level(**changes)
    plain = ours.encode("fox", add_special_tokens=False)
    assert ours.encode("fox") == [1] * expected[0] + plain + [2] * expected[1]


def test_sentence_piece_adds_bos_unless_told_otherwise() -> None:
    assert sentence_piece().encode("abc")[0] == 1
    assert sentence_piece(add_bos_token=False).encode("abc")[0] != 1
    assert sentence_piece().special_tokens == {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}


def reference_ids(text: str) -> list[int]:
    """SentencePiece's BPE as its paper has it: join the best-scored pair, leftmost first, until none is a token."""
    tokens, scores, types = toys.sentence_piece_vocabulary()
    rank = {t: scores[i] for i, t in enumerate(tokens) if types[i] == 1}
    symbols = list("▁" + text.replace(" ", "▁")) if text else []
    while True:
        joins = [(-rank[a + b], i) for i, (a, b) in enumerate(pairwise(symbols)) if a + b in rank]
        if not joins:
            break
        _, i = min(joins)
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
    ids = {token: i for i, token in enumerate(tokens)}
    return [i for s in symbols for i in ([ids[s]] if s in ids else [ids[f"<0x{byte:02X}>"] for byte in s.encode()])]


@settings(deadline=None, max_examples=300)
@given(st.text("abc 你好.é😀▁\n", max_size=30))
def test_sentence_piece_merges_by_score_and_falls_back_to_bytes(text: str) -> None:
    ours = SENTENCE_PIECE
    token_ids = ours.encode(text, add_special_tokens=False)
    assert token_ids == reference_ids(text)
    assert ours.decode(token_ids) == text.replace("▁", " ")


SENTENCE_PIECE = sentence_piece()


def test_space_prefix_at_each_stretch_of_text() -> None:
    """As llama.cpp and the converters of transformers for Llama have it."""
    token = SENTENCE_PIECE.token
    ids = SENTENCE_PIECE.encode("ab</s>ab<tool>ab")
    assert [token(i) for i in ids] == ["<s>", " ab", "</s>", " ab", "<tool>", " ab"]
    ids = sentence_piece(add_space_prefix=False).encode(" ab</s>ab")
    assert [token(i) for i in ids] == ["<s>", " ab", "</s>", "ab"]
    assert sentence_piece(add_space_prefix=False).decode(ids) == " abab"


def test_control_tokens_are_skipped_and_user_defined_ones_shown() -> None:
    ids = SENTENCE_PIECE.encode("a</s><tool>")
    assert SENTENCE_PIECE.decode(ids) == "a<tool>"
    assert SENTENCE_PIECE.special_token_ids == {0, 1, 2}


def test_end_tokens_of_turn_and_message_count() -> None:
    assert byte_level(eot_token_id=0, eom_token_id=5).eos_token_ids == (2, 0, 5)
    template = "{{ messages[1].content }}<|endoftext|>"
    assert byte_level(chat_template=template).eos_token_ids == (2, 0)
    assert byte_level(chat_template=template).chat_template == template


def test_ids_out_of_range_count_for_none(caplog: pytest.LogCaptureFixture) -> None:
    ours = byte_level(bos_token_id=2**32 - 1, eot_token_id=400)
    assert (ours.bos_token_id, ours.eos_token_ids) == (None, (2,))
    assert "4294967295" in caplog.text


VOCABULARY = toys.sentence_piece_vocabulary()


@pytest.mark.parametrize(
    ("make", "changes", "message"),
    [
        (byte_level, {"model": None}, "kind None"),
        (byte_level, {"model": "rwkv"}, "kind 'rwkv'"),
        (byte_level, {"tokens": None}, "tokens is missing"),
        (byte_level, {"tokens": []}, "tokens is missing"),
        (byte_level, {"tokens": [1, 2]}, "wrong type"),
        (byte_level, {"tokens": ["a", "b", "a"], "token_type": None}, "appear twice"),
        (byte_level, {"token_type": [1, 2]}, "400 tokens and 2 token types"),
        (byte_level, {"scores": [0.5]}, "400 tokens and 1 scores"),
        (byte_level, {"merges": None}, "merges is missing"),
        (byte_level, {"merges": ["q no-such-token"]}, "out of vocabulary"),
        (byte_level, {"merges": ["nospace"]}, "cannot be built"),
        (byte_level, {"add_bos_token": True, "bos_token_id": None}, "bos_token_id"),
        (sentence_piece, {"scores": None}, "scores is missing"),
        (sentence_piece, {"scores": ["x"] * len(VOCABULARY[0])}, "wrong type"),
        (sentence_piece, {"tokens": [*VOCABULARY[0][:-1], "x" * 20_000]}, "longer than any"),
    ],
)
def test_contradictions_give_one_clear_error(make: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        make(**changes)
    assert str(caught.value).startswith("model.gguf: ")


def test_default_model_encodes_as_transformers(smollm2_gguf: Path) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name)
    ours = load_tokenizer(smollm2_gguf)
    texts, rng = list(toys.TEXTS), random.Random(0)
    texts += ["".join(rng.choices("abcXYZ 019,.!'\n\t你好世界😀é—_-()<>½", k=rng.randint(1, 60))) for _ in range(400)]
    for text in texts:
        if not any(char.isnumeric() for char in text):
            assert ours.encode(text) == theirs.encode(text)
    # From a GGUF file transformers does not set digits apart, as the original's `tokenizer.json` and llama.cpp do.
    theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    for text in texts:
        token_ids = ours.encode(text)
        assert token_ids == theirs.encode(text)
        assert ours.decode(token_ids, skip_special_tokens=False) == text
        detokenizer = ours.detokenizer(skip_special_tokens=False)
        assert "".join([*map(detokenizer.push, token_ids), detokenizer.flush()]) == text


def test_default_model_is_known_to_the_last_detail(smollm2_gguf: Path) -> None:
    ours = load_tokenizer(smollm2_gguf)
    assert (ours.vocab_size, ours.bos_token_id, ours.eos_token_ids) == (49152, 1, (2,))
    # As llama.cpp encodes it, with the default model's file.
    assert ours.encode(" ½ ١٢") == [216, 16738, 216, 164, 111, 164, 112]


def test_default_model_loads_in_a_moment(smollm2_gguf: Path) -> None:
    def load_s() -> float:
        started = time.process_time()
        load_tokenizer(smollm2_gguf)
        return time.process_time() - started

    assert min(load_s() for _ in range(3)) < 0.4
