"""python -m tests.fuzz TARGET [libFuzzer's options]: coverage-guided fuzzing with atheris, where that is installed.

For example `python -m tests.fuzz gguf -runs=100000 -rss_limit_mb=2048`.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path


def main() -> None:
    try:
        import atheris
    except ImportError:
        sys.exit("fuzzing beyond the tests needs atheris: pip install atheris")
    with atheris.instrument_imports(include=["ingle"]):
        from tests.fuzz.targets import TARGETS, seed_of
    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        sys.exit(f"usage: python -m tests.fuzz TARGET [-runs=N]; the targets are {', '.join(TARGETS)}")
    name = sys.argv[1]
    with tempfile.TemporaryDirectory() as corpus:
        Path(corpus, "seed").write_bytes(seed_of(name))
        atheris.Setup([sys.argv[0], *sys.argv[2:], corpus], TARGETS[name].read)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
