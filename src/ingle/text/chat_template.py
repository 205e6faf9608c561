"""Chat templates: from a conversation to the prompt that the model was trained on, as transformers renders it."""

from __future__ import annotations

import json
import logging
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ingle.errors import ModelError, RequestError
from ingle.text.call_forms import calls_of, function_of
from ingle.text.conversation import MESSAGE_NOT_RENDERED, Forms, TemplateError
from ingle.text.formats.words import described
from ingle.text.sandbox import sandboxes
from ingle.text.system_message import UNSUPPORTED, advised, merged, num_leading_system

logger = logging.getLogger("ingle")

MAX_TEMPLATE_CHARS = 1_000_000

SPECIAL_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_TOOL = '{"type": "function", "function": {"name": …, "description": …, "parameters": …}}'
_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")

# What ingle passes, what templates find in every environment, and the parameters of transformers' `apply_chat_template`
# that are no template variables there: a client that sets one of these expects something that would not happen.
_RESERVED_NAMES = frozenset(SPECIAL_TOKEN_NAMES).union(
    ("messages", "tools", "add_generation_prompt"),
    ("raise_exception", "strftime_now", "namespace", "dict", "range", "cycler", "joiner", "lipsum", "self", "loop"),
    ("conversation", "chat_template", "continue_final_message", "tokenize", "padding", "truncation", "max_length"),
    ("return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs", "sanitize_control_tokens"),
)


