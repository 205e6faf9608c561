"""The processes in which chat templates are rendered and grammars tried: one for each at a time, so none waits for
another.

They start when they are needed, and again after a template that broke its limits. What runs in them is
`template_worker`.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO, Any, cast

from ingle.errors import RequestError
from ingle.text.conversation import TemplateError

_MAX_REPLY_BYTES = 64 << 20
_MAX_S = 30.0
"""For an answer, whatever the process does with its time: `template_worker` bounds what it computes in far less."""
_PIPE_BYTES = 1 << 16
_TOO_LONG, _KILLED = "it takes too long", "its process was killed"
_TOO_MUCH = "it takes too much memory"
"""How libraries that cannot get any end a process."""
_MAX_PROCESSES = 8
"""At a time, some 12 MB each. Whoever comes when all render waits."""


class SandboxError(Exception):
    """Why there is no answer, in words that may be shown."""

    def __init__(self, why: str, *, may_pass: bool = False) -> None:
        """`may_pass`: it is no fault of the request, which may be answered later."""
        super().__init__(why)
        self.may_pass = may_pass


class Sandbox:
    """One process, for one thread at a time."""

    # The parent's module path as it stands, so that the same ingle and the same Jinja are found without `site`. It ends
    # with its parent: a signal to the whole service lets answers end that are still to be rendered.
    _BOOT = (
        "import json, signal, sys\n"
        "for number in signal.SIGINT, signal.SIGHUP, signal.SIGTERM: signal.signal(number, signal.SIG_IGN)\n"
        "sys.path[:] = json.loads(sys.argv[1]); import ingle.text.template_worker as w; w.main()"
    )
    # All that the process needs; keys and tokens in the environment are none of a template's business.
    _ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "LANG", "LC_ALL", "LC_TIME", "TZ")

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._ended = False
        """It is not to be used any more."""

    def ask(self, request: bytes) -> dict[str, Any]:
        """What `template_worker` answers. Raises `SandboxError` when it breaks a limit.

        What ends the process from outside, as the system does where memory lacks, is no fault of the request: it is
        tried once more.
        """
        reply, why = self._try(request)
        if why == _KILLED and not self._ended:
            reply, why = self._try(request)
        if why is not None:
            raise SandboxError(why, may_pass=why == _KILLED)
        answer: dict[str, Any] = json.loads(reply)
        return answer

    def _try(self, request: bytes) -> tuple[bytes, str | None]:
        """What the process answers, and why it is not the whole of it."""
        process = self.start()
        try:
            reply = _exchange(process, request)
        except TimeoutError:
            self.stop()
            return b"", _TOO_LONG
        except BaseException:  # such as Ctrl-C: the answer still to come would be taken for the next one's
            self.stop()
            raise
        if reply.endswith(b"\n"):
            return reply, None
        status = self.stop()
        if len(reply) >= _MAX_REPLY_BYTES:
            return b"", "it writes too much"
        reasons: dict[int | None, str] = {
            -signal.SIGPROF: _TOO_LONG,
            -signal.SIGKILL: _KILLED,
            -signal.SIGABRT: _TOO_MUCH,
        }
        return b"", reasons.get(status, "its process ended without an answer")

    def start(self) -> subprocess.Popen[bytes]:
        """Starts the process if there is none."""
        if self._process is None or self._process.poll() is not None:
            path = [*sys.path, str(Path(__file__).parents[2])]
            try:
                self._process = process = subprocess.Popen(
                    [sys.executable, "-I", "-S", "-c", self._BOOT, json.dumps(path)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    bufsize=0,
                    stderr=subprocess.DEVNULL,  # a full pipe there would hold it up, and no time limit counts that
                    env={name: os.environ[name] for name in self._ENVIRONMENT if name in os.environ},
                    start_new_session=True,  # Ctrl-C in the terminal is not for it
                )
            except OSError as error:
                raise SandboxError(f"its process cannot start: {error}", may_pass=True) from error
            os.set_blocking(cast(IO[bytes], process.stdin).fileno(), False)
        return self._process

    def kill(self) -> None:
        """From another thread: a rendering under way ends as one whose process has died."""
        self._ended = True
        process = self._process
        if process is not None:
            process.kill()

    def stop(self) -> int | None:
        """End the process, if there is one, and return its exit status; negative for the signal that ended it."""
        process, self._process = self._process, None
        if process is None:
            return None
        process.kill()
        cast(IO[bytes], process.stdin).close()
        cast(IO[bytes], process.stdout).close()
        return process.wait()


def _exchange(process: subprocess.Popen[bytes], request: bytes) -> bytes:
    """The line that it answers, or what there is of it when the process ends. Raises `TimeoutError` after `_MAX_S`."""
    stdin, stdout = cast(IO[bytes], process.stdin).fileno(), cast(IO[bytes], process.stdout).fileno()
    left, reply = memoryview(request + b"\n"), bytearray()
    deadline_s = time.monotonic() + _MAX_S
    poll = select.poll()
    poll.register(stdin, select.POLLOUT)
    poll.register(stdout, select.POLLIN)
    while not reply.endswith(b"\n") and len(reply) < _MAX_REPLY_BYTES:
        ready = dict(poll.poll(max(0.0, deadline_s - time.monotonic()) * 1000))
        if not ready:
            raise TimeoutError
        if stdin in ready:
            try:
                left = left[os.write(stdin, left) :]
            except BrokenPipeError:
                break
            if not left:
                poll.unregister(stdin)
        if stdout in ready:
            data = os.read(stdout, _PIPE_BYTES)
            if not data:
                break
            reply += data
    return bytes(reply)


class Sandboxes:
    """All such processes of this one. Safe to use from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.forget()

    def forget(self) -> None:
        """In a forked child: the processes are the parent's, and so were whoever held the locks."""
        self._lock = threading.Lock()
        self._places = threading.Semaphore(_MAX_PROCESSES)
        self._idle: list[Sandbox] = []
        self._all: list[Sandbox] = []
        self._stopped = False

    def render(self, request: bytes) -> str:
        """The text of a template. Raises `RequestError`."""
        try:
            answer = self.ask(request)
        except SandboxError as error:
            status = 503 if error.may_pass else 400
            raise RequestError(f"chat template: {error}", param="messages", status=status) from None
        if "error" in answer:
            raise TemplateError(f"chat template: {answer['error']}", answer.get("reason"))
        text: str = answer["text"]
        return text

    def ask(self, request: bytes) -> dict[str, Any]:
        """The answer to one request to `template_worker`. Raises `SandboxError` when it breaks a limit."""
        with self._places:
            sandbox = self._take()
            try:
                return sandbox.ask(request)
            finally:
                with self._lock:
                    self._idle.append(sandbox)

    def _take(self) -> Sandbox:
        with self._lock:
            if self._stopped:
                raise RequestError("the server is being stopped", status=503)
            if not self._idle:
                self._idle.append(Sandbox())
                self._all += self._idle
            return self._idle.pop()

    def warm_up(self) -> None:
        """Starts a process, which imports Jinja while the caller reads a vocabulary."""
        with contextlib.suppress(RequestError, SandboxError):  # the first request will tell
            sandbox = self._take()
            sandbox.start()
            with self._lock:
                self._idle.append(sandbox)

    def stop(self) -> None:
        """Ends all processes, also those that render. From now on nothing is rendered."""
        with self._lock:
            self._stopped = True
            for sandbox in self._all:
                sandbox.kill()


sandboxes = Sandboxes()
atexit.register(sandboxes.stop)
os.register_at_fork(after_in_child=sandboxes.forget)
