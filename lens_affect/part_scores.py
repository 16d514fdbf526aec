"""What single modules of a tuned model are worth for a task.

Four ways to ask, all against the untuned and the tuned model: put a module's change alone into the base (`transfer`: is it enough?), take it out of
the tuned model (`revert`: is it needed?), put noise of its size in its place (`random_equal_norm`: or would any change do?), and add noise to the
module until language is damaged by a stated amount (`equal_damage`: does the task depend on it more than language does?).
"""

import contextlib
import hashlib
import html
import itertools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from lens_affect.ablations import ablate_modules
from lens_affect.adapter import model_info
from lens_affect.checkpoint_pairs import require_same_base
from lens_affect.checkpoints import open_checkpoint
from lens_affect.damage import equal_damage
from lens_affect.live_weights import EVERYTHING, choose_keys, replaced
from lens_affect.module_table import POWER, TwoWay, two_way_interval, two_way_ratio
from lens_affect.results import Provenance, Stopwatch, load_result, save_result
from lens_affect.sizes import choose_modules
from lens_affect.task_data import Example
from lens_affect.tasks import Task, TaskScores, examples_hash
from lens_affect.transfers import live_weights, transfer_modules
from lens_affect.tuned import Tuned

KINDS = ("transfer", "revert", "random_equal_norm", "equal_damage")
"""What is done to a module."""


