"""Outputs of the engine on their way to those who wait for them."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from ingle.channel import ChannelClosed, StepMessage
from ingle.errors import EngineError
from ingle.request import EngineOutput, EngineRequest, SamplingParams, TokenLogprobs
from ingle.server.engine_client import EngineClient, caller, joined


class ScriptedChannel:
    """Hands out what the test puts into `messages`; None closes it."""

    def __init__(self) -> None:
        self.messages: asyncio.Queue[StepMessage | None] = asyncio.Queue()
        self.sent: list[Any] = []

    def send(self, message: Any) -> None:
        self.sent.append(message)

    async def receive(self) -> StepMessage:
        message = await self.messages.get()
        if message is None:
            raise ChannelClosed
        return message

    def close(self) -> None:
        pass


class Ended:
    has_ended = True
    pid = 1

    def exit_text(self) -> str:
        return "exit status 9"

    def stop(self) -> None:
        pass


REQUEST = EngineRequest("a", [1], SamplingParams())


async def outputs_of(*messages: EngineOutput | None) -> list[EngineOutput]:
    """What comes of messages that were all there before anybody looked. Raises what the stream raises."""
    channel = ScriptedChannel()
    client = EngineClient(cast(Any, Ended()), cast(Any, channel), cast(Any, None))
    stream = client.generate(REQUEST)
    first = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0)
    for output in messages:
        channel.messages.put_nowait(None if output is None else StepMessage([output]))
    found = [await first]
    async for output in stream:
        found.append(output)
    return found


def scored(token_id: int) -> list[TokenLogprobs]:
    return [TokenLogprobs([token_id], [-1.0], 1)]


def test_what_came_while_nobody_looked_comes_as_one() -> None:
    first = EngineOutput("a", [5], num_cached_tokens=3, logprobs=scored(5), prompt_logprobs=[None])
    rest = [EngineOutput("a", [6], logprobs=scored(6)), EngineOutput("a", [7, 2], "stop", 2, logprobs=scored(7) * 2)]
    (found,) = asyncio.run(outputs_of(first, *rest))
    assert found == EngineOutput(
        "a", [5, 6, 7, 2], "stop", 2, 3, scored(5) + scored(6) + scored(7) * 2, prompt_logprobs=[None]
    )


def test_an_error_comes_by_itself_after_what_came_before() -> None:
    failed = EngineOutput("a", [], "error", error="NaN")
    found = asyncio.run(outputs_of(EngineOutput("a", [5]), EngineOutput("a", [6]), failed))
    assert found == [EngineOutput("a", [5, 6]), failed]


def test_an_engine_that_dies_is_told_after_what_it_gave() -> None:
    with pytest.raises(EngineError, match="the engine died: exit status 9"):
        asyncio.run(outputs_of(EngineOutput("a", [5]), EngineOutput("a", [6]), None))


def test_requests_go_out_in_the_name_of_who_asks() -> None:
    async def sent() -> EngineRequest:
        caller.set("ann")
        channel = ScriptedChannel()
        stream = EngineClient(cast(Any, Ended()), cast(Any, channel), cast(Any, None)).generate(REQUEST)
        task = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0)
        task.cancel()
        return cast(EngineRequest, channel.sent[0])

    assert asyncio.run(sent()).client == "ann"


def test_tokens_may_come_some_at_a_time_but_the_first_at_once() -> None:
    async def go() -> list[list[int]]:
        channel = ScriptedChannel()
        client = EngineClient(cast(Any, Ended()), cast(Any, channel), cast(Any, None), stream_interval=3)
        found: list[list[int]] = []
        told = asyncio.Event()

        async def read() -> None:
            async for output in client.generate(REQUEST):
                found.append(output.token_ids)
                told.set()

        reading = asyncio.create_task(read())
        await asyncio.sleep(0)
        for token_id in range(8):
            channel.messages.put_nowait(StepMessage([EngineOutput("a", [token_id])]))
            if token_id in (0, 3, 6):
                await told.wait()
                told.clear()
            await asyncio.sleep(0)
        channel.messages.put_nowait(StepMessage([EngineOutput("a", [8], "stop")]))
        await reading
        return found

    assert asyncio.run(go()) == [[0], [1, 2, 3], [4, 5, 6], [7, 8]]


def test_what_came_of_several_steps_says_as_one_what_they_said() -> None:
    """An answer that its grammar ends keeps its last token, however late the server looks."""
    first = EngineOutput("a", [1], num_cached_tokens=16, logprobs=scored(1), prompt_logprobs=[None], queued_s=0.5)
    whole = joined(
        [
            EngineOutput("a", [], num_prompt_read=8),
            first,
            EngineOutput("a", [2, 3], "stop", logprobs=scored(2) + scored(3), complete=True),
        ]
    )
    assert whole == EngineOutput(
        "a", [1, 2, 3], "stop", None, 16, scored(1) + scored(2) + scored(3), [None], queued_s=0.5, complete=True
    )
    reading = joined([EngineOutput("a", [], num_prompt_read=8), EngineOutput("a", [], num_prompt_read=16)])
    assert reading.num_prompt_read == 16 and joined([first, EngineOutput("a", [2], "stop", 2)]).stop_token_id == 2
