"""How narrow a model's activations lie, layer by layer: what any two texts share, whatever they say.

In a narrow cone every pair of directions looks alike and a few dimensions decide every cosine, so separation has to be read
against it; `localize(null="directions")` scores random directions from the same cone through the same pipeline.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from lens_affect.activations import SINK_RATIO
from lens_affect.adapter import (
    LensModel,
    add_hooks,
    device_of,
    encode,
    model_info,
    pad_right,
    pad_token_id,
    run_trunk,
)
from lens_affect.results import Provenance, Stopwatch, content_hash, load_result, save_result
from lens_affect.selfchecks import ensure_checked
from lens_affect.sites import resolve_site
from lens_affect.statistics import jackknife_interval


@dataclass(frozen=True)
class Anisotropy:
    """Measures of the residual stream over fixed neutral sentences; rows are `embedding` and then the layers."""

    table: pd.DataFrame
    """row, depth, mean_cosine, low, high, participation_ratio, top3_share, sink_tokens, first_token_norm, other_norm, sink_ratio (see
    measure_anisotropy)."""
    n_sentences: int
    """Sentences."""
    n_tokens: int
    """Ordinary tokens (no special token, not position 0)."""
    provenance: Provenance
    """Model, numerics, sentences, versions."""

    def to_frame(self) -> pd.DataFrame:
        """The table."""
        return self.table

    def at(self, layer: int | str) -> pd.Series:
        """The measures at one layer (or "embedding").

        Raises:
            ValueError: a layer that is not there.
        """
        found = self.table[self.table["row"] == str(layer)]
        if found.empty:
            raise ValueError(f"received layer {layer!r}; there are {', '.join(self.table['row'])}")
        return found.iloc[0]

    def save(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Save as a folder (see results.py)."""
        return save_result(self, folder, overwrite=overwrite)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "Anisotropy":
        """Load what `save` wrote."""
        return load_result(cls, folder)

    def __str__(self) -> str:
        layers = pd.DataFrame(self.table[self.table["row"] != "embedding"])
        middle = layers.iloc[len(layers) // 2]
        worst = layers.sort_values(by="sink_ratio").iloc[-1]
        sink = f"first token up to {worst['sink_ratio']:.0f} times as long as the others (layer {worst['row']})"
        return (
            f"{self.provenance.title}: two neutral sentences have a mean cosine of {middle['mean_cosine']:.2f} "
            f"[{middle['low']:.2f}, {middle['high']:.2f}] at layer {middle['row']} (last token, {self.n_sentences} sentences)\n"
            f"participation ratio {middle['participation_ratio']:.1f} of {self.n_tokens} tokens, three dimensions hold {middle['top3_share']:.0%} of the "
            f"squared norm there; {sink}"
        )

    def _repr_html_(self) -> str:
        import html

        return f"<p>{html.escape(str(self)).replace(chr(10), '<br>')}</p>{self.table.round(3).to_html(index=False, border=0)}"


def neutral_sentences() -> tuple[str, ...]:
    """Our twenty fixed sentences."""
    text = resources.files("lens_affect").joinpath("data/sentences.json").read_text(encoding="utf-8")
    return tuple(json.loads(text)["sentences"])


def measure_anisotropy(model: LensModel, sentences: Sequence[str] | None = None) -> Anisotropy:
    """Measure how narrow the residual stream is at every layer, on sentences without emotion.

    - `mean_cosine`: mean over all pairs of sentences of the cosine of their last tokens' residuals (the paper's measure,
      arXiv:2604.04064 section on anisotropy; Ethayarajh, 2019), with a delete-one-sentence jackknife interval.
    - `sink_tokens`: tokens beyond position 0 whose norm exceeds SINK_RATIO times their sentence's median; the next two leave them
      out, because a single one would be all that they show.
    - `participation_ratio`: (sum of eigenvalues)^2 / sum of squared eigenvalues of the covariance of ordinary tokens: how many
      dimensions they really use; at most the number of tokens - 1.
    - `top3_share`: share of the summed squared norm of ordinary tokens in the three largest dimensions (rogue dimensions;
      Timkey and van Schijndel, 2021).
    - `sink_ratio`: median norm of position 0 over the median norm of ordinary tokens.

    Args:
        model: a bridge or a HookedTransformer.
        sentences: at least 3; our twenty by default.

    Raises:
        ValueError: fewer than 3 sentences, or one without an ordinary token.

    Example:
        >>> print(measure_anisotropy(model))  # doctest: +SKIP
    """
    clock = Stopwatch()
    ensure_checked(model)
    texts = tuple(sentences) if sentences is not None else neutral_sentences()
    if len(texts) < 3:
        raise ValueError(
            f"received {len(texts)} sentences; at least 3 are needed for a mean over pairs with an interval"
        )
    encoded = [encode(model, text) for text in texts]
    empty = [i for i, e in enumerate(encoded) if not e.content]
    if empty:
        raise ValueError(f"received a sentence without an ordinary token (number {empty[0]}); leave it out")
    states = _residuals(model, encoded)
    n_layers = int(model.cfg.n_layers)
    last = [e.content[-1] for e in encoded]
    rows = []
    for name, state in states.items():
        depth = 0.0 if name == "embedding" else (int(name) + 1) / n_layers
        tokens = [state[i, list(e.content)].double() for i, e in enumerate(encoded)]
        kept = [t[t.norm(dim=-1) <= SINK_RATIO * t.norm(dim=-1).median()] for t in tokens]
        first = state[:, 0].double().norm(dim=-1).median()
        others = torch.cat(tokens).norm(dim=-1).median()
        cosine = _mean_cosine(state[torch.arange(len(texts)), torch.tensor(last)].double())
        rows.append(
            {"row": name, "depth": depth, **cosine, **_spread(torch.cat(kept))}
            | {"sink_tokens": sum(map(len, tokens)) - sum(map(len, kept)), "first_token_norm": float(first)}
            | {"other_norm": float(others), "sink_ratio": float(first / others.clamp_min(1e-30))}
        )
    return Anisotropy(
        table=pd.DataFrame(rows),
        n_sentences=len(texts),
        n_tokens=sum(len(e.content) for e in encoded),
        provenance=model_info(model).provenance.updated(
            stimuli_hash=content_hash(texts),
            bos="+".join(sorted({e.bos for e in encoded})),
            elapsed_seconds=clock.seconds,
        ),
    )


def _residuals(model: LensModel, encoded: list[Any]) -> dict[str, Float[Tensor, "text position d_model"]]:
    """Residual stream at every position, by row name; a handful of sentences fits into memory."""
    tokens, mask = pad_right(encoded, pad_token_id(model), device_of(model))
    states: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(value: Tensor, hook: Any = None) -> None:
            states[name] = value.detach().float().cpu()

        return hook

    post = resolve_site(model, "resid_post")
    hooks = [(resolve_site(model, "resid_pre").at(0), keep("embedding"))]
    hooks += [(post.at(layer), keep(str(layer))) for layer in range(int(model.cfg.n_layers))]
    with add_hooks(model, hooks):
        run_trunk(model, tokens, mask)
    return {name: states[name] for name in ("embedding", *map(str, range(int(model.cfg.n_layers))))}


def _mean_cosine(vectors: Float[Tensor, "text d_model"]) -> dict[str, float]:
    unit = vectors / vectors.norm(dim=-1, keepdim=True).clamp_min(1e-30)
    cosines = (unit @ unit.T).fill_diagonal_(0)
    n = len(vectors)
    total, own = cosines.sum(), cosines.sum(1)
    without = (total - 2 * own) / ((n - 1) * (n - 2))
    interval = jackknife_interval((total / (n * (n - 1))).numpy(), without.numpy())
    return {"mean_cosine": float(interval.estimate), "low": float(interval.low), "high": float(interval.high)}


def _spread(ordinary: Float[Tensor, "token d_model"]) -> dict[str, float]:
    centred = ordinary - ordinary.mean(0)
    values = torch.linalg.svdvals(centred) ** 2
    by_dimension = (ordinary**2).sum(0)
    top = by_dimension.topk(min(3, len(by_dimension))).values.sum()
    return {
        "participation_ratio": float(values.sum() ** 2 / (values**2).sum().clamp_min(1e-300)),
        "top3_share": float(top / by_dimension.sum().clamp_min(1e-300)),
    }
