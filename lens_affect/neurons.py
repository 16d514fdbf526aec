"""Which MLP neurons write an emotion's direction more in texts with that emotion than in the others on the same topics.

A difference between texts is not an effect on what the model says: ablate or patch a neuron to learn that.
"""

import contextlib
import html
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from scipy import stats
from torch import Tensor

from lens_affect.activations import DEFAULT_BATCH_TOKENS, Progress
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
)
from lens_affect.components import gate_site, make_writer, mlp_sites
from lens_affect.projections import require_direction
from lens_affect.results import Provenance, Stopwatch, load_result, save_result
from lens_affect.statistics import adjust_p, mean_interval
from lens_affect.stimuli import NEUTRAL, Stimuli
from lens_affect.vectors import EmotionVectors


@dataclass(frozen=True)
class NeuronTable:
    """Neurons of one layer that tell texts with an emotion from the others through what they write."""

    table: pd.DataFrame
    """One row per emotion and neuron, the largest differences of each emotion first; columns as in top_neurons."""
    layer: int
    """0-based block."""
    n_neurons: int
    """Neurons that were tested per emotion."""
    n_tests: int
    """Tests that `p_holm` pays for: neurons times emotions."""
    n_groups: dict[str, int]
    """Per emotion: groups (topics) that hold texts with it and others, the n of its intervals."""
    n_texts: int
    """Texts that were read."""
    source: str
    """Name of the stimuli."""
    provenance: Provenance
    """Model, numerics, stimuli, versions."""

    def to_frame(self) -> pd.DataFrame:
        """The table."""
        return self.table

    def save(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Save as a folder (see results.py)."""
        return save_result(self, folder, overwrite=overwrite)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "NeuronTable":
        """Load what `save` wrote."""
        return load_result(cls, folder)

    def __str__(self) -> str:
        first: Any = self.table.iloc[int(np.abs(self.table["difference"].to_numpy(float)).argmax())]
        clear = int(np.sum(self.table["p_holm"].to_numpy(float) < 0.05))
        return (
            f"{self.provenance.title}, {self.source}: neurons of layer {self.layer} over {self.n_texts} texts\n"
            f"largest: what neuron {first['neuron']} writes along {first['emotion']!r} differs by {first['difference']:+.3f} [{first['low']:+.3f}, "
            f"{first['high']:+.3f}] in texts with it (n = {self.n_groups[first['emotion']]} groups, Holm p = {first['p_holm']:.2g} over {self.n_tests} tests)\n"
            f"{clear} of the {len(self.table)} rows shown have a Holm p below 0.05; differences between texts, not effects"
        )

    def _repr_html_(self) -> str:
        head = html.escape(str(self)).replace("\n", "<br>")
        return f"<p>{head}</p>" + self.table.head(20).to_html(index=False, border=0, escape=True, float_format="%.3g")


def top_neurons(
    model: LensModel,
    stimuli: Stimuli,
    vectors: EmotionVectors,
    layer: int,
    *,
    emotions: Sequence[str] | None = None,
    n: int = 10,
    progress: Progress | None = None,
) -> NeuronTable:
    """Find the neurons of one layer that write an emotion's direction more (or less) in texts with that emotion.

    A neuron's contribution to a text is the mean over the text's tokens of act(gate) x up x (W_down row on the direction), with
    Gemma's post-norm scale held fixed per token. Special tokens, the prompt and position 0 never enter. The difference is taken within each group (topic) between the
    mean over texts with the emotion and the mean over all other texts, neutral ones too; interval and p are those of a t test over
    groups. The direction only scales a neuron's differences, so p is that of its activation, whatever the vectors were fitted on; the
    sizes, by which neurons are ranked, favour neurons that vary with the very texts the vectors come from.

    Args:
        model: a bridge, or a HookedTransformer without post-norms; dense MLPs only.
        stimuli: texts whose groups hold several labels each.
        vectors: fitted on this model at resid_post.
        layer: 0-based block of the neurons; the direction is that of the same block's output.
        emotions: which; all that stimuli and vectors share by default.
        n: neurons to list per emotion, by the size of the difference; all are tested.
        progress: called with (texts done, texts in all).

    Returns:
        A table with columns emotion, layer, neuron, contribution (in texts with the emotion, units of the residual stream), difference,
        low, high (95 %), p, p_holm (over all neurons and emotions of this call), gate_own, gate_other (mean gate before the activation function; NaN without gates), alignment
        (cosine of what the neuron writes with the direction).

    Raises:
        ValueError: vectors of another model or site, an unknown emotion or layer, fewer than two groups that hold an emotion and another label, a text
            without tokens that count or beyond the context window, a mixture of experts, or a model without MLPs.

    Example:
        >>> top_neurons(model, load_stimuli("passages"), vectors, 15, emotions=["afraid"]).to_frame()  # doctest: +SKIP
    """
    clock = Stopwatch()
    if n < 1:
        raise ValueError(f"received n={n}; allowed is 1 or more")
    chosen = _choose(stimuli, vectors, emotions)
    directions = torch.stack([require_direction(model, vectors, emotion, layer) for emotion in chosen])
    cells = _Cells(model, stimuli, layer)
    bos = cells.read(progress)
    writer = make_writer(model, layer, "mlp")
    onto = writer.onto(directions).cpu().numpy()
    rows, sizes = [], {}
    for emotion, along in zip(chosen, onto, strict=True):
        found = _compare(cells, emotion, along)
        sizes[emotion] = found.pop("n_groups")
        rows.append(found)
    p_holm = adjust_p(np.stack([found["p"] for found in rows]))
    frames = []
    for emotion, direction, found, adjusted in zip(chosen, directions, rows, p_holm, strict=True):
        best = np.argsort(-np.abs(found["difference"]), kind="stable")[:n]
        written = writer.rows(best.tolist())
        cosine = torch.cosine_similarity(written, direction.to(written.device)[None], dim=-1)
        columns = {name: found[name][best] for name in ("contribution", "difference", "low", "high", "p")}
        columns |= {
            "p_holm": adjusted[best],
            "gate_own": found["gate_own"][best],
            "gate_other": found["gate_other"][best],
        }
        frames.append(
            pd.DataFrame(
                {"emotion": emotion, "layer": layer, "neuron": best} | columns | {"alignment": cosine.cpu().numpy()}
            )
        )
    return NeuronTable(
        table=pd.concat(frames, ignore_index=True),
        layer=layer,
        n_neurons=onto.shape[1],
        n_tests=int(np.isfinite(p_holm).sum()),
        n_groups=sizes,
        n_texts=len(stimuli),
        source=stimuli.name,
        provenance=model_info(model).provenance.updated(
            stimuli_hash=stimuli.hash, bos=bos, elapsed_seconds=clock.seconds
        ),
    )


def _choose(stimuli: Stimuli, vectors: EmotionVectors, emotions: Sequence[str] | None) -> tuple[str, ...]:
    if isinstance(emotions, str):
        raise TypeError("received a single string; allowed is a list of emotions, e.g. emotions=['happy']")
    shared = [e for e in stimuli.labels if e != NEUTRAL and e in vectors.emotions]
    chosen = tuple(shared if emotions is None else emotions)
    for emotion in chosen:
        if emotion not in shared:
            raise ValueError(f"received emotion {emotion!r}; allowed are those of both stimuli and vectors: {shared}")
    if not chosen:
        raise ValueError(
            f"received no emotion that stimuli {list(stimuli.labels)} and vectors {list(vectors.emotions)} share; fit vectors on these emotions"
        )
    for emotion in chosen:
        if len(_paired_groups(stimuli, emotion)) < 2:
            raise ValueError(
                f"received stimuli in which {len(_paired_groups(stimuli, emotion))} groups hold both {emotion!r} and another label; a paired "
                "comparison needs at least 2: give texts that share topics"
            )
    return chosen


def _paired_groups(stimuli: Stimuli, emotion: str) -> list[str]:
    """Groups that hold texts with the emotion and texts without it."""
    pairs = set(zip(stimuli.groups, stimuli.emotions, strict=True))
    return [
        g
        for g in dict.fromkeys(stimuli.groups)
        if (g, emotion) in pairs and any(a == g and b != emotion for a, b in pairs)
    ]


def _compare(cells: "_Cells", emotion: str, along: Float[np.ndarray, " neuron"]) -> dict[str, Any]:
    """Every neuron's difference within groups, with its t test; `along` turns activations into contributions."""
    groups = _paired_groups(cells.stimuli, emotion)
    own = np.stack([cells.mean(g, emotion, own=True) for g in groups])  # [group, quantity, neuron]
    other = np.stack([cells.mean(g, emotion, own=False) for g in groups])
    differences = (own[:, 0] - other[:, 0]) * along
    interval = mean_interval(differences)
    with np.errstate(divide="ignore", invalid="ignore"):  # a neuron that never fires has no spread: p is NaN
        t = interval.estimate / (differences.std(axis=0, ddof=1) / np.sqrt(len(groups)))
    return {
        "n_groups": len(groups),
        "contribution": own[:, 0].mean(0) * along,
        "difference": interval.estimate,
        "low": interval.low,
        "high": interval.high,
        "p": 2 * stats.t.sf(np.abs(t), len(groups) - 1),
        "gate_own": own[:, 1].mean(0),
        "gate_other": other[:, 1].mean(0),
    }


class _Enough(Exception):
    """The layer has been read."""


class _Cells:
    """Sums of activations and gates per (group, emotion): memory grows with cells, not with texts."""

    def __init__(self, model: LensModel, stimuli: Stimuli, layer: int) -> None:
        self.model, self.stimuli, self.layer = model, stimuli, layer
        self._sites, self._gate = mlp_sites(model), gate_site(model)
        self._writer = make_writer(model, layer, "mlp")
        self._labels = list(dict.fromkeys(zip(stimuli.groups, stimuli.emotions, strict=True)))
        self._sums = np.zeros((len(self._labels), 2, self._writer.width))
        self._counts = np.zeros(len(self._labels))
        self._weights = torch.zeros(0)
        self._seen: dict[str, Tensor] = {}

    def mean(self, group: str, emotion: str, *, own: bool) -> Float[np.ndarray, "quantity neuron"]:
        """Mean over the group's texts with the emotion, or over its other texts: scaled activations, then gates."""
        at = [i for i, (g, e) in enumerate(self._labels) if g == group and (e == emotion) == own]
        return self._sums[at].sum(0) / self._counts[at].sum()

    def read(self, progress: Progress | None) -> str:
        """Every text once, longest first; returns the kinds of BOS that were met."""
        encoded = [self._encode(row) for row in range(len(self.stimuli))]
        order = sorted(range(len(encoded)), key=lambda row: -len(encoded[row].ids))
        done = 0
        with add_hooks(self.model, self._hooks()):
            while done < len(order):
                size = max(1, DEFAULT_BATCH_TOKENS // len(encoded[order[done]].ids))
                self._read_batch(order[done : done + size], [encoded[row] for row in order[done : done + size]])
                done = min(done + size, len(order))
                if progress:
                    progress(done, len(order))
        return "+".join(sorted({e.bos for e in encoded}))

    def _encode(self, row: int) -> Encoded:
        encoded = encode(self.model, self.stimuli.texts[row], self.stimuli.prompts[row])
        if not encoded.content or len(encoded.ids) > context_window(self.model):
            raise ValueError(
                f"received a text with {len(encoded.content)} tokens that count, {len(encoded.ids)} in all, in row {row}; allowed are at least "
                f"one and at most {context_window(self.model)}: leave it out with stimuli.select(rows=...)"
            )
        return encoded

    def _hooks(self) -> list[Hook]:
        hooks: list[Hook] = [(self._sites.input.at(self.layer), self._keep("act"))]
        if self._gate:
            hooks.append((self._gate.at(self.layer), self._pool_gate))
        # the fixed scale of a post-norm is known once its output is there
        hooks += [(self._sites.raw.at(self.layer), self._keep("raw")), (self._sites.written.at(self.layer), self._pool)]
        return hooks

    def _keep(self, name: str) -> Any:
        def hook(value: Tensor, hook: Any = None) -> None:
            self._seen[name] = value.flatten(2)

        return hook

    def _pool_gate(self, value: Tensor, hook: Any = None) -> None:
        self._seen["gate"] = torch.bmm(self._weights[:, None], value.flatten(2).float())[:, 0]

    def _pool(self, value: Tensor, hook: Any = None) -> None:
        scale = self._writer.scale(self._seen.pop("raw"), value).float()
        self._seen["act"] = torch.bmm((self._weights * scale)[:, None], self._seen["act"].float())[:, 0]
        raise _Enough

    def _read_batch(self, rows: list[int], batch: list[Encoded]) -> None:
        tokens, mask = pad_right(batch, pad_token_id(self.model), device_of(self.model))
        weights = torch.zeros(tokens.shape)
        for i, encoded in enumerate(batch):
            weights[i, list(encoded.content)] = 1 / len(encoded.content)
        self._weights = weights.to(tokens.device)
        with contextlib.suppress(_Enough):
            run_trunk(self.model, tokens, mask)
        act = self._seen.pop("act").cpu().double().numpy()
        gate = self._seen.pop("gate").cpu().double().numpy() if self._gate else np.full_like(act, np.nan)
        for i, row in enumerate(rows):
            if not np.isfinite(act[i]).all():
                raise ValueError(
                    f"received activations that are not finite: act, layer {self.layer}, text {row}; load the model with dtype=torch.float32 or bfloat16"
                )
            cell = self._labels.index((self.stimuli.groups[row], self.stimuli.emotions[row]))
            self._sums[cell] += np.stack([act[i], gate[i]])
            self._counts[cell] += 1
