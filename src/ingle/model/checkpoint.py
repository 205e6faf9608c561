"""What a checkpoint holds outranks what its configuration says of it: names, head, vocabulary, biases."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

from ingle.errors import ModelError
from ingle.model.architecture import DecoderConfig, WeightNames
from ingle.weights.source import WeightSource


def as_stored(config: DecoderConfig, source: WeightSource) -> tuple[DecoderConfig, list[str]]:
    """`config` as the tensors of `source` have it, and what to tell the user where the two differ.

    Made-up weights have everything. Raises `ModelError` when the names fit in several places.
    """
    if not source.stored_types:
        return config, []
    config = replace(config, names=_names_in(source.names, config.names))
    notices: list[str] = []
    for fit in (_vocabulary, _head, _biases):
        config = fit(config, source, notices)
    return config, notices


def _names_in(stored: Collection[str], names: WeightNames) -> WeightNames:
    """`names` under the prefix that the file has, such as `language_model.model.` for `model.`.

    It is the one under which most of these stand: the embedding, the last norm, a norm of the first layer.
    """
    body = names.embedding.rpartition(".")[0]
    first = f"{names.layers}.0.{names.input_norm}"
    leaves = [f"{name.removeprefix(f'{body}.')}.weight" for name in (names.embedding, names.norm, first)]
    found: dict[str, int] = {}
    for name in stored:
        for leaf in leaves:
            if name.endswith(leaf) and name[: -len(leaf)][-1:] in ("", "."):
                prefix = name[: -len(leaf)].removesuffix(".")
                found[prefix] = found.get(prefix, 0) + 1
    most = max(found.values(), default=0)
    best = [prefix for prefix, count in found.items() if count == most]
    if body in best or not best:
        best = [body]
    if len(best) > 1:
        raise ModelError(
            f"the checkpoint holds several decoders, under {', '.join(sorted(best))}, and none under {body}: "
            "ingle cannot tell which is meant"
        )

    def moved(name: str) -> str:
        return f"{best[0]}.{name.removeprefix(f'{body}.')}".removeprefix(".")

    parts, head = best[0].split("."), names.lm_head.rpartition(".")[2]
    heads = [names.lm_head, *(".".join([*parts[:count], head]) for count in range(1, len(parts) + 1)), head]
    return replace(
        names,
        embedding=moved(names.embedding),
        norm=moved(names.norm),
        layers=moved(names.layers),
        lm_head=next((name for name in heads if f"{name}.weight" in stored), names.lm_head),
    )


def _vocabulary(config: DecoderConfig, source: WeightSource, notices: list[str]) -> DecoderConfig:
    """Tokens were added, or rows cut off, and nobody told the configuration."""
    names = (f"{config.names.embedding}.weight", f"{config.names.lm_head}.weight")
    shapes = {source.shape(name) for name in names if name in source}
    rows = {shape[0] for shape in shapes if shape is not None and shape[1:] == (config.hidden_size,)}
    if len(shapes) != 1 or not rows or rows == {config.vocab_size}:  # where the two differ, loading says so
        return config
    (vocab_size,) = rows
    notices.append(f"the configuration says vocab_size {config.vocab_size}, and the checkpoint has {vocab_size} tokens")
    return replace(config, vocab_size=vocab_size)


def _head(config: DecoderConfig, source: WeightSource, notices: list[str]) -> DecoderConfig:
    """A head that is stored and differs from the embedding is used, and an equal one is held once.

    Two matrices that differ do so at their start, so comparing costs time only where it saves a matrix.
    """
    embedding, head = f"{config.names.embedding}.weight", f"{config.names.lm_head}.weight"
    stored = head in source
    tied = not stored or (embedding in source and source.alike(head, embedding))
    if stored and config.tied_embeddings and not tied:
        notices.append("the configuration ties the head to the embedding; the checkpoint has one of its own: used")
    if not stored and not config.tied_embeddings:
        notices.append(f"the checkpoint has no {head}: the embedding takes its place")
    return replace(config, tied_embeddings=tied)


def _biases(config: DecoderConfig, source: WeightSource, notices: list[str]) -> DecoderConfig:
    """Of the projections: the first layer's tell of all."""
    if config.mla is not None:
        return config
    names = config.names
    projections = {"qkv_bias": names.qkv, "output_bias": (names.attention_out,)}
    if config.moe is None:
        projections["mlp_bias"] = (*names.gate_up, names.mlp_down)
    stored: dict[str, Any] = {}
    for choice, modules in projections.items():
        stored[choice] = any(f"{names.layers}.0.{module}.bias" in source for module in modules)
        if stored[choice] != getattr(config, choice):
            has = "has biases of" if stored[choice] else "lacks the biases of"
            notices.append(f"the checkpoint {has} {', '.join(modules)}, and the configuration says otherwise")
    return replace(config, **stored)
