"""Dose and response: what a model writes when it is pushed along an emotion, at every strength, with controls in the same batch.

Every row of the batch is one text: a prompt, a direction and a strength. Rows of one prompt draw the same random numbers whatever their dose, so
two texts differ by the dose alone. Each text is then read again by the unsteered model (perplexity) and by the steered one (KL, achieved
change), and controls are brought to the achieved change of the steered texts (pushed_texts). Nothing is dropped: an empty text is counted and has
no value.
"""

import html
import logging
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from lens_affect.adapter import Form, LensModel, context_window, encode_prompt, form_of, model_info, token_ids
from lens_affect.generation import Mode, Scope
from lens_affect.pushed_texts import UNSTEERED, Planned, PushedText, Writer, plan_controls
from lens_affect.repetition import compression_ratio, distinct_share, longest_loop, repetition_limits, repetition_share
from lens_affect.results import Provenance, Stopwatch, content_hash, load_result, save_result
from lens_affect.scenarios import Scenarios
from lens_affect.scoring import score_texts
from lens_affect.statistics import cluster_means, mean_interval
from lens_affect.steering import check_strength, choose_layers, require_steerable, residual_norms
from lens_affect.stimuli import NEUTRAL, load_stimuli
from lens_affect.vectors import EmotionVectors

