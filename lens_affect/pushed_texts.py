"""Pushed texts: what a model writes under a direction and a dose of its own per text, in shared batches, and how far each text was pushed.

Rows of one prompt draw the same random numbers whatever their dose. Each text is read again by the unsteered and the steered model. Where a group of
texts was not moved as far as it should be, it is written anew at another dose (equal_change).
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from lens_affect.adapter import Form, LensModel, encode_prompt
from lens_affect.equal_change import PRECISION, ROUNDS, ChangeSearch
from lens_affect.generation import Intervention, Mode, Scope, generate
from lens_affect.scoring import score_texts
from lens_affect.statistics import derive_generator
from lens_affect.steering import STRENGTH_LIMIT, calibrate, residual_norms
from lens_affect.stimuli import NEUTRAL
from lens_affect.vectors import EmotionVectors

UNSTEERED = ("unsteered", "unsteered_again")
"""Two samples of every prompt without steering: the second says how far two texts differ by chance."""
CALIBRATION_TEXTS = 8
"""Unsteered texts on which the strength of several layers is set first."""
RANDOM = ("random", "random_in_spread")
"""Controls that draw directions for each prompt, the same for every emotion."""
FEWEST_IN_SPREAD = 3
"""Emotions that random directions in their spread need: the raw vectors of two around their grand mean are each other's opposite."""
log = logging.getLogger(__name__)


class Planned(NamedTuple):
    """A text that is to be written."""

    kind: str
    """`steered`, a control, or one of UNSTEERED."""
    emotion: str
    """Target; empty where there is none."""
    vector: str
    """Whose direction."""
    strength: float
    """The dose that was asked for."""
    prompt: int
    """Number of the prompt."""

    @property
    def cell(self) -> "Cell":
        """Texts that are dosed together."""
        return self.kind, self.emotion, self.strength


Cell = tuple[str, str, float]
"""Kind, emotion and strength."""


class PushedText(NamedTuple):
    """A text with what was added while it was written, and how far that moved the model. NaN where it has no token."""

    row: Planned
    """What was asked for."""
    text: str
    """The text."""
    tokens: tuple[int, ...]
    """Its tokens."""
    finished: bool
    """Whether it ended by itself."""
    finite: bool
    """Whether all logits were finite."""
    scale: float
    """What the reference norms were multiplied with."""
    vectors: Tensor
    """What was added at each layer, `[layer, d_model]`; empty without steering."""
    nll: float = np.nan
    """Mean negative log-likelihood per token under the unsteered model, nats."""
    kl: float = np.nan
    """KL of the steered from the unsteered next-word distribution, nats per token."""
    change: float = np.nan
    """Achieved change of the residual stream (scoring.TextScores)."""


def plan_controls(
    targets: Sequence[Sequence[str]],
    doses: Sequence[float],
    controls: Sequence[str],
    n_random: int,
    known: Sequence[str],
    seed: int,
) -> list[Planned]:
    """Steered rows and their controls.

    Args:
        targets: emotions that each prompt is steered to.
        doses: strengths.
        controls: names from doses.CONTROLS.
        n_random: random directions per prompt.
        known: emotions that there are vectors for.
        seed: of the draw of other emotions.

    Raises:
        ValueError: no other emotion, or too few for directions in their spread.
    """
    emotions = dict.fromkeys(e for of_prompt in targets for e in of_prompt)
    asked = [(e, p) for e in emotions for p in range(len(targets)) if e in targets[p]]
    rows = [Planned("steered", e, e, s, p) for s in doses for e, p in asked]
    named = [e for e in known if e != NEUTRAL]
    if RANDOM[1] in controls and len(named) < FEWEST_IN_SPREAD:
        raise ValueError(
            f"received controls {list(controls)} with vectors of {named}; the spread of fewer than {FEWEST_IN_SPREAD} emotions is the target and its "
            f"opposite: leave {RANDOM[1]!r} out, or fit vectors of more emotions"
        )
    for kind in RANDOM:
        if kind in controls:
            # The first direction of a prompt has the prompt's own number, so asking for more changes none of those before.
            numbers = [(p, f"{p}" + (f".{k}" if k else "")) for k in range(n_random) for p in range(len(targets))]
            rows += [Planned(kind, "", f"{kind.replace('_', ' ')} {name}", s, p) for s in doses for p, name in numbers]
    if "other_emotion" in controls:
        others = {e: [o for o in named if o != e] for e in emotions}
        alone = [e for e, found in others.items() if not found]
        if alone:
            raise ValueError(
                f"received controls {list(controls)} with vectors of {named}; there is no emotion other than {alone[0]}: leave 'other_emotion' out, or fit "
                "vectors of more emotions"
            )
        drawn = {
            e: derive_generator(seed, "other emotion", e).integers(0, len(others[e]), len(targets)) for e in emotions
        }
        rows += [Planned("other_emotion", e, others[e][drawn[e][p]], s, p) for s in doses for e, p in asked]
    return rows


