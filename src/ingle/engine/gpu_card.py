"""Whether a card is one that this build of PyTorch has code for, and one that Triton compiles for.

Asked before a model is loaded: otherwise the first kernel fails, with "no kernel image is available".
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ingle.errors import ConfigError

TRITON_SINCE = (8, 0)
"""The oldest capability that Triton supports (https://github.com/triton-lang/triton/pull/5066). It may compile for some
older cards, without their tensor cores and without bfloat16."""
_CUDA_13_SINCE = (7, 5)
"""The oldest that PyTorch built by CUDA 13 has code for, by its RELEASE.md; built by CUDA 12.6 it begins at 5.0."""
_CUDA_12_6_SINCE = (5, 0)
OLD_BUILD = "pip install 'torch>=2.11,<2.15' --index-url https://download.pytorch.org/whl/cu126"
NEW_BUILD = "pip install --upgrade --force-reinstall torch"


@dataclass(frozen=True)
class Card:
    name: str
    capability: tuple[int, int]
    """Compute capability, major and minor."""


def check_card(card: Card, architectures: Sequence[str], build: str) -> None:
    """Raises `ConfigError` for a card that PyTorch has no code for.

    architectures: as `torch.cuda.get_arch_list` names them; build: PyTorch's version.
    """
    if not architectures or any(_runs_on(each, card.capability) for each in architectures):
        return
    major, minor = card.capability
    if card.capability >= _CUDA_13_SINCE:
        advice = f"take a newer build: {NEW_BUILD}"
    elif card.capability >= _CUDA_12_6_SINCE:
        advice = f"take the build that has: {OLD_BUILD}"
    else:
        advice = "no build that ingle runs with has"
    raise ConfigError(
        f"the GPU here, {card.name}, has compute capability {major}.{minor}, and PyTorch {build} has no code for it "
        f"({', '.join(architectures)}); {advice}; or give --device cpu"
    )


def _runs_on(architecture: str, capability: tuple[int, int]) -> bool:
    """A binary runs on cards of its generation that are as new; PTX is compiled for every newer one."""
    match = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", architecture)
    if match is None:
        return False
    made_for = (int(match[2]), int(match[3]))
    if match[4] == "a":  # for one architecture alone
        return made_for == capability
    if match[1] == "sm" or match[4] == "f":
        return made_for[0] == capability[0] and made_for <= capability
    return made_for <= capability


def triton_notice(card: Card) -> str | None:
    """Why PyTorch's operators run in place of Triton's kernels on a card; None where Triton's do."""
    if card.capability >= TRITON_SINCE:
        return None
    major, minor = card.capability
    return (
        f"PyTorch's operators run in place of ingle's Triton kernels, slower and without CUDA graphs: {card.name} has "
        f"compute capability {major}.{minor}, and Triton supports {'.'.join(map(str, TRITON_SINCE))} and newer; "
        "--gpu-kernels triton tries them all the same"
    )
