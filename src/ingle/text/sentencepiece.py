"""SentencePiece (https://arxiv.org/abs/1808.06226) as a tokenizer of the `tokenizers` library.

Vocabularies come from `tokenizer.model` files (`sentencepiece_file`) and from GGUF metadata (`gguf_tokenizer`).
"""

from __future__ import annotations

from itertools import pairwise

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from ingle.text.sentencepiece_bpe import MergesByScore
from ingle.text.sentencepiece_model import CONTROL, NORMAL, SPACE, UNKNOWN, USER_DEFINED, SentencePieceModel

# The pairs that a vocabulary is cut into take memory that grows with the squares of its pieces' lengths. Real ones of
# 256k pieces come to some 3e7.
MAX_SQUARED_LENGTHS = 1 << 28

_NEVER = -1e6
_UNASSIGNED = range(0xF0000, 0xFFFFE)
"""Characters for private use, which nobody does."""


def backend_of(model: SentencePieceModel) -> tokenizers.Tokenizer:
    """Raises `ValueError` for a vocabulary that contradicts itself. Tokens to be found in text are added afterwards."""
    tokens = model.tokens
    if len(set(tokens)) != len(tokens):
        raise ValueError(f"{len(tokens) - len(set(tokens))} of its {len(tokens)} pieces appear twice")
    if sum(length**2 for length in map(len, model.pieces)) > MAX_SQUARED_LENGTHS:
        raise ValueError("its pieces are longer than any real vocabulary's")
    cuts: list[pre_tokenizers.PreTokenizer] = []
    if model.space_prefix == "first":
        cuts.append(pre_tokenizers.Metaspace(SPACE, prepend_scheme="first", split=False))
    if model.unigram:
        backend = tokenizers.Tokenizer(_unigram(model))
        if model.symbols_within:
            cuts.append(pre_tokenizers.Split(Regex(model.symbol_pattern), behavior="isolated"))
    else:
        merges = [] if model.symbols_within else _merges(model)
        by_score = model.symbols_within or _has_ties(model, merges)
        backend = tokenizers.Tokenizer(_bpe(model, [] if by_score else merges))
        if by_score:
            cuts.append(_merging_by_score(model))
    backend.normalizer = _normalizer(model)
    backend.pre_tokenizer = pre_tokenizers.Sequence(cuts) if cuts else None
    to_text: list[decoders.Decoder] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if model.space_prefix != "none":
        to_text.append(decoders.Strip(content=" ", left=1, right=0))
    backend.decoder = decoders.Sequence(to_text)
    return backend


def _normalizer(model: SentencePieceModel) -> normalizers.Normalizer:
    steps = _charsmap_steps(model)
    if model.trims_spaces:
        steps += [normalizers.Replace(Regex(rf"\A +|[ {SPACE}]+\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if model.space_prefix == "each":
        end = normalizers.Replace(Regex(r"(?<=[\s\S])\z"), SPACE)
        steps.append(end if model.space_suffix else normalizers.Prepend(SPACE))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])


def _charsmap_steps(model: SentencePieceModel) -> list[normalizers.Normalizer]:
    """Rules that leave user-defined pieces as they are: those that would change are away meanwhile, each for a
    character that no text has."""
    if not model.charsmap:
        return []
    rules = normalizers.Precompiled(model.charsmap)
    changed = [symbol for symbol in model.symbols_by_length if rules.normalize_str(symbol) != symbol]
    spelled = dict(zip(changed, map(chr, _UNASSIGNED), strict=False)) if model.symbols_within else {}
    away = [normalizers.Replace(symbol, char) for symbol, char in spelled.items()]
    back = [normalizers.Replace(char, symbol) for symbol, char in spelled.items()]
    return [*away, rules, *back]


def _merging_by_score(model: SentencePieceModel) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.PreTokenizer.custom(MergesByScore(model))


def add_tokens(
    backend: tokenizers.Tokenizer,
    tokens: list[str],
    types: list[int],
    also_special: frozenset[int] = frozenset(),
    strip_right: frozenset[int] = frozenset(),
) -> None:
    """The tokens that are looked for in text before all others: control and user-defined ones.

    Control tokens, and the ids `also_special`, are left out of decoded text. After the ids `strip_right`, white space
    in the text counts for nothing.
    """
    special, plain = [], []
    for index, (token, kind) in enumerate(zip(tokens, types, strict=True)):
        strip = index in strip_right
        if kind in (UNKNOWN, CONTROL) or index in also_special:
            special.append(AddedToken(token, normalized=False, special=True, rstrip=strip))
        elif kind == USER_DEFINED:
            plain.append(AddedToken(token, normalized=not token.strip(SPACE), special=False, rstrip=strip))
    backend.add_special_tokens(special)
    backend.add_tokens(plain)


def _bpe(model: SentencePieceModel, merges: list[tuple[str, str]]) -> models.BPE:
    return models.BPE(
        vocab={token: index for index, token in enumerate(model.tokens)},
        merges=merges,
        unk_token=None if model.unknown_id is None else model.tokens[model.unknown_id],
        fuse_unk=True,
        byte_fallback=model.byte_fallback,
    )


def _unigram(model: SentencePieceModel) -> models.Unigram:
    # Control and byte pieces are never read from text by their spelling: it has to lose to every other reading.
    scores = [
        score if kind in (NORMAL, USER_DEFINED) else _NEVER
        for score, kind in zip(model.scores, model.types, strict=True)
    ]
    vocab = list(zip(model.tokens, scores, strict=True))
    return models.Unigram(vocab, unk_id=model.unknown_id, byte_fallback=model.byte_fallback)


def _merges(model: SentencePieceModel) -> list[tuple[str, str]]:
    """SentencePiece joins the neighbours that make the best-scored piece: all cuts of pieces in two, best first."""
    from ingle.text.merges import merges_of  # NumPy, which a tokenizer.json does without

    best_first = sorted(range(len(model.pieces)), key=model.scores.__getitem__, reverse=True)
    return merges_of([model.pieces[index] for index in best_first if model.types[index] == NORMAL])


def _has_ties(model: SentencePieceModel, merges: list[tuple[str, str]]) -> bool:
    """Whether two pieces that merges make are equally good; these come one after the other."""
    scores = [score for score, kind in zip(model.scores, model.types, strict=True) if kind == NORMAL]
    if len(set(scores)) == len(scores):
        return False
    score_of = dict(zip(model.pieces, model.scores, strict=True))
    made = list(dict.fromkeys(left + right for left, right in merges))
    return any(score_of[piece] == score_of[other] for piece, other in pairwise(made))
