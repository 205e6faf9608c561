from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer

from ingle.config import TextConfig
from ingle.errors import ModelError, RequestError
from ingle.text.answer_end import call_ends
from ingle.text.load import load_tokenizer
from tests.text import toys
from tests.text.templates import TEMPLATES

NAMED = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
CHATML = TEMPLATES["chatml"]


def with_truncation() -> Tokenizer:
    backend = toys.byte_level()
    backend.enable_truncation(4)
    backend.enable_padding(length=16, pad_token="<|endoftext|>")
    return backend


FOLDERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "bare": (toys.byte_level, {}),
    "byte-level": (toys.byte_level, {"tokenizer_config__json": NAMED}),
    "bos in the post-processor": (
        toys.sentence_piece,
        {"tokenizer_config__json": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}},
    ),
    "add_bos_token beside tokenizer.json": (
        toys.byte_level,
        {"tokenizer_config__json": {**NAMED, "add_bos_token": True, "add_eos_token": True}},
    ),
    "no bos although the file adds it": (
        toys.sentence_piece,
        {"tokenizer_config__json": {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": False}},
    ),
    "flags changed and tokens added by the config": (
        toys.byte_level,
        {
            "tokenizer_config__json": {
                **NAMED,
                "added_tokens_decoder": {
                    "402": {"content": " x", "lstrip": False, "normalized": False, "special": False},
                    "0": {"content": "<|endoftext|>", "special": True},
                    "400": {"content": "<tool>", "lstrip": True, "rstrip": True, "normalized": False, "special": True},
                },
                "extra_special_tokens": ["user"],
            }
        },
    ),
    "special tokens that the vocabulary lacks": (
        toys.byte_level,
        {"tokenizer_config__json": {"pad_token": "[PAD]", "mask_token": "[MASK]", "bos_token": "[BOS]"}},
    ),
    "a vocabulary entry becomes special": (toys.byte_level, {"tokenizer_config__json": {"eos_token": "x"}}),
    "special_tokens_map": (
        toys.byte_level,
        {
            "tokenizer_config__json": {"pad_token": "[PAD]"},
            "special_tokens_map__json": {
                "eos_token": {"content": "<|im_end|>", "lstrip": False, "normalized": False},
                "bos_token": "[BOS]",
                "additional_special_tokens": ["[A]", "<tool>"],
            },
        },
    ),
    "added_tokens.json beside tokenizer.json": (
        toys.byte_level,
        {
            "tokenizer_config__json": {**NAMED, "pad_token": "[PAD]"},
            "added_tokens__json": {"[PAD]": 403, "<new>": 402, "<tool>": 400, "<|im_end|>": 2},
        },
    ),
    "added_tokens.json beside a newer list": (
        toys.byte_level,
        {
            "tokenizer_config__json": {**NAMED, "added_tokens_decoder": {"402": {"content": "<new>"}}},
            "added_tokens__json": {"[A]": 402},
        },
    ),
    "truncation and padding": (
        with_truncation,
        {"tokenizer_config__json": {**NAMED, "pad_token": "<|endoftext|>"}},
    ),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_encodes_and_decodes_as_transformers(tmp_path: Path, kind: str) -> None:
    from transformers import AutoTokenizer

    make, files = FOLDERS[kind]
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **files.get("tokenizer_config__json", {})}
    folder = toys.write_folder(tmp_path, make(), **{**files, "tokenizer_config__json": config})
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    for text in [*toys.TEXTS, "a [PAD][MASK] x <tool>  user[BOS]x [A] <new>"]:
        for special in (True, False):
            token_ids = theirs.encode(text, add_special_tokens=special)
            assert ours.encode(text, add_special_tokens=special) == token_ids
            assert ours.decode(token_ids, special) == theirs.decode(token_ids, skip_special_tokens=special)
    assert ours.vocab_size == len(theirs)
    assert ours.bos_token_id == theirs.bos_token_id
    assert ours.special_tokens == theirs.special_tokens_map
    assert (theirs.eos_token_id in ours.eos_token_ids) == (theirs.eos_token_id is not None)
    assert ours.special_token_ids == {i for i, token in theirs.added_tokens_decoder.items() if token.special}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(text=st.text(max_size=40))
def test_any_text_survives(tmp_path: Path, text: str) -> None:
    tokenizer = load_tokenizer(toys.write_folder(tmp_path, toys.byte_level()))
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text


def test_half_a_surrogate_pair_is_the_clients_error(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="surrogate"):
        load_tokenizer(toys.write_folder(tmp_path, toys.byte_level())).encode("\ud83d")


def test_text_of_single_tokens(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(toys.write_folder(tmp_path, toys.sentence_piece()))
    ids = [tokenizer._backend.get_vocab()[token] for token in ("▁abc", "<0xE4>", "</s>")]
    assert [tokenizer.token(i) for i in ids] == [" abc", "\ufffd", "</s>"]
    assert [tokenizer.token_bytes(i) for i in ids] == [b" abc", b"\xe4", b"</s>"]
    assert tokenizer.token(10**6) == ""


def end_ids(tmp_path: Path, **files: Any) -> tuple[int, ...]:
    return load_tokenizer(toys.write_folder(tmp_path, toys.byte_level(), **files)).eos_token_ids


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, ()),
        ({"generation_config__json": {"eos_token_id": [5, 2, 5]}}, (5, 2)),
        ({"generation_config__json": {"eos_token_id": 7}, "tokenizer_config__json": NAMED}, (7, 2)),
        ({"config__json": {"model_type": "llama", "eos_token_id": 9}}, (9,)),
        ({"config__json": {"eos_token_id": 9}, "generation_config__json": {}}, ()),
        ({"generation_config__json": {"eos_token_id": ["x", True, -1, 2.5, None]}}, ()),
        ({"tokenizer_config__json": {"eos_token": "<|endoftext|>"}, "chat_template__jinja": CHATML}, (0, 2)),
        ({"chat_template__jinja": "{{ messages[1].content }} \n<tool>\n<|im_end|>"}, (400,)),
        ({"chat_template__jinja": "{{ messages[1].content }}. <|im_end|>"}, ()),
        ({"chat_template__jinja": "{{ messages[0].content }}<|im_end|>"}, ()),
        ({"chat_template__jinja": "{{ raise_exception('no') }}"}, ()),
        ({"chat_template__jinja": "{% broken"}, ()),
    ],
)
def test_end_tokens_are_the_union(tmp_path: Path, files: dict[str, Any], expected: tuple[int, ...]) -> None:
    assert end_ids(tmp_path, **files) == expected


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        ({"tokenizer_config__json": {"chat_template": "config"}}, "config"),
        ({"tokenizer_config__json": {"chat_template": "config"}, "chat_template__jinja": "file\n"}, "file\n"),
        (
            {
                "tokenizer_config__json": {
                    "chat_template": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
                }
            },
            "d",
        ),
        ({"tokenizer_config__json": {"chat_template": [{"name": "tool_use", "template": "t"}]}}, None),
        ({"tokenizer_config__json": {"chat_template": 5}}, None),
    ],
)
def test_places_of_the_chat_template(tmp_path: Path, files: dict[str, Any], expected: str | None) -> None:
    assert load_tokenizer(toys.write_folder(tmp_path, toys.byte_level(), **files)).chat_template == expected


