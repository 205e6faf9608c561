"""An engine that does not compute: it looks up in a script what to say, and speaks the channel's protocol.

All else of the server is real: protocols, template, tokenizer, detokenizer, the parser of tools and thoughts. So what a
model of billions of parameters would say can be tried on any machine, and the same each time.

A prompt names its script in the text of its user, as `[script:NAME]`; the last one counts. Which step of the script is
due is told by the number of answers that the conversation holds since then. A step may name what the prompt has to hold
by then, such as what a tool answered: where that is missing, the answer says so and calls no tool.
"""

from __future__ import annotations

import json
import os
import re
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from ingle.channel import Abort, Channel, ChannelClosed, EngineInfo, EngineStats, NothingRefused, Start, StepMessage
from ingle.request import EngineOutput, EngineRequest, FinishReason
from ingle.text.load import load_text_side
from ingle.text.tokenizer import Tokenizer

SCRIPTS = "TEST_SCRIPTS"
"""The variable that names the file of scripts: a JSON object of lists of steps."""
LOG = "TEST_SCRIPT_LOG"
"""The one that names a file to which each request adds a line: its prompt, and how much of it was known."""
MISSING = "SCRIPT BROKEN"
CONTEXT = 131_072
THOUGHTFUL = "<think>\n15 * 37 is 555.\n</think>\n\n555."
"""What it says without a script to who wants to see reasoning, as suites of others do."""
_SCRIPT = re.compile(r"\[script:([\w-]+)\]")
_ANSWER = "<|im_start|>assistant\n"
_TOOLS = "<tools>"


class Step(msgspec.Struct):
    say: str
    expects: list[str] = []
    """What the prompt has to hold after the script's name."""
    needs_tools: bool = True
    """False: also where no tools are offered."""


class Asked(msgspec.Struct):
    """A line of the log."""

    prompt: str
    num_tokens: int
    num_cached_tokens: int
    answer: str


@dataclass
class Model:
    tokenizer: Tokenizer
    scripts: Mapping[str, Sequence[Step]]
    known: list[list[int]]
    """What a prefix cache would hold: prompts with their answers."""

    def answer(self, request: EngineRequest) -> Iterator[EngineOutput]:
        ids = list(request.prompt_token_ids)
        prompt = self.tokenizer.decode(ids, skip_special_tokens=False)
        said = self.said(prompt)
        cached = min(max((common(ids, known) for known in self.known), default=0), len(ids) - 1)
        tokens = [*self.tokenizer.encode(said, add_special_tokens=False), *self.tokenizer.eos_token_ids[:1]]
        self.known.append([*ids, *tokens])
        note(Asked(prompt, len(ids), cached, said))
        reason: FinishReason = "stop"
        if (most := request.sampling.max_tokens) is not None and most < len(tokens):
            tokens, reason = tokens[:most], "length"
        for place, token in enumerate(tokens):
            last = place == len(tokens) - 1
            yield EngineOutput(request.id, [token], reason if last else None, num_cached_tokens=cached)

    def said(self, prompt: str) -> str:
        names = list(_SCRIPT.finditer(prompt))
        if not names:
            return THOUGHTFUL if "Show your reasoning." in prompt else "Fine."
        since = prompt[names[-1].end() :]
        steps = self.scripts[names[-1][1]]
        number = since.count(_ANSWER) - 1
        if number >= len(steps):
            return f"{MISSING}: there is no step {number}"
        step = steps[number]
        if step.needs_tools and _TOOLS not in prompt:
            return "Fine."  # such as the request for a title
        lacks = [text for text in step.expects if text not in since]
        return f"{MISSING}: step {number} did not find {lacks}" if lacks else step.say


def common(one: Sequence[object], other: Sequence[object]) -> int:
    """How many entries both begin with."""
    for place, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return place
    return min(len(one), len(other))


def note(asked: Asked) -> None:
    if LOG in os.environ:
        with Path(os.environ[LOG]).open("ab") as file:
            file.write(msgspec.json.encode(asked) + b"\n")


def main() -> int:
    channel = Channel(socket.socket(fileno=int(sys.argv[1])))
    try:
        (start,) = channel.receive(wait=True)
        assert isinstance(start, Start)
        tokenizer = load_text_side(Path(start.path)).tokenizer
        scripts = msgspec.convert(json.loads(Path(os.environ[SCRIPTS]).read_text()), dict[str, list[Step]])
        channel.send(NothingRefused())
        channel.send(info(tokenizer))
        serve(channel, Model(tokenizer, scripts, []))
    except ChannelClosed:
        return 0


def serve(channel: Channel, model: Model) -> None:
    """A token of each running request after the other."""
    running: dict[str, Iterator[EngineOutput]] = {}
    steps = 0
    while True:
        for message in channel.receive(wait=not running):
            if isinstance(message, EngineRequest):
                running[message.id] = model.answer(message)
            elif isinstance(message, Abort):
                running.pop(message.id, None)
        outputs = [next(answer) for answer in running.values()]
        for output in outputs:
            if output.finish_reason is not None:
                del running[output.id]
        steps += 1
        channel.send(StepMessage(outputs))
        channel.send(EngineStats(num_steps=steps, num_running=len(running)))


def info(tokenizer: Tokenizer) -> EngineInfo:
    return EngineInfo(
        max_model_len=CONTEXT,
        vocab_size=tokenizer.vocab_size,
        max_num_seqs=16,
        num_pages=CONTEXT,
        page_size=16,
        device="script",
        dtype="float32",
        kv_dtype="float32",
        product_dtype="float32",
        factors=["float32"],
        kernels="none",
        writes_text=True,
        hidden_size=576,
        family="script",
        num_parameters=1,
        stored_types={"F32": 1},
        expanded_types=[],
        kept_types=[],
        weight_bytes=4,
        kv_cache_bytes=4,
        notices=[],
        timings_s={},
    )
