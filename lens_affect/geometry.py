"""Geometry of emotions: do two models (or sources, or layers) arrange them alike, and where do valence and arousal lie?

Two spaces of different width are compared through their representational dissimilarity matrices (RDMs): which emotions lie
close to which (Kriegeskorte et al., 2008, doi:10.3389/neuro.06.004.2008; between language models Jeong, 2026, arXiv:2604.11050).
The n(n-1)/2 entries of such a matrix share their emotions, so they are never counted as independent: p comes from relabelling
whole emotions (Mantel, 1967), the interval from leaving out whole groups of texts.

Agreement says that the distances have a similar order; it does not say that either model uses them. Two things make RDMs agree
that have nothing to do with the models: noise of texts that both read, where reliability is low, and unequal numbers of texts
per emotion (both measured in tests/test_geometry.py; see `compare_geometry`).
"""

import html
import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import chain
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from scipy import stats
from torch import Tensor

from lens_affect.activations import Activations
from lens_affect.nulls import p_text
from lens_affect.results import Provenance, Stopwatch, load_result, save_result
from lens_affect.statistics import derive_generator, jackknife_interval
from lens_affect.stimuli import NEUTRAL, Stimuli

log = logging.getLogger(__name__)

FEWEST_EMOTIONS = 4
"""Three emotions have 6 relabellings, so no p could reach 0.05; four have 24."""
MOST_BLOCKS = 24
"""Groups are left out one by one up to this many, in as many blocks beyond (as localization does)."""
MOST_UNEQUAL = 1.5
"""Ratio of the largest to the smallest number of texts per emotion from which on a comparison warns."""


