"""Contrast pairs as tokens of one model: of equal length, with the tokens that stand for each side's words."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lens_affect.adapter import (
    Encoded,
    LensModel,
    context_window,
    device_of,
    encode,
    pad_right,
    pad_token_id,
    token_ids,
)
from lens_affect.contrasts import SETS, ContrastPairs, Words


@dataclass(frozen=True)
class MatchedPairs:
    """Pairs of equal token length, padded on the right."""

    pairs: ContrastPairs
    """The pairs that were kept."""
    clean: Int[Tensor, "pair position"]
    """Tokens of the clean texts, BOS included where the model takes one."""
    corrupted: Int[Tensor, "pair position"]
    """Tokens of the corrupted texts."""
    mask: Int[Tensor, "pair position"]
    """1 for real tokens."""
    first: Int[Tensor, " pair"]
    """First position where the two texts differ; before it everything is equal, so nothing there can be patched."""
    last: Int[Tensor, " pair"]
    """Last real position, whose output is the next word."""
    clean_ids: tuple[tuple[int, ...], ...]
    """Tokens that stand for the clean side's words, with and without leading space."""
    corrupted_ids: tuple[tuple[int, ...], ...]
    """Tokens that stand for the corrupted side's words."""
    dropped: dict[str, int]
    """Pairs that were left out, by reason."""
    words_left_out: int
    """Words of the kept pairs without a token of their own."""
    bos: str
    """How the first position came about."""

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def answer_tokens(self) -> tuple[int, ...]:
        """Every token that stands for a word of some pair: what log_odds needs of the vocabulary."""
        return tuple(sorted({token for ids in (*self.clean_ids, *self.corrupted_ids) for token in ids}))

    def log_odds(
        self,
        logits: Float[Tensor, "pair token"],
        rows: Int[Tensor, " pair"] | None = None,
        *,
        tokens: Sequence[int] | None = None,
    ) -> Float[Tensor, " pair"]:
        """Logit difference of the two sides' words: log of P(any clean word) over P(any corrupted word), in nats.

        Args:
            logits: at the last position.
            rows: which pair each row of logits belongs to; all in order by default.
            tokens: token of each column of the logits; the whole vocabulary by default.
        """
        chosen = range(len(self)) if rows is None else rows.tolist()
        column = None if tokens is None else {token: i for i, token in enumerate(tokens)}

        def total(row: Tensor, ids: tuple[int, ...]) -> Tensor:
            return row[list(ids) if column is None else [column[token] for token in ids]].logsumexp(0)

        found = [
            total(row, self.clean_ids[i]) - total(row, self.corrupted_ids[i])
            for row, i in zip(logits, chosen, strict=True)
        ]
        return torch.stack(found)


def match_pairs(model: LensModel, pairs: ContrastPairs, *, drop: bool | None = None) -> MatchedPairs:
    """Tokenize pairs and keep those whose texts have as many tokens.

    A word stands for itself by its token with and without leading space. One that the tokenizer splits is scored by its first token,
    unless a word of the other side shares it; then it is left out and counted.

    Args:
        model: its tokenizer and BOS policy are used.
        pairs: the texts.
        drop: leave out pairs of unequal length instead of refusing them; by default only pairs of our own sets are dropped.

    Raises:
        ValueError: texts of unequal length, texts that are the same tokens, a side without a token of its own, texts beyond the
            context window, or nothing left.
    """
    may_drop = pairs.name in SETS if drop is None else drop
    encoded = [[encode(model, text) for text in side] for side in (pairs.clean, pairs.corrupted)]
    reasons: Counter[str] = Counter()
    kept: list[int] = []
    for row, (a, b) in enumerate(zip(*encoded, strict=True)):
        reason = _refusal(a, b, context_window(model))
        if reason and not may_drop:
            raise ValueError(
                f"received pair {row} with {reason} ({pairs.clean[row][:60]!r}: {len(a.ids)} tokens, {pairs.corrupted[row][:60]!r}: {len(b.ids)}); "
                "rewrite it, or leave such pairs out with drop=True"
            )
        if reason:
            reasons[reason] += 1
        else:
            kept.append(row)
    if not kept:
        raise ValueError(
            f"received {len(pairs)} pairs and none can be used ({dict(reasons)}); texts of a pair need equal token length"
        )
    chosen = pairs.select(kept)
    ids = [_answer_ids(model, a, b) for a, b in zip(chosen.clean_words, chosen.corrupted_words, strict=True)]
    lacking = [
        (row, side) for row, found in enumerate(ids) for side, i in (("clean", 0), ("corrupted", 1)) if not found[i]
    ]
    if lacking:
        row, side = lacking[0]
        raise ValueError(
            f"received {side}_words of pair {kept[row]} without a token of their own in this tokenizer ({chosen.clean_words[row]} against "
            f"{chosen.corrupted_words[row]}); give words that start differently"
        )
    clean, mask = pad_right([encoded[0][row] for row in kept], pad_token_id(model), device_of(model))
    corrupted, _ = pad_right([encoded[1][row] for row in kept], pad_token_id(model), device_of(model))
    return MatchedPairs(
        pairs=chosen,
        clean=clean,
        corrupted=corrupted,
        mask=mask,
        first=(clean != corrupted).long().argmax(1),
        last=mask.sum(1) - 1,
        clean_ids=tuple(found[0] for found in ids),
        corrupted_ids=tuple(found[1] for found in ids),
        dropped=dict(reasons),
        words_left_out=sum(found[2] for found in ids),
        bos=encoded[0][0].bos,
    )


def _refusal(a: Encoded, b: Encoded, window: int) -> str:
    if len(a.ids) != len(b.ids):
        return "unequal token length"
    if a.ids == b.ids:
        return "the same tokens"
    return "a text beyond the context window" if len(a.ids) > window else ""


def _answer_ids(model: LensModel, clean: Words, corrupted: Words) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Tokens of both sides, and the number of words that are left out."""
    sides = [
        [[token_ids(model.tokenizer, lead + word) for lead in (" ", "")] for word in words]
        for words in (clean, corrupted)
    ]  # side, word, with and without space
    found: list[tuple[int, ...]] = []
    left_out = 0
    for mine, theirs in (sides, sides[::-1]):
        first = {ids[0] for variants in theirs for ids in variants}
        whole = {ids[0] for variants in theirs for ids in variants if len(ids) == 1}
        kept = [[ids[0] for ids in variants if ids[0] not in (whole if len(ids) == 1 else first)] for variants in mine]
        left_out += sum(not tokens for tokens in kept)
        found.append(tuple(dict.fromkeys(token for tokens in kept for token in tokens)))
    return found[0], found[1], left_out
