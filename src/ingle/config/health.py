"""What a server does about an engine that is dead or stuck, and how it ends."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ingle.errors import ConfigError


@dataclass(frozen=True)
class HealthConfig:
    """When the engine is taken to be dead or stuck, what is done then, and how the server ends."""

    watchdog: bool = True
    """Start a new engine in place of one that has died or is stuck. Without, the server ends with a dead engine, and
    /health/ready tells of a stuck one."""
    watchdog_timeout: float = 300.0
    """Seconds after which an engine is stuck in which no step ended, nor a layer of one; 0 for no limit. One that is
    stopped, or shows no sign of life, is ended after 10."""
    max_engine_restarts: int = 5
    """Most new engines in a row. Then the server ends with an error, so that systemd or Docker starts it anew."""
    engine_restart_window: float = 600.0
    """Seconds that an engine has to run for the next to be the first in a row."""
    shutdown_timeout: float = 5.0
    """Seconds that answers have to end when the server is told to (SIGTERM, Ctrl-C); a second signal ends it at once.
    The whole takes up to 3.5 s more, and `docker stop` kills after 10 unless it is told otherwise."""

    def __post_init__(self) -> None:
        most = self.max_engine_restarts
        if not isinstance(most, int) or isinstance(most, bool) or most < 1:
            raise ConfigError(f"--max-engine-restarts {most!r} is not a number of engines: give 1 or more")
        for name in ("watchdog_timeout", "engine_restart_window", "shutdown_timeout"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0.0 <= value < math.inf:
                raise ConfigError(f"--{name.replace('_', '-')} {value!r} is not a time: give seconds, 0 or more")
