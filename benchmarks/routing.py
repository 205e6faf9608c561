"""Replicas that are pretended, and who gets a request: the router's choice beside plainer ones.

Each replica computes a token in a unit of time, for all its requests in turn, and holds prefixes up to its capacity.
People ask, wait for the answer, think and ask again. `python benchmarks/routing.py` takes some seconds.
"""

from __future__ import annotations

import heapq
import itertools
import random
import statistics
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from ingle.request import EngineOutput, EngineRequest, SamplingParams, token_ids
from ingle.server.routing import BLOCK, Routed, Router, block_keys

REPLICAS = 4


@dataclass(frozen=True)
class Load:
    conversations: int = 96
    turns: int = 6
    system: int = 2_000
    """Tokens at the beginning of all that share one."""
    systems: int = 3
    user: int = 100
    answer: int = 200
    """On average."""
    think: int = 3_000
    capacity: int = 120_000


LOADS = {
    "conversations": Load(),
    "more of them than there is time for": Load(conversations=300, think=2_000),
    "little room": Load(conversations=150, capacity=50_000, think=6_000),
    "one prompt of 8,000 for all": Load(300, 1, 8_000, 1, answer=250, think=6_000, capacity=200_000),
    "nothing in common": Load(400, 1, 30, 1, user=1_000, think=60_000),
}


@dataclass
class Job:
    conversation: int
    left: float
    since: float
    answer: list[int]
    routed: Routed | None


@dataclass
class Replica:
    jobs: dict[int, Job] = field(default_factory=dict)
    held: OrderedDict[int, None] = field(default_factory=OrderedDict)

    def hold(self, keys: list[int], capacity: int) -> int:
        """Tokens of these that it held before."""
        found = sum(1 for _ in itertools.takewhile(self.held.__contains__, keys))
        for key in reversed(keys):
            self.held[key] = None
            self.held.move_to_end(key)
        while len(self.held) > capacity // BLOCK:
            self.held.popitem(last=False)
        return BLOCK * found


Choose = Callable[[EngineRequest, list[Replica]], tuple[int, Routed | None]]


class Server:
    def __init__(self, load: Load, choose: Choose, router: Router) -> None:
        self.load, self.choose, self.router = load, choose, router
        self.rng, self.now = random.Random(1), 0.0
        self.replicas = [Replica() for _ in range(REPLICAS)]
        systems = [self.words(load.system) for _ in range(load.systems)]
        self.said = [list(systems[min(self.rng.randrange(4), load.systems - 1)]) for _ in range(load.conversations)]
        self.turns = [load.turns] * load.conversations
        self.asks = [(self.rng.random() * load.think, number) for number in range(load.conversations)]
        heapq.heapify(self.asks)
        self.names = itertools.count()
        self.seconds: list[float] = []
        self.num_prompt = self.num_held = 0

    def words(self, count: int) -> list[int]:
        return self.rng.choices(range(50_000), k=count)

    def run(self) -> None:
        while self.asks or any(replica.jobs for replica in self.replicas):
            ends = [(self.now + min(job.left for job in each.jobs.values()) * len(each.jobs), index)
                    for index, each in enumerate(self.replicas) if each.jobs]  # fmt: skip
            if self.asks and (not ends or self.asks[0][0] <= min(ends)[0]):
                self.pass_time(max(self.asks[0][0], self.now))
                self.ask(heapq.heappop(self.asks)[1])
            else:
                at, index = min(ends)
                self.pass_time(at)
                self.end(self.replicas[index])

    def pass_time(self, to: float) -> None:
        for replica in self.replicas:
            for job in replica.jobs.values():
                job.left -= (to - self.now) / len(replica.jobs)
        self.now = to

    def ask(self, number: int) -> None:
        said = self.said[number]
        said += self.words(self.load.user)
        request = EngineRequest(str(next(self.names)), token_ids(said), SamplingParams(max_tokens=None))
        index, routed = self.choose(request, self.replicas)
        replica = self.replicas[index]
        held = replica.hold(block_keys(hash(""), request.prompt_token_ids), self.load.capacity)
        answer = self.words(max(10, int(self.rng.expovariate(1 / self.load.answer))))
        replica.jobs[int(request.id)] = Job(number, len(said) - held + len(answer), self.now, answer, routed)
        self.num_prompt += len(said)
        self.num_held += held

    def end(self, replica: Replica) -> None:
        for name in [name for name, job in replica.jobs.items() if job.left <= 1e-6]:
            job = replica.jobs.pop(name)
            self.seconds.append(self.now - job.since)
            if job.routed is not None:
                self.router.took(job.routed, EngineOutput(str(name), job.answer, "stop"))
                self.router.end(job.routed)
            said = self.said[job.conversation]
            said += job.answer
            replica.hold(block_keys(hash(""), token_ids(said)), self.load.capacity)
            self.turns[job.conversation] -= 1
            if self.turns[job.conversation]:
                heapq.heappush(self.asks, (self.now + self.rng.expovariate(1 / self.load.think), job.conversation))


def choices(router: Router) -> dict[str, Choose]:
    turn = itertools.count()

    def by_router(request: EngineRequest, replicas: list[Replica]) -> tuple[int, Routed]:
        routed = router.route(request, range(len(replicas)))
        return routed.replica, routed

    return {
        "the router": by_router,
        "fewest requests": lambda request, replicas: (
            min(range(len(replicas)), key=lambda index: len(replicas[index].jobs)), None),
        "in turn": lambda request, replicas: (next(turn) % len(replicas), None),
    }  # fmt: skip


def main() -> None:
    print(f"{'':38}{'chosen':18}{'all':>9}{'mean':>9}{'p95':>9}{'cached':>8}")
    for name, load in LOADS.items():
        for rule in ("the router", "fewest requests", "in turn"):
            router = Router([load.capacity] * REPLICAS)
            server = Server(load, choices(router)[rule], router)
            server.run()
            seconds = sorted(server.seconds)
            figures = server.now, statistics.fmean(seconds), seconds[int(0.95 * len(seconds))]
            shown = "".join(f"{figure:9,.0f}" for figure in figures)
            print(f"{name:38}{rule:18}{shown}{server.num_held / server.num_prompt:8.0%}", flush=True)


if __name__ == "__main__":
    main()
