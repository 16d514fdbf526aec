"""Activation patching: how much of an emotional behaviour moves with one site's activation from one text to its counterpart.

Sites are nested, so a large effect of one says little by itself. At the same positions `o`, `z` and `attn_out` carry the same patch
(each decides the next), and so do `down`, `act` and `mlp_out`; `act` is made of `gate` and `up` and holds all that either of them can
move. The fair contrast for the gate is `up`, of the same width and with the same input; `mlp_out` and `attn_out` are ceilings.
"""

import html
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lens_affect.adapter import LensModel, model_info
from lens_affect.contrasts import ContrastPairs
from lens_affect.donors import DONORS, Donor, make_donors
from lens_affect.matching import MatchedPairs, match_pairs
from lens_affect.nulls import max_null, p_text, sign_flips, simultaneous_interval
from lens_affect.recording import BATCH_TOKENS, record
from lens_affect.replay import Outcome, Patch, Replay
from lens_affect.results import Provenance, Stopwatch, load_result, save_result
from lens_affect.selfchecks import ensure_checked
from lens_affect.sites import SITES, resolve_site
from lens_affect.statistics import jackknife_interval, mean_interval
from lens_affect.vectors import EmotionVectors

POSITIONS = ("all", "last", "each")
METRICS = {
    "logit_difference": "log odds of the clean words against the corrupted words, nats",
    "kl": "KL divergence of the next word from the target run's, nats",
    "projection": "projection of resid_post of a later layer on the clean emotion's unit vector minus that on the corrupted emotion's, at the last position",
}
"""What is measured, with its unit; a projection has the residual stream's."""
DIRECTIONS = ("denoise", "noise")
SAME = {"z": "attn_out", "o": "attn_out", "act": "mlp_out", "down": "mlp_out"}
"""Sites that carry the same patch as another at the same positions, when the whole activation is replaced."""
SMALLEST_GAP = 1e-4
"""Sum of gaps, in the metric's unit, below which there is nothing to divide by."""
GATE_AGAINST_SIBLINGS = ("gate", "up", "mlp_out", "q", "k", "v", "attn_out")


