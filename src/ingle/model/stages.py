"""The layers of a decoder divided among the stages of a pipeline."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from ingle.errors import ConfigError
from ingle.model.architecture import DecoderConfig
from ingle.model.count import count_layer


def divided(sizes: Sequence[int], num_stages: int) -> list[range]:
    """Neighbouring ones of these sizes in each stage, such that the fullest holds as little as it can.

    Raises `ValueError` for more stages than there are sizes.
    """
    if num_stages > len(sizes):
        raise ValueError(f"{len(sizes)} layers make no {num_stages} stages")
    low, high = max(sizes), sum(sizes)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(list(_filled(sizes, middle))) <= num_stages else (middle + 1, high)
    found = list(_filled(sizes, low))
    while len(found) < num_stages:  # of equal layers a full stage may leave none for the last ones
        widest = max(range(len(found)), key=lambda index: len(found[index]))
        start, stop = found[widest].start, found[widest].stop
        found[widest : widest + 1] = [range(start, (start + stop) // 2), range((start + stop) // 2, stop)]
    return found


def _filled(sizes: Sequence[int], room: int) -> Iterator[range]:
    """One after the other, as many as there is room for in each stage."""
    start, held = 0, 0
    for index, size in enumerate(sizes):
        if held + size > room and index > start:
            yield range(start, index)
            start, held = index, 0
        held += size
    yield range(start, len(sizes))


def stages_of(config: DecoderConfig, num_stages: int, counts: Sequence[int] = ()) -> list[range]:
    """The layers of each stage: so many as `counts` say, or about equally many bytes of weights, embedding and head
    among them, as what a step of few tokens takes is the time to read them. Raises `ConfigError`."""
    if num_stages > config.num_layers:
        raise ConfigError(
            f"--pipeline-parallel-size {num_stages}: the model has {config.num_layers} layers, and each stage needs one"
        )
    if counts:
        told = ",".join(map(str, counts))
        if len(counts) != num_stages:
            raise ConfigError(f"--pipeline-layers {told}: give one number for each of {num_stages} stages")
        if sum(counts) != config.num_layers:
            raise ConfigError(f"--pipeline-layers {told}: that is {sum(counts)}, and the model has {config.num_layers}")
        ends = [sum(counts[: index + 1]) for index in range(num_stages)]
        return [range(end - count, end) for end, count in zip(ends, counts, strict=True)]
    sizes = [count_layer(config, layer).total for layer in range(config.num_layers)]
    matrix = config.vocab_size * config.hidden_size
    sizes[0] += matrix
    sizes[-1] += matrix
    return divided(sizes, num_stages)


def stage_config(config: DecoderConfig, layers: range) -> DecoderConfig:
    """A decoder of which these layers are here alone."""
    return config if len(layers) == config.num_layers else replace(config, stage=layers)
