"""Where a patched activation comes from: the counterpart, and the controls that say what the counterpart's effect is worth.

An effect says that a patch did something. Beside it stand patches that should do nothing (the text itself), or that change as much without
the emotion (a random direction of the same length, another text on the same topic with the same emotion), or with another emotion, or that
are held to the same rank, so that a site of width 1536 has no advantage over one of 576.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from lens_affect.adapter import LensModel, add_hooks, run_trunk
from lens_affect.matching import MatchedPairs
from lens_affect.replay import Edit, Recording
from lens_affect.sites import resolve_site
from lens_affect.statistics import derive_generator, derive_seed
from lens_affect.stimuli import EMOTIONS

DONORS = {
    "counterpart": "the other text of the pair",
    "self": "the text itself: the effect is 0",
    "random": "a random direction, as long at each position as the difference to the counterpart",
    "topic": "another pair's text on the same topic with the emotion of the text that runs: content changes, emotion does not",
    "other_emotion": "another pair's text with a third emotion, on the same topic where there is one",
    "rank8": "the difference to the counterpart, projected on the 8 principal directions of such differences in other topics",
    "rank32": "the same with 32 directions",
}
"""Every donor."""
POSITIONS_PER_PAIR = 4
"""Differences per pair that principal directions are taken from."""


@dataclass(frozen=True)
class Donor:
    """Where replacements come from, per pair."""

    name: str
    """One of DONORS."""
    sources: tuple[int | None, ...]
    """Row of the recording per pair (clean texts first, then corrupted ones); None where no text qualifies."""
    edit: Edit | None = None
    """What is put in place of the source's activation; None for the activation itself."""

    @property
    def whole(self) -> bool:
        """Whether the whole activation is replaced, so that sites that determine each other carry the same patch."""
        return self.edit is None


def make_donors(
    model: LensModel,
    matched: MatchedPairs,
    recording: Recording,
    sites: Sequence[str],
    layers: Sequence[int],
    controls: Sequence[str],
    direction: str,
    positions: str,
    seed: int,
) -> list[Donor]:
    """The counterpart and the controls asked for.

    Args:
        model: reads the differences that ranks are taken from.
        matched: the pairs.
        recording: both sides of all pairs, clean texts first.
        sites: that will be patched.
        layers: that will be patched.
        controls: names from DONORS.
        direction: `denoise` or `noise`.
        positions: `last` takes principal directions from last positions only.
        seed: of random directions and of the choice among texts that qualify.
    """
    n = len(matched)
    own = tuple(range(n, 2 * n) if direction == "denoise" else range(n))
    counterpart = tuple(range(n) if direction == "denoise" else range(n, 2 * n))
    donors = [Donor("counterpart", counterpart)]
    for name in controls:
        rank = re.fullmatch(r"rank(\d+)", name)
        if name == "self":
            donors.append(Donor(name, own))
        elif name == "random":
            donors.append(Donor(name, counterpart, _random_direction(matched, seed)))
        elif rank:
            bases = _PrincipalDirections(model, matched, sites, layers, int(rank.group(1)), positions, seed)
            donors.append(Donor(name, counterpart, bases.project))
        else:
            donors.append(Donor(name, _other_texts(matched, own, name, seed)))
    return donors


def _random_direction(matched: MatchedPairs, seed: int) -> Edit:
    n, places = len(matched), int(matched.last.max()) + 1
    drawn: dict[tuple[str, int], Tensor] = {}

    def edit(
        own: Tensor, source: Tensor, site: str, layer: int, texts: Tensor, from_end: Tensor
    ) -> Float[Tensor, "row position width"]:
        key = site, layer
        if key not in drawn:  # drawn whole, so that no number depends on the batches; one at a time is kept
            drawn.clear()
            generator = torch.Generator().manual_seed(derive_seed(seed, "random donor", site, layer))
            drawn[key] = torch.nn.functional.normalize(
                torch.randn(n, places, own.shape[-1], generator=generator), dim=-1
            ).to(own)
        directions = drawn[key][texts[:, None] % n, (from_end - 1).clamp(max=places - 1)]
        return own + directions * (source - own).norm(dim=-1, keepdim=True)

    return edit


def _other_texts(matched: MatchedPairs, own: Sequence[int], name: str, seed: int) -> tuple[int | None, ...]:
    """A text of another pair for each pair, long enough for the patched positions."""
    n, pairs = len(matched), matched.pairs
    emotions = (*pairs.clean_emotions, *pairs.corrupted_emotions)
    lengths = (matched.last + 1).tolist() * 2
    found: list[int | None] = []
    for pair in range(n):
        needed = int(matched.last[pair] - matched.first[pair]) + 2  # one more than is patched: position 0 is no donor
        others = [t for t in range(2 * n) if t % n != pair and lengths[t] >= needed]
        same_topic = [t for t in others if pairs.groups[t % n] == pairs.groups[pair]]
        if name == "topic":
            candidates = [t for t in same_topic if emotions[t] == emotions[own[pair]]] or [
                t for t in same_topic if _valence(emotions[t]) == _valence(emotions[own[pair]]) is not None
            ]
        else:
            two = {pairs.clean_emotions[pair], pairs.corrupted_emotions[pair]}
            candidates = [t for t in same_topic if emotions[t] not in two] or [
                t for t in others if emotions[t] not in two
            ]
        rng = derive_generator(seed, "donor", name, pairs.clean[pair])
        found.append(int(rng.choice(candidates)) if candidates else None)
    return tuple(found)