@dataclass(frozen=True)
class PatchingMap:
    """Effects of patches by pair, site, layer and position. A row of positions is `all`, `last`, or a place counted from the end (`-1` is last)."""

    effect_raw: Float[Tensor, "pair site layer position"]
    """What the patch moves, in the metric's unit, towards the target; NaN where a pair has no such position."""
    change: Float[Tensor, "pair site layer position"]
    """Relative change of resid_post of the patched layer that the patch causes, over the patched positions."""
    controls: dict[str, Float[Tensor, "pair site layer position"]]
    """Effects of other donors (donors.DONORS), by name."""
    control_changes: dict[str, Float[Tensor, "pair site layer position"]]
    """The same for the relative change."""
    gap: Float[Tensor, " pair"]
    """What there is to move, in the metric's unit: metric of the target run minus the start run (for KL, the divergence of the start run)."""
    sites: tuple[str, ...]
    """Patched sites."""
    layers: tuple[int, ...]
    """0-based blocks."""
    positions: tuple[str, ...]
    """Labels of the position axis."""
    groups: tuple[str, ...]
    """Topic of each pair."""
    metric: str
    """One of METRICS."""
    read_layer: int | None
    """Block whose resid_post a projection is read from; None where the next word is read."""
    direction: str
    """`denoise`: the corrupted text runs, the clean one is the donor; `noise`: the reverse."""
    n_layers: int
    """Blocks of the model."""
    dropped: dict[str, int]
    """Pairs that were left out, by reason."""
    words_left_out: int
    """Words without a token of their own."""
    way: str
    """`resumed` or `full` (replay.Replay), with the largest difference between the two that was measured before the run."""
    seed: int
    """Of random donors and of the choice of other texts."""
    name: str
    """Name of the pairs."""
    provenance: Provenance
    """Model, numerics, pairs, seed, versions."""

    @property
    def gap_interval(self) -> tuple[float, float, float]:
        """Mean gap over groups with its 95 % limits. Where it is not above 0 there is nothing to move, and normalized effects mean nothing."""
        names = list(dict.fromkeys(self.groups))
        means = [float(self.gap[[g == name for g in self.groups]].mean()) for name in names]
        interval = mean_interval(np.array(means))
        return float(interval.estimate), float(interval.low), float(interval.high)

    @property
    def measured(self) -> str:
        """The metric in words."""
        return self.metric.replace("_", " ") if self.read_layer is None else f"projection at layer {self.read_layer}"

    @property
    def unit(self) -> str:
        """Of gap and effect_raw."""
        return "nats" if self.read_layer is None else "units of the residual stream"

    @property
    def null(self) -> str:
        """What p compares an effect with."""
        return "a random donor" if "random" in self.controls else "0"

    @property
    def shown(self) -> Bool[Tensor, " pair"]:
        """Pairs whose behaviour the model shows by itself: the gap is above 0."""
        return self.gap > 0

    def normalized(
        self, *, donor: str = "counterpart", per_change: bool = False, shown_only: bool = False
    ) -> tuple[Float[np.ndarray, "site layer position"], Float[np.ndarray, "group site layer position"]]:
        """Sum of effects over sum of gaps: 0 = nothing moved, 1 = the target's behaviour; and the same without each group.

        Args:
            donor: `counterpart`, or one of the controls.
            per_change: divided by the mean relative change of resid_post that the patch causes.
            shown_only: only pairs whose behaviour the model shows.

        Raises:
            ValueError: a donor that was not run, or no pair that shows the behaviour.
        """
        effect, change = self._of(donor)
        keep = self.shown if shown_only else torch.ones_like(self.shown)
        if not bool(keep.any()):
            raise ValueError(
                "no pair shows the behaviour (its gap is not above 0); use shown_only=False, or other pairs"
            )
        groups = [g for g, k in zip(self.groups, keep.tolist(), strict=True) if k]
        effect, change, gap = (x[keep].double().numpy() for x in (effect, change, self.gap))
        names = list(dict.fromkeys(groups))
        member = np.array([[g == name for g in groups] for name in names], float)
        known = np.isfinite(effect)
        sums = [
            np.einsum("gp,p...->g...", member, np.where(known, x, 0.0)) for x in (effect, change, known.astype(float))
        ]
        gaps = np.einsum("gp,p...->g...", member, np.where(known, gap[:, None, None, None], 0.0))

        def ratio(total: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
            gap_there = total(gaps)
            with np.errstate(invalid="ignore", divide="ignore"):
                found = np.where(np.abs(gap_there) > SMALLEST_GAP, total(sums[0]) / gap_there, np.nan)
                return found / (total(sums[1]) / total(sums[2])) if per_change else found

        whole = ratio(lambda x: x.sum(0))
        return whole, np.stack([ratio(lambda x, i=i: x.sum(0) - x[i]) for i in range(len(names))])

    def _of(self, donor: str) -> tuple[Tensor, Tensor]:
        if donor == "counterpart":
            return self.effect_raw, self.change
        if donor not in self.controls:
            raise ValueError(f"received donor {donor!r}; this map has 'counterpart' and {list(self.controls)}")
        return self.controls[donor], self.control_changes[donor]

    def to_frame(self, *, shown_only: bool = False) -> pd.DataFrame:
        """One row per cell: site, layer, position, effect (normalized), low, high, raw (mean over pairs), change, effect_per_change, one column
        per control, p and p_family of effect minus random donor (or of effect, where that was not run), n."""
        whole, without = self.normalized(shown_only=shown_only)
        interval = jackknife_interval(whole, without)
        per_change, _ = self.normalized(per_change=True, shown_only=shown_only)
        keep = self.shown if shown_only else torch.ones_like(self.shown)
        p, p_family = self._significance(shown_only)
        columns = {
            "effect": whole,
            "low": interval.low,
            "high": interval.high,
            "raw": self.effect_raw[keep].nanmean(0).numpy(),
            "change": self.change[keep].nanmean(0).numpy(),
            "effect_per_change": per_change,
        }
        columns |= {name: self.normalized(donor=name, shown_only=shown_only)[0] for name in self.controls}
        columns |= {"p": p, "p_family": p_family, "n": self.effect_raw[keep].isfinite().sum(0).numpy()}
        index = pd.MultiIndex.from_product(
            [self.sites, self.layers, self.positions], names=["site", "layer", "position"]
        )
        return pd.DataFrame({k: np.asarray(v).reshape(-1) for k, v in columns.items()}, index=index).reset_index()

    def _significance(self, shown_only: bool, n_flips: int = 4095) -> tuple[np.ndarray, np.ndarray]:
        """p of each cell by sign flips of whole topics, pointwise and over all cells by the maximum."""
        whole, without = self.normalized(shown_only=shown_only)
        if "random" in self.controls:
            other, other_without = self.normalized(donor="random", shown_only=shown_only)
            whole, without = whole - other, without - other_without
        n, shape = len(without), whole.shape
        p = np.full((2, whole.size), np.nan)
        pseudo = (n * whole - (n - 1) * without).reshape(n, -1)
        known = np.isfinite(pseudo).all(0)
        if n >= 2 and known.any():
            flips = sign_flips(n, n_flips, self.seed, "patching")
            null = max_null(pseudo[:, known].mean(0), flips @ pseudo[:, known] / n, better="high")
            p[:, known] = null.p, null.p_family
        return p[0].reshape(shape), p[1].reshape(shape)

    def compare(
        self, first: str, second: str, *, per_change: bool = False, donor: str = "counterpart", shown_only: bool = False
    ) -> pd.DataFrame:
        """Effect of one site minus another's in every layer and position, with intervals that hold for all of them at once.

        Args:
            first: a site.
            second: another site.
            per_change: compare at equal relative change of resid_post.
            donor: `counterpart`, or a control such as `rank8`, which gives both sites the same rank.
            shown_only: only pairs whose behaviour the model shows.

        Returns:
            Columns layer, position, difference, low, high (family-wise 95 % over layers and positions); the last row, layer `mean`, is the
            mean over layers with an interval of its own.

        Raises:
            ValueError: a site that was not patched.
        """
        for site in (first, second):
            if site not in self.sites:
                raise ValueError(f"received site {site!r}; this map has {list(self.sites)}")
        i, j = self.sites.index(first), self.sites.index(second)
        whole, without = self.normalized(per_change=per_change, donor=donor, shown_only=shown_only)
        difference, left = whole[i] - whole[j], without[:, i] - without[:, j]
        n = len(left)
        half = _simultaneous_half(n * difference - (n - 1) * left, self.seed)
        mean = jackknife_interval(np.nanmean(difference, 0), np.nanmean(left, 1))
        rows = [
            [layer, position, *(float(x[a, b]) for x in (difference, difference - half, difference + half))]
            for a, layer in enumerate(self.layers)
            for b, position in enumerate(self.positions)
        ]
        rows += [
            ["mean", position, *(float(x[b]) for x in (mean.estimate, mean.low, mean.high))]
            for b, position in enumerate(self.positions)
        ]
        return pd.DataFrame(rows, columns=["layer", "position", "difference", "low", "high"])

    def save(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Save as a folder (see results.py)."""
        return save_result(self, folder, overwrite=overwrite)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "PatchingMap":
        """Load what `save` wrote."""
        return load_result(cls, folder)

    def __str__(self) -> str:
        dropped = f", {sum(self.dropped.values())} dropped" if self.dropped else ""
        n_groups, smallest = len(set(self.groups)), 2 ** len(set(self.groups)) - 1
        gap, low, high = self.gap_interval
        nothing = "" if low > 0 else "; NOT ABOVE 0, so there is nothing to move and normalized effects mean nothing"
        head = (
            f"{self.provenance.title}, {self.name}: {self.direction} by {self.measured}, {len(self.gap)} pairs in {n_groups} groups{dropped}, "
            f"{int(self.shown.sum())} show the behaviour (mean gap {gap:.2f} [{low:.2f}, {high:.2f}] {self.unit}{nothing})"
        )
        table = self.to_frame()
        if not np.isfinite(table["effect"].to_numpy(float)).any():
            return head
        best = table.loc[table["effect"].idxmax()]
        return (
            f"{head}\n"
            f"largest effect {best['effect']:.2f} [{best['low']:.2f}, {best['high']:.2f}] at {best['site']}, layer {best['layer']}, position "
            f"{best['position']}; {'' if best['p_family'] < 0.05 else 'not shown to be '}above {self.null}: family-wise "
            f"{p_text(float(best['p_family']), min(smallest, 4095))}"
        )

    def _repr_html_(self) -> str:
        top = self.to_frame().sort_values(by="effect", ascending=False).head(8).round(3)
        return f"<p>{html.escape(str(self)).replace(chr(10), '<br>')}</p>{top.to_html(index=False, border=0)}"


def _simultaneous_half(
    pseudo: Float[np.ndarray, "group layer position"], seed: int
) -> Float[np.ndarray, "layer position"]:
    """Half widths of intervals that hold at once; NaN where a group has no value."""
    known = np.isfinite(pseudo).all(0)
    half = np.full(pseudo.shape[1:], np.nan)
    if known.any() and len(pseudo) > 2:
        interval = simultaneous_interval(pseudo[:, known], seed=seed)
        half[known] = (interval.high - interval.low) / 2
    return half


def patch_sites(
    model: LensModel,
    pairs: ContrastPairs,
    *,
    sites: Sequence[str] = GATE_AGAINST_SIBLINGS,
    layers: Sequence[int] | None = None,
    positions: str = "all",
    metric: str = "logit_difference",
    vectors: EmotionVectors | None = None,
    read_layer: int | None = None,
    direction: str = "denoise",
    controls: Sequence[str] = ("random",),
    drop: bool | None = None,
    seed: int = 0,
    batch_tokens: int = BATCH_TOKENS,
    progress: Callable[[int, int], None] | None = None,
) -> PatchingMap:
    """Replace one site's activation in one text by its counterpart's, for every pair, site and layer.

    Args:
        model: a bridge or a HookedTransformer.
        pairs: texts of equal token length (contrasts.load_pairs, ContrastPairs.from_texts).
        sites: names from sites.SITES.
        layers: 0-based blocks; all that the metric can show by default.
        positions: `all` from the first differing token on, `last`, or `each` of them by itself.
        metric: a name from METRICS.
        vectors: for `projection`: directions of the emotions of both sides of every pair, read at resid_post of this model.
        read_layer: for `projection`: the block that is read, the last one of the vectors by default; later blocks are not patched.
        direction: `denoise` (corrupted text, clean donor) or `noise` (clean text, corrupted donor).
        controls: names from donors.DONORS, each patched everywhere as well.
        drop: leave out pairs of unequal length instead of refusing them; by default only pairs of our own sets are dropped.
        seed: of random donors and of the choice of other texts.
        batch_tokens: positions that go through a block at once.
        progress: called with (patches done, patches in all).

    Returns:
        The map. Every run starts with a check that resumed and full forward passes agree.

    Raises:
        ValueError: an unknown site, metric, direction, donor or layer, a model without that site, pairs of unequal length, a side without
            words, vectors of another model or without an emotion of the pairs, or logits that are not finite.

    Example:
        >>> patch_sites(model, load_pairs("affect"), sites=["gate", "up"], positions="last").to_frame()  # doctest: +SKIP
    """
    clock = Stopwatch()
    read = _read_layer(model, metric, vectors, read_layer)
    layers = range(read + 1) if layers is None and read is not None else layers
    chosen = check_patching(model, sites, layers, positions, metric, direction, controls, read=read)
    matched = match_pairs(model, pairs, drop=drop)
    axes = None if vectors is None or read is None else emotion_axes(vectors, matched.pairs, read)
    ensure_checked(model)
    n = len(matched)
    # Rows 0 to n - 1 of the recording are the clean texts, the others the corrupted ones.
    recording = record(
        model, torch.cat([matched.clean, matched.corrupted]), matched.mask.repeat(2, 1), batch_tokens=batch_tokens
    )
    if not bool(recording.logits.isfinite().all()):
        bad = (~recording.logits.isfinite()).any(1).nonzero()[0, 0].item()
        raise ValueError(
            f"received logits that are not finite for {'clean' if bad < n else 'corrupted'} text {bad % n} in "
            f"{model_info(model).provenance.dtype}; load the model with dtype=torch.float32 or bfloat16"
        )
    donors = make_donors(model, matched, recording, sites, chosen, controls, direction, positions, seed)
    edits = {d.name: d.edit for d in donors if d.edit}
    tokens = matched.answer_tokens if metric == "logit_difference" else None
    replay = Replay(model, recording, sites=sites, edits=edits, read=read, tokens=tokens, batch_tokens=batch_tokens)
    measure, gap, offset = _measure(matched, replay.unpatched(), metric, direction, axes, tokens)
    places = places_of(matched, positions)
    cells = _cells(matched, sites, chosen, places, donors, direction)
    outcome = replay.run([cell.patch for cell in cells], measure=measure, progress=progress)
    effects, changes = _fill(cells, outcome, offset, (n, len(sites), len(chosen), len(places)), donors, sites)
    provenance = model_info(model).provenance.updated(
        stimuli_hash=matched.pairs.hash, bos=matched.bos, seed=seed, elapsed_seconds=clock.seconds
    )
    return PatchingMap(
        effect_raw=effects.pop("counterpart"),
        change=changes.pop("counterpart"),
        controls=effects,
        control_changes=changes,
        gap=gap,
        sites=tuple(sites),
        layers=chosen,
        positions=tuple(places),
        groups=matched.pairs.groups,
        metric=metric,
        read_layer=read,
        direction=direction,
        n_layers=int(model.cfg.n_layers),
        dropped=matched.dropped,
        words_left_out=matched.words_left_out,
        way=f"{replay.way}: {replay.reason or f'largest difference of an output {replay.difference:.1e}'}",
        seed=seed,
        name=pairs.name,
        provenance=provenance,
    )


def check_patching(
    model: LensModel,
    sites: Sequence[str],
    layers: Sequence[int] | None,
    positions: str,
    metric: str,
    direction: str,
    controls: Sequence[str],
    *,
    read: int | None = None,
) -> tuple[int, ...]:
    """The layers, if everything asked for is there; none behind the one that is read.

    Raises:
        ValueError: what is not, and what is allowed.
    """
    for name, received, allowed in (
        ("positions", positions, POSITIONS),
        ("metric", metric, METRICS),
        ("direction", direction, DIRECTIONS),
    ):
        if received not in allowed:
            raise ValueError(f"received {name}={received!r}; allowed are {list(allowed)}")
    unknown = [c for c in controls if c not in DONORS or c == "counterpart"]
    if unknown:
        raise ValueError(f"received controls {unknown}; allowed are {[d for d in DONORS if d != 'counterpart']}")
    if not sites or len(set(sites)) != len(sites):
        raise ValueError(f"received sites {list(sites)}; allowed are one or more different ones of {list(SITES)}")
    for site in sites:
        resolve_site(model, site)
    n_layers = int(model.cfg.n_layers) if read is None else read + 1
    chosen = tuple(range(n_layers)) if layers is None else tuple(layers)
    if not chosen or len(set(chosen)) != len(chosen) or any(not 0 <= layer < n_layers for layer in chosen):
        raise ValueError(f"received layers {list(chosen)}; allowed are different ones of 0 to {n_layers - 1}")
    return chosen


def _read_layer(model: LensModel, metric: str, vectors: EmotionVectors | None, read_layer: int | None) -> int | None:
    """The block that the metric reads, None for the next word.

    Raises:
        ValueError: vectors or a layer without use, a projection without vectors, or vectors that do not fit.
    """
    if metric != "projection":
        if vectors is not None or read_layer is not None:
            raise ValueError(
                f"received vectors or read_layer with metric={metric!r}; they belong to metric='projection'"
            )
        return None
    if vectors is None:
        raise ValueError(
            "received metric='projection' without vectors; give those of this model, e.g. "
            "vectors=fit_vectors(extract_activations(model, load_stimuli('passages')))"
        )
    vectors.require_match(model_info(model).provenance)
    if vectors.site != "resid_post":
        raise ValueError(
            f"received vectors read at {vectors.site}; a projection is read at resid_post: fit vectors there"
        )
    read = vectors.layers[-1] if read_layer is None else read_layer
    if read not in vectors.layers:
        raise ValueError(f"received read_layer={read}; there are vectors for layers {list(vectors.layers)}")
    return read


def emotion_axes(vectors: EmotionVectors, pairs: ContrastPairs, layer: int) -> Float[Tensor, "pair d_model"]:
    """Unit vector of each pair's clean emotion minus that of its corrupted one, at one layer.

    Raises:
        ValueError: an emotion of the pairs that has no vector.
    """
    missing = sorted({*pairs.clean_emotions, *pairs.corrupted_emotions} - set(vectors.emotions))
    if missing:
        raise ValueError(
            f"received pairs with {missing[:6]}, for which there is no vector; allowed are {list(vectors.emotions)}: fit vectors of these emotions, "
            "or select other pairs"
        )
    axes = [
        vectors.vector(a, layer) - vectors.vector(b, layer)
        for a, b in zip(pairs.clean_emotions, pairs.corrupted_emotions, strict=True)
    ]
    return torch.stack(axes)


def _measure(
    matched: MatchedPairs,
    outputs: Float[Tensor, "text output"],
    metric: str,
    direction: str,
    axes: Float[Tensor, "pair d_model"] | None,
    tokens: Sequence[int] | None,
) -> tuple[Callable[[Outcome], Tensor], Float[Tensor, " pair"], Float[Tensor, " pair"]]:
    """What to keep of each patched run, the gap of each pair, and the value of its start run; effects are value minus start."""
    n = len(matched)
    start, target = (slice(n, None), slice(0, n)) if direction == "denoise" else (slice(0, n), slice(n, None))
    if metric == "kl":
        goal = outputs[target].log_softmax(-1)

        def minus_kl(row_logits: Tensor, rows: Tensor) -> Tensor:
            return -(goal[rows].exp() * (goal[rows] - row_logits.log_softmax(-1))).sum(-1)

        offset = minus_kl(outputs[start], torch.arange(n))
        return lambda o: torch.stack([minus_kl(o.output, o.texts % n), o.change], 1), -offset, offset
    sign = 1.0 if direction == "denoise" else -1.0
    along = None if axes is None else axes.to(outputs)

    def value(output: Tensor, rows: Tensor) -> Tensor:
        return sign * (
            matched.log_odds(output, rows, tokens=tokens) if along is None else (output * along[rows]).sum(-1)
        )

    every = torch.arange(n)
    offset = value(outputs[start], every)
    gap = value(outputs[target], every) - offset
    return lambda o: torch.stack([value(o.output, o.texts % n), o.change], 1), gap, offset


def places_of(matched: MatchedPairs, positions: str) -> dict[str, int | None]:
    """Labels of the position axis -> place counted from the end (1 is last), None for all positions."""
    if positions == "all":
        return {"all": None}
    if positions == "last":
        return {"last": 1}
    longest = int((matched.last - matched.first).max()) + 1
    return {str(-place): place for place in range(longest, 0, -1)}


@dataclass(frozen=True)
class _Cell:
    patch: Patch
    donor: str
    pair: int
    site: int
    layer: int
    place: int


def _cells(
    matched: MatchedPairs,
    sites: Sequence[str],
    layers: Sequence[int],
    places: dict[str, int | None],
    donors: Sequence[Donor],
    direction: str,
) -> list[_Cell]:
    n = len(matched)
    first, last = matched.first.tolist(), matched.last.tolist()
    found = []
    for donor in donors:
        done = [site for site in sites if not (donor.whole and SAME.get(site) in sites)]
        for pair in range(n):
            source = donor.sources[pair]
            for k, place in enumerate(places.values()):
                low = first[pair] if place is None else last[pair] - place + 1
                high = last[pair] if place is None else low
                if source is None or low < first[pair]:
                    continue
                text = pair + n if direction == "denoise" else pair
                found += [
                    _Cell(
                        Patch(site, layer, text, source, low, high, donor.name if donor.edit else ""),
                        donor.name,
                        pair,
                        sites.index(site),
                        j,
                        k,
                    )
                    for site in done
                    for j, layer in enumerate(layers)
                ]
    return found


def _fill(
    cells: Sequence[_Cell],
    outcome: Float[Tensor, "cell value"],
    offset: Float[Tensor, " pair"],
    shape: tuple[int, int, int, int],
    donors: Sequence[Donor],
    sites: Sequence[str],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Effects and changes by donor; sites that carry the same patch get the same numbers."""
    found: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
    index = torch.tensor([[c.pair, c.site, c.layer, c.place] for c in cells])
    values = torch.stack([outcome[:, 0] - offset[index[:, 0]], outcome[:, 1]], 1)
    for donor in donors:
        mine = torch.tensor([c.donor == donor.name for c in cells])
        for table, column in zip(found, values[mine].unbind(1), strict=True):
            table[donor.name] = torch.full(shape, torch.nan)
            table[donor.name][tuple(index[mine].unbind(1))] = column
            for i, site in enumerate(sites):
                if donor.whole and SAME.get(site) in sites:
                    table[donor.name][:, i] = table[donor.name][:, sites.index(SAME[site])]
    return found
