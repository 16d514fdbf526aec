"""Do the foreign tokens that an emotion vector raises mean that emotion? Words of eight languages in the vectors' logit lens."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from lens_affect.adapter import model_info, token_ids
from lens_affect.crosslingual import middle_layer
from lens_affect.nulls import max_null
from lens_affect.results import Provenance, Stopwatch, load_result, save_result
from lens_affect.scripts import COMMON, PARTIAL, SPECIAL, TokenScripts, is_unspaced, token_scripts
from lens_affect.statistics import derive_generator, mean_interval
from lens_affect.vectors import EmotionVectors, logit_lens

ENGLISH = "English"
"""The language that the vectors' texts are taken to be in: a reference, and what foreign tokens must not be mistaken for."""
CONTROL = "control"
"""Label of the everyday words."""
FEWEST_EMOTIONS = 8
"""Emotions with a word of their own that a language needs; below, it cannot be decided."""
FEWEST_CONTROLS = 5
"""Control words that a language needs."""
TOP = 99.0
"""Percentile from which a word counts as brought up."""
SMALLEST_EFFECT = 10.0
"""Smallest effect, in percentile points, whose absence is stated: a language fails only where the interval of one of the two effects lies below."""
UNDECIDED = "cannot be decided"


@dataclass(frozen=True)
class MeaningTable:
    """Where the words of an emotion stand in the logit lens of its vector, language by language."""

    table: pd.DataFrame
    """One row per language. `effect`, `low`, `high`, `p`, `p_family`: percentile of an emotion's own words minus that of the same words under
    the other emotions' vectors, in percentage points, mean over emotions with 95 % interval; p from emotions' labels permuted, corrected over
    the foreign languages. `control_effect` and its limits, `control_p`, `control_p_family`: own words minus control words under the same vector; p
    from words exchanged between the two. `own`, `others`, `control`: the three percentiles. `own_top`, `others_top`: share of these words
    among the top 1 % of the vocabulary, under their own and under the others' vectors. `n_emotions`, `n_words`, `n_controls`: what is
    behind them. `whole`: share of those words that are one token. `lost_shared`, `lost_partial`, `lost_english`: words that could not be used.
    `verdict`: `holds` if both family-wise p are at most 0.05, `does not hold` if the 95 % interval of one of the two effects lies below SMALLEST_EFFECT,
    else `cannot be decided`, as with too few words (FEWEST_EMOTIONS, FEWEST_CONTROLS)."""
    per_emotion: pd.DataFrame
    """language, emotion, own, others, control (percentiles), n_words."""
    words: pd.DataFrame
    """language, emotion, word, tokens (the first tokens that stand for it), percentile (under its own vector; NaN if it could not be used, and for controls), loss."""
    layer: int
    """0-based block of the vectors."""
    n_layers: int
    """Blocks of the model."""
    n_permutations: int
    """Relabellings."""
    provenance: Provenance
    """Model, numerics, stimuli, seed, versions."""

    def to_frame(self) -> pd.DataFrame:
        """One row per language."""
        return self.table

    def save(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Save as a folder (see results.py)."""
        return save_result(self, folder, overwrite=overwrite)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "MeaningTable":
        """Load what `save` wrote."""
        return load_result(cls, folder)

    def __str__(self) -> str:
        rows = self.table.to_dict("records")
        measured = [r for r in rows if np.isfinite(r["effect"])]
        foreign = [r for r in measured if r["language"] != ENGLISH]
        found = sum(r["verdict"] == "holds" for r in foreign)
        effects = {
            r["language"]: f"{r['language']} {r['effect']:+.1f} [{r['low']:+.1f}, {r['high']:+.1f}]" for r in measured
        }
        left = ", ".join(r["language"] for r in rows if not np.isfinite(r["effect"]))
        unsure = ", ".join(r["language"] for r in measured if r["verdict"] == UNDECIDED)
        fails = ", ".join(r["language"] for r in measured if r["verdict"] == "does not hold")
        return (
            f"{self.provenance.title}, layer {self.layer} of {self.n_layers}: in {found} of {len(foreign)} foreign languages the words of an emotion stand "
            f"higher under its vector than under others' and than everyday words (family-wise p <= 0.05, {self.n_permutations} relabellings)\n"
            f"percentile points above other vectors: {', '.join(effects.values()) or 'none measured'}\n"
            f"an effect of {SMALLEST_EFFECT:g} points is excluded in: {fails or 'none'}; neither shown nor excluded in: {unsure or 'none'}"
            + (f"\ncannot be decided (too few words with a token of their own): {left}" if left else "")
        )

    def _repr_html_(self) -> str:
        import html

        return f"<p>{html.escape(str(self)).replace(chr(10), '<br>')}</p>{self.table.round(3).to_html(index=False)}"


def load_emotion_words() -> pd.DataFrame:
    """Our words that name the 20 emotions in nine languages, and everyday words beside them (data/emotion_words.md).

    Returns:
        Columns language, emotion (or `control`), word.
    """
    with files("lens_affect.data").joinpath("emotion_words.csv").open(encoding="utf-8") as file:
        return pd.read_csv(file, dtype=str, keep_default_na=False)


def foreign_meaning(
    model: Any,
    vectors: EmotionVectors,
    layer: int | None = None,
    *,
    languages: Sequence[str] | None = None,
    words: pd.DataFrame | None = None,
    n_permutations: int = 1000,
    seed: int = 0,
) -> MeaningTable:
    """Do emotion vectors raise the words that name their emotion, in languages other than the one they were read from?

    A word stands for itself by its first token, with and without a space before it (without, in scripts that have no spaces). A first
    token is left out if it is only a piece of a character, if words of two labels share it, or if it begins an English word of the lists: " nerv"
    would credit Spanish with what is English. The percentile of a token is the share of the vocabulary that a vector raises less.

    Args:
        model: the model the vectors come from.
        vectors: unit directions per emotion; emotions without words of ours are ignored.
        layer: 0-based block; the middle one by default.
        languages: English names; all eight by default. English is always there, as a reference.
        words: a table like `load_emotion_words()`, in its place.
        n_permutations: relabellings.
        seed: of the relabellings.

    Returns:
        Effects in percentile points (0: own words stand where they stand under other vectors; 100 is the most). Two emotions that are near each
        other raise each other's words, so the effect is a cautious one. First tokens are often pieces of words: `whole` says how
        many are not. A high percentile is no generated word.

    Raises:
        ValueError: vectors of another model, an unknown layer or language, or fewer than two relabellings.

    Source: the claim is that of arXiv:2604.04064 about Chinese in Qwen; the words and the test are ours.

    Example:
        >>> print(foreign_meaning(model, vectors, 15, languages=["Chinese", "Spanish"]))  # doctest: +SKIP
    """
    clock = Stopwatch()
    vectors.require_match(model_info(model).provenance)
    layer = middle_layer(vectors, layer)
    if n_permutations < 2:
        raise ValueError(f"received n_permutations={n_permutations}; allowed is 2 or more")
    every = load_emotion_words() if words is None else words
    chosen = _choose_languages(every, languages)
    emotions = [e for e in vectors.emotions if e in set(every["emotion"])]
    at = [vectors.emotions.index(e) for e in emotions]
    logits = logit_lens(model, vectors.directions[at, vectors.layers.index(layer)])
    known = token_scripts(model.tokenizer, logits.shape[1])
    found = [w for language in chosen for w in _find_tokens(model.tokenizer, known, every, language)]
    found = [w for w in found if w.label in (*emotions, CONTROL)]
    percentiles = _percentiles(logits, found)
    measured = [_measure(language, found, percentiles, emotions, n_permutations, seed) for language in chosen]
    return MeaningTable(
        table=_judge(measured),
        per_emotion=pd.DataFrame([row for m in measured for row in m.per_emotion], columns=list(PER_EMOTION)),
        words=_word_table(found, percentiles, emotions, known),
        layer=layer,
        n_layers=vectors.n_layers,
        n_permutations=n_permutations,
        provenance=vectors.provenance.updated(seed=seed, elapsed_seconds=clock.seconds),
    )


def _choose_languages(words: pd.DataFrame, languages: Sequence[str] | None) -> list[str]:
    there = list(dict.fromkeys(words["language"]))
    if isinstance(languages, str):
        raise TypeError("received a single string; allowed is a list of languages, e.g. languages=['Chinese']")
    unknown = [name for name in languages or () if name not in there]
    if unknown:
        raise ValueError(f"received the languages {unknown}; there are words of {there}")
    chosen = [name for name in there if languages is None or name in languages or name == ENGLISH]
    return sorted(chosen, key=lambda name: name == ENGLISH)  # the reference comes last


@dataclass(frozen=True)
class _Word:
    """A word with the first tokens that can stand for it."""

    language: str
    label: str
    """An emotion, or `control`."""
    text: str
    tokens: tuple[int, ...]
    whole: bool
    """Whether one of the tokens is the whole word."""
    loss: str
    """Why there is no token: `shared`, `partial` or `english`; else empty."""


def _find_tokens(tokenizer: Any, known: TokenScripts, words: pd.DataFrame, language: str) -> list[_Word]:
    of_language = pd.DataFrame(words[words["language"] == language]).to_dict("records")
    english = [w.casefold() for w in words[words["language"] == ENGLISH]["word"]] if language != ENGLISH else []
    beginnings = {w[:n] for w in english for n in range(1, len(w) + 1)}
    forms = [_forms(tokenizer, known, row["word"]) for row in of_language]
    labels: dict[int, set[str]] = {}
    for row, ids in zip(of_language, forms, strict=True):
        for first in ids:
            labels.setdefault(first, set()).add(row["emotion"])

    def loss_of(first: int) -> str:
        if known.scripts[first] in (PARTIAL, SPECIAL, COMMON):
            return "partial"
        if known.texts[first].strip().casefold() in beginnings:
            return "english"
        return "shared" if len(labels[first]) > 1 else ""

    found = []
    for row, ids in zip(of_language, forms, strict=True):
        losses = {first: loss_of(first) for first in ids}
        kept = tuple(first for first, loss in losses.items() if not loss)
        loss = "" if kept else next(iter(losses.values()), "partial")
        found.append(_Word(language, row["emotion"], row["word"], kept, any(ids[t] for t in kept), loss))
    return found


def _forms(tokenizer: Any, known: TokenScripts, word: str) -> dict[int, bool]:
    """First token of a word that is more than space, and whether it is the whole word, with and without a space before."""
    found: dict[int, bool] = {}
    for form in (word,) if is_unspaced(word) else (" " + word, word):
        ids = [t for t in token_ids(tokenizer, form) if known.texts[t].strip()]
        if ids:
            found.setdefault(ids[0], len(ids) == 1)
    return found


def _percentiles(logits: Float[Tensor, "emotion token"], words: list[_Word]) -> Float[np.ndarray, "emotion word"]:
    """Percentile of each word under each vector, the mean over its first tokens; NaN for a word without one."""
    ordered = logits.sort(dim=1).values
    found = np.full((len(logits), len(words)), np.nan)
    for i, word in enumerate(words):
        if word.tokens:
            at = logits[:, list(word.tokens)].contiguous()
            below = torch.searchsorted(ordered, at) + torch.searchsorted(ordered, at, right=True)
            found[:, i] = (100 * below.double() / 2 / logits.shape[1]).mean(1).numpy()
    return found


def _word_table(words: list[_Word], percentiles: np.ndarray, emotions: list[str], known: TokenScripts) -> pd.DataFrame:
    rows = [
        {
            "language": w.language,
            "emotion": w.label,
            "word": w.text,
            "tokens": " ".join(repr(known.texts[t]) for t in w.tokens),
            "percentile": np.nan if w.label == CONTROL else percentiles[emotions.index(w.label), i],
            "loss": w.loss,
        }
        for i, w in enumerate(words)
    ]
    return pd.DataFrame(rows)


PER_EMOTION: tuple[str, ...] = ("language", "emotion", "own", "others", "control", "n_words")
"""Columns of MeaningTable.per_emotion."""


@dataclass(frozen=True)
class _Measured:
    """One language."""

    row: dict[str, Any]
    per_emotion: list[dict[str, Any]]
    permuted: np.ndarray
    """Effect under each relabelling of emotions; empty where it cannot be decided."""
    exchanged: np.ndarray
    """Control effect under each exchange of words."""


def _measure(
    language: str, words: list[_Word], percentiles: np.ndarray, emotions: list[str], n_permutations: int, seed: int
) -> _Measured:
    inside = [(i, w) for i, w in enumerate(words) if w.language == language]
    used = [(i, w) for i, w in inside if w.tokens]
    of = {label: [i for i, w in used if w.label == label] for label in (*emotions, CONTROL)}
    kept, controls = [e for e in emotions if of[e]], of[CONTROL]
    whole = [w.whole for _, w in used if w.label != CONTROL]
    row: dict[str, Any] = {
        "language": language,
        **dict.fromkeys(("effect", "low", "high", "control_effect", "control_low", "control_high"), np.nan),
        **dict.fromkeys(("own", "others", "control", "own_top", "others_top"), np.nan),
        "n_emotions": len(kept),
        "n_words": len(whole),
        "n_controls": len(controls),
        "whole": float(np.mean(whole)) if whole else np.nan,
        **{f"lost_{kind}": sum(w.loss == kind for _, w in inside) for kind in ("shared", "partial", "english")},
    }
    if len(kept) < FEWEST_EMOTIONS or len(controls) < FEWEST_CONTROLS:
        return _Measured(row, [], np.empty(0), np.empty(0))
    at = [emotions.index(e) for e in kept]
    # scores[vector, words]: the words of one emotion under the vector of another
    scores = np.stack([percentiles[at][:, of[e]].mean(1) for e in kept], axis=1)
    n, own = len(kept), np.diag(scores)
    others = (scores.sum(0) - own) / (n - 1)
    control = percentiles[at][:, controls].mean(1)
    effect, gap = mean_interval(own - others), mean_interval(own - control)
    row |= {"effect": float(effect.estimate), "low": float(effect.low), "high": float(effect.high)}
    row |= {"control_effect": float(gap.estimate), "control_low": float(gap.low), "control_high": float(gap.high)}
    row |= {"own": float(own.mean()), "others": float(others.mean()), "control": float(control.mean())}
    top = np.stack([(percentiles[at][:, i] >= TOP).astype(float) for i, w in used if w.label in kept], axis=1)
    is_own = np.array([[w.label == e for _, w in used if w.label in kept] for e in kept])
    row |= {"own_top": float(top[is_own].mean()), "others_top": float(top[~is_own].mean())}
    orders = _orders(len(emotions), at, n_permutations, seed)
    matched = scores[np.arange(n), orders].mean(1)
    permuted = matched - (scores.mean() * n - matched) / (n - 1)
    values = zip(kept, own.tolist(), others.tolist(), control.tolist(), strict=True)
    per_emotion = [dict(zip(PER_EMOTION, (language, *v, len(of[v[0]])), strict=True)) for v in values]
    pairs = [(i, of[e]) for i, e in zip(at, kept, strict=True)]
    return _Measured(
        row, per_emotion, permuted, _exchange(percentiles, pairs, controls, n_permutations, seed, language)
    )


def _orders(n_emotions: int, kept: list[int], n_permutations: int, seed: int) -> Int[np.ndarray, "permutation emotion"]:
    """Which emotion's words each vector gets. Languages with the same emotions see the same relabellings, so their maximum means something."""
    keys = derive_generator(seed, "foreign_meaning", "permutation").random((n_permutations, n_emotions))
    return keys[:, kept].argsort(1)


def _exchange(
    percentiles: np.ndarray,
    own: list[tuple[int, list[int]]],
    controls: list[int],
    n_permutations: int,
    seed: int,
    language: str,
) -> Float[np.ndarray, " permutation"]:
    """Own minus control words, with words exchanged at random between the two under each vector."""
    rng = derive_generator(seed, "foreign_meaning", "controls", language)
    total = np.zeros(n_permutations)
    for vector, mine in own:
        values = percentiles[vector, [*mine, *controls]]
        shuffled = rng.permuted(np.tile(values, (n_permutations, 1)), axis=1)
        total += shuffled[:, : len(mine)].mean(1) - shuffled[:, len(mine) :].mean(1)
    return total / len(own)


def _judge(measured: list[_Measured]) -> pd.DataFrame:
    """p-values, family-wise over foreign languages; English stands by itself."""
    rows = [m.row | dict.fromkeys(("p", "p_family", "control_p", "control_p_family"), np.nan) for m in measured]
    decided = [i for i, m in enumerate(measured) if len(m.permuted)]
    for is_english in (False, True):
        family = [i for i in decided if (rows[i]["language"] == ENGLISH) == is_english]
        for prefix, column, null in (("", "effect", "permuted"), ("control_", "control_effect", "exchanged")):
            if family:
                drawn = np.stack([getattr(measured[i], null) for i in family], axis=1)
                found = max_null(np.array([rows[i][column] for i in family]), drawn, better="high")
                for i, p, p_family in zip(family, found.p.tolist(), found.p_family.tolist(), strict=True):
                    rows[i] |= {f"{prefix}p": p, f"{prefix}p_family": p_family}
    for row in rows:
        row["verdict"] = verdict_of(row)
    return pd.DataFrame(rows)


def verdict_of(row: Mapping[str, Any]) -> str:
    """Verdict on a language by a row of MeaningTable: what is not significant may still be there, unless its interval excludes an effect worth a name."""
    if row["p_family"] <= 0.05 and row["control_p_family"] <= 0.05:
        return "holds"
    return "does not hold" if min(row["high"], row["control_high"]) < SMALLEST_EFFECT else UNDECIDED
