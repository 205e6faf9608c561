"""How people ask for an answer in Python: as vLLM's users write it, and as those of ChatGLM, Qwen and TigerBot."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from ingle.errors import RequestError
from ingle.request import SamplingParams

Message = dict[str, Any]
Conversation = Sequence[Message]
Pair = tuple[str, str]
"""A question and its answer."""

_TEXT_NAMES = ("query", "message", "messages")
_OPTIONS = ("history", "sampling_params", "use_tqdm", "system", "tokenizer")
_TEMPLATE_OPTIONS = (
    *("add_generation_prompt", "continue_final_message", "chat_template", "chat_template_kwargs"),
    *("tools", "documents"),
)
_SAMPLING = tuple(name for name in SamplingParams.__struct_fields__)
_AS_HERE = {"max_new_tokens": "max_tokens"}
_ONLY: dict[str, tuple[Any, ...]] = {
    "lora_request": (None,),
    "chat_template_content_format": ("auto", "string", "openai", None),
    "mm_processor_kwargs": (None,),
    "num_beams": (1, None),
    "do_sample": (True, False, None),
    "generation_config": (None,),
    "logits_processor": (None,),
}
"""Arguments of others' `chat` of which only these values mean anything here."""
_HINTS = {
    "max_length": "it counts the prompt too: give max_tokens, which counts the answer alone",
    "stop_words_ids": "give stop_token_ids, or stop with the texts",
    "stream": "stream_chat() gives the answer piece by piece",
}


@dataclass(frozen=True)
class ChatCall:
    """One call of `LLM.chat`, read."""

    conversations: list[list[Message]]
    asked_by_text: bool
    """A question was asked, and its reply and the history are wanted; else messages were given, and outputs are."""
    history: list[Any]
    """As it was given."""
    sampling_params: SamplingParams | Sequence[SamplingParams] | None
    sampling: Mapping[str, Any]
    """Single parameters, over those."""
    use_tqdm: bool
    template: Mapping[str, Any] = field(default_factory=dict)

    def history_with(self, reply: str) -> list[Any]:
        """In the form in which it was given: pairs, else messages."""
        (messages,) = self.conversations
        if _is_pairs(self.history):
            return [*self.history, (messages[-1]["content"], reply)]
        return [*messages, {"role": "assistant", "content": reply}]


def read_chat(said: Sequence[Any], named: Mapping[str, Any]) -> ChatCall:
    """Raises `RequestError` naming an argument that is not known here, or whose value cannot be used."""
    named, sampling = _sorted(named)
    words = list(said)
    given = [named[name] for name in _TEXT_NAMES if named.get(name) is not None]
    if words and not isinstance(words[0], str | Sequence | Mapping) and (len(words) > 1 or given):
        del words[0]  # the tokenizer, as in model.chat(tokenizer, query, history)
    if len(given) + bool(words) != 1:
        raise RequestError('give one question, chat("…"), or messages, chat([{"role": "user", "content": "…"}])')
    asked = given[0] if given else words.pop(0)
    history, params, use_tqdm = _more(words, named, by_text=_is_text(asked))
    conversations = _conversations(asked, history, named.get("system"))
    return ChatCall(
        conversations,
        _is_text(asked),
        list(history or ()),
        params,
        sampling,
        use_tqdm,
        {name: named[name] for name in _TEMPLATE_OPTIONS if named.get(name) is not None},
    )


def as_messages(history: Sequence[Any] | None) -> list[Message]:
    """A history of messages, or of pairs of question and answer. Raises `RequestError`."""
    if history is None:
        return []
    if not isinstance(history, Sequence) or isinstance(history, str):
        raise RequestError(
            f"history is a {type(history).__name__}: give a list of messages, or of pairs", param="history"
        )
    messages: list[Message] = []
    for entry in history:
        if isinstance(entry, Mapping):
            messages.append(dict(entry))
        elif isinstance(entry, Sequence) and len(entry) == 2 and all(isinstance(text, str) for text in entry):
            messages += [{"role": "user", "content": entry[0]}, {"role": "assistant", "content": entry[1]}]
        else:
            raise RequestError(
                f"history holds {entry!r:.80}: give messages, or pairs of question and answer", param="history"
            )
    return messages


def _sorted(named: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments by name: those of a conversation, and sampling parameters."""
    plain: dict[str, Any] = {}
    sampling: dict[str, Any] = {}
    for name, value in named.items():
        if name in (*_TEXT_NAMES, *_OPTIONS, *_TEMPLATE_OPTIONS):
            plain[name] = value
        elif (own := _AS_HERE.get(name, name)) in _SAMPLING:
            sampling[own] = value
        elif name not in _ONLY or not any(value is one or value == one for one in _ONLY[name]):
            raise _unknown(name, value)
    if named.get("do_sample") is False:
        sampling.setdefault("temperature", 0.0)
    return plain, sampling


def _unknown(name: str, value: Any) -> RequestError:
    if name in _HINTS:
        return RequestError(f"chat() does not take {name}: {_HINTS[name]}", param=name)
    if name in _ONLY:
        return RequestError(f"chat() does not take {name}={value!r:.60}: leave it out", param=name)
    near = difflib.get_close_matches(name, (*_TEXT_NAMES, *_OPTIONS, *_TEMPLATE_OPTIONS, *_SAMPLING), 1, cutoff=0.75)
    return RequestError(f"chat() does not take {name}" + (f": do you mean {near[0]}?" if near else ""), param=name)


def _more(
    words: list[Any], named: Mapping[str, Any], *, by_text: bool
) -> tuple[Sequence[Any] | None, SamplingParams | Sequence[SamplingParams] | None, bool]:
    """History, sampling parameters and whether a bar is shown. What comes by place is told apart by its type."""
    history, params, bar = (named.get(name) for name in ("history", "sampling_params", "use_tqdm"))
    for word in words:
        if isinstance(word, bool):
            bar = word
        elif isinstance(word, SamplingParams) or (_is_list(word) and word and isinstance(word[0], SamplingParams)):
            params = word
        elif word is not None:
            history = word
    if history and not by_text:
        raise RequestError("messages are the whole conversation: give a question with history, or messages alone")
    if by_text and not isinstance(params, SamplingParams | None):
        raise RequestError(f"sampling_params is a {type(params).__name__}: one question takes one SamplingParams")
    return history, params, bar is None or bool(bar)


def _conversations(asked: Any, history: Sequence[Any] | None, system: str | None) -> list[list[Message]]:
    if _is_text(asked):
        asked = [*as_messages(history), {"role": "user", "content": asked}]
    many = asked if _is_list(asked) and asked and _is_list(asked[0]) else [asked]
    conversations = []
    for messages in many:
        if not _is_list(messages) or not messages or not all(isinstance(message, Mapping) for message in messages):
            raise RequestError(
                f'{messages!r:.80} is no conversation: give messages, [{{"role": "user", "content": "…"}}]',
                param="messages",
            )
        first = [{"role": "system", "content": system}] if system and messages[0].get("role") != "system" else []
        conversations.append([*first, *map(dict, messages)])
    return conversations


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _is_pairs(history: Sequence[Any]) -> bool:
    return bool(history) and not isinstance(history[0], Mapping)


def over(params: SamplingParams, sampling: Mapping[str, Any]) -> SamplingParams:
    """`params` with some of them replaced. Raises `RequestError`."""
    return msgspec.structs.replace(params, **sampling) if sampling else params