class ChatTemplate:
    """A Jinja chat template with the special tokens it may name. Rendering is safe from any thread.

    Templates run in a sandbox process with limits on time, memory and output, see `template_worker`. Raises
    `ModelError` when the template is longer than any real one.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str], *, merge_system: bool = False) -> None:
        """`merge_system` puts a system message before the first user's text, as `system_message.merged` does."""
        if len(source) > MAX_TEMPLATE_CHARS:
            raise ModelError(
                f"the chat template has {len(source)} characters, at most {MAX_TEMPLATE_CHARS} are taken: "
                "give another one with --chat-template"
            )
        self.source = source
        self.knows_tools = re.search(r"\btools\b", source) is not None
        """Else tools are described in the system message."""
        self._special_tokens = dict(special_tokens)
        self._reserved = _RESERVED_NAMES | self._special_tokens.keys()
        self._forms = Forms(source)
        self._merge_system = merge_system

    def prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """`render`, with all that was sent: content becomes text or parts, a `developer` a `system` message, arguments
        of calls text or objects, where the template wants it so.

        With `continue_final_message` it ends where the text of the last message does. Raises `RequestError` naming the
        first message that the template leaves out, and saying so where it is the system message alone that the template
        does not take.
        """
        for tool in tools or ():
            if not isinstance(tool, Mapping):
                raise RequestError(f"each tool is an object, {_TOOL}, got {tool!r:.100}", param="tools")
        sent: Sequence[Mapping[str, Any]] = _as_transformers_passes(messages)
        options = _Options(tools, documents, add_generation_prompt and not continue_final_message, chat_template_kwargs)
        end = None
        if continue_final_message:
            sent, end = _with_end(sent)
        if tools and not self.knows_tools:
            prompt = self._with_described_tools(sent, tools, options)
        else:
            prompt = self._whole_prompt(sent, options)
        return prompt if end is None else _up_to(end, prompt)

    def _with_described_tools(
        self, sent: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], options: _Options
    ) -> str:
        """A template that takes no system message gets the description in the first user message, if that is all."""
        with_tools = described(sent, tools)
        if num_leading_system(sent):
            return self._whole_prompt(with_tools, options)
        try:
            return self._whole_prompt(with_tools, options)
        except RequestError as error:
            if not isinstance(error, TemplateError) and error.code not in (MESSAGE_NOT_RENDERED, UNSUPPORTED):
                raise
            return self._whole_prompt(merged(with_tools), options)

    def _whole_prompt(self, sent: Sequence[Mapping[str, Any]], options: _Options) -> str:
        if not num_leading_system(sent):
            return self._logged(self._written(sent, options), options)
        one = merged(sent)
        if self._merge_system:
            return self._logged(self._written(one, options, num_before=len(sent) - len(one)), options)
        try:
            return self._logged(self._written(sent, options), options)
        except RequestError as error:
            if not isinstance(error, TemplateError) and error.code != MESSAGE_NOT_RENDERED:
                raise
            try:
                self._render(self._written(one, options), options)
            except RequestError:
                raise error from None
            raise advised(error) from None

    def _written(
        self, messages: Sequence[Mapping[str, Any]], options: _Options, *, num_before: int = 0
    ) -> Sequence[Mapping[str, Any]]:
        """`num_before`: messages that were sent before these, and are in them now."""
        return self._forms.write(
            messages, options.shape, lambda marked: self._render(marked, options), num_before=num_before
        )

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt of a conversation, special tokens included: encode it with `add_special_tokens=False`.

        `chat_template_kwargs` are the client's own template variables, such as `enable_thinking`. Raises `RequestError`
        when they name what is not theirs to set, and with the template's own words when it fails.
        """
        options = _Options(tools, None, add_generation_prompt, chat_template_kwargs)
        return self._logged(_as_transformers_passes(messages), options)

    def _logged(self, messages: Sequence[Mapping[str, Any]], options: _Options) -> str:
        try:
            return self._render(messages, options)
        except TemplateError as error:
            if error.reason is not None:
                logger.warning("chat template: %r", error.reason)
            raise

    def _render(self, messages: Sequence[Mapping[str, Any]], options: _Options) -> str:
        extra = dict(options.chat_template_kwargs or {})
        for name in extra:
            if name in self._reserved:
                raise RequestError(f"chat_template_kwargs cannot set {name!r}", param="chat_template_kwargs")
        variables = {"documents": options.documents} | self._special_tokens | extra
        variables |= {
            "messages": messages,
            "tools": options.tools,
            "add_generation_prompt": options.add_generation_prompt,
        }
        try:
            request = json.dumps({"template": self.source, "variables": variables}).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise RequestError(f"the conversation is not plain JSON: {error}", param="messages") from error
        return sandboxes.render(request)


@dataclass(frozen=True)
class _Options:
    """What a template is told beside the messages."""

    tools: Sequence[Mapping[str, Any]] | None
    documents: Sequence[Mapping[str, Any]] | None
    add_generation_prompt: bool
    chat_template_kwargs: Mapping[str, Any] | None

    @property
    def shape(self) -> list[Any]:
        """All of it that may decide over which messages are rendered."""
        return [bool(self.tools), bool(self.documents), self.add_generation_prompt, self.chat_template_kwargs]


def _with_end(messages: Sequence[Mapping[str, Any]]) -> tuple[list[Mapping[str, Any]], str]:
    """With a mark at the end of the last message's text. Raises `RequestError`."""
    *before, last = messages
    content, mark = last.get("content", ""), f"zq{uuid.uuid4().hex}zq"
    if last.get("tool_calls"):
        raise RequestError("continue_final_message: the last message calls tools, which is its end", param="messages")
    if not isinstance(content, list):
        return [*before, {**last, "content": f"{content}{mark}"}], mark
    if not content or not isinstance(content[-1], Mapping) or not isinstance(content[-1].get("text"), str):
        raise RequestError("continue_final_message: the last message does not end with text", param="messages")
    return [*before, {**last, "content": [*content[:-1], {**content[-1], "text": content[-1]["text"] + mark}]}], mark


def _up_to(mark: str, prompt: str) -> str:
    """Raises `RequestError`."""
    before, found, _ = prompt.rpartition(mark)
    if not found:
        raise RequestError(
            "continue_final_message: this model's chat template does not leave the last message as it was sent",
            param="messages",
        )
    return before


def _as_transformers_passes(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Without keys whose value is None, and with a message's reasoning under each name that templates read."""
    if not messages:
        raise RequestError("messages is empty: a conversation has at least one message", param="messages")
    passed = []
    for message in messages:
        if not isinstance(message, Mapping):
            raise RequestError(f"each message is an object, got {message!r:.100}", param="messages")
        fields = {key: value for key, value in message.items() if value is not None}
        reasoning = next((fields[name] for name in _REASONING_FIELDS if name in fields), None)
        if reasoning is not None:
            fields = {"thinking": reasoning, **fields, "reasoning_content": reasoning}
        passed.append(fields)
    return _with_names(passed)


def _with_names(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Results of tools with the name of the tool, which some templates write, and OpenAI's messages lack."""
    names: dict[str, Any] = {}
    for message in messages:
        names |= {str(call.get("id")): function_of(call).get("name") for call in calls_of(message)}
        name = names.get(str(message.get("tool_call_id"))) if message.get("role") == "tool" else None
        if name is not None and "name" not in message:
            message["name"] = name
    return messages
