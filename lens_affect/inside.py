"""Behaviour and inside together: does what a judge reads in a text go with what the model's own emotion vectors read in it?

The judge sees the text alone; the vectors see the residual stream of the unsteered model while it reads the same text after its prompt. Vectors must come from
other texts than the ones that steered (half of the topics each, say), else a text that was pushed along a direction would be read with the same
direction's errors. Correlations are taken within a dose, so that the dose itself, which drives both, explains nothing.
"""

import html
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from scipy import stats
from torch import Tensor

from lens_affect.activations import SINK_RATIO
from lens_affect.adapter import LensModel, add_hooks, device_of, encode_prompt, model_info, pad_token_id, run_trunk
from lens_affect.doses import UNSTEERED, DoseResponse
from lens_affect.judgements import Judgement
from lens_affect.nulls import max_null, p_text
from lens_affect.prefixes import is_hooked, read_prefix
from lens_affect.results import Provenance, Stopwatch, load_result, save_result
from lens_affect.sites import resolve_site
from lens_affect.statistics import derive_generator, resample_clusters
from lens_affect.steering import require_steerable
from lens_affect.vectors import EmotionVectors

BATCH_TOKENS = 4096
"""Padded tokens per pass."""
SETS = {
    "unsteered": "both unsteered texts of every prompt",
    "steered": "texts steered to the emotion, at every dose",
    "random": "texts pushed along random directions, at every dose",
}
"""Texts over which a correlation is taken."""


