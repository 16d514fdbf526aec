"""The projection of a text's tokens on an emotion's direction, layer by layer."""

import html
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from lens_affect.adapter import (
    Encoded,
    Hook,
    LensModel,
    add_hooks,
    context_window,
    device_of,
    encode,
    model_info,
    pad_right,
    pad_token_id,
    run_trunk,
    text_of_token,
)
from lens_affect.results import Provenance, Stopwatch, load_result, save_result
from lens_affect.selfchecks import ensure_checked
from lens_affect.sites import resolve_site
from lens_affect.vectors import EmotionVectors
from lens_affect.views import view_tokens

UNIT = "units of the residual stream"
"""Projections are on unit vectors, so they have the residual stream's own unit, which differs from model to model."""


@dataclass(frozen=True)
class LayerProjections:
    """The projection of every token on an emotion's direction at every layer, measured from the vectors' reference."""

    emotion: str
    """Whose directions; each layer has its own."""
    layers: tuple[int, ...]
    """0-based blocks of the first axis."""
    tokens: tuple[str, ...]
    """The tokens as text, with BOS and prompt."""
    content: tuple[int, ...]
    """Positions that count: the text's own tokens; no special token, no prompt, never position 0."""
    values: Float[Tensor, "layer token"]
    """Projection on the unit direction, in units of the residual stream; 0 is the vectors' reference."""
    provenance: Provenance
    """Model, numerics, versions."""

    def to_frame(self) -> pd.DataFrame:
        """One row per layer and token: layer, position, token, counted, projection."""
        index = pd.MultiIndex.from_product([self.layers, range(len(self.tokens))], names=["layer", "position"])
        table = pd.Series(self.values.flatten().numpy(), index=index, name="projection").reset_index()
        table.insert(2, "token", [self.tokens[i] for i in table["position"]])
        table.insert(3, "counted", table["position"].isin(self.content))
        return table

    def save(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Save as a folder (see results.py)."""
        return save_result(self, folder, overwrite=overwrite)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "LayerProjections":
        """Load what `save` wrote."""
        return load_result(cls, folder)

    def __str__(self) -> str:
        means = self.values[:, list(self.content)].mean(1)
        at = int(means.argmax())
        return (
            f"{self.provenance.title}: projection of {len(self.content)} tokens on {self.emotion!r} at {len(self.layers)} layers\n"
            f"mean highest at layer {self.layers[at]} ({means[at]:+.2f} from the reference, {UNIT})"
        )

    def _repr_html_(self) -> str:
        head = html.escape(str(self)).replace("\n", "<br>")
        return f"<p>{head}</p>{view_tokens(self, self.values, unit=UNIT).html}"


def projection_by_layer(
    model: LensModel, text: str, vectors: EmotionVectors, emotion: str, *, prompt: str = ""
) -> LayerProjections:
    """Project every token on an emotion's direction at every layer, from the vectors' reference.

    Args:
        model: a bridge or a HookedTransformer.
        text: what is read.
        vectors: fitted on this model at resid_post.
        emotion: one of the vectors' emotions.
        prompt: a request that the text answers; it is read before the text and does not count.

    Returns:
        `values[layer, token]` in units of the residual stream.

    Raises:
        ValueError: vectors of another model or site, an unknown emotion, or a text that is empty or too long.
    """
    clock = Stopwatch()
    found: dict[int, Tensor] = {}
    hooks: list[Hook] = []
    resid_post = resolve_site(model, "resid_post")
    for i, layer in enumerate(vectors.layers):
        direction = require_direction(model, vectors, emotion, layer)

        def project(value: Tensor, hook: Any = None, i: int = i, direction: Tensor = direction) -> None:
            along = direction.to(value.device)
            found[i] = (value[0].double() - vectors.reference[i].double().to(value.device)) @ along

        hooks.append((resid_post.at(layer), project))
    encoded = encode_text(model, text, prompt)
    read_text(model, encoded, hooks)
    return LayerProjections(
        emotion=emotion,
        layers=vectors.layers,
        tokens=tuple(text_of_token(model, i) for i in encoded.ids),
        content=encoded.content,
        values=torch.stack([found[i] for i in range(len(vectors.layers))]).float().cpu(),
        provenance=model_info(model).provenance.updated(bos=encoded.bos, elapsed_seconds=clock.seconds),
    )


def require_direction(model: LensModel, vectors: EmotionVectors, emotion: str, layer: int) -> Float[Tensor, " d_model"]:
    """The unit direction in float64, after proving that it belongs to this model's residual stream.

    Raises:
        ValueError: vectors of another model or site, or an unknown emotion or layer.
    """
    ensure_checked(model)
    vectors.require_match(model_info(model).provenance)
    if vectors.site != "resid_post":
        raise ValueError(
            f"received vectors of site {vectors.site!r}; allowed are those of 'resid_post', the stream that heads and neurons write into: "
            "fit vectors on resid_post"
        )
    return vectors.vector(emotion, layer).double()


def encode_text(model: LensModel, text: str, prompt: str) -> Encoded:
    """Tokens of one text, refused where none counts or there are too many."""
    encoded = encode(model, text, prompt)
    if not encoded.content:
        raise ValueError(f"received the text {text[:40]!r}, which has no token that counts; allowed is a longer text")
    if len(encoded.ids) > context_window(model):
        raise ValueError(
            f"received a text of {len(encoded.ids)} tokens; allowed are {context_window(model)}, the context window: shorten it"
        )
    return encoded


def read_text(model: LensModel, encoded: Encoded, hooks: list[Hook]) -> None:
    """One forward pass with hooks."""
    with add_hooks(model, hooks):
        run_trunk(model, *pad_right([encoded], pad_token_id(model), device_of(model)))
