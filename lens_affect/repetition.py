"""Repetition: how much of a text says again what it said before, on tokens or words, with its limit in ordinary prose."""

import re
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

FEWEST_TOKENS = 12
"""Shorter texts have no value: a share of so few n-grams says nothing."""
N = 3
"""Tokens per n-gram."""
_UNIT = re.compile(r"[㐀-鿿぀-ヿ가-힯]|\w+|[^\w\s]")


def repetition_share(text_or_tokens: str | Sequence[int], *, n: int = N) -> float:
    """Share of n-grams that occurred before in the text; NaN below FEWEST_TOKENS tokens.

    Args:
        text_or_tokens: token ids; or a text, which is split into words, punctuation marks and single East Asian characters.
        n: tokens per n-gram.

    Example:
        >>> repetition_share("the same words " * 6)
        0.8125
    """
    tokens = _units(text_or_tokens)
    if len(tokens) < max(FEWEST_TOKENS, n):
        return float("nan")
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams)


def longest_loop(text_or_tokens: str | Sequence[int]) -> float:
    """Longest stretch that repeats what stands directly before it, as a share of the text: 0 for none, near 1 for nothing else.

    A stretch loops with period p where each token equals the one p places earlier; it counts from its second round on.

    Example:
        >>> longest_loop([1, 2, 3, 1, 2, 3, 1, 2, 3, 1, 2, 3])
        0.75
    """
    tokens = np.asarray(_codes(_units(text_or_tokens)))
    if len(tokens) < FEWEST_TOKENS:
        return float("nan")
    best = 0
    for period in range(1, len(tokens) // 2 + 1):
        run = longest = 0
        for same in tokens[period:] == tokens[:-period]:
            run = run + 1 if same else 0
            longest = max(longest, run)
        if longest >= period:  # a whole round at least, or a common word would be a loop
            best = max(best, longest)
    return best / len(tokens)


def compression_ratio(text: str) -> float:
    """Compressed over plain size in bytes (zlib): about 0.6 to 0.7 for 50 words of prose, near 0 for loops; NaN for an empty text."""
    data = text.encode()
    return len(zlib.compress(data, 9)) / len(data) if data else float("nan")


def distinct_share(text_or_tokens: str | Sequence[int], *, n: int) -> float:
    """Different n-grams over all n-grams (distinct-n; Li et al., 2016, arXiv:1510.03055); NaN where there is none."""
    tokens = _units(text_or_tokens)
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return len(set(grams)) / len(grams) if grams else float("nan")


def repetition_limits(
    references: Sequence[Sequence[int]], longest: int, *, quantile: float = 0.99
) -> Float[np.ndarray, " length"]:
    """Repetition share that a given share of ordinary texts stays below, for every length in tokens.

    Args:
        references: tokens of ordinary texts; stretches of each length are taken from them end to end.
        longest: length of the last entry.
        quantile: share of stretches that stay below.

    Returns:
        Entry i is the limit for i tokens; NaN below FEWEST_TOKENS.

    Raises:
        ValueError: references too short for the longest stretch.
    """
    joined = [token for tokens in references for token in tokens]
    if len(joined) < longest:
        raise ValueError(f"received {len(joined)} reference tokens for stretches of {longest}; give more text")
    limits = np.full(longest + 1, np.nan)
    for length in range(FEWEST_TOKENS, longest + 1):
        step = max(1, length // 4)
        shares = [repetition_share(joined[i : i + length]) for i in range(0, len(joined) - length + 1, step)]
        limits[length] = np.quantile(shares, quantile)
    return limits


def _units(text_or_tokens: str | Sequence[int]) -> Sequence[Any]:
    return _UNIT.findall(text_or_tokens) if isinstance(text_or_tokens, str) else text_or_tokens


def _codes(units: Sequence[Any]) -> list[int]:
    known: dict[Any, int] = {}
    return [known.setdefault(unit, len(known)) for unit in units]
