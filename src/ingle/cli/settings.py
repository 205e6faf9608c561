"""What `/set` changes in a conversation."""

from __future__ import annotations

import difflib
import json
import shlex
from collections.abc import Mapping
from typing import Any

import msgspec

from ingle.errors import RequestError
from ingle.request import SamplingParams

PARAMETERS = (
    *("temperature", "top_p", "top_k", "min_p", "max_tokens", "seed", "stop", "repetition_penalty"),
    *("presence_penalty", "frequency_penalty", "min_tokens", "ignore_eos"),
)
_SWITCHES = ("drop_oldest", "verbose", "history")
_OLLAMAS = {"num_predict": "max_tokens", "repeat_penalty": "repetition_penalty"}
_OLLAMAS_WORDS = {"quiet": "verbose off", "nohistory": "history off"}
_AT_START = {
    "num_ctx": "start with --max-model-len",
    "num_gpu": "start with --device",
    "num_thread": "start with --threads",
    "format": "answers in a format are not there yet",
    "think": "reasoning is not told apart yet",
    "wordwrap": "the terminal wraps lines",
}
_ON = {"on": True, "true": True, "1": True, "": True, "off": False, "false": False, "0": False}


class Settings:
    def __init__(self, params: SamplingParams, told: Mapping[str, Any], *, drop_oldest: bool, verbose: bool) -> None:
        """`told`: of `params`, those that the model or the user has set."""
        self.params = params
        self.drop_oldest = drop_oldest
        self.verbose = verbose
        self.history = True
        """Whether what is typed is kept for the next time."""
        self._first = params
        self._told = set(told)

    def set(self, text: str) -> str:
        """`NAME VALUE`, as Ollama's users write it too; `default` is the value at the start. Returns what to show.

        Raises `RequestError` as `SamplingParams` does.
        """
        text = text.removeprefix("parameter ").strip()
        name, _, value = _OLLAMAS_WORDS.get(text, text).partition(" ")
        name, value = _OLLAMAS.get(name.replace("-", "_"), name.replace("-", "_")), value.strip()
        if not name:
            return self.shown()
        if name in _AT_START:
            raise RequestError(f"/set {name}: {_AT_START[name]}")
        if name in _SWITCHES:
            if value.lower() not in _ON:
                raise RequestError(f"/set {name} {value}: give on or off")
            setattr(self, name, _ON[value.lower()])
        elif name in PARAMETERS:
            self._set_parameter(name, value)
        else:
            near = difflib.get_close_matches(name, (*PARAMETERS, *_SWITCHES), 1)
            hint = f"do you mean {near[0]}?" if near else "/set alone lists what there is"
            raise RequestError(f"/set {name}: no such parameter; {hint}")
        return self._line(name)

    def told(self) -> dict[str, Any]:
        """What the model or the user has set."""
        return {name: getattr(self.params, name) for name in PARAMETERS if name in self._told}

    def shown(self) -> str:
        return "\n".join(map(self._line, (*PARAMETERS, *_SWITCHES)))

    def _line(self, name: str) -> str:
        value = getattr(self, name) if name in _SWITCHES else getattr(self.params, name)
        if isinstance(value, bool):
            value = "on" if value else "off"
        elif isinstance(value, tuple):
            value = " ".join(json.dumps(word, ensure_ascii=False) for word in value) or "none"
        elif value is None:
            value = "as the context allows" if name == "max_tokens" else "none"
        return f"{name:<20}{value}"

    def _set_parameter(self, name: str, value: str) -> None:
        if not value:
            raise RequestError(f"/set {name} needs a value, now it is: {self._line(name).split(maxsplit=1)[1]}")
        self.params = msgspec.structs.replace(self.params, **{name: self._read(name, value)})
        self._told.add(name)

    def _read(self, name: str, value: str) -> Any:
        if value == "default":
            return getattr(self._first, name)
        if name == "stop":
            try:
                words = _words(value)
            except ValueError as error:
                raise RequestError(f"/set stop {value}: {error}") from None
            return () if words == ["none"] else tuple(word.replace("\\n", "\n") for word in words)
        if name == "ignore_eos":
            if value.lower() not in _ON:
                raise RequestError(f"/set {name} {value}: give on or off")
            return _ON[value.lower()]
        if value == "none":
            return None
        try:
            return json.loads(value)
        except ValueError:
            return value  # which SamplingParams refuses, in its own words


def _words(text: str) -> list[str]:
    """Quoted or not; a backslash is none of the shell's."""
    lexer = shlex.shlex(text, posix=True)
    lexer.whitespace_split, lexer.escape, lexer.commenters = True, "", ""
    return list(lexer)