def _valence(emotion: str) -> str | None:
    known = EMOTIONS.get(emotion)
    return None if known is None else known.valence


class _PrincipalDirections:
    """Principal directions of the pairs' differences at each site and layer, for each topic from the pairs of all others."""

    def __init__(
        self,
        model: LensModel,
        matched: MatchedPairs,
        sites: Sequence[str],
        layers: Sequence[int],
        rank: int,
        positions: str,
        seed: int,
    ) -> None:
        groups = matched.pairs.groups
        self.topics = list(dict.fromkeys(groups))
        self.topic_of = torch.tensor([self.topics.index(g) for g in groups])
        pair, column = _sampled_positions(matched, positions, seed)
        self.topic_of_difference = self.topic_of[pair]
        fewest = min(int((self.topic_of_difference != t).sum()) for t in range(len(self.topics)))
        if fewest < rank:
            raise ValueError(
                f"received the control rank{rank} with {fewest} differences outside one topic; allowed are ranks up to {fewest}: give more pairs or topics"
            )
        self.rank = rank
        self.differences = _read_differences(model, matched, sites, layers, pair, column)
        self._bases: dict[tuple[str, int], list[Tensor]] = {}

    def project(
        self, own: Tensor, source: Tensor, site: str, layer: int, texts: Tensor, from_end: Tensor
    ) -> Float[Tensor, "row position width"]:
        """The text's activation plus the part of the difference that lies in the principal directions."""
        key = site, layer
        if key not in self._bases:
            self._bases.clear()
            x = self.differences[key].double()
            self._bases[key] = [
                _principal(x[self.topic_of_difference != t], self.rank).to(own) for t in range(len(self.topics))
            ]
        topics = self.topic_of.to(texts.device)[texts % len(self.topic_of)]
        moved = own.clone()
        for topic in topics.unique().tolist():
            rows, basis = topics == topic, self._bases[key][topic]
            moved[rows] += (source[rows] - own[rows]) @ basis.T @ basis
        return moved


def _sampled_positions(
    matched: MatchedPairs, positions: str, seed: int
) -> tuple[Int[Tensor, " difference"], Int[Tensor, " difference"]]:
    """Pair and column of the differences that directions are taken from: the last position, and for `all` some others."""
    pairs, columns = [], []
    for row, (first, last) in enumerate(zip(matched.first.tolist(), matched.last.tolist(), strict=True)):
        earlier = np.arange(first, last) if positions != "last" else np.arange(0)
        rng = derive_generator(seed, "rank positions", matched.pairs.clean[row])
        chosen = rng.permutation(earlier)[: POSITIONS_PER_PAIR - 1].tolist()
        pairs += [row] * (len(chosen) + 1)
        columns += [*chosen, last]
    return torch.tensor(pairs), torch.tensor(columns)


@torch.no_grad()
def _read_differences(
    model: LensModel,
    matched: MatchedPairs,
    sites: Sequence[str],
    layers: Sequence[int],
    pair: Int[Tensor, " difference"],
    column: Int[Tensor, " difference"],
    rows_at_once: int = 32,
) -> dict[tuple[str, int], Float[Tensor, "difference width"]]:
    parts: dict[tuple[str, int], list[Tensor]] = {(s, layer): [] for s in sites for layer in layers}
    hooks = []
    at: dict[str, Tensor] = {}

    def keep(key: tuple[str, int]) -> Callable[..., None]:
        def hook(value: Tensor, hook: object = None) -> None:
            seen = value.flatten(2)[at["row"], at["column"]]
            clean, corrupted = seen.chunk(2)
            parts[key].append((clean - corrupted).float().cpu())

        return hook

    for site in sites:
        hooks += [(resolve_site(model, site).at(layer), keep((site, layer))) for layer in layers]
    with add_hooks(model, hooks):
        for start in range(0, len(matched), rows_at_once):
            rows = slice(start, start + rows_at_once)
            size = len(matched.clean[rows])
            mine = (pair >= start) & (pair < start + size)
            at["row"] = torch.cat([pair[mine] - start, pair[mine] - start + size])
            at["column"] = column[mine].repeat(2)
            run_trunk(model, torch.cat([matched.clean[rows], matched.corrupted[rows]]), matched.mask[rows].repeat(2, 1))
    return {key: torch.cat(found) for key, found in parts.items()}


def _principal(x: Float[Tensor, "difference width"], rank: int) -> Float[Tensor, "rank width"]:
    """Right singular vectors of the largest singular values (not centred: which text of a pair comes first means nothing)."""
    if len(x) > x.shape[1]:
        return torch.linalg.eigh(x.T @ x).eigenvectors[:, -rank:].T
    values, left = torch.linalg.eigh(x @ x.T)
    kept = (
        values[-rank:] > 1e-10 * values[-1]
    )  # fewer independent differences than the rank: the other directions are none
    return torch.where(kept, values[-rank:].clamp(min=1e-30).rsqrt(), 0.0)[:, None] * (left[:, -rank:].T @ x)