AUTO_STRENGTHS = (-0.8, -0.4, 0.1, 0.2, 0.4, 0.8, 1.6)
"""Shares of the residual norm, from hardly noticed to more than the stream itself; negative ones push away."""
CONTROLS = {
    "random": "random directions of each prompt, the same for every emotion",
    "random_in_spread": "random directions of each prompt within the spread of the emotions' vectors (pushed_texts.direction_in_spread)",
    "other_emotion": "the direction of another emotion, drawn per prompt",
}
"""What stands beside the emotion's own direction, at the same achieved change."""
MEASURES = (
    "perplexity_ratio",
    "repetition",
    "longest_loop",
    "compression",
    "distinct_1",
    "distinct_2",
    "kl",
    "change",
    "n_tokens",
)
"""What is averaged over the texts of a cell; the ratio is a geometric mean."""
ROWS_AT_ONCE = 96
"""Texts per batch: more are hardly faster on a CPU."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DoseResponse:
    """Texts at every strength, and what was measured of each."""

    table: pd.DataFrame
    """One row per text: kind (`steered`, a control, or one of UNSTEERED), emotion (target; empty where there is none), vector (whose direction), strength,
    scale (what the norms were multiplied with: the strength, or what was found for several layers and for controls at equal change), prompt (number), group, text, n_tokens, finished,
    finite, nll (mean per token, nats), nll_unsteered (of the unsteered text of the same prompt), repetition, longest_loop, compression, distinct_1,
    distinct_2, kl, change."""
    tokens: Int[Tensor, "text position"]
    """Token ids of each text; -1 behind its end."""
    limits: Float[Tensor, " length"]
    """Repetition that 99 % of ordinary stretches of that many tokens stay below (repetition.repetition_limits)."""
    norms: Float[Tensor, " layer"]
    """Reference norms behind the strengths (steering.residual_norms)."""
    prompts: tuple[str, ...]
    """What was continued."""
    emotions: tuple[str, ...]
    """Targets."""
    strengths: tuple[float, ...]
    """Shares of the residual norm, in order."""
    layers: tuple[int, ...]
    """0-based steered blocks."""
    scope: str
    """`response`, `prompt` or `all`."""
    mode: str
    """`add` or `clamp`."""
    form: str
    """How prompts stood before the texts: `chat`, `plain` or `continue`."""
    longest: int
    """Tokens asked for."""
    unit: str
    """`token` or `byte`: what nll is a mean over."""
    scorer: str
    """Model behind the perplexities."""
    seed: int
    """Of sampling and of controls."""
    name: str
    """Name of the prompts."""
    provenance: Provenance
    """Model, numerics, prompts, seed, versions."""

    @property
    def texts(self) -> tuple[str, ...]:
        """All texts, in the table's order: what judges read."""
        return tuple(self.table["text"])

    @property
    def kinds(self) -> tuple[str, ...]:
        """`steered` and the controls that were run."""
        return tuple(k for k in dict.fromkeys(self.table["kind"]) if k not in UNSTEERED)

    def column(self, name: str) -> np.ndarray:
        """One column of the table as an array."""
        return self.table[name].to_numpy()

    @property
    def log_ratio(self) -> Float[np.ndarray, " text"]:
        """Log of each text's perplexity over that of the unsteered text of its prompt; NaN where either is empty."""
        return self.column("nll").astype(float) - self.column("nll_unsteered").astype(float)

    @property
    def perplexity_unit(self) -> str:
        """What the perplexities are per, and under which model, in words."""
        own = self.scorer == self.provenance.title
        return f"per {self.unit}, under {'the unsteered model itself' if own else self.scorer}"

    @property
    def repeats(self) -> Float[np.ndarray, " text"]:
        """1 where a text repeats more than its limit for that many tokens, 0 where it does not, NaN where it is too short to say."""
        repetition = self.column("repetition").astype(float)
        limit = self.limits.numpy()[self.column("n_tokens").astype(int)]
        return np.where(np.isnan(repetition), np.nan, (repetition > limit).astype(float))

    @property
    def base_rate(self) -> float:
        """Share of unsteered texts that repeat more than their limit: small models loop by themselves."""
        plain = self.repeats[np.isin(self.column("kind"), UNSTEERED)]
        return float(np.nanmean(plain)) if np.isfinite(plain).any() else math.nan

    def control_changes(self) -> pd.DataFrame:
        """How far each control moved the stream beside the steered texts of one emotion and strength, on the prompts that both have.

        Random directions are the same for all emotions, so their texts were brought to the mean change over these; here they stand beside each of them.

        Returns:
            control, emotion, strength, change and steered (mean achieved changes), deviation (change / steered - 1); NaN where there is none.
        """
        change, prompt, cells = self.column("change").astype(float), self.column("prompt").astype(int), self.cells()
        rows = []
        for (kind, emotion, strength), beside in cells.items():
            for control in CONTROLS if kind == "steered" else ():
                own = cells.get((control, emotion, strength), cells.get((control, "", strength)))
                if own is not None:
                    own = own[np.isin(prompt[own], prompt[beside])]
                    moved, wanted = _mean_known(change[own]), _mean_known(change[beside])
                    off = moved / wanted - 1 if wanted else math.nan
                    rows.append([control, emotion, strength, moved, wanted, off])
        return pd.DataFrame(rows, columns=["control", "emotion", "strength", "change", "steered", "deviation"])

    @property
    def unequal(self) -> float:
        """Largest relative deviation of a control's achieved change from that of one emotion's steered texts at one strength (control_changes); NaN without
        controls."""
        off = np.abs(self.control_changes()["deviation"].to_numpy(float))
        return float(np.nanmax(off)) if np.isfinite(off).any() else math.nan

    def cells(self) -> dict[tuple[str, str, float], Int[np.ndarray, " row"]]:
        """Rows of the table by (kind, emotion, strength), in order of appearance."""
        found: dict[tuple[str, str, float], list[int]] = {}
        keys = zip(self.column("kind"), self.column("emotion"), self.column("strength"), strict=True)
        for row, (kind, emotion, strength) in enumerate(keys):
            found.setdefault((str(kind), str(emotion), float(strength)), []).append(row)
        return {key: np.array(rows) for key, rows in found.items()}

    def to_frame(self) -> pd.DataFrame:
        """One row per cell (kind, emotion, strength): every name of MEASURES with `_low` and `_high` (95 %, t over groups of prompts) and `_n` (texts that have a value), n
        (texts), n_empty."""
        groups, rows = self.column("group"), []
        measured = {m: self.column(m).astype(float) for m in MEASURES[1:]} | {MEASURES[0]: self.log_ratio}
        for (kind, emotion, strength), members in self.cells().items():
            row: dict[str, Any] = {"kind": kind, "emotion": emotion, "strength": strength}
            for measure in MEASURES:
                means = cluster_means(measured[measure][members], groups[members].tolist())
                limits = [math.nan] * 3
                if len(means):
                    found = mean_interval(means)
                    limits = [float(found.estimate), float(found.low), float(found.high)]
                if measure == MEASURES[0]:
                    limits = [math.exp(x) for x in limits]
                row |= dict(zip((measure, f"{measure}_low", f"{measure}_high"), limits, strict=True))
                row[f"{measure}_n"] = int(np.isfinite(measured[measure][members]).sum())
            rows.append(row | {"n": len(members), "n_empty": int((self.column("n_tokens")[members] == 0).sum())})
        return pd.DataFrame(rows)

    def save(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Save as a folder (see results.py)."""
        return save_result(self, folder, overwrite=overwrite)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "DoseResponse":
        """Load what `save` wrote."""
        return load_result(cls, folder)

    def __str__(self) -> str:
        log_ratio, repetition = self.log_ratio, self.column("repetition").astype(float)
        parts = []
        for strength in self.strengths:
            rows = (self.column("kind") == "steered") & (self.column("strength") == strength)
            known = rows & np.isfinite(log_ratio)
            ratio = math.exp(log_ratio[known].mean()) if known.any() else math.nan
            repeated = repetition[rows & np.isfinite(repetition)]
            parts.append(f"{strength:+g}: {ratio:.2f}, {repeated.mean() if len(repeated) else math.nan:.2f}")
        moved = self.column("change").astype(float)[self.column("kind") == "steered"]
        moved = moved[np.isfinite(moved)]
        layers = f"layer {self.layers[0]}" if len(self.layers) == 1 else f"layers {self.layers[0]} to {self.layers[-1]}"
        n_empty = int((self.column("n_tokens") == 0).sum())
        return (
            f"{self.provenance.title}, {self.name}: {len(self.emotions)} emotions x {len(self.strengths)} strengths at {layers}, "
            f"{len(self.prompts)} prompts of up to {self.longest} tokens, {len(self.table)} texts, {n_empty} empty\n"
            f"strength: ratio of perplexities ({self.perplexity_unit}), repeated 3-grams: {'; '.join(parts)}\n"
            f"the residual stream changes by up to {moved.max() if len(moved) else math.nan:.2f} of itself{self._equality()}\n"
            f"without steering {self.base_rate:.2f} of the texts repeat more than 99 % of ordinary prose does"
        )

    def _equality(self) -> str:
        """How equal the controls' changes are, and where they are least so, in words."""
        changes = self.control_changes().dropna(subset=["deviation"])
        if changes.empty:
            return ""
        worst = max(changes.to_dict("records"), key=lambda row: abs(row["deviation"]))
        # Random texts serve all emotions at once: over them the deviations can cancel.
        over = pd.DataFrame(changes.groupby(["control", "strength"])[["change", "steered"]].mean())
        mean = float(np.abs(over["change"].to_numpy(float) / over["steered"].to_numpy(float) - 1).max())
        return (
            f"; controls move it as far as the mean of the emotions to {100 * mean:.0f} %, as each emotion at each strength to {100 * self.unequal:.0f} % "
            f"(most: {worst['control'].replace('_', ' ')} beside {worst['emotion']} {worst['strength']:+g})"
        )

    def _repr_html_(self) -> str:
        cells = self.to_frame()[
            ["kind", "emotion", "strength", "perplexity_ratio", "repetition", "kl", "change", "n", "n_empty"]
        ]
        return (
            f"<p>{html.escape(str(self)).replace(chr(10), '<br>')}</p>{cells.round(3).to_html(index=False, border=0)}"
        )


def sweep_strengths(
    model: LensModel,
    vectors: EmotionVectors,
    prompts: Scenarios | Sequence[str],
    *,
    emotions: Sequence[str] | None = None,
    layers: int | Sequence[int] | None = None,
    strengths: Sequence[float] | str = "auto",
    controls: Sequence[str] = ("random", "other_emotion"),
    n_random: int = 1,
    scope: Scope = "response",
    mode: Mode = "add",
    n_tokens: int = 48,
    form: Form | None = None,
    scorer: LensModel | None = None,
    temperature: float = 0.7,
    top_p: float = 0.95,
    seed: int = 0,
    rows_at_once: int = ROWS_AT_ONCE,
    progress: Callable[[int, int], None] | None = None,
) -> DoseResponse:
    """Generate and score texts for every emotion, strength and prompt, with controls, in shared batches.

    Args:
        model: what is steered.
        vectors: directions of this model, read at resid_post.
        prompts: scenarios (requests for chat models, openings for base models), or texts.
        emotions: targets, of the vectors' emotions: every prompt is steered to each. None steers each scenario to its own target.
        layers: one block, several (doses are searched for so that the last one's output changes by the strength), or None for the middle one.
        strengths: shares of the residual norm, none of them 0; AUTO_STRENGTHS by default.
        controls: names from CONTROLS; each is written anew until its texts change the stream as much as the steered ones, to 5 %: another emotion's as
            those of the target, random ones as the mean over the emotions that they serve (DoseResponse.control_changes).
        n_random: random directions per prompt, of each kind.
        scope: `response`, `prompt` or `all`.
        mode: `add` or `clamp`.
        n_tokens: length limit of each text.
        form: `chat`, `plain` or `continue`; by default `chat` where the model has a template, else `continue` for scenarios, `plain` for texts.
        scorer: another model whose perplexity is taken; with another tokenizer it is per byte.
        temperature: of sampling.
        top_p: nucleus.
        seed: of sampling and of controls.
        rows_at_once: texts per batch.
        progress: called with (texts done, texts in all, which grows where controls are written anew).

    Raises:
        ValueError: no prompt, an unknown emotion, layer or control, prompts without targets and no emotions, a strength that makes no sense,
            vectors of another model or site, of too few emotions for a control, or prompts beyond the context window.

    Example:
        >>> sweep_strengths(model, vectors, load_scenarios("neutral"), emotions=["calm"], layers=14)  # doctest: +SKIP
    """
    clock = Stopwatch()
    planned = plan_sweep(
        *(model, vectors, prompts),
        **{"emotions": emotions, "layers": layers, "strengths": strengths, "controls": controls, "n_random": n_random},
        **{"mode": mode, "n_tokens": n_tokens, "form": form, "scorer": scorer, "seed": seed},
    )
    texts, groups, targets, doses, chosen, chosen_form, pushed = planned
    sampling: dict[str, Any] = {"max_new_tokens": n_tokens, "temperature": temperature, "top_p": top_p}
    plain = [Planned(kind, "", "", 0.0, p) for kind in UNSTEERED for p in range(len(texts))]
    writer = Writer(*(model, vectors, texts, chosen, scope, mode, chosen_form, seed, sampling, rows_at_once, progress))
    writer.expected = len(plain) + len(pushed)
    written = writer.write(plain)
    writer.reference = written[: len(texts)]
    written += writer.write_equal(pushed)
    table = _measured(written, groups)
    unit = _add_perplexity(table, written, texts, model, scorer, chosen_form)
    return DoseResponse(
        table=table,
        tokens=_padded([w.tokens for w in written]),
        limits=_limits(tuple(token_ids(model.tokenizer, text) for text in load_stimuli("passages").texts), n_tokens),
        norms=residual_norms(model),
        prompts=texts,
        emotions=tuple(dict.fromkeys(e for of_prompt in targets for e in of_prompt)),
        strengths=tuple(sorted(doses)),
        layers=chosen,
        scope=scope,
        mode=mode,
        form=chosen_form,
        longest=n_tokens,
        unit=unit,
        scorer=model_info(model if scorer is None else scorer).provenance.title,
        seed=seed,
        name=prompts.name if isinstance(prompts, Scenarios) else "prompts",
        provenance=model_info(model).provenance.updated(
            stimuli_hash=content_hash(texts, groups), seed=seed, elapsed_seconds=clock.seconds
        ),
    )


class SweepPlan(NamedTuple):
    """What a sweep is about to write."""

    texts: tuple[str, ...]
    """Prompts as they are continued."""
    groups: tuple[str, ...]
    """Group of each."""
    targets: tuple[tuple[str, ...], ...]
    """Emotions that each is steered to."""
    doses: tuple[float, ...]
    """Strengths."""
    layers: tuple[int, ...]
    """0-based steered blocks."""
    form: Form
    """How prompts stand before the texts."""
    pushed: list[Planned]
    """Steered texts and controls, before any is written anew."""


def plan_sweep(
    model: LensModel,
    vectors: EmotionVectors,
    prompts: Scenarios | Sequence[str],
    *,
    emotions: Sequence[str] | None = None,
    layers: int | Sequence[int] | None = None,
    strengths: Sequence[float] | str = "auto",
    controls: Sequence[str] = ("random", "other_emotion"),
    n_random: int = 1,
    mode: str = "add",
    n_tokens: int = 48,
    form: Form | None = None,
    scorer: LensModel | None = None,
    seed: int = 0,
) -> SweepPlan:
    """Everything that sweep_strengths checks before it writes a text, and the texts that it will write; arguments and errors are those of sweep_strengths."""
    chosen_form = form or (
        "continue" if isinstance(prompts, Scenarios) and form_of(model) == "plain" else form_of(model)
    )
    texts = (
        prompts.prompts("continue" if chosen_form == "continue" else "chat")
        if isinstance(prompts, Scenarios)
        else tuple(prompts)
    )
    groups = prompts.groups if isinstance(prompts, Scenarios) else tuple(f"prompt {i}" for i in range(len(texts)))
    doses = AUTO_STRENGTHS if isinstance(strengths, str) else tuple(float(s) for s in strengths)
    chosen = choose_layers(layers, int(model.cfg.n_layers))
    targets = _targets(prompts, emotions, len(texts))
    _check(model, vectors, texts, targets, doses, controls, n_random, mode)
    pushed = plan_controls(targets, doses, controls, n_random, vectors.emotions, seed)
    for layer in chosen:
        vectors.vector(vectors.emotions[0], layer)
    for reader, name in ((model, "the model"), (scorer, "the scorer")):
        if reader is not None:
            _check_window(reader, name, texts, chosen_form, n_tokens)
    return SweepPlan(texts, groups, targets, doses, chosen, chosen_form, pushed)


def _targets(prompts: Scenarios | Sequence[str], emotions: Sequence[str] | None, n: int) -> tuple[tuple[str, ...], ...]:
    """Emotions that each prompt is steered to."""
    if emotions is None:
        if not isinstance(prompts, Scenarios) or NEUTRAL in prompts.emotions:
            raise ValueError(
                "received prompts without targets and emotions=None; name the emotions, or use load_scenarios()"
            )
        return tuple((target,) for target in prompts.emotions)
    if isinstance(emotions, str) or not emotions:
        raise ValueError(f"received emotions={emotions!r}; allowed is a list with at least one emotion of the vectors")
    return (tuple(emotions),) * n


def _check(
    model: LensModel,
    vectors: EmotionVectors,
    texts: Sequence[str],
    targets: Sequence[Sequence[str]],
    doses: Sequence[float],
    controls: Sequence[str],
    n_random: int,
    mode: str,
) -> None:
    if not texts or not all(text.strip() for text in texts):
        raise ValueError(f"received {len(texts)} prompts, or an empty one; allowed are one or more texts")
    for emotion in {e for of_prompt in targets for e in of_prompt}:
        vectors.vector(emotion, vectors.layers[0])
    if not doses or len(set(doses)) != len(doses) or 0.0 in doses:
        raise ValueError(
            f"received strengths {list(doses)}; allowed are different ones other than 0, which is always run"
        )
    for dose in doses:
        check_strength(dose)
    unknown = [c for c in controls if c not in CONTROLS]
    if unknown:
        raise ValueError(f"received controls {unknown}; allowed are {list(CONTROLS)}")
    if n_random < 1:
        raise ValueError(
            f"received n_random={n_random}; allowed is 1 or more (leave 'random' out of controls for none)"
        )
    if mode not in ("add", "clamp"):
        raise ValueError(f"received mode={mode!r}; allowed are 'add' and 'clamp', which have a strength")
    require_steerable(model, vectors)


def _measured(written: Sequence[PushedText], groups: Sequence[str]) -> pd.DataFrame:
    rows = []
    for one in written:
        row = one.row._asdict() | {
            "scale": one.scale,
            "group": groups[one.row.prompt],
            "text": one.text,
            "n_tokens": len(one.tokens),
        }
        row |= {"finished": one.finished, "finite": one.finite, "nll": one.nll, "nll_unsteered": math.nan}
        row |= {
            "repetition": repetition_share(one.tokens),
            "longest_loop": longest_loop(one.tokens),
            "compression": compression_ratio(one.text),
            "distinct_1": distinct_share(one.tokens, n=1),
            "distinct_2": distinct_share(one.tokens, n=2),
            "kl": one.kl,
            "change": one.change,
        }
        rows.append(row)
    return pd.DataFrame(rows)


def _add_perplexity(
    table: pd.DataFrame,
    written: Sequence[PushedText],
    prompts: Sequence[str],
    model: LensModel,
    scorer: LensModel | None,
    form: Form,
) -> str:
    """nll under another scorer where there is one; nll of the unsteered text of the same prompt; what nll is a mean over."""
    unit = "token"
    if scorer is not None:
        heads = _heads_of(scorer, prompts, form)
        alike = scorer.tokenizer.get_vocab() == model.tokenizer.get_vocab()
        responses = [w.tokens if alike else token_ids(scorer.tokenizer, w.text) for w in written]
        window = context_window(scorer)
        # Texts are never lost to a scorer that cannot read them: those have no perplexity.
        read = [
            r if len(heads[w.row.prompt]) + len(r) <= window else () for w, r in zip(written, responses, strict=True)
        ]
        if lost := sum(len(r) > 0 for r in responses) - sum(len(r) > 0 for r in read):
            log.warning(
                "%d texts are beyond the scorer's context window of %d tokens and have no perplexity", lost, window
            )
        scores = score_texts(scorer, [heads[w.row.prompt] for w in written], read)
        nll = scores.nll.double()
        if not alike:
            unit = "byte"
            nll = nll * scores.n_tokens / torch.tensor([max(1, len(w.text.encode())) for w in written])
        table["nll"] = nll.numpy()
    plain = table["nll"].to_numpy(float)[: len(prompts)]  # the unsteered texts stand first
    table["nll_unsteered"] = plain[table["prompt"].to_numpy(int)]
    return unit


def _heads_of(scorer: LensModel, prompts: Sequence[str], form: Form) -> list[tuple[int, ...]]:
    return [encode_prompt(scorer, text, form=form if form != "chat" else form_of(scorer))[0] for text in prompts]


def _check_window(reader: LensModel, name: str, prompts: Sequence[str], form: Form, n_tokens: int) -> None:
    """Refuse what does not fit the window before texts are written; with a tokenizer of its own a scorer may need more tokens than asked for."""
    longest, window = max(map(len, _heads_of(reader, prompts, form))), context_window(reader)
    if longest + n_tokens > window:
        raise ValueError(
            f"received prompts of up to {longest} tokens and n_tokens={n_tokens}; the context window of {name}, {model_info(reader).provenance.title}, holds "
            f"{window}: shorten them"
        )


def _mean_known(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else math.nan


@lru_cache(maxsize=4)
def _limits(references: tuple[tuple[int, ...], ...], longest: int) -> Float[Tensor, " length"]:
    return torch.from_numpy(repetition_limits(references, longest)).float()


def _padded(tokens: Sequence[Sequence[int]]) -> Int[Tensor, "text position"]:
    found = torch.full((len(tokens), max(1, *map(len, tokens))), -1, dtype=torch.long)
    for i, ids in enumerate(tokens):
        found[i, : len(ids)] = torch.tensor(ids, dtype=torch.long)
    return found
