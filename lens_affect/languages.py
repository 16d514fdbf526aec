"""Are emotion vectors the same in every language? Directions from texts in one language, applied to texts in another."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from lens_affect.activations import Activations
from lens_affect.adapter import token_ids
from lens_affect.nulls import max_null, permute_labels
from lens_affect.results import Provenance, Stopwatch, load_result, save_result
from lens_affect.scripts import count_words
from lens_affect.statistics import derive_generator, jackknife_interval, share_interval
from lens_affect.stimuli import EMOTIONS, NEUTRAL

Centring = Literal["grand_mean", "within_topic"]
N_HALVES = 20
"""Random splits of the topics behind cosines between different texts."""


@dataclass(frozen=True)
class TransferTable:
    """Decoding and cosines between languages, at every layer. The first axis is where directions come from, the second where they are used."""

    languages: tuple[str, ...]
    """Names of both axes."""
    layers: tuple[int, ...]
    """0-based blocks of the last axis."""
    accuracy: Float[Tensor, "source target layer"]
    """Share of texts of a held-out topic whose direction is closest (by cosine) to their own emotion's, learned in the source language."""
    low: Float[Tensor, "source target layer"]
    """Lower 95 % limit over topics."""
    high: Float[Tensor, "source target layer"]
    """Upper 95 % limit."""
    null_mean: Float[Tensor, "source target layer"]
    """Mean under labels permuted within the target's topics."""
    p: Float[Tensor, "source target layer"]
    """Permutation p of the accuracy."""
    p_family: Float[Tensor, "source target layer"]
    """The same corrected over all layers and pairs of two languages (within one language: over layers and languages)."""
    cosine: Float[Tensor, "source target layer"]
    """Mean cosine of the two vectors of an emotion, from all texts; where these are translations of each other, it also holds what they tell. 1 on the diagonal."""
    cosine_low: Float[Tensor, "source target layer"]
    """Lower 95 % limit over topics (jackknife)."""
    cosine_high: Float[Tensor, "source target layer"]
    """Upper 95 % limit."""
    cosine_disjoint: Float[Tensor, "source target layer"]
    """The same between vectors from different topics (mean over random halves): on the diagonal what one language agrees with itself."""
    cosine_p: Float[Tensor, "source target layer"]
    """p of cosine_disjoint, from emotions' vectors exchanged in the target."""
    per_topic: Float[Tensor, "topic source target layer"]
    """Accuracy per held-out topic."""
    tokens_per_word: Float[Tensor, " source"]
    """Tokens per word (per character where there are no spaces), the covariate of a language the tokenizer knows badly; NaN without a model."""
    emotions: tuple[str, ...]
    """Emotions that every language has."""
    topics: tuple[str, ...]
    """Topics that every language has."""
    n_texts: int
    """Texts per language."""
    n_layers: int
    """Blocks of the model."""
    n_permutations: int
    """Relabellings."""
    centring: str
    """`grand_mean` or `within_topic`; always of each language by itself."""
    provenance: Provenance
    """Model, numerics, seed, versions."""

    @property
    def corrected(self) -> Float[Tensor, "source target layer"]:
        """cosine_disjoint as a share of what the reliability of both languages' vectors allows; NaN where one is not positive."""
        own = self.cosine_disjoint.diagonal(dim1=0, dim2=1)  # layer, language
        ceiling = (own[:, :, None] * own[:, None, :]).clamp_min(0).sqrt().permute(1, 2, 0)
        positive = (own[:, :, None] > 0) & (own[:, None, :] > 0)
        return torch.where(positive.permute(1, 2, 0), self.cosine_disjoint / ceiling, torch.nan)

    @property
    def best_layer(self) -> int:
        """Layer with the best mean accuracy within languages: chosen without a look at any transfer."""
        within = self.accuracy.diagonal(dim1=0, dim2=1).mean(1)
        return self.layers[int(within.argmax())]

    def to_frame(self) -> pd.DataFrame:
        """One row per source, target and layer, with depth, tokens_per_word of the target and n (texts)."""
        names = ("accuracy", "low", "high", "null_mean", "p", "p_family", "cosine", "cosine_low", "cosine_high")
        arrays = {n: getattr(self, n) for n in (*names, "cosine_disjoint", "corrected", "cosine_p")}
        rows = [
            {
                "source": a,
                "target": b,
                "layer": layer,
                "depth": (layer + 1) / self.n_layers,
                **{n: array[i, j, k].item() for n, array in arrays.items()},
                "tokens_per_word": self.tokens_per_word[j].item(),
                "n": self.n_texts,
            }
            for i, a in enumerate(self.languages)
            for j, b in enumerate(self.languages)
            for k, layer in enumerate(self.layers)
        ]
        return pd.DataFrame(rows)

    def save(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Save as a folder (see results.py)."""
        return save_result(self, folder, overwrite=overwrite)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "TransferTable":
        """Load what `save` wrote."""
        return load_result(cls, folder)

    def __str__(self) -> str:
        at = self.layers.index(self.best_layer)
        n = len(self.languages)
        apart = ~torch.eye(n, dtype=torch.bool)
        across = share_interval(self.per_topic[:, apart][..., at].mean(1).numpy())
        within = share_interval(self.per_topic[:, ~apart][..., at].mean(1).numpy())
        cells = ", ".join(
            f"{a} to {b} {self.accuracy[i, j, at]:.2f}"
            for i, a in enumerate(self.languages)
            for j, b in enumerate(self.languages)
            if i != j
        )
        worst = float(self.p_family[apart][:, at].max())
        return (
            f"{self.provenance.title}, layer {self.best_layer} of {self.n_layers} (best within languages): {len(self.emotions)} emotions are told apart with accuracy "
            f"{float(across.estimate):.2f} [{float(across.low):.2f}, {float(across.high):.2f}] across languages and {float(within.estimate):.2f} "
            f"[{float(within.low):.2f}, {float(within.high):.2f}] within them ({self.n_texts} texts each, {len(self.topics)} topics held out in turn)\n"
            f"{cells}; chance {1 / len(self.emotions):.2f}, largest family-wise p = {worst:.3g}\n"
            f"cosine of vectors from different topics {self.cosine_disjoint[apart][:, at].mean():.2f} across and "
            f"{self.cosine_disjoint[~apart][:, at].mean():.2f} within languages"
        )

    def _repr_html_(self) -> str:
        import html

        table = pd.DataFrame(
            self.accuracy[..., self.layers.index(self.best_layer)].numpy(), index=self.languages, columns=self.languages
        )
        return f"<p>{html.escape(str(self)).replace(chr(10), '<br>')}</p>{table.round(3).to_html()}"


def language_transfer(
    activations_by_language: Mapping[str, Activations],
    *,
    centring: Centring = "grand_mean",
    model: Any = None,
    n_permutations: int = 1000,
    seed: int = 0,
) -> TransferTable:
    """Emotion vectors of each language against those of each other one, at every layer.

    Decoding: class means of the source language, learned without the held-out topic, name the emotion of the target's texts on that topic by
    the nearest mean. Each language is centred by itself (its own mean without that topic, or its own topics' means), so a constant shift between languages
    costs nothing; the labels of the target are not used. Where texts are translations of each other, the topic is held out in all of them.

    Args:
        activations_by_language: two or more readings of the same model, with emotions and topics in common. Only those are used.
        centring: `grand_mean`, or `within_topic` (each topic's mean over its texts is subtracted first).
        model: for tokens per word.
        n_permutations: relabellings within topics.
        seed: of relabellings and halves.

    Returns:
        Accuracies, cosines, intervals over topics (t; jackknife for cosines) and p. The diagonal is decoding within a language. High transfer says
        that directions agree, not that the model uses them alike; low transfer into a language of many tokens per word may be the tokenizer's doing.

    Raises:
        ValueError: fewer than two languages, other models, sites or layers, fewer than two emotions or three topics in common, or a language that
            lacks a text for some emotion on some topic.

    Example:
        >>> print(language_transfer({"English": english, "Chinese": chinese}))  # doctest: +SKIP
    """
    clock = Stopwatch()
    if centring not in ("grand_mean", "within_topic"):
        raise ValueError(f"received centring={centring!r}; allowed are 'grand_mean' and 'within_topic'")
    if n_permutations < 2:
        raise ValueError(f"received n_permutations={n_permutations}; allowed is 2 or more")
    languages = tuple(activations_by_language)
    first = _check_same(activations_by_language)
    emotions, topics = _in_common(activations_by_language)
    sets = [_texts(language, a, emotions, topics, centring) for language, a in activations_by_language.items()]
    shape = (len(languages), len(languages), len(first.layers))
    per_topic = torch.empty(len(topics), *shape, dtype=torch.double)
    permuted = np.empty((n_permutations, *shape))
    relabelled = [_relabel(s, n_permutations, seed) for s in sets]
    for i, source in enumerate(sets):
        for j, target in enumerate(sets):
            chosen = _decode(source, target, len(emotions))  # text, layer
            per_topic[:, i, j] = _by_topic(chosen == target.labels[:, None], target)
            for draw in range(n_permutations):
                permuted[draw, i, j] = _by_topic(chosen == relabelled[j][draw][:, None], target).mean(0).numpy()
    accuracy = per_topic.mean(0)
    limits = share_interval(per_topic.numpy())
    cosine, cosine_low, cosine_high = _cosines(sets, len(emotions), len(topics))
    disjoint, cosine_p = _disjoint_cosines(sets, len(emotions), len(topics), n_permutations, seed)
    return TransferTable(
        languages=languages,
        layers=first.layers,
        accuracy=accuracy,
        low=torch.from_numpy(limits.low),
        high=torch.from_numpy(limits.high),
        **_p_values(accuracy.numpy(), permuted),
        cosine=cosine,
        cosine_low=cosine_low,
        cosine_high=cosine_high,
        cosine_disjoint=disjoint,
        cosine_p=cosine_p,
        per_topic=per_topic,
        tokens_per_word=torch.tensor(
            [_tokens_per_word(a, model, emotions, topics) for a in activations_by_language.values()], dtype=torch.double
        ),
        emotions=emotions,
        topics=topics,
        n_texts=len(sets[0].labels),
        n_layers=first.n_layers,
        n_permutations=n_permutations,
        centring=centring,
        provenance=first.provenance.updated(seed=seed, elapsed_seconds=clock.seconds),
    )


def _check_same(activations: Mapping[str, Activations]) -> Activations:
    if len(activations) < 2:
        raise ValueError(f"received {len(activations)} languages; allowed are two or more")
    (name, first), *others = activations.items()
    for other_name, other in others:
        for field in ("model", "revision", "weights_sha256", "numerics"):
            a, b = getattr(first.provenance, field), getattr(other.provenance, field)
            if a != b:
                raise ValueError(
                    f"received {field} {a!r} for {name} and {b!r} for {other_name}; read both with one model"
                )
        mine, theirs = (first.sites, first.layers, first.pooling), (other.sites, other.layers, other.pooling)
        if mine != theirs:
            raise ValueError(
                f"received {name} read at {mine} and {other_name} at {theirs}; read both at the same site and layers, with the same pooling"
            )
    for language, found in activations.items():
        if found.squares:
            raise ValueError(
                f"received {language} kept as moments; held-out topics need one row per text: use keep='pooled'"
            )
        _ = found.values  # says which sites there are if several
    return first


def _in_common(activations: Mapping[str, Activations]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    stimuli = [a.stimuli for a in activations.values()]
    emotions = tuple(e for e in stimuli[0].labels if e != NEUTRAL and all(e in s.labels for s in stimuli))
    topics = tuple(g for g in dict.fromkeys(stimuli[0].groups) if all(g in s.groups for s in stimuli))
    if len(emotions) < 2 or len(topics) < 3:
        raise ValueError(
            f"received {len(emotions)} emotions and {len(topics)} topics that all of {list(activations)} have; allowed are at least 2 and 3: "
            f"use the labels of our passages ({', '.join(list(EMOTIONS)[:3])}, ...) and the same group names in every language"
        )
    return emotions, topics


@dataclass(frozen=True)
class _Texts:
    """One language."""

    x: Float[Tensor, "text layer d_model"]
    labels: Int[Tensor, " text"]
    topics: Int[Tensor, " text"]

    def means(self, keep: Tensor, n: int) -> Float[Tensor, "emotion layer d_model"]:
        """Class means of the kept texts minus their mean."""
        means = torch.stack([self.x[keep & (self.labels == e)].mean(0) for e in range(n)])
        return means - means.mean(0)


def _texts(
    language: str, activations: Activations, emotions: tuple[str, ...], topics: tuple[str, ...], centring: Centring
) -> _Texts:
    stimuli = activations.stimuli
    kept = [
        i
        for i, (e, g) in enumerate(zip(stimuli.emotions, stimuli.groups, strict=True))
        if e in emotions and g in topics
    ]
    cells = {(stimuli.emotions[i], stimuli.groups[i]) for i in kept}
    missing = [(e, g) for e in emotions for g in topics if (e, g) not in cells]
    if missing:
        raise ValueError(
            f"received no {language} text of {missing[0][0]!r} on {missing[0][1]!r} ({len(missing)} cells are empty); every language needs every emotion "
            "on every topic: leave the emotion or the topic out with .select()"
        )
    x = activations.values[kept].double()
    labels = torch.tensor([emotions.index(stimuli.emotions[i]) for i in kept])
    groups = torch.tensor([topics.index(stimuli.groups[i]) for i in kept])
    if centring == "within_topic":
        for topic in range(len(topics)):
            x[groups == topic] -= x[groups == topic].mean(0)
    return _Texts(x, labels, groups)


def _decode(source: _Texts, target: _Texts, n_emotions: int) -> Int[Tensor, "text layer"]:
    """Emotion of the nearest class mean of the source, each topic held out in both."""
    chosen = torch.empty(len(target.labels), target.x.shape[1], dtype=torch.long)
    for topic in target.topics.unique():
        means = source.means(source.topics != topic, n_emotions)
        others = target.topics != topic
        x = target.x[~others] - target.x[others].mean(0)
        unit = means / means.norm(dim=-1, keepdim=True).clamp_min(1e-30)
        chosen[~others] = torch.einsum("tld,eld->tle", x, unit).argmax(-1)
    return chosen


def _by_topic(right: Tensor, target: _Texts) -> Float[Tensor, "topic layer"]:
    member = torch.nn.functional.one_hot(target.topics).double()
    return (member.T @ right.double()) / member.sum(0)[:, None]


def _relabel(texts: _Texts, n_permutations: int, seed: int) -> Int[Tensor, "permutation text"]:
    order = permute_labels(
        [str(e) for e in texts.labels.tolist()],
        [str(t) for t in texts.topics.tolist()],
        design="crossed",
        n_permutations=n_permutations,
        seed=seed,
    )
    return texts.labels[torch.from_numpy(order)]


def _p_values(accuracy: np.ndarray, permuted: np.ndarray) -> dict[str, Tensor]:
    """One family for transfer between languages, one for decoding within them."""
    apart = ~np.eye(len(accuracy), dtype=bool)
    found = {name: np.empty_like(accuracy) for name in ("null_mean", "p", "p_family")}
    for cells in (apart, ~apart):
        null = max_null(accuracy[cells].ravel(), permuted[:, cells].reshape(len(permuted), -1), better="high")
        for name, values in (("null_mean", null.mean), ("p", null.p), ("p_family", null.p_family)):
            found[name][cells] = values.reshape(int(cells.sum()), -1)
    return {name: torch.from_numpy(values) for name, values in found.items()}


def _matrix(a: Tensor, b: Tensor) -> Float[Tensor, "layer emotion emotion"]:
    """Cosines of every emotion's vector in one set with every emotion's in the other."""
    a, b = (v / v.norm(dim=-1, keepdim=True).clamp_min(1e-30) for v in (a, b))
    return torch.einsum("eld,fld->lef", a, b)


def _mean_diagonal(matrix: Tensor) -> Tensor:
    return matrix.diagonal(dim1=-2, dim2=-1).mean(-1)


def _cosines(sets: list[_Texts], n_emotions: int, n_topics: int) -> tuple[Tensor, Tensor, Tensor]:
    left_out = []
    for topic in range(-1, n_topics):  # -1 leaves none out
        means = [s.means(s.topics != topic, n_emotions) for s in sets]
        left_out.append(torch.stack([torch.stack([_mean_diagonal(_matrix(a, b)) for b in means]) for a in means]))
    interval = jackknife_interval(left_out[0].numpy(), torch.stack(left_out[1:]).numpy())
    return left_out[0], torch.from_numpy(interval.low.clip(min=-1)), torch.from_numpy(interval.high.clip(max=1))


def _disjoint_cosines(
    sets: list[_Texts], n_emotions: int, n_topics: int, n_permutations: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Cosines between vectors of different halves of the topics, and p from emotions exchanged in the second."""
    rng = derive_generator(seed, "language_transfer", "halves")
    total = torch.zeros(len(sets), len(sets), sets[0].x.shape[1], n_emotions, n_emotions, dtype=torch.double)
    for _ in range(N_HALVES):
        half = torch.from_numpy(rng.permutation(n_topics)[: n_topics // 2])
        halves = [
            (s.means(torch.isin(s.topics, half), n_emotions), s.means(~torch.isin(s.topics, half), n_emotions))
            for s in sets
        ]
        for i, a in enumerate(halves):
            for j, b in enumerate(halves):
                total[i, j] += (_matrix(a[0], b[1]) + _matrix(a[1], b[0])) / 2 / N_HALVES
    observed = _mean_diagonal(total)
    rng = derive_generator(seed, "language_transfer", "emotions")
    hits = torch.ones_like(observed)
    for _ in range(n_permutations):
        hits += _mean_diagonal(total[..., torch.from_numpy(rng.permutation(n_emotions))]) >= observed - 1e-9
    return observed, hits / (1 + n_permutations)


def _tokens_per_word(activations: Activations, model: Any, emotions: tuple[str, ...], topics: tuple[str, ...]) -> float:
    if model is None:
        return float("nan")
    texts = activations.stimuli.select(emotions=emotions, groups=topics).texts
    return sum(len(token_ids(model.tokenizer, t)) for t in texts) / sum(map(count_words, texts))
