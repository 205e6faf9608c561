"""The number that an answer comes to."""

from __future__ import annotations

import math
import unicodedata

import regex

_NUMBER = regex.compile(r"[-+]?(?:\d[\d,_' ]*\d|\d)(?:\.\d+)?(?:[eE][-+]?\d+)?|[-+]?\.\d+")
_GROUPED = regex.compile(r"[-+]?\d{1,3}(?:[,_' ]\d{3})+(?:\.\d+)?")


def number_in(text: str) -> float | None:
    """The last number, which is where an answer that reasons comes to its end. Digits may be grouped and of any
    script; a percent sign does not count."""
    text = unicodedata.normalize("NFKC", text).replace("−", "-")
    found = None
    for match in _NUMBER.finditer(text):
        grouped = _GROUPED.fullmatch(match[0])  # else 3, 4 and 5, of which the last counts
        digits = regex.sub(r"[,_' ]", "", match[0]) if grouped else regex.split(r"[,_' ]+", match[0])[-1]
        try:
            found = float(digits)
        except ValueError:
            continue
    return found if found is not None and math.isfinite(found) else None
