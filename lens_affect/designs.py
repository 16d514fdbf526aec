"""How texts are split and relabelled: folds that keep groups together, and relabellings under "the emotion does not matter"."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from lens_affect.nulls import permute_labels
from lens_affect.statistics import derive_seed
from lens_affect.stimuli import EMOTIONS, NEUTRAL, Stimuli


@dataclass(frozen=True)
class Design:
    """Labels and folds of the texts that are scored; `neutral` rows have label -1 and belong to no fold."""

    labels: Int[np.ndarray, " item"]
    """Class number of each text, -1 for neutral."""
    n_classes: int
    """Number of emotions."""
    folds: Int[np.ndarray, " item"]
    """Fold in which a text is held out, -1 if it never is."""
    n_folds: int
    """Number of folds."""
    clusters: Int[np.ndarray, " item"]
    """Group number of each text."""
    n_clusters: int
    """Number of groups."""
    positive: tuple[bool | None, ...]
    """Per class: pleasant, unpleasant, or unknown."""


def make_design(
    stimuli: Stimuli, *, n_splits: int | None = None, test_groups: Sequence[str] | None = None, seed: int = 0
) -> tuple[Design, tuple[str, ...]]:
    """Folds that keep groups together, and the classes.

    Args:
        stimuli: the texts.
        n_splits: folds of whole groups; by default one per group (crossed design), or 5 (groups nested in labels).
        test_groups: a published split: only these groups are held out, all at once, and all others are learned from.
        seed: of folds that are drawn.

    Raises:
        ValueError: fewer than two emotions, fewer groups than folds, or a fold whose training set lacks a class.
    """
    emotions = tuple(e for e in stimuli.labels if e != NEUTRAL)
    if len(emotions) < 2:
        raise ValueError(f"received the emotions {list(emotions)}; telling apart needs at least two")
    labels = np.array([emotions.index(e) if e != NEUTRAL else -1 for e in stimuli.emotions])
    groups = list(dict.fromkeys(g for g, label in zip(stimuli.groups, labels, strict=True) if label >= 0))
    # Neutral texts of a topic without emotional ones never enter a score that holds topics out.
    number = {g: i for i, g in enumerate(groups)}
    clusters = np.array([number.get(g, -1) for g in stimuli.groups])
    folds_of = (
        _folds(stimuli, groups, labels, n_splits, seed) if test_groups is None else _published(groups, test_groups)
    )
    folds = np.array([folds_of[c] if c >= 0 and label >= 0 else -1 for c, label in zip(clusters, labels, strict=True)])
    n_folds = max(folds_of) + 1
    for fold in range(n_folds):
        lacking = set(range(len(emotions))) - set(labels[(folds != fold) & (labels >= 0)].tolist())
        if lacking:
            raise ValueError(
                f"received {len(groups)} groups for {n_folds} folds; without fold {fold} no text of {emotions[min(lacking)]!r} is left to learn "
                "from: add groups for that emotion, or use fewer folds"
            )
    known = [EMOTIONS.get(e) for e in emotions]
    positive = tuple(None if e is None else e.valence == "positive" for e in known)
    return Design(labels, len(emotions), folds, n_folds, clusters, len(groups), positive), emotions


def _published(groups: list[str], test_groups: Sequence[str]) -> list[int]:
    chosen = set(test_groups)
    unknown = chosen - set(groups)
    if unknown or not chosen or chosen == set(groups):
        raise ValueError(
            f"received {len(chosen)} test groups, {len(unknown)} of them unknown; allowed are some, not all, of the {len(groups)} groups with emotions"
        )
    return [0 if g in chosen else -1 for g in groups]


def _folds(stimuli: Stimuli, groups: list[str], labels: np.ndarray, n_splits: int | None, seed: int) -> list[int]:
    n = n_splits if n_splits is not None else (len(groups) if stimuli.design == "crossed" else 5)
    if not 2 <= n <= len(groups):
        raise ValueError(
            f"received {len(groups)} groups for {n} folds; allowed are 2 to {len(groups)} folds (groups are never split)"
        )
    if n == len(groups):
        return list(range(n))
    from sklearn.model_selection import KFold, StratifiedKFold

    random_state = derive_seed(seed, "folds") % 2**32
    found = [0] * len(groups)
    if stimuli.design == "nested":
        of_group = {g: label for g, label in zip(stimuli.groups, labels.tolist(), strict=True) if label >= 0}
        target = np.array([of_group[g] for g in groups])
        smallest = int(np.bincount(target).min())
        if smallest < n:
            raise ValueError(
                f"received an emotion with {smallest} groups for {n} folds; every fold needs one of each emotion: use n_splits={max(smallest, 2)}"
            )
        splitter = StratifiedKFold(n, shuffle=True, random_state=random_state).split(np.zeros(len(groups)), target)
    else:
        splitter = KFold(n, shuffle=True, random_state=random_state).split(np.zeros(len(groups)))
    for fold, (_, held_out) in enumerate(splitter):
        for g in held_out:
            found[g] = fold
    return found


def draw_labellings(stimuli: Stimuli, design: Design, n_permutations: int, seed: int) -> Tensor:
    """The true labels first, then the relabellings; neutral texts keep theirs."""
    labels = torch.from_numpy(design.labels)
    if not n_permutations:
        return labels[None]
    emotional = np.flatnonzero(design.labels >= 0)
    if stimuli.design == "crossed":
        order = permute_labels(
            [stimuli.emotions[i] for i in emotional],
            [stimuli.groups[i] for i in emotional],
            design="crossed",
            n_permutations=n_permutations,
            seed=seed,
        )
    else:
        # Whole groups swap labels, but within a fold: a fold keeps its composition, so every relabelling has a score.
        first = np.array([emotional[design.clusters[emotional] == c][0] for c in range(design.n_clusters)])
        swapped = permute_labels(
            [stimuli.emotions[i] for i in first],
            [str(design.folds[i]) for i in first],
            design="crossed",
            n_permutations=n_permutations,
            seed=seed,
        )
        position = {int(item): i for i, item in enumerate(emotional)}
        order = np.array([position[int(item)] for item in first])[swapped][:, design.clusters[emotional]]
    drawn = labels[None].repeat(n_permutations + 1, 1)
    drawn[1:, torch.from_numpy(emotional)] = labels[torch.from_numpy(emotional[order])]
    return drawn