@dataclass
class Writer:
    """Writes rows in batches, each with its own direction and dose, and reads them again."""

    model: LensModel
    """What is steered."""
    vectors: EmotionVectors
    """Its directions."""
    prompts: Sequence[str]
    """What is continued."""
    layers: tuple[int, ...]
    """0-based steered blocks."""
    scope: Scope
    """`response`, `prompt` or `all`."""
    mode: Mode
    """`add` or `clamp`."""
    form: Form
    """How prompts stand before the texts."""
    seed: int
    """Of sampling and random directions."""
    sampling: dict[str, Any]
    """Further options of generation.generate."""
    rows_at_once: int
    """Texts per batch."""
    progress: Callable[[int, int], None] | None = None
    """Called with (texts done, texts in all)."""
    reference: Sequence[PushedText] = ()
    """Unsteered texts, on which several layers are calibrated."""
    expected: int = 0
    """Texts in all, as far as known."""
    _done: int = 0
    _scales: dict[tuple[str, float], float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._norms = residual_norms(self.model)[list(self.layers)]
        self._heads = [encode_prompt(self.model, text, form=self.form)[0] for text in self.prompts]

    def write(self, rows: Sequence[Planned], factors: Mapping[Cell, float] | None = None) -> list[PushedText]:
        """Texts of these rows, read again; `factors` multiply the doses of their cells. Rows of one prompt share their random numbers."""
        found: list[PushedText] = []
        for start in range(0, len(rows), self.rows_at_once):
            part = list(rows[start : start + self.rows_at_once])
            added = [self._added(row, (factors or {}).get(row.cell, 1.0)) for row in part]
            text = generate(
                self.model,
                [self.prompts[row.prompt] for row in part],
                interventions=self._interventions([v for _, v in added]),
                row_seeds=[f"{row.prompt}{' again' if row.kind == UNSTEERED[1] else ''}" for row in part],
                form=self.form,
                seed=self.seed,
                **self.sampling,
            )
            found += [
                PushedText(row, text.texts[i], text.tokens[i], text.finished[i], text.finite[i], *added[i])
                for i, row in enumerate(part)
            ]
            self._done += len(part)
            self.expected = max(self.expected, self._done)
            if self.progress:
                self.progress(self._done, self.expected)
        scores = score_texts(
            self.model,
            [self._heads[t.row.prompt] for t in found],
            [t.tokens for t in found],
            interventions=self._interventions([t.vectors for t in found]),
        )
        measured = zip(scores.nll.tolist(), scores.kl.tolist(), scores.change.tolist(), strict=True)
        return [t._replace(nll=n, kl=k, change=c) for t, (n, k, c) in zip(found, measured, strict=True)]

    def write_equal(self, rows: Sequence[Planned]) -> list[PushedText]:
        """Texts of these rows at equal achieved change.

        With several layers the norms set no dose: steered texts should change by their strength. Controls should change as the steered texts beside them did.
        """
        texts = self.write(rows)
        if len(self.layers) > 1:
            texts = self.equalize(texts, {cell: abs(cell[2]) for cell in by_cell(texts) if cell[0] == "steered"})
        return self.equalize(texts, control_targets(texts))

    def equalize(self, texts: Sequence[PushedText], targets: Mapping[Cell, float]) -> list[PushedText]:
        """The same rows, written anew where their cell's achieved change is not within PRECISION of its target; the closest is kept."""
        cells = by_cell(texts)
        kept = {cell: [texts[i] for i in rows] for cell, rows in cells.items()}
        searches = {}
        for cell, target in targets.items():
            searches[cell] = ChangeSearch(target, largest=STRENGTH_LIMIT / max(abs(t.scale) for t in kept[cell]))
            searches[cell].saw(1.0, mean_change(kept[cell]))
        for _ in range(ROUNDS):
            factors = {cell: factor for cell, search in searches.items() if (factor := search.next()) is not None}
            if not factors:
                break
            rows = [texts[i].row for cell in factors for i in cells[cell]]
            self.expected += len(rows)
            again = self.write(rows, factors)
            for cell, members in by_cell(again).items():
                part = [again[i] for i in members]
                if searches[cell].saw(factors[cell], mean_change(part)):
                    kept[cell] = part
        off = [cell for cell, search in searches.items() if search.missed]
        if off:
            log.warning(
                "%d of %d groups of texts could not be brought to within %.0f %% of the change that they should have (%s); the achieved change "
                "stands with each",
                *(len(off), len(searches), 100 * PRECISION),
                ", ".join(f"{kind} {emotion} {strength:+g}".replace("  ", " ") for kind, emotion, strength in off),
            )
        found = list(texts)
        for cell, rows in cells.items():
            for i, text in zip(rows, kept[cell], strict=True):
                found[i] = text
        return found

    def _interventions(self, added: Sequence[Tensor]) -> list[Intervention]:
        rows = tuple(i for i, v in enumerate(added) if len(v))
        if not rows:
            return []
        vectors = torch.stack([added[i] for i in rows])
        return [
            Intervention(layer, "resid_post", vectors[:, k], self.mode, self.scope, rows)
            for k, layer in enumerate(self.layers)
        ]

    def _added(self, row: Planned, factor: float) -> tuple[float, Tensor]:
        if row.kind in UNSTEERED:
            return 0.0, torch.empty(0)
        if row.kind == "random":
            width = self.vectors.directions.shape[-1]
            drawn = derive_generator(self.seed, "random direction", row.vector).standard_normal(width)
            unit = torch.from_numpy(drawn / np.linalg.norm(drawn)).float().expand(len(self.layers), -1)
        elif row.kind == RANDOM[1]:
            unit = direction_in_spread(self.vectors, self.layers, derive_generator(self.seed, RANDOM[1], row.vector))
        else:
            unit = torch.stack([self.vectors.vector(row.vector, layer) for layer in self.layers])
        # One first calibration serves all random directions: they differ by chance only.
        key = (row.kind if row.kind in RANDOM else row.vector, row.strength)
        if key not in self._scales:
            self._scales[key] = self._calibrated(unit, row.strength)
        scale = factor * self._scales[key]
        return scale, scale * self._norms[:, None] * unit

    def _calibrated(self, unit: Float[Tensor, "layer d_model"], strength: float) -> float:
        if len(self.layers) == 1:
            return strength
        texts = [t for t in self.reference if t.tokens][:CALIBRATION_TEXTS]
        if not texts:
            raise ValueError(
                "every unsteered text is empty, so several layers cannot be calibrated; use one layer, or other prompts"
            )
        heads = [self._heads[t.row.prompt] for t in texts]
        return calibrate(
            *(self.model, unit, self.layers, strength, heads, [t.tokens for t in texts]),
            scope=self.scope,
            mode=self.mode,
        )


def direction_in_spread(
    vectors: EmotionVectors, layers: Sequence[int], generator: np.random.Generator
) -> Float[Tensor, "layer d_model"]:
    """A unit direction per layer, drawn from the covariance of the emotions' raw vectors (class mean minus baseline).

    The sum of the raw vectors, each times a standard normal number, is normal with covariance sum over emotions of v v': it lies where texts of different
    emotions differ and has their anisotropy, which isotropic directions have not; only which emotion it stands for is left to chance. The numbers are the
    same at all layers. EmotionVectors keep no activations, so the spread of texts within an emotion is not in it. A draw is symmetric about 0 along the
    target, and holds some of it (a mean squared cosine of one over the effective number of dimensions that the emotions span), so what it does
    to a target is no less than nothing: a strict control, and one that says little where few emotions have vectors.

    Args:
        vectors: of FEWEST_IN_SPREAD emotions or more; `neutral` is left out.
        layers: blocks that there are vectors for.
        generator: of the normal numbers.

    Raises:
        ValueError: vectors that are all 0 at a layer.
    """
    kept = [i for i, e in enumerate(vectors.emotions) if e != NEUTRAL]
    at = [vectors.layers.index(layer) for layer in layers]
    units = torch.nn.functional.normalize(vectors.directions[kept][:, at].double(), dim=-1)
    weights = torch.from_numpy(generator.standard_normal(len(kept)))
    drawn = torch.einsum("e,eld->ld", weights, vectors.raw_norms[kept][:, at].double()[..., None] * units)
    length = drawn.norm(dim=-1, keepdim=True)
    if bool((length == 0).any()):
        raise ValueError(
            f"received vectors that are all 0 at one of layers {list(layers)}; they have no spread: choose other layers"
        )
    return (drawn / length).float()


def by_cell(texts: Sequence[PushedText]) -> dict[Cell, list[int]]:
    """Places of the texts of each cell, in order of appearance."""
    found: dict[Cell, list[int]] = {}
    for i, text in enumerate(texts):
        found.setdefault(text.row.cell, []).append(i)
    return found


def mean_change(texts: Sequence[PushedText]) -> float:
    """Mean achieved change of the texts that have one."""
    known = [t.change for t in texts if np.isfinite(t.change)]
    return float(np.mean(known)) if known else float("nan")


def control_targets(texts: Sequence[PushedText]) -> dict[Cell, float]:
    """Mean change of the steered texts that stand beside each control: of its emotion, or of all where it serves all (random directions).

    Random texts are written once for all emotions, so they can equal the mean over these only; DoseResponse.control_changes says how far that is from each.
    """
    cells, found = by_cell(texts), {}
    for cell in cells:
        kind, emotion, strength = cell
        if kind in (*UNSTEERED, "steered"):
            continue
        beside = [c for c in cells if c[0] == "steered" and c[2] == strength and emotion in ("", c[1])]
        found[cell] = mean_change([texts[i] for c in beside for i in cells[c]])
    return found