def test_default_template_in_the_folder_of_templates(tmp_path: Path) -> None:
    folder = toys.write_folder(tmp_path, toys.byte_level(), chat_template__jinja="file")
    toys.write_folder(folder / "additional_chat_templates", default__jinja="folder", tool_use__jinja="tools")
    assert load_tokenizer(folder).chat_template == "folder"


def test_a_given_template_replaces_the_models_own(tmp_path: Path) -> None:
    folder = toys.write_folder(tmp_path, toys.byte_level(), chat_template__jinja="own")
    tokenizer = load_tokenizer(folder, TextConfig(CHATML))
    assert (tokenizer.chat_template, tokenizer.eos_token_ids) == (CHATML, (2,))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "tokenizer.json is missing"),
        ({"tokenizer__json": "{"}, "not a tokenizer"),
        ({"tokenizer__json": "[]"}, "not a tokenizer"),
        ({"tokenizer__json": {"model": {"type": "BPE", "vocab": {}, "merges": ["a b"]}}}, "not a tokenizer"),
        ({"tokenizer_config__json": "[1]"}, "not an object"),
        ({"tokenizer_config__json": "[" * 100_000}, "damaged"),
        ({"tokenizer__json": toys.byte_level_json(), "generation_config__json": "nope"}, "damaged"),
        ({"tokenizer__json": toys.byte_level_json(), "added_tokens__json": {"<far>": 500}}, "cannot have the id 500"),
    ],
)
def test_damaged_folders_give_one_clear_error(tmp_path: Path, files: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        load_tokenizer(toys.write_folder(tmp_path, **files))
    assert str(tmp_path) in str(caught.value)


def test_files_are_bounded(tmp_path: Path) -> None:
    folder = toys.write_folder(tmp_path)
    with (folder / "tokenizer.json").open("wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(ModelError, match="1073741824 bytes"):
        load_tokenizer(folder)


def test_hostile_configs_do_no_harm(tmp_path: Path) -> None:
    config = {
        "added_tokens_decoder": {
            "x": {"content": "a"},
            "7": 7,
            "8": {"content": 9},
            "9": {"content": "<q>", "evil": 1},
        },
        "extra_special_tokens": {"messages": "<m>", "n": 3},
        "bos_token": ["<s>"],
        "chat_template": "{{ messages[0].content }}",
    }
    tokenizer = load_tokenizer(toys.write_folder(tmp_path, toys.byte_level(), tokenizer_config__json=config))
    assert tokenizer.special_tokens == {"messages": "<m>"} and tokenizer.bos_token_id is None
    assert len(tokenizer.encode("<q>")) == 1


def test_folders_without_tokenizer_json_are_converted(tmp_path: Path) -> None:
    model = json.loads(toys.byte_level_json())["model"]
    merges = "\n".join(" ".join(merge) for merge in model["merges"])
    files = {"vocab__json": model["vocab"], "merges__txt": merges, "config__json": {"model_type": "gpt2"}}
    tokenizer = load_tokenizer(toys.write_folder(tmp_path, **files, tokenizer_config__json=NAMED))
    assert tokenizer.encode(toys.CORPUS[2]) == toys.byte_level().encode(toys.CORPUS[2]).ids


def test_what_cannot_be_converted_is_said(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="transformers cannot make it"):
        load_tokenizer(toys.write_folder(tmp_path, tiktoken__model="no model", config__json={"model_type": "llama"}))


def test_loading_imports_no_torch(tmp_path: Path) -> None:
    folder = toys.write_folder(tmp_path, toys.byte_level(), chat_template__jinja=CHATML)
    code = (
        "import sys; from pathlib import Path; import ingle.text.gguf_tokenizer, ingle.text.stream\n"
        "from ingle.text.load import load_tokenizer\n"
        f"assert load_tokenizer(Path({str(folder)!r})).eos_token_ids == (2,)\n"
        "print([name for name in ('torch', 'transformers', 'jinja2') if name in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_added_tokens_with_options_survive_the_round_trip(tmp_path: Path) -> None:
    backend = toys.byte_level()
    backend.add_tokens([AddedToken("<wide>", lstrip=True, rstrip=True, special=True)])
    tokenizer = load_tokenizer(toys.write_folder(tmp_path, backend))
    assert tokenizer.decode(tokenizer.encode("a  <wide>  b"), skip_special_tokens=False) == "a<wide>b"


def turns_with(user: str, assistant: str, more: str = "") -> str:
    """A template by what stands before each role's content."""
    return (
        "{% for m in messages %}{% if m.role == 'user' %}" + user + "{% else %}" + assistant + "{% endif %}"
        "{{ m.content }}" + more + "{% endfor %}{% if add_generation_prompt %}" + assistant + "{% endif %}"
    )


@pytest.mark.parametrize(
    ("template", "end_ids", "stops"),
    [
        # The end marker comes with the next turn.
        (turns_with("{% if not loop.first %}<|im_end|>\n{% endif %}<|im_start|>user\n", "<|im_start|>x"), (2,), ()),
        ("{% for m in messages %}{{ m.content }}{% if not loop.last %}<|im_end|>{% endif %}{% endfor %}", (2,), ()),
        # No end marker: the next turn's beginning ends the answer, as a token.
        (turns_with("<|im_start|>", "<tool>"), (1,), ()),
        (turns_with("\n\n<|im_start|> user: ", "<tool>"), (1,), ()),
        # Text before that token ends it, too, where it is long enough to tell.
        (turns_with("\n### end <|im_start|>user: ", "<tool>"), (1,), ("### end",)),
        (turns_with("\n##<|im_start|>user: ", "<tool>"), (1,), ()),
        # A template that asks for one more answer whatever it is told.
        ("{% for m in messages %}<tool>{{ m.content }}<|im_end|>{% endfor %}<|im_start|>", (2,), ()),
        (
            "{% for m in messages %}{{ m.content }}{% if m.role == 'user' %}<tool>{% else %}<|im_end|>{% endif %}"
            "{% endfor %}",
            (2,),
            (),
        ),
        (
            "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>{% endif %}{{ m.content }}{% endfor %}<tool>",
            (1,),
            (),
        ),
        # What stands after the last answer is an end, what stands between two messages of one answer is none.
        (
            turns_with("<|im_start|>", "<tool>", "{% if loop.last %}<|endoftext|>{% else %}<|im_end|>{% endif %}"),
            (0,),
            (),
        ),
        # One turn is all that the template knows.
        (
            "{% if messages | length > 2 %}{{ raise_exception('no') }}{% endif %}" + turns_with("", "", "<|im_end|>"),
            (2,),
            (),
        ),
    ],
)
def test_what_a_template_writes_after_an_answer_ends_it(
    tmp_path: Path, template: str, end_ids: tuple[int, ...], stops: tuple[str, ...]
) -> None:
    tokenizer = load_tokenizer(toys.write_folder(tmp_path, toys.byte_level(), chat_template__jinja=template))
    assert (tokenizer.eos_token_ids, tokenizer.chat_stops) == (end_ids, stops)


def test_a_call_in_channels_ends_with_a_token_of_its_own() -> None:
    tokens = ["<|return|>", "<|call|>", "<|end|>"]
    assert call_ends("<|start|>assistant<|channel|>final<|message|>{{ x }}<|return|>", tokens) == ("<|call|>",)
    assert call_ends("<|start|>assistant<|channel|>final<|message|>{{ x }}<|return|>", tokens[:1]) == ()
    assert call_ends("{{ x }}<|end|>", tokens) == ()


@pytest.mark.parametrize("name", ["chat_template__jinja", "tokenizer_config__json"])
def test_a_byte_order_mark_is_no_text(tmp_path: Path, name: str) -> None:
    files = {name: f"\ufeff{CHATML}" if name.endswith("jinja") else "\ufeff" + json.dumps({"chat_template": CHATML})}
    folder = toys.write_folder(tmp_path, toys.byte_level(), **files)
    assert load_tokenizer(folder).chat_template == CHATML
    assert load_tokenizer(folder, TextConfig(f"\ufeff{CHATML}")).chat_template == CHATML


@pytest.mark.parametrize(
    ("vocab_size", "kept", "notices"),
    [
        (403, (2, 400, 1), []),
        (400, (2, 1), [r"end token 400 is left out: the model has 400 tokens, from 0 to 399"]),
        (2, (1,), [r"end token 2, 400 is left out: .* from 0 to 1"]),
        (
            1,
            (),
            [r"prompts begin with token 1 and will be refused", r"end token .* no other is left: only stop strings"],
        ),
    ],
)
def test_end_tokens_are_held_against_the_model(
    tmp_path: Path, vocab_size: int, kept: tuple[int, ...], notices: list[str]
) -> None:
    (tmp_path / "tokenizer.json").write_text(toys.byte_level_json())
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<|im_start|>", "eos_token": "<|im_start|>"})
    )
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 400]}))
    tokenizer = load_tokenizer(tmp_path)
    told = tokenizer.hold_against(vocab_size)
    assert tokenizer.eos_token_ids == kept
    assert len(told) == len(notices) and all(re.search(*pair) for pair in zip(notices, told, strict=True))
