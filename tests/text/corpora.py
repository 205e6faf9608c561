"""Text of many languages and shapes, to train small vocabularies on and to compare tokenizers over."""

from __future__ import annotations

import random
import unicodedata

SENTENCES = [
    "The quick brown fox jumps over the lazy dog, doesn't it? They'll say we'd've known; I'm sure you're right.",
    "In 2024, 1,234,567 people paid $9.99 (or €8.50) for v2.0.1-beta; that's 42% more than 0x1F4A9.",
    "Größe, naïve café, Ångström, coöperate, señor, fiancée, Zürich, İstanbul, Łódź, œuvre, ﬁne ﬂour.",
    "你好，世界！今天天气很好，我们一起去公园散步吧。人工智能正在改变我们的生活方式。",
    "繁體中文：電腦與網路已經成為生活的一部分。「引號」、『雙引號』……",
    "東京タワーはとても高いです。ひらがな、カタカナ、漢字を混ぜて書きます。ﾊﾝｶｸｶﾅ",
    "안녕하세요, 세계! 오늘은 날씨가 참 좋네요. 한국어 형태소 분석은 어렵습니다.",
    "Привет, мир! Съешь же ещё этих мягких французских булок, да выпей чаю.",
    "مرحبا بالعالم! كيف حالك اليوم؟ ١٢٣٤٥ שלום עולם, מה שלומך?",
    "नमस्ते दुनिया, आप कैसे हैं? ภาษาไทยไม่มีช่องว่าง xin chào thế giới, tiếng Việt có dấu.",
    "😀😃😄 👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇨🇳🇰🇷 ❤️ ☕️ ✓ → ∑ ∞ ½ ² ③ Ⅳ",
    "def f(x: int) -> list[str]:\n    return [str(i) for i in range(x)]  # comment\n\n\tif x == 0:\n\t\tpass\n",
    "for (int i = 0; i < n; ++i) {\n  a[i] *= b[i] >> 2; // 注释\n}\r\n#include <stdio.h>\n",
    '{"name": "ingle", "tags": ["a", "b"], "n": 1e-9, "url": "https://example.com/?q=a%20b&c=d#e"}',
    "<table><tr><td>1</td></tr></table> &amp; <|endoftext|> <s>[INST] hi [/INST]</s> <unk> <0x0A>",
    "   leading, trailing   and\t\ttabs \n\n\n\n blanks  \u00a0non-breaking\u3000ideographic\u200bzero-width\ufeff",
    "ＦＵＬＬ　ｗｉｄｔｈ　１２３！？ ℌ𝔢𝔩𝔩𝔬 𝟘𝟙𝟚 e\u0301 \u1112\u1161\u11ab a\u0328\u0301 ﷺ",
    "AAAAAAAA bbbbbbbb abababab ............ -------- ======== \u2581under\u2581score\u2581",
]
EDGES = [
    "",
    " ",
    "  ",
    "\n",
    "\t",
    "\r\n",
    "a",
    " a",
    "a ",
    "。",
    "\u2581",
    "\u2581 \u2581",
    "\x00",
    "\x7f\x01",
    "'",
    "'s",
    "…",
]


def texts(seed: int = 0, count: int = 2000) -> list[str]:
    """Sentences, edges, and random splices of them with stray characters of every plane."""
    rng = random.Random(seed)
    joined = "".join(SENTENCES)
    made = [*SENTENCES, *EDGES, *(unicodedata.normalize("NFD", sentence) for sentence in SENTENCES)]
    while len(made) < count:
        pieces = []
        for _ in range(rng.randint(1, 6)):
            kind = rng.random()
            if kind < 0.6:
                start = rng.randrange(len(joined))
                pieces.append(joined[start : start + rng.randint(1, 25)])
            elif kind < 0.8:
                pieces.append(rng.choice([" ", "  ", "   ", "\n", "\n\n", "\t", "\r\n"]) * rng.randint(1, 3))
            else:
                pieces.append(_any_character(rng))
        made.append("".join(pieces))
    return made


def _any_character(rng: random.Random) -> str:
    while True:
        character = chr(rng.randrange(0x20, rng.choice([0x80, 0x250, 0x3000, 0x10000, 0x30000])))
        if unicodedata.category(character) not in ("Cs", "Cn", "Co"):
            return character