@dataclass(frozen=True)
class PartScores:
    """Scores of one task with single modules changed, over the seeds of a fine-tune. For a loss, scores are turned so that high is good."""

    kind: str
    """One of KINDS."""
    arms: tuple[str, ...]
    """Modules of each arm, such as `gate` or `gate+up`."""
    seeds: tuple[int, ...]
    """Seed of each fine-tune."""
    scores: Float[Tensor, "arm seed example"]
    """Score of each example."""
    before: Float[Tensor, " example"]
    """Of the untuned model."""
    after: Float[Tensor, "seed example"]
    """Of the tuned ones."""
    scales: Float[Tensor, "arm seed"]
    """Scale of the noise for `equal_damage` (c of c |W|), NaN where the damage was not reached; 1 for the others."""
    rises: Float[Tensor, "arm seed"]
    """Rise of the loss on neutral text through `equal_damage`, nats per token; NaN for the others."""
    tuned: tuple[str, ...]
    """What was scored, one per seed: a hash of a run's trained weights, or the name of a checkpoint."""
    target: float
    """Rise that was asked of `equal_damage`; NaN for the others."""
    groups: tuple[str, ...]
    """Of the examples; resampled together."""
    title: str
    """Task as a reader knows it."""
    metric: str
    """What scores are."""
    provenance: Provenance
    """Of the base and this step."""

    def to_frame(self) -> pd.DataFrame:
        """One row per arm: arm, n_seeds, n, score, low, high, share, share_low, share_high.

        `share` is the share of the gain of tuning that the arm brings (`transfer`) or that goes with it (the others): 0 is nothing, 1 all of it.
        Intervals are over seeds and examples.
        """
        rows = []
        for arm in self.arms:
            values, after = self._kept(arm)
            row = {"arm": arm, "n_seeds": len(values), "n": len(self.before)}
            row |= dict.fromkeys(("score", "low", "high", "share", "share_low", "share_high"), math.nan)
            if len(values):
                score = two_way_interval(values, self.groups)
                row |= {"score": score.estimate, "low": score.low, "high": score.high}
                row |= dict(zip(("share", "share_low", "share_high"), self._share(values, after), strict=True))
            rows.append(row)
        return pd.DataFrame(rows)

    def _kept(self, arm: str) -> tuple[np.ndarray, np.ndarray]:
        """Scores of an arm, and of the tuned model, at the seeds that were measured."""
        values = self.scores[self._place(arm)].double().numpy()
        known = np.isfinite(values).all(axis=1)
        return values[known], self.after.double().numpy()[known]

    def _share(self, values: np.ndarray, after: np.ndarray) -> tuple[float, float, float]:
        before = self.before.double().numpy()[None]
        if not two_way_interval(after - before, self.groups).low > 0:  # NaN too
            return math.nan, math.nan, math.nan  # nothing was gained for certain: there is nothing to have a share of
        top = values - before if self.kind == "transfer" else after - values
        return two_way_ratio(top, after - before, self.groups)

    def _place(self, arm: str) -> int:
        if arm not in self.arms:
            raise ValueError(f"received the arm {arm!r}; allowed are {list(self.arms)}")
        return self.arms.index(arm)

    def contrast(self, arm: str, other: str) -> TwoWay:
        """How much more one arm matters than another: what it brings more (`transfer`) or what is lost more without it (the others), in units of the
        score, paired over seeds and examples.

        Args:
            arm: such as `gate`.
            other: such as `up`.

        Raises:
            ValueError: an arm that is not there, or arms without a common seed.
        """
        one, two = (self.scores[self._place(name)].double().numpy() for name in (arm, other))
        known = np.isfinite(one).all(axis=1) & np.isfinite(two).all(axis=1)
        if not known.any():
            raise ValueError(f"received {arm!r} and {other!r}, which were not measured at a common seed")
        sign = 1.0 if self.kind == "transfer" else -1.0
        return two_way_interval(sign * (one - two)[known], self.groups)

    @property
    def detectable(self) -> float:
        """True difference between two arms, in units of the score, that this design sees four times out of five: median over the pairs, NaN without one."""
        found = []
        for arm, other in itertools.combinations(self.arms, 2):
            with contextlib.suppress(ValueError):  # never measured at a common seed
                found.append(self.contrast(arm, other).detectable)
        known = [value for value in found if math.isfinite(value)]
        return float(np.median(known)) if known else math.nan

    def save(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Save as a folder (see results.py)."""
        return save_result(self, folder, overwrite=overwrite)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "PartScores":
        """Load what `save` wrote."""
        return load_result(cls, folder)

    def __str__(self) -> str:
        words = {
            "transfer": "share of the gain that a module alone brings to the untuned model",
            "revert": "share of the gain that goes when a module is taken back",
            "random_equal_norm": "share of the gain that goes when noise takes the place of a module's change",
            "equal_damage": f"share of the gain that goes when noise raises the loss on neutral text by {self.target:.2f} nats",
        }
        table = self.to_frame()
        parts = [
            f"{row['arm']} {row['share']:.2f} [{row['share_low']:.2f}, {row['share_high']:.2f}]"
            for row in table.to_dict("records")
            if math.isfinite(row["share"])
        ]
        sign = -1.0 if self.metric == "nats per token" else 1.0  # scores of a loss are turned
        told = ", ".join(parts) or f"none, nothing was gained for certain; scores: {self._told_scores(sign)}"
        return (
            f"{self.provenance.title} on {self.title}: {self.metric} {sign * float(self.before.mean()):.3f} untuned, {sign * float(self.after.mean()):.3f} tuned\n"
            f"{words[self.kind]} (95 %): {told}\n"
            f"{len(self.before)} examples, {len(self.seeds)} seeds; minimum detectable difference between two arms {self.detectable:.3f} (median, power "
            f"{POWER:.0%})"
        )

    def _told_scores(self, sign: float) -> str:
        """What is told where there are no shares."""
        rows = self.to_frame().to_dict("records")
        limits = {row["arm"]: sorted((sign * row["low"], sign * row["high"])) for row in rows}
        return ", ".join(
            f"{r['arm']} {sign * r['score']:.3f} [{limits[r['arm']][0]:.3f}, {limits[r['arm']][1]:.3f}]"
            for r in rows
            if math.isfinite(r["score"])
        )

    def _repr_html_(self) -> str:
        text = html.escape(str(self)).replace("\n", "<br>")
        return f"<p>{text}</p>{self.to_frame().round(3).to_html(index=False, border=0)}"


def score_parts(
    model: Any,
    tuned: Any,
    task: Task,
    *,
    arms: Sequence[str] = ("gate", "up", "down", "attention"),
    kind: str = "transfer",
    examples: Sequence[Example] | None = None,
    seed: int = 0,
    target: float = 0.3,
    measure: str = "score",
    before: TaskScores | None = None,
    after: TaskScores | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> PartScores:
    """Score a task with each arm's modules transferred, reverted, replaced by noise, or damaged.

    Args:
        model: the base, a bridge in memory; it is as before afterwards.
        tuned: what was tuned from it: a run of tune_module, an adapter, a folder, a hub id, or a model in memory.
        task: what is scored.
        arms: modules of each arm: names and groups, such as `gate`, `gate+up`, `attention`.
        kind: one of KINDS.
        examples: to score; the task's test split by default.
        seed: of noise, and what the fine-tune is called in a join.
        target: rise of the loss on neutral text for `equal_damage`, nats per token.
        measure: `score`, or `log_share`: log of the right label's share among all labels, finer than accuracy.
        before: scores of the untuned model on the same examples, where they are known already.
        after: the same of the tuned model.
        progress: called with (arms done, arms in all).

    Returns:
        Scores of one fine-tune; `join_parts` puts several seeds together.

    Raises:
        ValueError: an unknown kind, measure or module, no arm, scores of other examples, or checkpoints that do not fit.

    Example:
        >>> print(score_parts(model, run, task, kind="revert"))  # doctest: +SKIP
    """
    if kind not in KINDS or measure not in ("score", "log_share") or not arms:
        raise ValueError(
            f"received kind {kind!r}, measure {measure!r} and the arms {list(arms)}; allowed are the kinds {list(KINDS)}, the measures "
            "'score' and 'log_share', and at least one arm"
        )
    watch, chosen = Stopwatch(), task.examples("test") if examples is None else tuple(examples)
    for arm in arms:
        choose_modules(arm, present=open_checkpoint(model).modules)
    require_same_base(model, tuned)
    hashed = examples_hash(task, chosen)
    for known in (before, after):
        if known is not None and known.provenance.stimuli_hash != hashed:
            raise ValueError(
                f"received scores of {len(known.values)} other examples for the {len(chosen)} given; allowed are scores of the same ones"
            )

    def score() -> TaskScores:
        return task.score(model, chosen, seed=0)

    first = before or score()
    with _whole(model, tuned):
        last = after or score()
        scales, rises = _scales(model, arms, kind, target, seed)
    start, end = _turned(first, measure), _turned(last, measure)
    found = []
    for i, arm in enumerate(arms):
        if math.isnan(scales[i]):
            found.append(torch.full_like(start, math.nan))
        else:
            with _changed(model, tuned, arm, kind, scales[i], seed):
                found.append(_turned(score(), measure))
        if progress:
            progress(i + 1, len(arms))
    return PartScores(
        kind=kind,
        arms=tuple(arms),
        seeds=(seed,),
        scores=torch.stack(found)[:, None],
        before=start,
        after=end[None],
        scales=torch.tensor(scales, dtype=torch.float32)[:, None],
        rises=torch.tensor(rises, dtype=torch.float32)[:, None],
        tuned=(fingerprint(tuned),),
        target=target if kind == "equal_damage" else math.nan,
        groups=first.groups,
        title=task.title,
        metric=first.metric if measure == "score" else "log share of the right label",
        provenance=model_info(model).provenance.updated(seed=seed, stimuli_hash=hashed, elapsed_seconds=watch.seconds),
    )


def fingerprint(tuned: Any) -> str:
    """What tells one fine-tune from another: a hash of what a run trained, else its name.

    Args:
        tuned: as for score_parts.
    """
    if not isinstance(tuned, Tuned):
        return str(getattr(tuned, "name_or_path", tuned) if not isinstance(tuned, str | Path) else tuned)
    digest = hashlib.sha256()
    for name, value in sorted(tuned.trained.items()):
        digest.update(f"{name}{tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _turned(scores: TaskScores, measure: str) -> Float[Tensor, " example"]:
    """High is good."""
    values = scores.values if measure == "score" else scores.gold_log_probability()
    return values if scores.better == "high" or measure == "log_share" else -values


def _whole(model: Any, tuned: Any) -> contextlib.AbstractContextManager[Any]:
    return transfer_modules(model, tuned, modules=EVERYTHING, any_base=True)


def _scales(model: Any, arms: Sequence[str], kind: str, target: float, seed: int) -> tuple[list[float], list[float]]:
    if kind != "equal_damage":
        return [1.0] * len(arms), [math.nan] * len(arms)
    found = equal_damage(model, arms=arms, target=target, seed=seed)
    return [float(s) for s in found.scales], [float(r) for r in found.rise]


@contextlib.contextmanager
def _changed(model: Any, tuned: Any, arm: str, kind: str, scale: float, seed: int) -> Iterator[None]:
    """The model with what is asked for in place."""
    with contextlib.ExitStack() as inside:
        if kind == "transfer":
            inside.enter_context(transfer_modules(model, tuned, modules=arm, any_base=True))
            yield
            return
        live = live_weights(model)
        base = {key: live.read(key) for key in choose_keys(live.checkpoint, arm)}
        inside.enter_context(_whole(model, tuned))
        if kind == "equal_damage":
            inside.enter_context(ablate_modules(model, modules=arm, how="random_equal_norm", scale=scale, seed=seed))
        else:
            inside.enter_context(replaced(live, base.items(), f"{arm} back to the base"))
        if kind == "random_equal_norm":
            inside.enter_context(ablate_modules(model, modules=arm, how=kind, tuned=tuned, seed=seed))
        yield


def join_parts(parts: Sequence[PartScores]) -> PartScores:
    """Scores of several seeds as one result.

    Args:
        parts: of the same kind, arms, task and examples, each of other seeds.

    Raises:
        ValueError: none, or parts that do not belong together.
    """
    kinds = {
        (p.kind, p.arms, p.metric, str(p.target), p.provenance.stimuli_hash, p.provenance.weights_sha256) for p in parts
    }
    seeds = [seed for p in parts for seed in p.seeds]
    if len(kinds) != 1 or len(set(seeds)) < len(seeds):
        raise ValueError(
            f"received {len(parts)} parts of {len(kinds)} kinds with the seeds {seeds}; allowed are parts of one kind, model and set of examples, "
            "with different seeds"
        )
    first = parts[0]
    joined: dict[str, Any] = {
        name: torch.cat([getattr(p, name) for p in parts], dim=1) for name in ("scores", "scales", "rises")
    }
    joined["after"] = torch.cat([p.after for p in parts])
    joined["tuned"] = tuple(name for p in parts for name in p.tuned)
    rest = {n: getattr(first, n) for n in first.__dataclass_fields__ if n not in joined}
    return PartScores(**{**rest, **joined, "seeds": tuple(seeds)})
