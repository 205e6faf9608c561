"""Chat templates: from a conversation to the prompt that the model was trained on, as transformers renders it."""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, cast

from ingle.errors import ModelError, RequestError
from ingle.text.conversation import Forms, TemplateError

logger = logging.getLogger("ingle")

MAX_TEMPLATE_CHARS = 1_000_000
_MAX_REPLY_BYTES = 64 << 20

SPECIAL_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
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

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        if len(source) > MAX_TEMPLATE_CHARS:
            raise ModelError(
                f"the chat template has {len(source)} characters, at most {MAX_TEMPLATE_CHARS} are taken: "
                "give another one with --chat-template"
            )
        self.source = source
        self._special_tokens = dict(special_tokens)
        self._reserved = _RESERVED_NAMES | self._special_tokens.keys()
        self._forms = Forms(source)

    def prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """`render`, with all that was sent: content becomes text or parts, and a `developer` a `system` message, where
        the template wants it so.

        Raises `RequestError` naming the first message that the template leaves out.
        """
        sent = _as_transformers_passes(messages)
        options: dict[str, Any] = {
            "add_generation_prompt": add_generation_prompt,
            "chat_template_kwargs": chat_template_kwargs,
        }
        written = self._forms.write(sent, options, lambda marked: self._render(marked, None, **options))
        return self.render(written, **options)

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
        try:
            return self._render(messages, tools, add_generation_prompt, chat_template_kwargs)
        except TemplateError as error:
            if error.reason is not None:
                logger.warning("chat template: %r", error.reason)
            raise

    def _render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        add_generation_prompt: bool,
        chat_template_kwargs: Mapping[str, Any] | None,
    ) -> str:
        extra = dict(chat_template_kwargs or {})
        for name in extra:
            if name in self._reserved:
                raise RequestError(f"chat_template_kwargs cannot set {name!r}", param="chat_template_kwargs")
        variables = {"documents": None} | self._special_tokens | extra
        variables |= {
            "messages": _as_transformers_passes(messages),
            "tools": tools,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            request = json.dumps({"template": self.source, "variables": variables}).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise RequestError(f"the conversation is not plain JSON: {error}", param="messages") from error
        return _sandbox.render(request)


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
    return passed


class _Sandbox:
    """The process that renders. It starts with the first request and again after one that broke its limits."""

    # The parent's module path as it stands, so that the same ingle and the same Jinja are found without `site`.
    _BOOT = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); import ingle.text.template_worker as w; w.main()"
    # All that the process needs; keys and tokens in the environment are none of a template's business.
    _ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "LANG", "LC_ALL", "LC_TIME", "TZ")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def render(self, request: bytes) -> str:
        """Raises `RequestError` when the template fails or breaks a limit."""
        with self._lock:
            process = self._running()
            try:
                reply = _exchange(process, request)
            except BaseException:  # such as Ctrl-C: the answer still to come would be taken for the next one's
                self.stop()
                raise
            if not reply.endswith(b"\n"):
                why = "it takes too long" if self.stop() == -signal.SIGPROF else "its process ended without an answer"
                raise RequestError(f"chat template: {why}", param="messages")
        answer: dict[str, str] = json.loads(reply)
        if "error" in answer:
            raise TemplateError(f"chat template: {answer['error']}", answer.get("reason"))
        return answer["text"]

    def start(self) -> None:
        with self._lock, contextlib.suppress(RequestError):  # the first request will tell
            self._running()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            path = [*sys.path, str(Path(__file__).parents[2])]
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-I", "-S", "-c", self._BOOT, json.dumps(path)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    env={name: os.environ[name] for name in self._ENVIRONMENT if name in os.environ},
                    start_new_session=True,  # Ctrl-C in the terminal is not for it
                )
            except OSError as error:
                raise RequestError(f"chat template: its process cannot start: {error}", status=500) from error
        return self._process

    def stop(self) -> int | None:
        """End the process, if there is one, and return its exit status; negative for the signal that ended it."""
        process, self._process = self._process, None
        if process is None:
            return None
        process.kill()
        with contextlib.suppress(BrokenPipeError):  # part of a request was still in the buffer
            cast(IO[bytes], process.stdin).close()
        cast(IO[bytes], process.stdout).close()
        return process.wait()

    def forget(self) -> None:
        """In a forked child: the process is the parent's, and so was whoever held the lock."""
        self._lock = threading.Lock()
        self._process = None


def _exchange(process: subprocess.Popen[bytes], request: bytes) -> bytes:
    stdin, stdout = cast(IO[bytes], process.stdin), cast(IO[bytes], process.stdout)
    try:
        stdin.write(request + b"\n")
        stdin.flush()
    except BrokenPipeError:
        return b""
    return stdout.readline(_MAX_REPLY_BYTES)


_sandbox = _Sandbox()


def warm_up() -> None:
    """Starts the process that renders, which imports Jinja while the caller reads a vocabulary."""
    _sandbox.start()


atexit.register(_sandbox.stop)
os.register_at_fork(after_in_child=_sandbox.forget)
