"""Names for the content of full pages, chained so that equal names mean equal token prefixes."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b

ROOT = b""


def page_hash(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """16 bytes that name a page holding `token_ids` after the prefix named `parent`.

    A cryptographic hash: a collision would let one client read the keys and values of another's prompt.
    """
    return blake2b(array("i", token_ids).tobytes(), digest_size=16, key=parent).digest()


def root(salt: str) -> bytes:
    """What names of prefixes begin with: pages are shared between requests of the same salt."""
    return blake2b(salt.encode(errors="surrogatepass"), digest_size=16).digest() if salt else ROOT


def extend_hashes(
    hashes: list[bytes], token_ids: Sequence[int], page_size: int, num_pages: int, root: bytes = ROOT
) -> None:
    """Grows `hashes`, in place, to name the first `num_pages` full pages of `token_ids`."""
    parent = hashes[-1] if hashes else root
    for start in range(len(hashes) * page_size, num_pages * page_size, page_size):
        parent = page_hash(parent, token_ids[start : start + page_size])
        hashes.append(parent)


def name_in_group(content_hash: bytes, group: int) -> bytes:
    """Names a page that holds this content for the layers of one group."""
    return content_hash + bytes((group,))
