"""Regimes of steering: what a push does to a text, by its perplexity against the unsteered text, its repetition, and what a judge gains.

Perplexity alone cannot tell: a loop has a low one. So each text first gets a damage label, a cell (an emotion at a strength) takes the most
frequent one, and only a cell of sound texts is asked whether the push did what it should.
"""

import html
import math
import os
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from scipy import stats

from lens_affect.adapter import LensModel
from lens_affect.doses import UNSTEERED, DoseResponse
from lens_affect.generation import generate
from lens_affect.judgements import Judgement
from lens_affect.results import Provenance, load_result, save_result
from lens_affect.scenarios import load_scenarios
from lens_affect.statistics import cluster_means, mean_interval, resample_clusters
from lens_affect.steering import Protocol, make_push
from lens_affect.vectors import EmotionVectors

DAMAGE = {
    "invalid": "no text, or logits that are not finite",
    "repetitive_collapse": "repeats more than REPETITIVE and than 99 % of ordinary prose of that length does, whatever the perplexity",
    "explosive": "perplexity above r_high times that of the unsteered text, without repetition",
    "degraded": "perplexity ratio between r_ok and r_high, or below 1 / r_ok, without repetition",
    "sound": "perplexity ratio within 1 / r_ok and r_ok, without repetition",
}
"""What can be said of a single text, worst first."""
REGIMES = {
    **{name: DAMAGE[name] for name in ("invalid", "repetitive_collapse", "explosive", "degraded")},
    "surgical": "sound texts, and the judge sees more of the target than under random directions",
    "inert": "sound texts, and no such gain",
    "undecided": "sound texts, and no judge that can name the emotion",
}
"""What can be said of a cell."""


R_OK = 1.5
"""Smallest upper end of the band in which a ratio of perplexities per token is called unchanged."""
CHANCE = 0.975
"""Quantile of the ratios between two unsteered texts of one prompt that the band covers."""


REPETITIVE = 0.1
"""Repeated share of 3-grams that no text is called repetitive below: tuned on one half of the labelled texts (data/regime_texts.md)."""


def in_words(label: str) -> str:
    """A label as a reader's words: `repetitive_collapse` is repetitive collapse."""
    return label.replace("_", " ")


@dataclass(frozen=True)
class Thresholds:
    """What the rule compares with; fixed by unsteered and labelled text, before a steered one is looked at."""

    r_ok: float
    """Upper end of the band of unchanged perplexity; its lower end is 1 / r_ok."""
    r_high: float
    """Perplexity ratio above which a text is called explosive: r_ok squared."""
    repetition: float
    """Repeated share above which a text is called repetitive: what 99 % of ordinary texts of full length stay below, and at least REPETITIVE."""
    unit: str = "token"
    """What the perplexities behind the ratios are per: `token`, or `byte` under a scorer with another tokenizer."""

    @classmethod
    def of(cls, dose: DoseResponse) -> "Thresholds":
        """From the two unsteered samples of every prompt, and from ordinary prose.

        R_OK is a ratio of perplexities per token. A log perplexity per byte is smaller by the bytes per token, so under a scorer with another tokenizer the
        band is at least R_OK ** (1 / bytes per token), with the steered model's own tokens in its unsteered texts: those that R_OK was tuned on, and
        the same ones whichever scorer reads.
        """
        first, again = (dose.column("nll")[dose.column("kind") == kind].astype(float) for kind in UNSTEERED)
        ratios = np.exp(np.concatenate([again - first, first - again]))
        ratios = ratios[np.isfinite(ratios)]
        least = R_OK if dose.unit == "token" else R_OK ** (1 / _bytes_per_token(dose))
        r_ok = max(least, float(np.quantile(ratios, CHANCE))) if len(ratios) else least
        return cls(r_ok, r_ok**2, max(float(dose.limits[-1]), REPETITIVE), dose.unit)


def _bytes_per_token(dose: DoseResponse) -> float:
    plain = np.isin(dose.column("kind"), UNSTEERED)
    n_bytes = sum(len(text.encode()) for text in dose.column("text")[plain])
    return max(
        1.0, n_bytes / max(1, int(dose.column("n_tokens")[plain].sum()))
    )  # 1 where every unsteered text is empty


