"""Does pushing along an emotion bring up foreign tokens, and do they mean the emotion? Read off the unembedding, without a forward pass.

A direction's logit lens says which tokens it raises if it is read out at once; what later layers make of it, and what a steered
model then writes, is another question (scripts.script_shares measures it in texts).
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from lens_affect.adapter import model_info, unembedding
from lens_affect.effects import equivalence
from lens_affect.nulls import max_null, p_text, sign_flips
from lens_affect.results import Provenance, Stopwatch, load_result, save_result
from lens_affect.scripts import COMMON, PARTIAL, SPECIAL, token_scripts
from lens_affect.statistics import derive_generator, mean_interval
from lens_affect.vectors import EmotionVectors, logit_lens

HOME = ("Latin", COMMON, PARTIAL, SPECIAL)
"""Classes that are not foreign to English texts; every other script is."""
SETS_OF_THEIR_OWN = 50
"""Draws whose random directions are all new; further ones mix these directions anew, since each is a product with the whole unembedding."""
DIRECTIONS_AT_ONCE = 50
"""Random directions per matrix product; bounds memory (a quarter of a million tokens each)."""


@dataclass(frozen=True)
class ScriptTable:
    """Scripts of the tokens that emotion vectors raise most, against random directions and the vocabulary."""

    scripts: tuple[str, ...]
    """Scripts and the classes `Common` (no letter), `partial` (a piece of a character), `special`, `Other`; by share in the vocabulary."""
    shares: Float[Tensor, "emotion script"]
    """Share of each emotion's top k tokens; rows sum to 1."""
    random: Float[Tensor, "draw script"]
    """The same for random directions, averaged over as many of them per draw as there are emotions."""
    vocabulary: Float[Tensor, " script"]
    """Share of all tokens."""
    low: Float[Tensor, " script"]
    """Lower 95 % limit of the mean share, over emotions."""
    high: Float[Tensor, " script"]
    """Upper 95 % limit."""
    p: Float[Tensor, " script"]
    """Share of draws in which random directions bring up at least as many tokens of this script, (1 + hits) / (1 + draws)."""
    p_family: Float[Tensor, " script"]
    """The same corrected over scripts by the maximum."""
    tokens: pd.DataFrame
    """emotion, rank (1 is raised most), token, script."""
    emotions: tuple[str, ...]
    """Whose vectors."""
    layer: int
    """0-based block of the vectors."""
    n_layers: int
    """Blocks of the model."""
    k: int
    """Tokens per direction."""
    n_random: int
    """Draws."""
    provenance: Provenance
    """Model, numerics, stimuli, seed, versions."""
    p_emotion: Float[Tensor, "emotion script"] | None = None
    """p of each emotion by itself, corrected over the emotions: share of draws in which the direction with the most tokens of this script has at least as
    many as this emotion, (1 + hits) / (1 + draws). None in a result that was saved before it was measured."""

    @property
    def foreign(self) -> Float[Tensor, " emotion"]:
        """Share of each emotion's top tokens whose letters are of another script than Latin."""
        return self.shares[:, self._foreign].sum(1)

    @property
    def _foreign(self) -> list[int]:
        return [i for i, s in enumerate(self.scripts) if s not in HOME]

    def to_frame(self) -> pd.DataFrame:
        """One row per script: script, share, low, high, random, random_low, random_high (95 % of the draws), vocabulary, p, p_family, n (tokens)."""
        draws = self.random.numpy()
        random_low, random_high = np.quantile(draws, [0.025, 0.975], axis=0)
        return pd.DataFrame(
            {
                "script": list(self.scripts),
                "share": self.shares.mean(0).numpy(),
                "low": self.low.numpy(),
                "high": self.high.numpy(),
                "random": draws.mean(0),
                "random_low": random_low,
                "random_high": random_high,
                "vocabulary": self.vocabulary.numpy(),
                "p": self.p.numpy(),
                "p_family": self.p_family.numpy(),
                "n": self.k * len(self.emotions),
            }
        )

    def per_emotion(self) -> pd.DataFrame:
        """Shares as a table with emotions as rows and scripts as columns."""
        return pd.DataFrame(self.shares.numpy(), index=list(self.emotions), columns=list(self.scripts))

    def emotion_tests(self) -> pd.DataFrame:
        """Every emotion by itself against random directions: emotion, script, share, random (mean), p_family (over the emotions; p_emotion), n (tokens).

        Raises:
            ValueError: a result that was saved before this was measured.
        """
        if self.p_emotion is None:
            raise ValueError(
                "received a table that was saved without tests of single emotions; allowed is a new one: script_entanglement(model, vectors)"
            )
        rows = [
            [
                emotion,
                script,
                float(self.shares[e, s]),
                float(self.random[:, s].mean()),
                float(self.p_emotion[e, s]),
                self.k,
            ]
            for e, emotion in enumerate(self.emotions)
            for s, script in enumerate(self.scripts)
        ]
        return pd.DataFrame(rows, columns=["emotion", "script", "share", "random", "p_family", "n"])

    def save(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Save as a folder (see results.py)."""
        return save_result(self, folder, overwrite=overwrite)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "ScriptTable":
        """Load what `save` wrote."""
        return load_result(cls, folder)

    def __str__(self) -> str:
        interval = mean_interval(self.foreign.double().numpy())
        drawn = self.random[:, self._foreign].sum(1)
        p = (1 + int((drawn >= self.foreign.mean() - 1e-9).sum())) / (1 + self.n_random)
        rows = self.to_frame().set_index("script")
        above = [s for s in self.scripts if s not in HOME and rows.loc[s, "p_family"] <= 0.05]
        named = ", ".join(f"{s} {rows.loc[s, 'share']:.3f} (random {rows.loc[s, 'random']:.3f})" for s in above[:4])
        return (
            f"{self.provenance.title}, layer {self.layer} of {self.n_layers}: of the {self.k} tokens that each of {len(self.emotions)} emotion vectors raises most, "
            f"{float(interval.estimate):.3f} [{max(float(interval.low), 0):.3f}, {min(float(interval.high), 1):.3f}] are in a script other than Latin\n"
            f"random directions {float(drawn.mean()):.3f} ({p_text(p, self.n_random).replace('permutations', 'draws')}), vocabulary {float(self.vocabulary[self._foreign].sum()):.3f}; "
            f"more than random after correction over scripts: {named or 'none'}{self._alone()}"
        )

    def _alone(self) -> str:
        """Emotions that have more of some foreign script than random directions, in words."""
        if self.p_emotion is None:
            return ""
        found = [
            e
            for e, p in zip(self.emotions, self.p_emotion[:, self._foreign].tolist(), strict=True)
            if min(p, default=1.0) <= 0.05
        ]
        return f"\nemotions with more of some foreign script than random directions, after correction over emotions, not over scripts: {', '.join(found) or 'none'}"

    def _repr_html_(self) -> str:
        import html

        table = self.to_frame().query("share > 0 or vocabulary > 0.01").round(3).to_html(index=False)
        return f"<p>{html.escape(str(self)).replace(chr(10), '<br>')}</p>{table}"


def middle_layer(vectors: EmotionVectors, layer: int | None) -> int:
    """The layer asked for, or the middle one of the vectors.

    Raises:
        ValueError: there are no vectors for this layer.
    """
    chosen = vectors.layers[len(vectors.layers) // 2] if layer is None else layer
    vectors.vector(vectors.emotions[0], chosen)  # names the layers there are
    return chosen


@overload
def script_entanglement(
    model: Any, vectors: EmotionVectors, layer: int | None = None, *, k: int = 50, n_random: int = 200, seed: int = 0
) -> ScriptTable: ...


@overload
def script_entanglement(
    *, base: ScriptTable, tuned: ScriptTable, margin: float = 0.05, n_flips: int = 4095, seed: int = 0
) -> "ScriptComparison": ...


def script_entanglement(
    model: Any = None,
    vectors: EmotionVectors | None = None,
    layer: int | None = None,
    *,
    base: ScriptTable | None = None,
    tuned: ScriptTable | None = None,
    k: int = 50,
    n_random: int = 200,
    margin: float = 0.05,
    n_flips: int = 4095,
    seed: int = 0,
) -> "ScriptTable | ScriptComparison":
    """Scripts of the k tokens that each emotion vector raises most, against random directions and the vocabulary; or what tuning changed about them.

    With `base` and `tuned`, the tables of two related models, their shares are compared, paired by emotion: does tuning suppress the foreign tokens?

    Random directions say what any direction of this residual stream brings up through this unembedding (rare tokens are over-represented
    there, whatever their script). They are no emotion-free contrast of texts: a share above theirs does not show that emotion is what
    brings the script up, only that it is not the geometry of the unembedding alone.

    Args:
        model: the model the vectors come from.
        vectors: unit directions; their length plays no part.
        layer: 0-based block; the middle one by default.
        base: table of the base model, in the place of model and vectors.
        tuned: table of the tuned one, with the same emotions and k.
        k: tokens per direction.
        n_random: draws of as many random directions as there are emotions; the smallest possible p is 1 / (1 + n_random). The first SETS_OF_THEIR_OWN draws
            share no direction, further ones mix theirs anew.
        margin: largest difference that counts as none (two one-sided tests per script).
        n_flips: sign flips behind the p of a difference.
        seed: of the draws, or of the flips.

    Returns:
        Of a model: shares with 95 % intervals over emotions (t), random directions' and the vocabulary's shares, p-values of the mean over emotions, corrected
        over scripts, and of every emotion by itself, corrected over emotions.
        Of a pair: differences with intervals over emotions. "Not different" is not "the same": only `equivalent` says that. Two models differ by
        more than their tuning if their vectors were read from texts of their own.

    Raises:
        ValueError: vectors of another model, an unknown layer, k beyond the vocabulary, or fewer than one draw; a pair with other emotions or another
            k; neither a model with its vectors nor a pair, or both.

    Source: the claim is that of arXiv:2604.04064 about Qwen; logit lens after nostalgebraist (2020).

    Example:
        >>> print(script_entanglement(model, vectors, 15))  # doctest: +SKIP
        >>> print(script_entanglement(base=table, tuned=table_of_the_instruct_model))  # doctest: +SKIP
    """
    if model is None and vectors is None and base is not None and tuned is not None:
        return _compare(base, tuned, margin, n_flips, seed)
    if model is None or vectors is None or base is not None or tuned is not None:
        raise ValueError(
            "received neither a model with its vectors nor a pair of tables, or both; allowed are script_entanglement(model, vectors), and of two such "
            "tables script_entanglement(base=..., tuned=...)"
        )
    return _table(model, vectors, layer, k, n_random, seed)


def _table(model: Any, vectors: EmotionVectors, layer: int | None, k: int, n_random: int, seed: int) -> ScriptTable:
    clock = Stopwatch()
    vectors.require_match(model_info(model).provenance)
    layer = middle_layer(vectors, layer)
    size = unembedding(model).shape[1]
    if not 1 <= k <= size:
        raise ValueError(f"received k={k}; allowed are 1 to {size} tokens")
    if n_random < 1:
        raise ValueError(f"received n_random={n_random}; allowed is 1 or more: shares mean little without a comparison")
    at = vectors.layers.index(layer)
    top = logit_lens(model, vectors.directions[:, at]).topk(k).indices
    known = token_scripts(model.tokenizer, size)
    labels = known.labels
    number = torch.tensor([labels.index(s) for s in known.scripts])
    shares = _shares(number[top], len(labels))
    n_sets = min(n_random, SETS_OF_THEIR_OWN)
    directions = vectors.random_vectors(seed=seed, n=n_sets)[:, :, at].flatten(0, 1)
    drawn = torch.cat([logit_lens(model, part).topk(k).indices for part in directions.split(DIRECTIONS_AT_ONCE)])
    each = _shares(number[drawn], len(labels))
    draws = each[_members(n_sets, n_random, len(shares), seed)]
    random = draws.mean(1)
    vocabulary = torch.bincount(number, minlength=len(labels)).double() / size
    interval = mean_interval(shares.numpy())
    p, p_family = _above_random(shares.mean(0), random, vocabulary, k * len(shares))
    tokens = [
        {"emotion": emotion, "rank": rank + 1, "token": known.texts[t], "script": known.scripts[t]}
        for emotion, row in zip(vectors.emotions, top.tolist(), strict=True)
        for rank, t in enumerate(row)
    ]
    return ScriptTable(
        scripts=labels,
        shares=shares,
        random=random,
        vocabulary=vocabulary,
        low=torch.from_numpy(interval.low.clip(min=0)),
        high=torch.from_numpy(interval.high.clip(max=1)),
        p=p,
        p_family=p_family,
        tokens=pd.DataFrame(tokens),
        emotions=vectors.emotions,
        layer=layer,
        n_layers=vectors.n_layers,
        k=k,
        n_random=n_random,
        provenance=vectors.provenance.updated(seed=seed, elapsed_seconds=clock.seconds),
        p_emotion=(1 + (draws.amax(1)[:, None] >= shares - 1e-9).double().sum(0)) / (1 + n_random),
    )


def _members(n_sets: int, n_random: int, n: int, seed: int) -> Int[Tensor, "draw emotion"]:
    """Which random directions make up each draw: n new ones, as long as there are any, then n different ones of all."""
    rng = derive_generator(seed, "script_entanglement", "draws")
    more = [rng.permutation(n_sets * n)[:n] for _ in range(n_random - n_sets)]
    own = np.arange(n_sets * n).reshape(n_sets, n)
    return torch.from_numpy(np.concatenate([own, *(row[None] for row in more)]))


def _shares(numbers: Int[Tensor, "row k"], n_scripts: int) -> Float[Tensor, "row script"]:
    return torch.nn.functional.one_hot(numbers, n_scripts).double().mean(1)


def _above_random(
    share: Tensor, random: Float[Tensor, "draw script"], vocabulary: Tensor, n_tokens: int
) -> tuple[Float[Tensor, " script"], Float[Tensor, " script"]]:
    """p per script, and over all scripts by the maximum.

    Scripts are standardised by their spread over draws, but by no less than that of n_tokens drawn from the vocabulary: a script that
    no draw happened to hold has a null without spread, and would otherwise never or always be found.
    """
    least = (vocabulary * (1 - vocabulary) / n_tokens).sqrt()
    spread = torch.maximum(random.std(0) if len(random) > 1 else torch.zeros_like(least), least).clamp_min(1e-12)
    z, z_random = (share - random.mean(0)) / spread, (random - random.mean(0)) / spread
    n = len(random)
    p = (1 + (z_random >= z - 1e-9).double().sum(0)) / (1 + n)
    p_family = (1 + (z_random.amax(1, keepdim=True) >= z - 1e-9).double().sum(0)) / (1 + n)
    return p, p_family


@dataclass(frozen=True)
class ScriptComparison:
    """Scripts that two related models bring up, the second minus the first."""

    table: pd.DataFrame
    """script, base, tuned (mean shares), difference, low, high (95 % over emotions), p, p_family (over scripts), p_equivalent (that the
    difference is within the margin), equivalent, n (emotions)."""
    models: tuple[str, str]
    """Base and tuned."""
    layers: tuple[int, int]
    """0-based block of each."""
    margin: float
    """Largest difference in share that counts as none."""

    def to_frame(self) -> pd.DataFrame:
        """One row per script."""
        return self.table

    def save(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Save as a folder (see results.py)."""
        return save_result(self, folder, overwrite=overwrite)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "ScriptComparison":
        """Load what `save` wrote."""
        return load_result(cls, folder)

    def __str__(self) -> str:
        rows = [row for row in self.table.to_dict("records") if row["script"] not in HOME]
        if not rows:
            return f"{self.models[0]} and {self.models[1]}: neither vocabulary has a script other than Latin"
        head = f"{self.models[1]} (layer {self.layers[1]}) minus {self.models[0]} (layer {self.layers[0]}), {rows[0]['n']} emotions"
        top = max(rows, key=lambda row: abs(row["difference"]))
        return (
            f"{head}: the largest change of a foreign script's share is {top['difference']:+.3f} [{top['low']:+.3f}, {top['high']:+.3f}] "
            f"({top['script']}, family-wise p = {top['p_family']:.3g}); {sum(row['equivalent'] for row in rows)} of {len(rows)} foreign scripts "
            f"change by less than {self.margin:g}"
        )


def _compare(base: ScriptTable, tuned: ScriptTable, margin: float, n_flips: int, seed: int) -> ScriptComparison:
    if base.emotions != tuned.emotions or base.k != tuned.k:
        raise ValueError(
            f"received {len(base.emotions)} emotions with k={base.k} and {len(tuned.emotions)} with k={tuned.k}; allowed are equal ones in equal "
            "order: fit both models' vectors on the same texts"
        )
    names = tuple(dict.fromkeys((*base.scripts, *tuned.scripts)))
    first, second = (t.per_emotion().reindex(columns=list(names), fill_value=0.0).to_numpy() for t in (base, tuned))
    difference = second - first
    interval = mean_interval(difference)
    flips = sign_flips(len(difference), n_flips, seed, "compare_scripts")
    null = max_null(np.abs(interval.estimate), np.abs(flips @ difference / len(difference)), better="high")
    same = [equivalence(column, margin=margin) for column in difference.T]
    table = pd.DataFrame(
        {
            "script": list(names),
            "base": first.mean(0),
            "tuned": second.mean(0),
            "difference": interval.estimate,
            "low": interval.low,
            "high": interval.high,
            "p": null.p,
            "p_family": null.p_family,
            "p_equivalent": [s.p for s in same],
            # Shares that agree for every emotion have no spread to test, and are the same.
            "equivalent": [
                s.equivalent or (not np.ptp(c) and abs(c[0]) < margin) for s, c in zip(same, difference.T, strict=True)
            ],
            "n": len(difference),
        }
    )
    return ScriptComparison(
        table, (base.provenance.title, tuned.provenance.title), (base.layer, tuned.layer), float(margin)
    )
