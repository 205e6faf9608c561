"""What models are asked when they are verified: short texts of many kinds, and random token ids."""

from __future__ import annotations

import random
from pathlib import Path

TEXTS = (
    "The capital of France is",
    "中国的首都是北京，它有三千多年的历史。请介绍一下",
    "def fibonacci(n: int) -> int:\n    if n < 2:\n        return n\n    return",
    "Die Würde des Menschen ist unantastbar. Sie zu achten und zu schützen ist",
    "吾輩は猫である。名前はまだ無い。",
    "Теорема Пифагора утверждает, что",
    "العربية لغة جميلة، وهي",
    "1, 1, 2, 3, 5, 8, 13, 21, 34, 55,",
    "Q: If a train travels 60 km in 45 minutes, how fast is it?\nA: Let's think step by step. 😀",
    "नमस्ते! आप कैसे हैं?",
    "안녕하세요. 오늘 날씨가",
    "<html>\n  <body>\n    <h1>Hello</h1>\n\t<p>",
)
"""Prompts of several languages and scripts."""

PASSAGE = Path(__file__).parent / "alice.txt"
"""The first two chapters of Alice's Adventures in Wonderland, by Lewis Carroll (1865): in the public domain."""
_LONGEST_RANDOM = 192


def random_prompts(count: int, vocab_size: int, seed: int) -> list[list[int]]:
    """Prompts of random ids and lengths, from one token to some dozen pages: what no tokenizer would ever make."""
    source = random.Random(seed)
    lengths = [1 + round((_LONGEST_RANDOM - 1) * index / max(count - 1, 1)) for index in range(count)]
    return [[source.randrange(vocab_size) for _ in range(length)] for length in lengths]