@dataclass(frozen=True)
class InsideOutside:
    """Rank correlations of a judge's probabilities with projections on emotion vectors, within doses."""

    table: pd.DataFrame
    """One row per set of texts (SETS) and emotion: texts, emotion, rho (Spearman, on ranks centred within each dose), low, high (95 %, bootstrap over prompts),
    rho_pooled (without centring, for comparison), null_low, null_high (95 % of relabellings of prompts), p, p_family (over the emotions of the set), n (texts),
    n_prompts."""
    projections: Float[Tensor, "text emotion"]
    """Mean projection of each text's tokens on every vector; NaN for an empty text. In units of the residual stream."""
    emotions: tuple[str, ...]
    """Columns of the projections."""
    layer: int
    """0-based block whose output was read."""
    n_permutations: int
    """Relabellings behind p."""
    judge: str
    """Title of the judge."""
    name: str
    """Name of the prompts."""
    provenance: Provenance
    """Of the reading."""

    def to_frame(self) -> pd.DataFrame:
        """The table."""
        return self.table

    def save(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Save as a folder (see results.py)."""
        return save_result(self, folder, overwrite=overwrite)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "InsideOutside":
        """Load what `save` wrote."""
        return load_result(cls, folder)

    def __str__(self) -> str:
        lines = [
            f"{self.provenance.title}, {self.name}: {self.judge} against projections at layer {self.layer}, rank correlation within doses"
        ]
        for name in dict.fromkeys(self.table["texts"]):
            own = pd.DataFrame(self.table[(self.table["texts"] == name) & self.table["rho"].notna()])
            if own.empty:
                lines.append(f"{name}: no emotion with enough texts")
                continue
            best = own.sort_values(by="rho", ascending=False).to_dict("records")[0]
            above = [str(e) for e in own[own["p_family"] < 0.05]["emotion"]]
            lines.append(
                f"{name}: mean {own['rho'].to_numpy().mean():.2f} of {len(own)} emotions; most {best['emotion']} {best['rho']:.2f} [{best['low']:.2f}, {best['high']:.2f}], "
                f"n = {best['n']}, {p_text(float(best['p_family']), self.n_permutations)}; above chance after correction: {', '.join(above) or 'none'}"
            )
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        table = self.table.to_html(index=False, border=0, float_format="{:.2f}".format)
        return f"<p>{html.escape(str(self)).replace(chr(10), '<br>')}</p>{table}"


def correlate_inside(
    model: LensModel,
    dose: DoseResponse,
    judgement: Judgement,
    vectors: EmotionVectors,
    *,
    layer: int | None = None,
    n_permutations: int = 1000,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> InsideOutside:
    """Read every text of a dose-response with the unsteered model, project it, and correlate with a judge.

    Args:
        model: the one that wrote the texts.
        dose: of sweep_strengths.
        judgement: of `dose.texts`, in that order.
        vectors: of this model, read at resid_post, from other texts than the vectors that steered.
        layer: whose output is projected; the last steered one by default.
        n_permutations: relabellings of prompts, the same in every dose.
        seed: of relabellings and bootstrap.
        progress: called with (texts done, texts in all).

    Raises:
        ValueError: vectors of another model or site, a judgement of other texts, a layer that is not there, or no emotion that both know.
    """
    clock = Stopwatch()
    require_steerable(model, vectors)
    if len(judgement.probabilities) != len(dose.table):
        raise ValueError(
            f"received a judgement of {len(judgement.probabilities)} texts for {len(dose.table)}; use judge_texts(judge, dose.texts)"
        )
    at = dose.layers[-1] if layer is None else layer
    if at not in vectors.layers:
        raise ValueError(
            f"received layer {at}; these vectors have {vectors.layers[0]} to {vectors.layers[-1]}: choose one of them"
        )
    shared = [e for e in vectors.emotions if e in judgement.emotions]
    if not shared:
        raise ValueError(
            f"received vectors of {list(vectors.emotions)} and a judge that names {list(judgement.emotions)}; nothing is shared"
        )
    projections = read_projections(model, dose, vectors, layer=at, progress=progress)
    rows: list[dict[str, Any]] = []
    for texts, named in _sets(dose, shared).items():
        found = [_Pairs.of(dose, judgement, projections, vectors, emotion, members) for emotion, members in named]
        rows += _correlations(texts, [e for e, _ in named], found, n_permutations, seed)
    return InsideOutside(
        table=pd.DataFrame(rows),
        projections=projections,
        emotions=vectors.emotions,
        layer=at,
        n_permutations=n_permutations,
        judge=judgement.title,
        name=dose.name,
        provenance=model_info(model).provenance.updated(seed=seed, elapsed_seconds=clock.seconds),
    )


@torch.no_grad()
def read_projections(
    model: LensModel,
    dose: DoseResponse,
    vectors: EmotionVectors,
    *,
    layer: int,
    progress: Callable[[int, int], None] | None = None,
) -> Float[Tensor, "text emotion"]:
    """Mean over each text's tokens of the component along every vector, read after its prompt by the unsteered model; NaN for an empty text.

    Tokens whose norm exceeds activations.SINK_RATIO times the median of their text are left out, as everywhere.
    """
    units = torch.stack([vectors.vector(emotion, layer) for emotion in vectors.emotions])
    heads = [encode_prompt(model, prompt, form=dose.form)[0] for prompt in dose.prompts]  # pyright: ignore[reportArgumentType]
    prompts = dose.column("prompt").astype(int)
    bodies = [[t for t in row if t >= 0] for row in dose.tokens.tolist()]
    found = torch.full((len(bodies), len(units)), math.nan)
    order = sorted((i for i, body in enumerate(bodies) if body), key=lambda i: (int(prompts[i]), -len(bodies[i])))
    longest = max(map(len, heads)) + max(map(len, bodies))
    device, kept, total, hooked = device_of(model), [], len(order), is_hooked(model)
    hook = (resolve_site(model, "resid_post").at(layer), lambda value, hook=None: kept.append(value.float()))
    while order:
        rows, order = order[: max(1, BATCH_TOKENS // longest)], order[max(1, BATCH_TOKENS // longest) :]
        chosen = [heads[prompts[i]] for i in rows]
        prefix = None if hooked else read_prefix(model, chosen)
        # Behind a prefix that was read already, a row starts with the last token of its prompt.
        ids = [(*head[0 if prefix is None else -1 :], *bodies[i]) for i, head in zip(rows, chosen, strict=True)]
        tokens = torch.full((len(rows), max(map(len, ids))), pad_token_id(model), dtype=torch.long)
        for k, row in enumerate(ids):
            tokens[k, : len(row)] = torch.tensor(row)
        place, ends = torch.arange(tokens.shape[1]), torch.tensor([len(row) for row in ids])[:, None]
        tokens, mask = tokens.to(device), (place < ends).long().to(device)
        with add_hooks(model, [hook]):
            if prefix is None:
                run_trunk(model, tokens, mask)
            else:
                run_trunk(model, tokens, torch.cat([prefix.mask, mask], dim=1), past=prefix.expanded())
        own = (place < ends) & (place >= ends - torch.tensor([len(bodies[i]) for i in rows])[:, None])
        found[rows] = _project(kept.pop().cpu(), own, units, vectors.reference[vectors.layers.index(layer)])
        if progress:
            progress(total - len(order), total)
    return found


def _project(
    stream: Float[Tensor, "row position d_model"],
    own: Tensor,
    units: Float[Tensor, "emotion d_model"],
    reference: Float[Tensor, " d_model"],
) -> Float[Tensor, "row emotion"]:
    norms = torch.where(own, stream.norm(dim=-1), torch.nan)
    counted = (norms <= SINK_RATIO * norms.nanmedian(dim=1, keepdim=True).values).float()
    mean = torch.einsum("rpd,rp->rd", stream, counted) / counted.sum(1, keepdim=True)
    return (mean - reference.float()) @ units.float().T


def _sets(dose: DoseResponse, shared: Sequence[str]) -> dict[str, list[tuple[str, Int[np.ndarray, " text"]]]]:
    kind, emotion = dose.column("kind"), dose.column("emotion")
    plain = np.flatnonzero(np.isin(kind, UNSTEERED))
    found = {"unsteered": [(e, plain) for e in shared]}
    found["steered"] = [(e, np.flatnonzero((kind == "steered") & (emotion == e))) for e in dose.emotions if e in shared]
    if "random" in dose.kinds:
        found["random"] = [(e, np.flatnonzero(kind == "random")) for e in dose.emotions if e in shared]
    return {name: rows for name, rows in found.items() if rows}


@dataclass(frozen=True)
class _Pairs:
    """What the judge and the vectors say of the same texts."""

    outside: Float[np.ndarray, " text"]
    inside: Float[np.ndarray, " text"]
    dose: np.ndarray
    prompt: Int[np.ndarray, " text"]

    @classmethod
    def of(
        cls,
        dose: DoseResponse,
        judgement: Judgement,
        projections: Tensor,
        vectors: EmotionVectors,
        emotion: str,
        members: Int[np.ndarray, " text"],
    ) -> "_Pairs":
        outside = judgement.probability(emotion).double().numpy()[members]
        inside = projections[:, vectors.emotions.index(emotion)].double().numpy()[members]
        # Random directions of one prompt and dose are told apart by their number: each is a dose of its own.
        names = [
            f"{kind} {strength} {str(vector).partition('.')[2]}"
            for kind, strength, vector in zip(
                dose.column("kind")[members],
                dose.column("strength")[members],
                dose.column("vector")[members],
                strict=True,
            )
        ]
        known = np.isfinite(outside) & np.isfinite(inside)
        return cls(
            outside[known], inside[known], np.array(names)[known], dose.column("prompt").astype(int)[members][known]
        )


def _centred_ranks(values: Float[np.ndarray, " text"], dose: np.ndarray) -> Float[np.ndarray, " text"]:
    """Ranks over all texts, minus their mean within each dose."""
    ranks = stats.rankdata(values)
    for name in set(dose.tolist()):
        ranks[dose == name] -= ranks[dose == name].mean()
    return ranks


def _correlation(x: np.ndarray, y: np.ndarray) -> float:
    spread = math.sqrt(float((x * x).sum()) * float((y * y).sum()))
    return float((x * y).sum()) / spread if spread > 1e-9 else math.nan


def _correlations(
    texts: str, emotions: Sequence[str], found: Sequence[_Pairs], n_permutations: int, seed: int
) -> list[dict[str, Any]]:
    rows, observed, permuted = [], [], []
    for emotion, pairs in zip(emotions, found, strict=True):
        names = sorted(set(pairs.prompt.tolist()))
        row: dict[str, Any] = {"texts": texts, "emotion": emotion, "n": len(pairs.prompt), "n_prompts": len(names)}
        rows.append(row)
        row |= dict.fromkeys(("rho", "low", "high", "rho_pooled", "null_low", "null_high", "p", "p_family"), math.nan)
        if len(names) < 5:
            continue
        outside, inside = _centred_ranks(pairs.outside, pairs.dose), _centred_ranks(pairs.inside, pairs.dose)
        row["rho"] = _correlation(outside, inside)
        row["rho_pooled"] = _correlation(*(stats.rankdata(x) - (len(x) + 1) / 2 for x in (pairs.outside, pairs.inside)))
        if math.isnan(row["rho"]):
            continue
        row["low"], row["high"] = _bootstrap(outside, inside, pairs.prompt, seed)
        observed.append(row)
        permuted.append(_relabelled(outside, inside, pairs, n_permutations, seed))
    if observed:
        null = max_null(np.array([row["rho"] for row in observed]), np.stack(permuted, axis=1), better="high")
        for i, row in enumerate(observed):
            row |= {"null_low": float(null.low[i]), "null_high": float(null.high[i])}
            row |= {"p": float(null.p[i]), "p_family": float(null.p_family[i])}
    columns = (
        "texts",
        "emotion",
        "rho",
        "low",
        "high",
        "rho_pooled",
        "null_low",
        "null_high",
        "p",
        "p_family",
        "n",
        "n_prompts",
    )
    return [{c: row[c] for c in columns} for row in rows]


def _bootstrap(outside: np.ndarray, inside: np.ndarray, prompt: np.ndarray, seed: int) -> tuple[float, float]:
    names = sorted(set(prompt.tolist()))
    # Sums per prompt are all that a draw of whole prompts needs.
    sums = np.array([[(x * y)[prompt == p].sum() for p in names] for x, y in _products(outside, inside)])
    drawn = sums[:, resample_clusters(len(names), 2000, seed, "inside")].sum(2)
    spread = np.sqrt(drawn[1] * drawn[2])
    known = spread > 1e-9
    low, high = np.quantile(drawn[0][known] / spread[known], [0.025, 0.975])
    return float(low), float(high)


def _products(x: np.ndarray, y: np.ndarray) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
    return (x, y), (x, x), (y, y)


def _relabelled(
    outside: np.ndarray, inside: np.ndarray, pairs: _Pairs, n_permutations: int, seed: int
) -> Float[np.ndarray, " permutation"]:
    """Correlations after the prompts of the judge's side are shuffled, the same way in every dose. A text without a partner there is left out."""
    names = sorted(set(pairs.prompt.tolist()))
    doses = sorted(set(pairs.dose.tolist()))
    grid = np.full((2, len(doses), len(names)), math.nan)
    for k, values in enumerate((outside, inside)):
        grid[k, [doses.index(d) for d in pairs.dose], [names.index(p) for p in pairs.prompt]] = values
    generator = derive_generator(seed, "permutation", "inside")
    found = np.empty(n_permutations)
    for i in range(n_permutations):
        x, y = grid[0][:, generator.permutation(len(names))], grid[1]
        both = np.isfinite(x) & np.isfinite(y)
        value = _correlation(x[both], y[both])
        found[i] = 0.0 if math.isnan(value) else value
    return found