@dataclass(frozen=True)
class GeometryAgreement:
    """Agreement of two emotion geometries."""

    rho: float
    """Spearman correlation of the upper triangles of both RDMs: 1 same order of distances, 0 unrelated."""
    low: float
    """Lower 95 % limit over groups (delete-one-group jackknife); NaN where leaving one out leaves an emotion without texts."""
    high: float
    """Upper 95 % limit."""
    p: float
    """One-sided permutation p over relabelled emotions; NaN without permutations."""
    n_permutations: int
    """Relabellings behind p."""
    reliability_first: float
    """Spearman correlation between RDMs of two random halves of the first's groups, mean over splits, stepped up to full length
    by Spearman-Brown; NaN where no split has every emotion in both halves."""
    reliability_second: float
    """The same of the second."""
    ceiling: float
    """sqrt(reliability_first * reliability_second): what rho would be between equal geometries read from different texts; NaN
    where a reliability is not positive."""
    corrected: float
    """rho / ceiling; NaN where the ceiling is. Too high where reliability is low, since the noise of an RDM falls faster with more
    texts than Spearman-Brown assumes (equal geometries: 1.03 at a ceiling of 0.77, 1.5 at 0.32), and where both read the same
    texts, whose luck they share while the ceiling counts it as noise."""
    corrected_disjoint: float
    """The same without stepping up and without shared texts: mean correlation of one half of the groups in the first with the other
    half in the second, over the geometric mean of the correlations between halves within each (equal geometries: 1.00 at a
    ceiling of 0.77, 1.1 at 0.32). Read this one unless both are reliable and read different texts."""
    emotions: tuple[str, ...]
    """Emotions in both, in the order of the RDMs."""
    layers: tuple[int, int]
    """0-based block of each."""
    sites: tuple[str, str]
    """Site of each."""
    models: tuple[str, str]
    """Name of each model."""
    methods: tuple[str, str]
    """Name of each one's stimuli."""
    n_texts: tuple[int, int]
    """Texts of these emotions in each."""
    n_groups: int
    """Groups in either; each is left out wherever it stands."""
    n_shared_groups: int
    """Groups in both."""
    n_shared_texts: int
    """Texts that both read. They raise rho (and lower p) by what is particular to them."""
    rdm_first: Float[Tensor, "emotion emotion"]
    """RDM of the first: 1 - cosine."""
    rdm_second: Float[Tensor, "emotion emotion"]
    """RDM of the second."""
    provenance_first: Provenance
    """Model, numerics, stimuli, seed of the first."""
    provenance_second: Provenance
    """The same of the second."""

    def to_frame(self) -> pd.DataFrame:
        """One row: model, method, site, layer and n_texts of each (`_first`, `_second`), n_emotions, and every number above under its name."""
        both = {
            "model": self.models,
            "method": self.methods,
            "site": self.sites,
            "layer": self.layers,
            "n_texts": self.n_texts,
        }
        row = {f"{name}_{place}": v[i] for name, v in both.items() for i, place in enumerate(("first", "second"))}
        numbers = {f.name: getattr(self, f.name) for f in fields(self) if f.type in (int, float)}
        return pd.DataFrame([row | {"n_emotions": len(self.emotions)} | numbers])

    def save(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Save as a folder (see results.py)."""
        return save_result(self, folder, overwrite=overwrite)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "GeometryAgreement":
        """Load what `save` wrote."""
        return load_result(cls, folder)

    def __str__(self) -> str:
        first, second = (
            f"{model} ({method}, layer {layer})"
            for model, method, layer in zip(self.models, self.methods, self.layers, strict=True)
        )
        significance = p_text(self.p, self.n_permutations) if self.n_permutations else "no null (n_permutations=0)"
        shared = (
            f"\n{self.n_shared_texts} texts were read by both, which raises rho and the first correction"
            if self.n_shared_texts
            else ""
        )
        correction = (
            f"corrected {self.corrected:.2f}, between disjoint groups {self.corrected_disjoint:.2f}"
            if math.isfinite(self.ceiling)
            else "no correction: a reliability is not positive, or could not be measured"
        )
        return (
            f"{first} and {second}: the RDMs of {len(self.emotions)} emotions agree with Spearman rho = {self.rho:.2f} "
            f"[{self.low:.2f}, {self.high:.2f}] over {self.n_groups} groups, {significance}\n"
            f"reliabilities {self.reliability_first:.2f} and {self.reliability_second:.2f}, noise ceiling {self.ceiling:.2f}; {correction}{shared}"
        )

    def _repr_html_(self) -> str:
        return "<p>" + html.escape(str(self)).replace("\n", "<br>") + "</p>"


@dataclass(frozen=True)
class _Texts:
    """Emotional texts of one source at one layer."""

    x: Float[Tensor, "text d_model"]
    """What was read."""
    member: Float[Tensor, "emotion text"]
    """Number of texts behind a row in the line of its emotion, 0 elsewhere."""
    groups: np.ndarray
    """Group of each text."""
    stimuli: Stimuli
    """The texts, without neutral ones."""

    def rdm(self, keep: Bool[np.ndarray, " text"] | None = None) -> Float[Tensor, "emotion emotion"] | None:
        """RDM of the kept texts, or None when an emotion has no text or no direction."""
        # Texts that are left out get weight 0: no copy of what was read is made for each subset.
        member = self.member if keep is None else self.member * torch.from_numpy(keep)
        total = member.sum(1, keepdim=True)
        if (total == 0).any():
            return None
        means = (member / total) @ self.x
        centred = means - means.mean(0)
        norms = centred.norm(dim=1, keepdim=True)
        if (norms <= 1e-9 * means.norm(dim=1).max()).any():
            return None
        unit = centred / norms
        return (1 - unit @ unit.T).fill_diagonal_(0)

    def halves(self, first: set[str]) -> tuple[Tensor | None, Tensor | None]:
        """RDMs of the texts whose group is, and is not, in the first half."""
        inside = np.isin(self.groups, list(first))
        return self.rdm(inside), self.rdm(~inside)


def entry_of(activations: Activations, layer: int) -> int:
    """Place of a 0-based layer among the layers that were read.

    Raises:
        ValueError: it was not read.
    """
    if layer not in activations.layers:
        raise ValueError(
            f"received layer {layer}; there are activations of {list(activations.layers)}: extract it with layers=[{layer}]"
        )
    return activations.layers.index(layer)


def emotional_texts(
    activations: Activations, layer: int, emotions: Sequence[str], rows: Sequence[int] | None = None
) -> _Texts:
    """Texts (or cells) of some emotions at one layer, in the order of the stimuli."""
    entry = entry_of(activations, layer)
    # Rows by hand: Activations.select would copy every layer.
    allowed = range(len(activations.stimuli)) if rows is None else rows
    labels = activations.stimuli.select(rows=allowed).emotions
    kept = [row for row, label in zip(allowed, labels, strict=True) if label in emotions]
    stimuli = activations.stimuli.select(rows=kept)
    is_of = np.array(stimuli.emotions)[None] == np.array(emotions)[:, None]
    return _Texts(
        x=activations.values[:, entry][kept].double(),
        member=torch.from_numpy(is_of) * activations.counts[kept].double(),
        groups=np.array(stimuli.groups),
        stimuli=stimuli,
    )


def emotions_of(activations: Activations) -> list[str]:
    """Labels without neutral."""
    return [e for e in activations.stimuli.labels if e != NEUTRAL]


def emotion_rdm(
    activations: Activations, layer: int, *, rows: Sequence[int] | None = None
) -> Float[Tensor, "emotion emotion"]:
    """Dissimilarity of all pairs of emotions at one layer: 1 - cosine between their class means minus the grand mean.

    Emotions with fewer texts have noisier means, which pull the grand mean towards themselves: with unequal numbers of texts even
    pure noise has an RDM that comes back.

    Args:
        activations: of one site; neutral rows are left out.
        layer: 0-based block.
        rows: row numbers of the texts to use; all by default.

    Returns:
        Symmetric, 0 on the diagonal, between 0 (same direction) and 2 (opposite); emotions in the order of
        `activations.stimuli.labels` without neutral (Kriegeskorte et al., 2008; arXiv:2604.11050).

    Raises:
        ValueError: an unknown layer, several sites, fewer than two emotions, or an emotion without a text or a direction.

    Example:
        >>> emotion_rdm(activations, 14).shape  # doctest: +SKIP
        torch.Size([20, 20])
    """
    emotions = emotions_of(activations)
    if len(emotions) < 2:
        raise ValueError(f"received the emotions {emotions}; a dissimilarity needs at least two")
    texts = emotional_texts(activations, layer, emotions, rows)
    missing = [e for e in emotions if e not in texts.stimuli.emotions]
    if missing:
        raise ValueError(f"received rows without a text of {missing}; every emotion needs one: add rows of it")
    return _full_rdm(texts, layer)


def _full_rdm(texts: _Texts, layer: int) -> Float[Tensor, "emotion emotion"]:
    found = texts.rdm()
    if found is None:
        raise ValueError(
            f"received an emotion whose mean at layer {layer} equals the mean of all emotions; it has no direction: leave it out "
            "with activations.select(emotions=...)"
        )
    return found


def compare_geometry(
    first: Activations,
    second: Activations,
    *,
    layers: tuple[int, int],
    n_permutations: int = 1000,
    n_halves: int = 20,
    seed: int = 0,
) -> GeometryAgreement:
    """Spearman correlation of two emotion RDMs, with a permutation p, an interval over groups of texts, and a noise ceiling.

    Args:
        first: activations of one site, of any model.
        second: of the same or another model, site or source; emotions are matched by name, widths may differ.
        layers: 0-based block of each.
        n_permutations: relabellings of the second RDM's emotions. 0 for none (NaN).
        n_halves: random splits of the groups behind the reliabilities.
        seed: of relabellings and splits.

    Returns:
        rho, and an interval that says how far it would move with other groups of texts, not with other emotions. p is one-sided.
        Choose the layers beforehand: the best of many pairs of layers has no honest p here. p says that the RDMs are related, by
        whatever they share: unrelated geometries that read the same noisy texts have p <= 0.05 in 0.05 of cases at a ceiling of
        0.94, 0.07 at 0.78, and 0.57 at 0.34; pure noise in 576 dimensions in 0.73 where half of the emotions have twice as many
        texts (60 planted pairs each; unequal numbers are warned of).

    Raises:
        ValueError: fewer than 4 emotions in common, an unknown layer, several sites, an emotion without a direction, or an RDM
            whose entries are all equal.

    Example:
        >>> print(compare_geometry(first, second, layers=(14, 9)))  # doctest: +SKIP
    """
    clock = Stopwatch()
    emotions = [e for e in emotions_of(first) if e in emotions_of(second)]
    if len(emotions) < FEWEST_EMOTIONS:
        raise ValueError(
            f"received {len(emotions)} emotions in common ({emotions}); allowed are {FEWEST_EMOTIONS} or more. The first has "
            f"{emotions_of(first)}, the second {emotions_of(second)}: read stimuli with the same labels in both"
        )
    pair = (emotional_texts(first, layers[0], emotions), emotional_texts(second, layers[1], emotions))
    _warn_of_imbalance(pair)
    rdms = [_full_rdm(texts, layer) for texts, layer in zip(pair, layers, strict=True)]
    for place, rdm in zip(("first", "second"), rdms, strict=True):
        if np.ptp(_upper(rdm)) < 1e-6:
            raise ValueError(
                f"received a {place} geometry in which all emotions are equally far apart; their order cannot be compared: use "
                "more texts, or another layer"
            )
    rho = _spearman(rdms[0], rdms[1])
    strata = strata_of(pair[0], pair[1])
    low, high = _interval(pair, rho, strata)
    within_first, within_second, across = _half_correlations(pair, strata, n_halves, seed)
    reliability = [2 * r / (1 + r) if r > -1 else math.nan for r in (within_first, within_second)]
    ceiling = _geometric_mean(reliability[0], reliability[1])
    groups = [set(texts.groups) for texts in pair]
    return GeometryAgreement(
        rho=rho,
        low=low,
        high=high,
        p=_permutation_p(rdms[0], rdms[1], rho, n_permutations, seed),
        n_permutations=n_permutations,
        reliability_first=reliability[0],
        reliability_second=reliability[1],
        ceiling=ceiling,
        corrected=rho / ceiling,
        corrected_disjoint=across / _geometric_mean(within_first, within_second),
        emotions=tuple(emotions),
        layers=layers,
        sites=(first.sites[0], second.sites[0]),
        models=(first.provenance.title, second.provenance.title),
        methods=(first.stimuli.name, second.stimuli.name),
        n_texts=(int(pair[0].member.sum()), int(pair[1].member.sum())),
        n_groups=len(groups[0] | groups[1]),
        n_shared_groups=len(groups[0] & groups[1]),
        n_shared_texts=len(set(pair[0].stimuli.texts) & set(pair[1].stimuli.texts)),
        rdm_first=rdms[0],
        rdm_second=rdms[1],
        provenance_first=first.provenance.updated(seed=seed, elapsed_seconds=clock.seconds),
        provenance_second=second.provenance.updated(seed=seed, elapsed_seconds=clock.seconds),
    )


def _warn_of_imbalance(pair: tuple[_Texts, _Texts]) -> None:
    counts = [texts.member.sum(1) for texts in pair]
    if all(n.max() >= MOST_UNEQUAL * n.min() for n in counts):
        log.warning(
            "the emotions have %d to %d texts in the first and %d to %d in the second; unequal numbers alone make RDMs agree: "
            "compare equally many per emotion with activations.select(rows=...)",
            *(int(edge) for n in counts for edge in (n.min(), n.max())),
        )


def _upper(rdm: Tensor) -> Float[np.ndarray, " pair"]:
    return rdm.numpy()[np.triu_indices(len(rdm), 1)]


def _unit_ranks(rdm: Tensor) -> Float[np.ndarray, " pair"]:
    """Ranks of the upper triangle, centred and of length 1, so that Spearman's correlation is a dot product."""
    ranks = stats.rankdata(_upper(rdm))
    centred = ranks - ranks.mean()
    return centred / np.linalg.norm(centred)


def _spearman(a: Tensor, b: Tensor) -> float:
    return float(_unit_ranks(a) @ _unit_ranks(b))


def _permutation_p(a: Tensor, b: Tensor, rho: float, n_permutations: int, seed: int) -> float:
    """Share of relabellings of the second RDM, rows and columns together, that agree at least as well."""
    if not n_permutations:
        return math.nan
    n = len(a)
    rows, columns = np.triu_indices(n, 1)
    ranks = np.zeros((n, n))
    ranks[rows, columns] = ranks[columns, rows] = _unit_ranks(b)
    rng = derive_generator(seed, "geometry", "permutation")
    orders = rng.permuted(np.tile(np.arange(n), (n_permutations, 1)), axis=1)
    permuted = ranks[orders[:, rows], orders[:, columns]] @ _unit_ranks(a)
    # A relabelling that changes nothing must count although it was summed in another order.
    return float((1 + (permuted >= rho - 1e-9).sum()) / (1 + n_permutations))


def strata_of(first: _Texts, second: _Texts) -> list[list[str]]:
    """Groups by where they occur, and by their emotion in a source whose groups have one each: every split and every block
    takes its share of each, so that as few as possible leave an emotion without texts."""

    def kinds(texts: _Texts) -> dict[str, str]:
        nested = texts.stimuli.design == "nested"
        return {g: e if nested else "" for g, e in zip(texts.groups, texts.stimuli.emotions, strict=True)}

    a, b = kinds(first), kinds(second)
    found: dict[tuple[str | None, str | None], list[str]] = {}
    for group in dict.fromkeys([*a, *b]):
        found.setdefault((a.get(group), b.get(group)), []).append(group)
    return list(found.values())


def blocks_of(strata: list[list[str]]) -> list[list[str]]:
    """What is left out at a time: one group, or one of MOST_BLOCKS blocks that hold a share of every stratum."""
    groups = list(chain.from_iterable(strata))
    n_blocks = min(len(groups), MOST_BLOCKS)
    return [groups[block::n_blocks] for block in range(n_blocks)]


def _interval(pair: tuple[_Texts, _Texts], rho: float, strata: list[list[str]]) -> tuple[float, float]:
    """Jackknife in which each group is left out wherever it stands.

    With the same groups in both, what they share moves both RDMs at once; with groups of their own, the squares add up to the sum
    of both variances. For 6 to 40 groups it covers 0.95 to 1.00 of the time (planted data): too wide rather than too narrow.
    """
    blocks = blocks_of(strata)
    left_out = []
    for block in blocks:
        a, b = (texts.rdm(~np.isin(texts.groups, block)) for texts in pair)
        if a is None or b is None:
            return math.nan, math.nan
        left_out.append(_spearman(a, b))
    if len(blocks) < 2:
        return math.nan, math.nan
    interval = jackknife_interval(np.array(rho), np.array(left_out))
    return max(float(interval.low), -1.0), min(float(interval.high), 1.0)


def _half_correlations(
    pair: tuple[_Texts, _Texts], strata: list[list[str]], n_halves: int, seed: int
) -> tuple[float, float, float]:
    """Mean Spearman correlation between halves of the groups: within the first, within the second, and across both."""
    rng = derive_generator(seed, "geometry", "halves")
    found = []
    for _ in range(n_halves):
        half: set[str] = set()
        for groups in strata:
            # Of an odd number the second half always gets one more: by chance, the emotions of a half would differ in their texts.
            half |= {groups[i] for i in rng.permutation(len(groups))[: len(groups) // 2]}
        ranks = [_unit_ranks(rdm) for texts in pair for rdm in texts.halves(half) if rdm is not None]
        if len(ranks) == 4:  # else an emotion has too few groups
            a1, a2, b1, b2 = ranks
            found.append((a1 @ a2, b1 @ b2, (a1 @ b2 + a2 @ b1) / 2))
    if not found:
        return math.nan, math.nan, math.nan
    within_first, within_second, across = np.mean(found, axis=0).tolist()
    return within_first, within_second, across


def _geometric_mean(a: float, b: float) -> float:
    return math.sqrt(a * b) if a > 0 and b > 0 else math.nan
