"""Direct attribution: which heads and neurons write an emotion into the residual stream of a text.

The residual stream is a sum, so its projection on a direction splits exactly into what the embedding, each attention head and each MLP
neuron added (Elhage et al., 2021, transformer-circuits.pub/2021/framework). Direct means direct: a head that makes a later neuron fire gets
no credit for it, and what writes a direction is not shown to be what the model acts on.
"""

import html
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from lens_affect.adapter import Encoded, Hook, LensModel, device_of, model_info, text_of_token
from lens_affect.components import WriterSites, attention_sites, gate_site, make_writer, mlp_sites
from lens_affect.projections import UNIT, LayerProjections, encode_text, read_text, require_direction
from lens_affect.results import Provenance, Stopwatch, load_result, save_result
from lens_affect.selfchecks import TOLERANCES
from lens_affect.sites import resolve_site
from lens_affect.vectors import EmotionVectors
from lens_affect.views import view_tokens, visible, write_page


@dataclass(frozen=True)
class DirectAttribution:
    """The projection of every token on an emotion's direction at one layer, split into what wrote it.

    `total` = `embedding` + `positional` + sums over layers (and heads) of `heads`, `attention_other`, `mlps` and `mlp_other`. All of them
    in units of the residual stream. Norm scales are held fixed per token.
    """

    emotion: str
    """Whose direction."""
    layer: int
    """0-based block whose output is projected; parts come from blocks 0 to this one."""
    tokens: tuple[str, ...]
    """The tokens as text, with BOS and prompt."""
    content: tuple[int, ...]
    """Positions that count: the text's own tokens; no special token, no prompt, never position 0 (the attention sink)."""
    total: Float[Tensor, " token"]
    """Projection of resid_post on the unit direction, from the origin of the residual stream."""
    reference: float
    """Projection of the vectors' reference: `total - reference` is what EmotionVectors.project measures, 0 for an average text."""
    embedding: Float[Tensor, " token"]
    """What the token embedding added, with its scale in Gemma."""
    positional: Float[Tensor, " token"]
    """What the positional embedding added; 0 in models with rotary positions."""
    heads: Float[Tensor, "token layer head"]
    """What each attention head added (z W_O); query heads, so grouped keys and values need no care."""
    attention_other: Float[Tensor, "token layer"]
    """What the attention's output bias added."""
    mlps: Float[Tensor, "token layer"]
    """What all neurons of a layer added together."""
    mlp_other: Float[Tensor, "token layer"]
    """What the MLP's output bias added."""
    neuron_layers: tuple[int, ...]
    """Block of each neuron that is listed: those with the largest mean contribution over `content`, of either sign, largest first."""
    neuron_indices: tuple[int, ...]
    """Its index in that block's MLP."""
    neurons: Float[Tensor, "token neuron"]
    """What each listed neuron added: fixed norm scale x activation x (W_down row on the direction)."""
    gates: Float[Tensor, "token neuron"]
    """Its gate before the activation function; NaN in a model without gates."""
    activations: Float[Tensor, "token neuron"]
    """act(gate) x up, the input of W_down; in a model without gates the activation itself."""
    alignment: Float[Tensor, " neuron"]
    """Cosine, -1 to 1, between what the neuron writes (its W_down row, after a post-norm's weight) and the direction."""
    largest_error: float
    """Largest difference between a sum of parts and its whole, as a share of the length of the vector it was projected from."""
    provenance: Provenance
    """Model, numerics, versions."""

    def top_neurons(self) -> pd.DataFrame:
        """The listed neurons, largest mean contribution first.

        Returns:
            Columns layer, neuron, contribution (mean over the text's tokens), at (the token where it adds most in size), peak (its
            contribution there), gate and activation (there), alignment.
        """
        rows = []
        for k, (layer, neuron) in enumerate(zip(self.neuron_layers, self.neuron_indices, strict=True)):
            own = self.neurons[list(self.content), k]
            at = self.content[int(own.abs().argmax())]
            rows.append(
                {
                    "layer": layer,
                    "neuron": neuron,
                    "contribution": own.mean().item(),
                    "at": self.tokens[at],
                    "peak": self.neurons[at, k].item(),
                    "gate": self.gates[at, k].item(),
                    "activation": self.activations[at, k].item(),
                    "alignment": self.alignment[k].item(),
                }
            )
        return pd.DataFrame(rows)

    def to_frame(self) -> pd.DataFrame:
        """One row per token and part: position, token, counted, part, layer, head, contribution; a token's rows sum to its total.

        Parts are `embedding`, `positional`, `head`, `attention_other`, `mlp` and `mlp_other`; layer and head are missing where there is none.
        """
        frames = []
        for part, values in (
            ("embedding", self.embedding),
            ("positional", self.positional),
            ("head", self.heads),
            ("attention_other", self.attention_other),
            ("mlp", self.mlps),
            ("mlp_other", self.mlp_other),
        ):
            index = pd.MultiIndex.from_product(
                [range(n) for n in values.shape],
                names=["position", "layer", "head"][: values.ndim],
            )
            column = pd.Series(values.flatten().numpy(), index=index, name="contribution")
            frames.append(column.reset_index().assign(part=part))
        table = pd.concat(frames, ignore_index=True)
        table["token"] = [self.tokens[i] for i in table["position"]]
        table["counted"] = table["position"].isin(self.content)
        table[["layer", "head"]] = table[["layer", "head"]].astype("Int64")
        return pd.DataFrame(table[["position", "token", "counted", "part", "layer", "head", "contribution"]])

    def largest_parts(self, n: int = 8) -> pd.DataFrame:
        """The parts with the largest mean over the text's tokens, of either sign.

        Args:
            n: how many.

        Returns:
            Columns part (`embedding`, `head 12.3`, `MLP 14`, ...) and contribution (mean over `content`).
        """
        kept = list(self.content)
        means = {"embedding": self.embedding[kept].mean(), "positional embedding": self.positional[kept].mean()}
        for layer in range(self.layer + 1):
            for head in range(self.heads.shape[2]):
                means[f"head {layer}.{head}"] = self.heads[kept, layer, head].mean()
            means[f"attention bias {layer}"] = self.attention_other[kept, layer].mean()
            means[f"MLP {layer}"] = self.mlps[kept, layer].mean()
            means[f"MLP bias {layer}"] = self.mlp_other[kept, layer].mean()
        order = sorted(means, key=lambda part: -abs(float(means[part])))[:n]
        return pd.DataFrame({"part": order, "contribution": [float(means[part]) for part in order]})

    def save(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Save as a folder (see results.py)."""
        return save_result(self, folder, overwrite=overwrite)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "DirectAttribution":
        """Load what `save` wrote."""
        return load_result(cls, folder)

    def __str__(self) -> str:
        own = self.total[list(self.content)] - self.reference
        most, least = (self.tokens[self.content[int(i)]].strip() for i in (own.argmax(), own.argmin()))
        parts = ", ".join(f"{p} {c:+.2f}" for p, c in self.largest_parts(4).itertuples(index=False))
        listed = self.top_neurons().head(4)
        named = [
            f"{layer}.{neuron} {mean:+.2f}"
            for layer, neuron, mean in zip(listed["layer"], listed["neuron"], listed["contribution"], strict=True)
        ]
        return (
            f"{self.provenance.title}: {self.emotion!r} at layer {self.layer}, mean projection {own.mean():+.2f} from the reference "
            f"({self.reference:+.2f}) over {len(self.content)} tokens, highest at {most!r} ({own.max():+.2f}), lowest at {least!r} ({own.min():+.2f})\n"
            f"largest parts of the mean ({own.mean() + self.reference:+.2f} in all): {parts}\n"
            f"largest neurons (mean, layer.index): {', '.join(named)}\n"
            f"parts sum to the projection within {self.largest_error:.0e} of the vectors' length; direct effects only"
        )

    def _repr_html_(self) -> str:
        head = html.escape(str(self)).replace("\n", "<br>")
        tables = [_table_html(table) for table in (self.largest_parts(), self.top_neurons().head(8))]
        return f"<p>{head}</p>{view_tokens(self, self.total - self.reference, unit=UNIT).html}{''.join(tables)}"


def attribute_direction(
    model: LensModel,
    text: str,
    vectors: EmotionVectors,
    emotion: str,
    layer: int,
    *,
    prompt: str = "",
    n_neurons: int = 20,
) -> DirectAttribution:
    """Split the projection of every token on an emotion's direction into embedding, heads and neurons, exactly.

    Args:
        model: a bridge, or a HookedTransformer without post-norms; dense MLPs only.
        text: what is read.
        vectors: fitted on this model at resid_post.
        emotion: one of the vectors' emotions.
        layer: 0-based block whose output is projected.
        prompt: a request that the text answers; it is read before the text and does not count.
        n_neurons: neurons to list, by the size of their mean contribution over the text's tokens.

    Returns:
        The parts per token, in units of the residual stream; every sum of parts is checked against the model's own activations.

    Raises:
        ValueError: vectors of another model or site, an unknown emotion or layer, a text that is empty or too long, a mixture of experts, or a
            model without MLPs.
        RuntimeError: the parts do not add up to the whole, so this architecture is not what we take it for.

    Example:
        >>> attribute_direction(model, "Her hands shook.", vectors, "afraid", 15).heads.shape  # doctest: +SKIP
        torch.Size([5, 16, 9])
    """
    clock = Stopwatch()
    if n_neurons < 1:
        raise ValueError(f"received n_neurons={n_neurons}; allowed is 1 or more")
    splitter = _Splitter(model, require_direction(model, vectors, emotion, layer), layer, n_neurons)
    encoded = encode_text(model, text, prompt)
    splitter.run(encoded)
    at = vectors.layers.index(layer)
    reference = (vectors.reference[at].double() @ vectors.vector(emotion, layer).double()).item()
    return DirectAttribution(
        emotion=emotion,
        layer=layer,
        tokens=tuple(text_of_token(model, i) for i in encoded.ids),
        content=encoded.content,
        reference=reference,
        **splitter.results(),
        provenance=model_info(model).provenance.updated(bos=encoded.bos, elapsed_seconds=clock.seconds),
    )


def write_explanation(
    path: str | os.PathLike[str], parts: DirectAttribution, by_layer: LayerProjections, origin: str = ""
) -> Path:
    """Write one offline page about a text: its tokens by layer, what wrote the direction, and where the vectors come from.

    Args:
        path: where to.
        parts: of attribute_direction.
        by_layer: of projection_by_layer, on the same text and emotion.
        origin: a sentence about the vectors.

    Returns:
        The path.
    """
    headline = "".join(f"<p>{html.escape(line)}</p>" for line in str(parts).splitlines())
    tables = [_table_html(table) for table in (parts.largest_parts(12), parts.top_neurons())]
    return write_page(
        path,
        f"{parts.emotion} in {parts.provenance.title}",
        [
            headline,
            f'<p class="note">{html.escape(origin)}</p>',
            "<h2>Projection by layer, from the vectors' reference</h2>",
            view_tokens(by_layer, by_layer.values, unit=UNIT, start_layer=parts.layer).html,
            f"<h2>Largest parts at layer {parts.layer}, mean over the text's tokens</h2>",
            tables[0],
            "<h2>Largest neurons, mean over the text's tokens, and where each adds most</h2>",
            tables[1],
            '<p class="note">Direct effects only: a head that makes a later neuron fire gets no credit for it, and what writes a direction is not '
            "shown to be what the model acts on. Parts are measured from the origin of the residual stream, colours from the reference.</p>",
        ],
    )


def _table_html(table: pd.DataFrame) -> str:
    shown = table.assign(at=[visible(t) for t in table["at"]]) if "at" in table else table
    return shown.to_html(index=False, border=0, escape=True, float_format="%.3f")


class _Splitter:
    """Collects what the hooks of one block saw and splits it as soon as the block is done, so memory holds one block at a time."""

    def __init__(self, model: LensModel, direction: Float[Tensor, " d_model"], layer: int, n_neurons: int) -> None:
        self.model, self.layer, self.n_neurons = model, layer, n_neurons
        self.direction = direction.to(device_of(model))
        self.content: list[int] = []
        self.parts: dict[str, list[Tensor]] = {
            name: [] for name in ("heads", "attention_other", "mlps", "mlp_other", "gates", "activations", "neurons")
        }
        self.candidates: list[tuple[int, int]] = []
        self.cosines: list[float] = []
        self.embedding = self.positional = self.running = self.total = torch.zeros(0)
        self.largest_error = 0.0
        info = model_info(model).provenance
        self._tolerance = TOLERANCES.get(str(info.dtype), TOLERANCES["float32"])["activations"]
        self._seen: dict[str, Tensor] = {}
        self._attention, self._mlp, self._gate = attention_sites(model), mlp_sites(model), gate_site(model)

    def run(self, encoded: Encoded) -> None:
        """Read the text once and split every block up to the layer."""
        self.content = list(encoded.content)
        resid_pre, resid_post = resolve_site(self.model, "resid_pre"), resolve_site(self.model, "resid_post")
        names = {"resid_pre": resid_pre.at(0)}
        if not _is_rotary(self.model):
            names["positional"] = "hook_pos_embed"
        hooks: list[Hook] = [(name, self._keep(key)) for key, name in names.items()]
        for layer in range(self.layer + 1):
            sites = [*vars(self._attention).values(), *vars(self._mlp).values(), *([self._gate] if self._gate else [])]
            hooks += [(site.at(layer), self._keep(site.name)) for site in sites]
            hooks.append((resid_post.at(layer), self._finish(layer)))
        read_text(self.model, encoded, hooks)

    def _keep(self, key: str) -> Callable[..., None]:
        def hook(value: Tensor, hook: Any = None) -> None:
            self._seen[key] = value[0].flatten(1).double()  # a copy: a model may go on in place

        return hook

    def _finish(self, layer: int) -> Callable[..., None]:
        def hook(value: Tensor, hook: Any = None) -> None:
            if layer == 0:
                self._start()
            self._split_attention(layer)
            self._split_mlp(layer)
            after = value[0].double()
            self._check(self.running, after, f"resid_post of layer {layer}")
            self.total = after @ self.direction
            self._seen.clear()

        return hook

    def _start(self) -> None:
        whole = self._seen["resid_pre"] @ self.direction
        positional = self._seen.get("positional")
        self.positional = torch.zeros_like(whole) if positional is None else positional @ self.direction
        self.embedding = whole - self.positional
        self.running = whole

    def _split_attention(self, layer: int) -> None:
        values, other = self._inputs(layer, self._attention)
        by_head = values.unflatten(1, (int(self.model.cfg.n_heads), -1)).sum(-1)
        self._add("heads", by_head)
        self._add("attention_other", other)
        self._check(by_head.sum(1) + other, self._seen["attn_out"], f"attention of layer {layer}")
        self.running = self.running + by_head.sum(1) + other

    def _split_mlp(self, layer: int) -> None:
        values, other = self._inputs(layer, self._mlp)
        self._add("mlps", values.sum(1))
        self._add("mlp_other", other)
        self._check(values.sum(1) + other, self._seen["mlp_out"], f"MLP of layer {layer}")
        self.running = self.running + values.sum(1) + other
        best = values[self.content].mean(0).abs().topk(min(self.n_neurons, values.shape[1])).indices
        self._add("neurons", values[:, best])
        self._add("activations", self._seen["act"][:, best])
        gate = self._seen["gate"] if self._gate else torch.full_like(self._seen["act"], math.nan)
        self._add("gates", gate[:, best])
        rows = make_writer(self.model, layer, "mlp").rows(best.tolist())
        self.cosines += torch.cosine_similarity(rows, self.direction[None], dim=-1).tolist()
        self.candidates += [(layer, int(j)) for j in best]

    def _inputs(self, layer: int, sites: WriterSites) -> tuple[Tensor, Tensor]:
        """`[token, input]`: what each input of the last linear map adds along the direction; and what its bias adds per token."""
        writer = make_writer(self.model, layer, "attention" if sites.input.name == "z" else "mlp")
        scale = writer.scale(self._seen[sites.raw.name], self._seen[sites.written.name])
        values = self._seen[sites.input.name] * writer.onto(self.direction[None])[0] * scale[:, None]
        return values, scale * (writer.bias() @ self.direction)

    def _add(self, name: str, value: Tensor) -> None:
        self.parts[name].append(value)

    def _check(self, summed: Tensor, whole: Tensor, what: str) -> None:
        length = whole.norm(dim=-1).clamp_min(1e-30)
        error = ((summed - whole @ self.direction).abs() / length).max().item()
        if not error <= self._tolerance:
            raise RuntimeError(
                f"the parts of the {what} miss the whole by {error:.1e} of its length, allowed {self._tolerance:.0e}: this architecture writes to "
                "its residual stream in a way that is not known here; please report it"
            )
        self.largest_error = max(self.largest_error, error)

    def results(self) -> dict[str, Any]:
        """The arrays of DirectAttribution."""
        stacked = {name: torch.stack(self.parts[name], 1) for name in ("heads", "attention_other", "mlps", "mlp_other")}
        neurons = {name: torch.cat(self.parts[name], 1) for name in ("neurons", "gates", "activations")}
        order = neurons["neurons"][self.content].mean(0).abs().argsort(descending=True)[: self.n_neurons]
        arrays = stacked | {name: value[:, order] for name, value in neurons.items()}
        arrays |= {"embedding": self.embedding, "positional": self.positional, "total": self.total}
        return {name: value.float().cpu() for name, value in arrays.items()} | {
            "alignment": torch.tensor(self.cosines)[order.cpu()],
            "neuron_layers": tuple(self.candidates[int(i)][0] for i in order),
            "neuron_indices": tuple(self.candidates[int(i)][1] for i in order),
            "largest_error": self.largest_error,
        }


def _is_rotary(model: Any) -> bool:
    """Whether there is no positional embedding to add: a bridge aliases hook_pos_embed to its rotary angles, so the name proves nothing."""
    return getattr(model.cfg, "positional_embedding_type", "standard") != "standard"
