"""Arguments of `SamplingParams(...)` by the names of other tools."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

from ingle.habits.near import nearest

SAME: Mapping[str, str] = {
    **dict.fromkeys(("max_new_tokens", "num_predict", "n_predict", "max_completion_tokens"), "max_tokens"),
    **dict.fromkeys(("repeat_penalty", "rep_pen"), "repetition_penalty"),
    **dict.fromkeys(("temp",), "temperature"),
    **dict.fromkeys(("num_return_sequences",), "n"),
    **dict.fromkeys(("stop_words", "stop_sequences", "stop_strings"), "stop"),
    **dict.fromkeys(("eos_token_ids",), "stop_token_ids"),
    **dict.fromkeys(("random_seed",), "seed"),
    **dict.fromkeys(("guided_decoding",), "structured_outputs"),
}
"""Theirs, and ours."""

BOUND: Mapping[str, str] = {
    **dict.fromkeys(("json_schema", "guided_json"), "json"),
    **dict.fromkeys(("regex", "guided_regex"), "regex"),
    **dict.fromkeys(("choice", "guided_choice"), "choice"),
    **dict.fromkeys(("ebnf", "guided_grammar"), "grammar"),
}
"""Theirs, and which of `structured_outputs` it is."""

_NO_BEAMS = "beams are not searched: sample with temperature, and with n for several answers"
_NO_SAMPLER = "there is no such sampler: use temperature, top_k, top_p and min_p"

REFUSED: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "best_of": ((), "only all of n answers are given: choose among them by their logprobs"),
    "use_beam_search": ((False,), _NO_BEAMS),
    "num_beams": ((1,), _NO_BEAMS),
    "beam_width": ((1,), _NO_BEAMS),
    "length_penalty": ((1.0,), _NO_BEAMS),
    "early_stopping": ((False,), _NO_BEAMS),
    "do_sample": ((True,), "temperature=0 is the same as do_sample=False"),
    "logits_processors": (([], ()), "no code of others runs in a step: logit_bias is what there is"),
    "structural_tag": ((), "structured_outputs binds an answer, and its `after` says from where on"),
    "thinking_token_budget": ((), "it is a field of requests to the server"),
    "prompt": ((), "a prompt is an argument of LLM.generate"),
    **dict.fromkeys(("typical_p", "tfs_z"), ((1.0,), _NO_SAMPLER)),
    **dict.fromkeys(("mirostat", "mirostat_mode", "xtc_probability", "dry_multiplier"), ((0,), _NO_SAMPLER)),
    "top_a": ((0,), _NO_SAMPLER),
    "no_repeat_ngram_size": ((0,), "repetition_penalty is what there is"),
}
"""Theirs, the values with which it asks for nothing, and the answer to others."""

IDLE: Mapping[str, str] = {
    "detokenize": "text is always made of the tokens",
    "spaces_between_special_tokens": "special tokens are written as they are",
    "output_kind": "LLM.generate gives whole answers, LLM.stream_chat pieces",
    "logprobs_mode": "log probabilities are those before temperature and penalties",
    "extra_args": "there are none",
    "skip_clone": "values are never changed",
    "flat_logprobs": "log probabilities have one form",
    "stream_interval": "it is the server's: --stream-interval",
}
"""Theirs, and why it changes nothing."""


def translated(given: Mapping[str, Any], own: Set[str]) -> tuple[dict[str, Any], list[str]]:
    """Our own arguments, and what is to be said of the rest.

    Raises `ValueError` for those that cannot be had: all of them in one line.
    """
    found: dict[str, Any] = {name: value for name, value in given.items() if name in own}
    notices, objections = [], []
    for name, value in given.items():
        if name in own:
            continue
        if name in SAME:
            found.setdefault(SAME[name], value)
        elif name in BOUND:
            if value is not None:
                found.setdefault("structured_outputs", {BOUND[name]: value})
        elif name in REFUSED:
            harmless, answer = REFUSED[name]
            as_n = name == "best_of" and value == given.get("n", 1)
            if value is not None and value not in harmless and not as_n:
                objections.append(f"{name}={value!r:.80}: {answer}")
        elif name in IDLE:
            notices.append(f"{name}={value!r:.80} changes nothing here: {IDLE[name]}")
        else:
            near = nearest(f"--{name}".replace("_", "-"), {f"--{each}".replace("_", "-"): each for each in own})
            objections.append(f"there is no parameter {name}" + (f"; did you mean {near}?" if near else ""))
    if objections:
        raise ValueError("; ".join(objections))
    return found, notices