def damage_of(perplexity_ratio: float, repetition: float, thresholds: Thresholds, *, limit: float | None = None) -> str:
    """Damage label of one text.

    Args:
        perplexity_ratio: steered over unsteered; NaN for an empty text.
        repetition: repeated share of 3-grams; NaN for a text too short to have one.
        thresholds: r_ok, r_high, repetition.
        limit: repetition limit for this text's length, in the place of the thresholds' one.
    """
    if not math.isfinite(perplexity_ratio):
        return "invalid"
    if repetition > (thresholds.repetition if limit is None else limit):  # false for NaN
        return "repetitive_collapse"
    if perplexity_ratio > thresholds.r_high:
        return "explosive"
    return "sound" if 1 / thresholds.r_ok <= perplexity_ratio <= thresholds.r_ok else "degraded"


def regime_of(perplexity_ratio: float, repetition: float, gain: float | None, thresholds: Thresholds) -> str:
    """The plain rule for one cell or text.

    Args:
        perplexity_ratio: steered over unsteered, under the unsteered scorer; NaN where there is no text.
        repetition: repeated share of token 3-grams.
        gain: of the judge's target probability above the random-direction null (its lower limit, where there is an interval); None without a
            judge that can name the emotion.
        thresholds: Thresholds.of(dose), or one's own.

    Example:
        >>> regime_of(1.1, 0.02, 0.2, Thresholds(1.5, 2.25, 0.1))
        'surgical'
        >>> regime_of(0.3, 0.9, 0.2, Thresholds(1.5, 2.25, 0.1))
        'repetitive_collapse'
    """
    damage = damage_of(perplexity_ratio, repetition, thresholds)
    if damage != "sound":
        return damage
    return "undecided" if gain is None or math.isnan(gain) else "surgical" if gain > 0 else "inert"


