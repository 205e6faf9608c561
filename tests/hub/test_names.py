"""How people write the name of a model, from guides, model pages and other tools, and what it means."""

from __future__ import annotations

import pytest

from ingle.errors import ConfigError, ModelError
from ingle.hub.names import RepoRef, ShortName, UrlRef, parse_name

HF, MS = "huggingface", "modelscope"
CDN = "https://example.org/files/model-q4_k_m.gguf"


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("Qwen/Qwen2-7B-Instruct", RepoRef(HF, "Qwen/Qwen2-7B-Instruct")),
        ("Qwen/Qwen2-7B-Instruct/", RepoRef(HF, "Qwen/Qwen2-7B-Instruct")),
        ("TigerResearch/tigerbot-70b-chat-v4@main", RepoRef(HF, "TigerResearch/tigerbot-70b-chat-v4", "main")),
        ("org/name@refs/pr/3", RepoRef(HF, "org/name", "refs/pr/3")),
        ("org/name@a1b2c3d", RepoRef(HF, "org/name", "a1b2c3d")),
        (
            "bartowski/Qwen2.5-7B-Instruct-GGUF:Q4_K_M",
            RepoRef(HF, "bartowski/Qwen2.5-7B-Instruct-GGUF", None, "Q4_K_M"),
        ),
        ("hf.co/bartowski/L-GGUF:Q4_K_M", RepoRef(HF, "bartowski/L-GGUF", None, "Q4_K_M")),
        ("huggingface.co/unsloth/x-GGUF", RepoRef(HF, "unsloth/x-GGUF")),
        ("hf-mirror.com/org/name", RepoRef(HF, "org/name")),
        ("hf://org/name@v1", RepoRef(HF, "org/name", "v1")),
        ("hf:gpt2", RepoRef(HF, "gpt2")),
        ("org/name@v1:Q8_0", RepoRef(HF, "org/name", "v1", "Q8_0")),
        ("org/name:Q8_0@v1", RepoRef(HF, "org/name", "v1", "Q8_0")),
        ("org/name:model-00001-of-00003.gguf", RepoRef(HF, "org/name", None, "model-00001-of-00003.gguf")),
        ("org/name/Q4_K_M/x.gguf", RepoRef(HF, "org/name", None, "Q4_K_M/x.gguf")),
        ("modelscope:qwen/Qwen2-7B-Instruct", RepoRef(MS, "qwen/Qwen2-7B-Instruct")),
        ("modelscope://Qwen/Qwen2-7B@v1.0.1", RepoRef(MS, "Qwen/Qwen2-7B", "v1.0.1")),
        ("modelscope.cn/Qwen/Qwen2-7B-GGUF:q4_k_m", RepoRef(MS, "Qwen/Qwen2-7B-GGUF", None, "q4_k_m")),
        ("https://huggingface.co/Qwen/Qwen3-0.6B", RepoRef(HF, "Qwen/Qwen3-0.6B")),
        ("https://huggingface.co/Qwen/Qwen3-0.6B/tree/main", RepoRef(HF, "Qwen/Qwen3-0.6B")),
        ("https://huggingface.co/org/name/tree/v2", RepoRef(HF, "org/name", "v2")),
        (
            "https://huggingface.co/org/name/resolve/main/a/b-Q4_0.gguf?download=true",
            RepoRef(HF, "org/name", None, "a/b-Q4_0.gguf"),
        ),
        ("https://huggingface.co/org/name/blob/main/model.safetensors", RepoRef(HF, "org/name")),
        ("https://hf-mirror.com/org/name", RepoRef(HF, "org/name", endpoint="https://hf-mirror.com")),
        ("https://www.modelscope.cn/models/Qwen/Qwen2-7B/summary", RepoRef(MS, "Qwen/Qwen2-7B")),
        ("https://modelscope.cn/models/Qwen/Qwen2-7B/files", RepoRef(MS, "Qwen/Qwen2-7B")),
        (
            "https://hub.example.org/org/name/resolve/main/config.json",
            RepoRef(HF, "org/name", "main", endpoint="https://hub.example.org"),
        ),
        (CDN, UrlRef(CDN)),
        (f"{CDN}?sig=a%2Fb", UrlRef(f"{CDN}?sig=a%2Fb")),
        ("qwen3:0.6b", ShortName("qwen3:0.6b")),
    ],
)
def test_what_a_name_means(name: str, reference: object) -> None:
    assert parse_name(name) == reference


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("org/na me", "a name on a hub is org/name"),
        ("org/../name", "a name on a hub is org/name"),
        ("org/name/more", "a name on a hub is org/name"),
        ("hf:", "a name on a hub is org/name"),
        ("org/..", "a name on a hub is org/name"),
        ("org/name--x", "a name on a hub is org/name"),
        ("org/näme", "a name on a hub is org/name"),
        ("org/name@../../etc", "not the name of a branch"),
        ("org/name@", "not the name of a branch"),
        ("org/name:", "neither a quantization"),
        ("org/name:Q4 K", "neither a quantization"),
        ("org/name:$(id)", "neither a quantization"),
        ("https://", "it names no host"),
        ("https://[::1/x.gguf", "is not a URL"),
        ("https://h:99999/x.gguf", "is not a URL"),
        ("https://example.org/model.safetensors", "has to be that of a .gguf file"),
        ("https://huggingface.co/datasets/org/name", "not a model's page"),
        ("https://huggingface.co/", "a name on a hub is org/name"),
        ("o/" + "x" * 3000, "too long"),
        ("org/\x1b[2Jname", "a name on a hub is org/name"),
    ],
)
def test_what_names_nothing(name: str, message: str) -> None:
    with pytest.raises(ModelError, match=message) as error:
        parse_name(name)
    assert len(str(error.value)) < 400 and str(error.value).isprintable()


def test_the_default_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INGLE_HUB", "modelscope")
    assert parse_name("org/name") == RepoRef(MS, "org/name")
    assert parse_name("hf:org/name") == RepoRef(HF, "org/name")
    assert parse_name("org/name", "huggingface") == RepoRef(HF, "org/name")
    assert parse_name("org/name", "ms") == RepoRef(MS, "org/name")
    monkeypatch.setenv("INGLE_HUB", "gitee")
    with pytest.raises(ConfigError, match="INGLE_HUB 'gitee' is not a hub: give huggingface or modelscope"):
        parse_name("org/name")


@pytest.mark.parametrize("name", ["org/name", "org/name@v1", "org/name:Q4_K_M", "modelscope:org/name@v1:Q8_0"])
def test_a_reference_is_written_as_it_is_read(name: str) -> None:
    assert str(parse_name(name)) == name