@dataclass(frozen=True)
class RegimeMap:
    """Regime of every emotion and strength."""

    table: pd.DataFrame
    """One row per cell: kind, emotion, strength, regime, perplexity_ratio, repetition, change (means), gain, gain_low, gain_high (judge's target probability
    against random directions), share_* of texts per damage label, p_* of regimes over resampled groups of prompts, n."""
    damage: tuple[str, ...]
    """Damage label of each text, in the order of the dose-response table."""
    thresholds: Thresholds
    """What the rule compared with."""
    null: str
    """What a gain is compared with."""
    judge: str
    """Title of the judge; empty without one."""
    base_rate: float
    """Share of unsteered texts that loop by themselves."""
    layers: tuple[int, ...]
    """0-based steered blocks."""
    name: str
    """Name of the prompts."""
    provenance: Provenance
    """Of the dose-response."""
    protocol: str = "lens_affect"
    """Whose rule: ours, or `jeong2026`, which uses no thresholds."""

    def to_frame(self) -> pd.DataFrame:
        """The table."""
        return self.table

    def regime(self, emotion: str, strength: float) -> str:
        """Regime of one steered cell.

        Raises:
            ValueError: a cell that is not there.
        """
        columns = {name: self.table[name].to_numpy() for name in ("kind", "emotion", "strength", "regime")}
        rows = (columns["kind"] == "steered") & (columns["emotion"] == emotion) & (columns["strength"] == strength)
        if not rows.any():
            raise ValueError(
                f"received {emotion!r} at {strength}; this map has {sorted(set(self.table['emotion']) - {''})} at {self.strengths}"
            )
        return str(columns["regime"][rows][0])

    @property
    def strengths(self) -> tuple[float, ...]:
        """Strengths in order."""
        return tuple(sorted(set(self.table["strength"].to_numpy(float).tolist())))

    def save(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Save as a folder (see results.py)."""
        return save_result(self, folder, overwrite=overwrite)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "RegimeMap":
        """Load what `save` wrote."""
        return load_result(cls, folder)

    def __str__(self) -> str:
        own = pd.DataFrame(self.table[self.table["kind"] == "steered"])
        parts = []
        for strength in self.strengths:
            counts = Counter(own["regime"].to_numpy()[own["strength"].to_numpy() == strength].tolist())
            parts.append(f"{strength:+g}: {', '.join(f'{in_words(name)} {n}' for name, n in counts.most_common())}")
        head = f"{self.provenance.title}, {self.name}: regimes of {len(set(own['emotion']))} emotions at {len(self.strengths)} strengths"
        if self.protocol == "jeong2026":
            return f"{head} by the rule in the paper's code, which takes no perplexity and no judge\n{'; '.join(parts)}"
        return (
            f"{head} ({f'judge: {self.judge}, {self.null}' if self.judge else 'no judge'})\n"
            f"{'; '.join(parts)}\n"
            f"ratio of perplexities per {self.thresholds.unit} unchanged up to {self.thresholds.r_ok:.2f}, explosive above {self.thresholds.r_high:.2f}; repetitive above "
            f"{self.thresholds.repetition:.3f} of 3-grams; {self.base_rate:.2f} of unsteered texts loop by themselves"
        )

    def _repr_html_(self) -> str:
        own = self.table[self.table["kind"] == "steered"].pivot(index="emotion", columns="strength", values="regime")
        return f"<p>{html.escape(str(self)).replace(chr(10), '<br>')}</p>{own.to_html(border=0)}"


def classify_regimes(
    dose: DoseResponse,
    judgement: Judgement | None = None,
    *,
    thresholds: Thresholds | None = None,
    protocol: str = "lens_affect",
    n_resamples: int = 2000,
) -> RegimeMap:
    """Regime of every cell by the table of damage labels, with bootstrap probabilities.

    A text's ratio is taken against the unsteered text of its prompt (against the mean of all unsteered ones where that is empty). A cell's regime is
    its most frequent damage label, the worse one where two are as frequent; a cell of sound texts is `surgical` where the interval (t over groups
    of prompts) of judge's target probability minus that of random directions at the same strength lies above 0.

    Args:
        dose: of sweep_strengths.
        judgement: of `dose.texts`, in that order; None leaves sound cells undecided.
        thresholds: by default Thresholds.of(dose).
        protocol: `jeong2026` takes the rule in the paper's code in the place of ours, on the texts of each cell (jeong_regime); the judge's gains are
            stated and decide nothing.
        n_resamples: draws of whole groups behind the probabilities.

    Raises:
        ValueError: a judgement of other texts, an unknown protocol, or thresholds for a protocol that has none.
    """
    if protocol not in get_args(Protocol):
        raise ValueError(f"received protocol={protocol!r}; allowed are {list(get_args(Protocol))}")
    if protocol == "jeong2026" and thresholds is not None:
        raise ValueError(
            "received thresholds with protocol='jeong2026', whose rule has none; allowed there is thresholds=None"
        )
    limits = thresholds or Thresholds.of(dose)
    if judgement is not None and len(judgement.probabilities) != len(dose.table):
        raise ValueError(
            f"received a judgement of {len(judgement.probabilities)} texts for {len(dose.table)}; use judge_texts(judge, dose.texts)"
        )
    damage = (
        damage_labels(dose, limits) if protocol == "lens_affect" else np.array([_jeong_label(t) for t in dose.texts])
    )
    cells, groups = dose.cells(), dose.column("group")
    log_ratio, repetition, change = (
        dose.log_ratio,
        dose.column("repetition").astype(float),
        dose.column("change").astype(float),
    )
    rows = []
    for (kind, emotion, strength), members in cells.items():
        if kind in UNSTEERED:
            continue
        gain = _gain(dose, judgement, cells, kind, emotion, strength)
        row: dict[str, Any] = {"kind": kind, "emotion": emotion, "strength": strength}
        labels, of_group = damage[members], groups[members]
        row["regime"] = _regime(labels, _lowest(gain, of_group), protocol)
        row["perplexity_ratio"] = math.exp(_mean(log_ratio[members]))
        row |= {"repetition": _mean(repetition[members]), "change": _mean(change[members])}
        row |= dict(zip(("gain", "gain_low", "gain_high"), _limits(gain, of_group), strict=True))
        row |= {f"share_{name}": float((labels == name).mean()) for name in DAMAGE}
        row |= _probabilities(labels, gain, of_group, n_resamples, dose.seed, protocol)
        rows.append(row | {"n": len(members)})
    return RegimeMap(
        table=pd.DataFrame(rows),
        damage=tuple(damage.tolist()),
        thresholds=limits,
        null="against random directions" if "random" in dose.kinds else "against the unsteered texts",
        judge="" if judgement is None else judgement.title,
        base_rate=float((damage[np.isin(dose.column("kind"), UNSTEERED)] == "repetitive_collapse").mean()),
        layers=dose.layers,
        name=dose.name,
        provenance=dose.provenance,
        protocol=protocol,
    )


def damage_labels(dose: DoseResponse, thresholds: Thresholds) -> np.ndarray:
    """Damage label of every text, in the order of `dose.table`.

    A text's perplexity is taken against the unsteered text of its prompt, or against the mean of all unsteered texts where that is empty. Logits that are
    not finite make it invalid.

    Raises:
        ValueError: thresholds of another unit than the perplexities.
    """
    if thresholds.unit != dose.unit:
        raise ValueError(
            f"received thresholds per {thresholds.unit} for perplexities per {dose.unit}; use Thresholds.of(dose), or your own with unit={dose.unit!r}"
        )
    plain = dose.column("nll").astype(float)[dose.column("kind") == UNSTEERED[0]]
    usual = _mean(plain)
    base = np.where(
        np.isnan(dose.column("nll_unsteered").astype(float)), usual, dose.column("nll_unsteered").astype(float)
    )
    ratios = np.exp(dose.column("nll").astype(float) - base)
    ratios = np.where(dose.column("finite").astype(bool), ratios, np.nan)
    # Short texts repeat by chance: their limit in ordinary prose may be higher.
    limits = np.maximum(dose.limits.numpy()[dose.column("n_tokens").astype(int)], thresholds.repetition)
    repetition = dose.column("repetition").astype(float)
    return np.array(
        [
            damage_of(r, x, thresholds, limit=float(limit))
            for r, x, limit in zip(ratios.tolist(), repetition.tolist(), limits, strict=True)
        ]
    )


def judged_cells(dose: DoseResponse, judgement: Judgement) -> pd.DataFrame:
    """What the judge sees of the target in every steered cell, and of the same target under random directions and without steering.

    Args:
        dose: of sweep_strengths.
        judgement: of `dose.texts`, in that order.

    Returns:
        One row per steered cell that the judge can name: emotion, strength, probability with `_low` and `_high` (95 %, t over groups of prompts), random and
        unsteered (mean probability of the same emotion there; random is NaN where none was run), gain with `_low` and `_high` (as in classify_regimes), n.
    """
    cells, groups, rows = dose.cells(), dose.column("group"), []
    plain = np.isin(dose.column("kind"), UNSTEERED)
    for (kind, emotion, strength), members in cells.items():
        gain = _gain(dose, judgement, cells, kind, emotion, strength) if kind == "steered" else None
        if gain is None:
            continue
        probability = judgement.probability(emotion).double().numpy()
        row: dict[str, Any] = {"emotion": emotion, "strength": strength}
        for name, values in (("probability", probability[members]), ("gain", gain)):
            limits = _limits(values, groups[members])
            row |= dict(zip((name, f"{name}_low", f"{name}_high"), limits, strict=True))
        row["random"] = _mean(probability[cells.get(("random", "", strength), np.array([], dtype=int))])
        rows.append(row | {"unsteered": _mean(probability[plain]), "n": len(members)})
    return pd.DataFrame(rows)


def _gain(
    dose: DoseResponse,
    judgement: Judgement | None,
    cells: dict[tuple[str, str, float], Int[np.ndarray, " row"]],
    kind: str,
    emotion: str,
    strength: float,
) -> Float[np.ndarray, " text"] | None:
    """Target probability minus the mean of the null's texts of the same prompt; None where it cannot be judged."""
    if judgement is None or emotion not in judgement.emotions:
        return None
    members = cells[kind, emotion, strength]
    null = cells.get(("random", "", strength), cells["unsteered", "", 0.0])
    probability = judgement.probability(emotion).double().numpy()
    prompt = dose.column("prompt").astype(int)
    of_prompt = {p: _mean(probability[null[prompt[null] == p]]) for p in set(prompt[null].tolist())}
    return np.array([probability[i] - of_prompt[prompt[i]] for i in members])


def _limits(gain: np.ndarray | None, groups: np.ndarray) -> tuple[float, float, float]:
    means = np.empty(0) if gain is None else cluster_means(gain, groups.tolist())
    if not len(means):
        return math.nan, math.nan, math.nan
    found = mean_interval(means)
    return float(found.estimate), float(found.low), float(found.high)


def _lowest(gain: np.ndarray | None, groups: np.ndarray) -> float | None:
    return None if gain is None else _limits(gain, groups)[1]


def _mean(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else math.nan


def _regime(labels: np.ndarray, gain_low: float | None, protocol: str = "lens_affect") -> str:
    counts = np.array([[(labels == name).sum() for name in DAMAGE]])
    return str(_regimes(counts, np.array([math.nan if gain_low is None else gain_low]), protocol)[0])


def _regimes(counts: Int[np.ndarray, "draw label"], gain_low: Float[np.ndarray, " draw"], protocol: str) -> np.ndarray:
    """Regime by counts of damage labels (in DAMAGE's order) and the lower limit of the gain."""
    names = np.array(list(DAMAGE))
    if protocol == "jeong2026":
        loops, short = (
            counts[:, names == name].sum(1) / counts.sum(1) for name in ("repetitive_collapse", "explosive")
        )
        return np.where(loops > 0.5, "repetitive_collapse", np.where(short > 0.3, "explosive", "surgical"))
    worst = names[1:][counts[:, 1:].argmax(1)]  # the first, worse one of equals
    of_sound = np.where(np.isnan(gain_low), "undecided", np.where(gain_low > 0, "surgical", "inert"))
    mostly_invalid = 2 * counts[:, 0] > counts.sum(1)
    return np.where(mostly_invalid, "invalid", np.where(worst == "sound", of_sound, worst))


def _probabilities(
    labels: np.ndarray, gain: np.ndarray | None, groups: np.ndarray, n_resamples: int, seed: int, protocol: str
) -> dict[str, float]:
    """Share of resamples of whole groups in which each regime comes out; a group that is drawn twice counts as two."""
    names = list(dict.fromkeys(groups.tolist()))
    drawn = resample_clusters(len(names), n_resamples, seed, "regimes")
    counts = np.array([[((labels == label) & (groups == name)).sum() for label in DAMAGE] for name in names])
    lowest = np.full(n_resamples, math.nan)
    if gain is not None:
        means = np.array([_mean(gain[groups == name]) for name in names])[drawn]
        known = np.isfinite(means).sum(1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # draws without a value stay NaN
            half = stats.t.ppf(0.975, known - 1) * np.nanstd(means, axis=1, ddof=1) / np.sqrt(known)
            lowest = np.nanmean(means, axis=1) - half
    found = _regimes(counts[drawn].sum(1), lowest, protocol)
    return {f"p_{name}": float((found == name).mean()) for name in REGIMES}


def jeong_regime(texts: Sequence[str]) -> str:
    """Regime of a model's samples by the rule in the paper's code (arXiv:2604.04064; PAPERS: it uses no perplexity).

    More than half of the samples with some whitespace-token 3-gram at least three times: repetitive_collapse; else more than 30 % with fewer than three
    whitespace tokens: explosive; else surgical.
    """
    return _regime(np.array([_jeong_label(text) for text in texts]), None, "jeong2026")


def _jeong_label(text: str) -> str:
    words = text.split()
    if max(Counter(zip(words, words[1:], words[2:], strict=False)).values(), default=0) >= 3:
        return "repetitive_collapse"
    return "explosive" if len(words) < 3 else "sound"


def run_jeong_regime(
    model: LensModel,
    vectors: EmotionVectors,
    *,
    strengths: Sequence[float] = (0.005, 0.01, 0.02, 0.03, 0.05),
    max_new_tokens: int = 20,
) -> tuple[str, pd.DataFrame]:
    """The paper's regime measurement: threat steered to calm and weather to hostile, five strengths at all layers, 20 greedy tokens.

    Args:
        model: what is steered.
        vectors: directions of this model; the paper's protocol takes the one of layer n_layers // 2 at all layers.
        strengths: shares of each pass's own mean norm.
        max_new_tokens: greedy tokens per sample.

    Returns:
        The label, and the samples: columns scenario, emotion, strength, text.
    """
    scenarios = load_scenarios("jeong2026")
    rows = []
    for name, emotion, prompt in zip(scenarios.ids, scenarios.emotions, scenarios.openings, strict=True):
        for strength in strengths:
            push = make_push(model, vectors, emotion, strength=strength, protocol="jeong2026")
            text = generate(
                model,
                [prompt],
                interventions=push.interventions(),
                max_new_tokens=max_new_tokens,
                greedy=True,
                use_cache=False,
                form="continue",
            )
            rows.append([name, emotion, strength, text.texts[0]])
    table = pd.DataFrame(rows, columns=["scenario", "emotion", "strength", "text"])
    return jeong_regime(table["text"].tolist()), table
