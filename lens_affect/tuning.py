"""Tune chosen linear maps of a model on a task, and put the model back exactly as it was.

Only the arm's maps learn: through LoRA (peft), or themselves. The loss is on the answer's tokens over the whole vocabulary. Every arm gets its
learning rate by the same rule: the one with the lowest validation loss after a few steps, looked for up or down from a first one. A loss that is not finite, or that explodes,
ends the arm; it is recorded as such, and the model is restored all the same.
"""

import contextlib
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from lens_affect.adapter import LensModel, model_info
from lens_affect.answers import AnswerBatch, answer_loss, answer_scores, encode_rows, make_batch
from lens_affect.arms import Arm, plan_arm
from lens_affect.results import Stopwatch
from lens_affect.sizes import module_shapes
from lens_affect.statistics import derive_generator
from lens_affect.task_data import Example
from lens_affect.tasks import Task, TaskScores
from lens_affect.trainable import linear_maps, trainable
from lens_affect.tuned import Tuned, require_peft
from lens_affect.tuning_plans import MOST_TRIES, RATE_STEPS

log = logging.getLogger(__name__)

FIRST_RATE = {"lora": 8e-3, "full": 1e-4}
"""Learning rate that the rule tries first, by method."""
RATE_FACTOR = 4.0
"""The next rate is this many times higher or lower."""
WARM_UP = 0.1
"""Share of the steps in which the rate rises; it falls to 0 along a line after that."""
EXPLODED = 3.0
"""A training loss above this many times the first one, in nats plus one, counts as exploded."""


class NoRateError(RuntimeError):
    """The loss exploded at every learning rate."""


def tune_module(
    model: Any,
    task: Task,
    *,
    modules: str | Sequence[str],
    method: str = "lora",
    rank: int | None = None,
    n_parameters: int | None = None,
    layers: Sequence[int] | None = None,
    steps: int = 100,
    seed: int = 0,
    rate: float | None = None,
    batch_size: int = 16,
    max_tokens: int = 32,
    check_every: int = 20,
    patience: int = 2,
    n_validation: int = 96,
    test: Sequence[Example] | None = None,
    before: TaskScores | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Tuned:
    """Train the maps of one arm on a task and score the model before and after; the model itself is unchanged afterwards.

    Args:
        model: a bridge in float32.
        task: what is learned (its training examples) and scored (its test examples).
        modules: a module, a group (attention, mlp, all, none), several of these, or `random`.
        method: `lora` or `full`.
        rank: of LoRA (equal rank); 4 where no size is given.
        n_parameters: weights to train instead (equal size).
        layers: 0-based blocks; all by default.
        steps: of AdamW, without weight decay, gradients clipped to norm 1; warm-up over a tenth of them, then down to 0 along a line.
        seed: of LoRA's start, of the batches, of random maps.
        rate: highest learning rate; by default `choose_rate` picks one for this arm.
        batch_size: examples in a step, of alike lengths.
        max_tokens: longest training example; longer ones are left out.
        check_every: steps between looks at the validation loss.
        patience: looks without improvement after which training stops; the best weights are kept.
        n_validation: validation examples.
        test: examples to score; the task's test split by default.
        before: scores of the untuned model on the same examples, where they are known already.
        progress: called with (steps done, steps).

    Returns:
        The arm with its learning curve, scores and trained weights.

    Raises:
        ValueError: an unknown module, a size that cannot be met, a model that is not in float32, or too few examples.
        TypeError: no bridge.
    """
    arm = _plan(model, modules, method, rank, n_parameters, layers, seed)
    chosen = task.examples("test") if test is None else tuple(test)
    before = before or task.score(model, chosen, seed=seed)
    clock = Stopwatch()
    if not arm.ranks:
        return _untuned(model, arm, task, seed, before, clock)
    data = _read_data(model, task, seed, steps, batch_size, max_tokens, n_validation)
    if rate is None:
        try:
            rate = _best_rate(model, arm, data, seed)
        except NoRateError as error:
            log.warning("%s", error)
            return _untuned(model, arm, task, seed, before, clock, str(error))
    with trainable(model, arm, seed) as parameters:
        cost = _Cost()
        run = _train(model, parameters, data, rate, check_every, patience, progress)
        spent = cost.spent()
        trained = {name: value.detach().clone() for name, value in parameters.items()}
        after = before if run.exploded else task.score(model, chosen, seed=seed)
    if run.exploded:
        after = _unmeasured(before)
        log.warning("%s exploded: %s", arm, run.note)
    return Tuned(
        arm=arm,
        task=task.name,
        seed=seed,
        rate=rate,
        steps=steps,
        best_step=run.best_step,
        exploded=run.exploded,
        note=run.note,
        curve=run.curve,
        before=before,
        after=after,
        trained=trained,
        seconds=spent[0],
        cpu_seconds=spent[1],
        peak_megabytes=spent[2],
        provenance=model_info(model).provenance.updated(
            seed=seed, stimuli_hash=before.provenance.stimuli_hash, elapsed_seconds=clock.seconds
        ),
    )


def choose_rate(
    model: Any,
    task: Task,
    *,
    modules: str | Sequence[str],
    method: str = "lora",
    rank: int | None = None,
    n_parameters: int | None = None,
    layers: Sequence[int] | None = None,
    seed: int = 0,
    first: float | None = None,
    batch_size: int = 16,
    max_tokens: int = 32,
    n_validation: int = 96,
) -> float:
    """The rule by which every arm gets its learning rate: validation loss after RATE_STEPS steps, climbed up or down in factors of four.

    Args:
        model: a bridge in float32.
        task: what is learned.
        modules: as in `tune_module`, like the following ones.
        method: `lora` or `full`.
        rank: of LoRA.
        n_parameters: weights to train instead.
        layers: 0-based blocks.
        seed: as in `tune_module`; a campaign tunes the rate once per arm and uses it for all seeds.
        first: rate that is tried first; FIRST_RATE by default. From there the rule climbs in steps of RATE_FACTOR.
        batch_size: examples in a step.
        max_tokens: longest training example.
        n_validation: validation examples.

    Raises:
        ValueError: as `tune_module`.
        NoRateError: the loss exploded at every rate.
    """
    arm = _plan(model, modules, method, rank, n_parameters, layers, seed)
    data = _read_data(model, task, seed, RATE_STEPS, batch_size, max_tokens, n_validation)
    return _best_rate(model, arm, data, seed, first)


def run_arms(
    model: Any,
    task: Task,
    *,
    modules: Sequence[str],
    seeds: Sequence[int] = (0, 1, 2),
    method: str = "lora",
    rank: int = 4,
    equal_size: bool = False,
    steps: int = 100,
    n_test: int | None = None,
    folder: str | os.PathLike[str] | None = None,
    report: Callable[[str], Any] | None = None,
) -> dict[str, list[Tuned]]:
    """Tune several arms with several seeds, seed by seed, so that what is there when it is interrupted is a balanced comparison.

    Args:
        model: a bridge in float32.
        task: what is learned and scored.
        modules: one arm each, as in `tune_module`.
        seeds: one run of each arm per seed. The learning rate is chosen with the first one.
        method: `lora` or `full`.
        rank: of LoRA.
        equal_size: every arm but `all` trains as many weights as the gate does at this rank (up, in a model without a gate).
        steps: of training.
        n_test: test examples, drawn at random; all by default.
        folder: where runs are kept, one folder each; finished ones are read instead of run again.
        report: `report(name)` gives a context manager for one run; what it yields is called with (steps done, steps).

    Returns:
        Runs by arm, in the order of the seeds: what `compare_arms` takes.

    Raises:
        ValueError: as `tune_module`; or a folder that holds runs of another model, task or size.
    """
    if not modules or not seeds:
        raise ValueError(f"received modules={list(modules)} and seeds={list(seeds)}; allowed is at least one of each")
    config, place = model.original_model.config, Path(folder) if folder is not None else None
    kinds = {name: arm_size(config, name, method, rank, equal_size) for name in modules}
    for name, kind in kinds.items():
        _plan(model, name, method, kind.get("rank"), kind.get("n_parameters"), None, seeds[0])  # wrong names end here
    test = task.examples("test") if n_test is None else task.examples("test", n=n_test)
    before: TaskScores | None = None
    rates: dict[str, float] = {}
    found: dict[str, list[Tuned]] = {name: [] for name in modules}
    for seed in seeds:
        for name, kind in kinds.items():
            saved = place / f"{name}-seed{seed}" / "tuned" if place is not None else None
            if saved is not None and (saved / "manifest.json").is_file():
                done = _require_same(Tuned.load(saved), model, task, name, steps, len(test), kind, seed, method)
            else:
                before = before or task.score(model, test)
                with (report or silent)(f"{name}, seed {seed}") as progress:
                    done = tune_module(
                        *(model, task),
                        modules=name,
                        method=method,
                        steps=steps,
                        seed=seed,
                        rate=rates.get(name),
                        test=test,
                        before=before,
                        progress=progress,
                        **kind,
                    )
                if saved is not None:
                    done.save(saved)
            before = before or done.before
            if not done.exploded:
                rates.setdefault(name, done.rate)
            found[name].append(done)
    return found


def arm_size(config: Any, name: str, method: str, rank: int, equal_size: bool) -> dict[str, Any]:
    """Rank or size of an arm as `plan_arm` takes it.

    Args:
        config: of the model.
        name: of the arm.
        method: `lora` or `full`.
        rank: of LoRA.
        equal_size: as many weights as the gate at this rank, or in full tuning as the smallest of gate, up, down and attention; `all` and `none`
            keep what they are, and `random` has the gate's size at this rank by itself.
    """
    if method == "full":
        if not equal_size or name in ("all", "none"):
            return {}
        present = module_shapes(config)
        rivals = [m for m in ("gate", "up", "down") if m in present] + ["attention"]
        return {"n_parameters": min(plan_arm(config, m, method="full").n_parameters for m in rivals)}
    if not equal_size or name in ("all", "none", "random"):
        return {"rank": rank}
    like = "gate" if "gate" in module_shapes(config) else "up"
    return {"n_parameters": plan_arm(config, like, rank=rank).n_parameters}


def _require_same(
    done: Tuned,
    model: Any,
    task: Task,
    name: str,
    steps: int,
    n_test: int,
    kind: Mapping[str, Any],
    seed: int,
    method: str,
) -> Tuned:
    arm = _plan(model, name, method, kind.get("rank"), kind.get("n_parameters"), None, seed)
    there = (done.provenance.weights_sha256, done.task, done.arm.n_parameters, done.arm.method, done.before.n)
    here = (model_info(model).provenance.weights_sha256, task.name, arm.n_parameters, method, n_test)
    if there != here or done.steps not in (0, steps):
        raise ValueError(
            f"received a folder with the run {name}, seed {seed}, of {done.provenance.title} on {done.task} ({done.arm.n_parameters} weights, "
            f"{done.steps} steps, {done.before.n} test rows), which is not what is asked for: choose another folder"
        )
    return done


@contextlib.contextmanager
def silent(name: str) -> Iterator[None]:
    """What a long run reports to where nobody asked.

    Args:
        name: of the step.
    """
    yield None


def _plan(
    model: Any,
    modules: str | Sequence[str],
    method: str,
    rank: int | None,
    n_parameters: int | None,
    layers: Sequence[int] | None,
    seed: int,
) -> Arm:
    maps = linear_maps(model)
    dtype = next(iter(maps.values()))[1].weight.dtype
    if dtype != torch.float32:
        raise ValueError(f"received a model in {dtype}; tuning needs float32: load_model(..., dtype=torch.float32)")
    if method == "lora":
        require_peft()
        rank = 4 if rank is None and n_parameters is None else rank
    config = model.original_model.config
    return plan_arm(config, modules, method=method, rank=rank, n_parameters=n_parameters, layers=layers, seed=seed)


Row = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class _Data:
    batches: list[AnswerBatch]
    validation: list[tuple[str, str]]


def _read_data(
    model: LensModel, task: Task, seed: int, steps: int, batch_size: int, max_tokens: int, n_validation: int
) -> _Data:
    if steps < 1 or batch_size < 1:
        raise ValueError(f"received steps={steps} and batch_size={batch_size}; allowed are whole numbers from 1")
    examples = task.examples("train")
    if not examples or not task.examples("validation"):
        raise ValueError(
            f"received the task {task.name}, which has no training or validation examples; choose one that has"
        )
    order = derive_generator(seed, "training examples").permutation(len(examples)).tolist()
    rows: list[Row] = []
    left_out = 0
    while len(rows) < steps * batch_size:  # small sets are read several times, in the same order
        before = len(rows)
        for i in order:
            if len(rows) == steps * batch_size:
                break
            prompt, answer = task.prompt(examples[i]), task.answer(examples[i])
            (row,) = encode_rows(model, [prompt], [answer])
            if len(row[0]) + len(row[1]) - 1 <= max_tokens:
                rows.append(row)
            else:
                left_out += 1
        if len(rows) == before:
            raise ValueError(f"received max_tokens={max_tokens}; no training example of {task.name} is that short")
    if left_out:
        log.info(
            "%d training examples of %s are longer than %d tokens and were left out", left_out, task.name, max_tokens
        )
    available = task.examples("validation")
    kept = task.examples("validation", n=min(n_validation, len(available)), seed=seed)
    return _Data(
        [make_batch(model, batch) for batch in _bucketed(rows, batch_size, seed)],
        [(task.prompt(e), task.answer(e)) for e in kept],
    )


def _bucketed(rows: list[Row], batch_size: int, seed: int) -> list[list[Row]]:
    """Batches of alike lengths, in random order: rows are sorted within windows of eight batches, so no batch waits for one long row."""
    rng, batches = derive_generator(seed, "batches"), []
    for first in range(0, len(rows), 8 * batch_size):
        window = sorted(rows[first : first + 8 * batch_size], key=lambda row: len(row[0]) + len(row[1]))
        found = [window[i : i + batch_size] for i in range(0, len(window), batch_size)]
        batches += [found[i] for i in rng.permutation(len(found))]
    return batches


@dataclass(frozen=True)
class _Run:
    curve: Any
    best_step: int
    best_loss: float
    exploded: bool
    note: str


def _train(
    model: Any,
    parameters: Mapping[str, torch.nn.Parameter],
    data: _Data,
    rate: float,
    check_every: int,
    patience: int,
    progress: Callable[[int, int], None] | None = None,
) -> _Run:
    """Train in place; the parameters end as they were at the lowest validation loss."""
    values = list(parameters.values())
    optimizer = torch.optim.AdamW(values, lr=rate, weight_decay=0.0)
    steps = len(data.batches)
    warm = max(1, round(WARM_UP * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / warm, max(0.0, (steps - s) / max(1, steps - warm)))
    )
    first_loss, since, rows, note, exploded = math.nan, [], [_look(model, data, 0, math.nan)], "all steps", False
    best, best_step = [v.detach().clone() for v in values], 0
    waited = 0
    for step, batch in enumerate(data.batches, start=1):
        loss = answer_loss(model, batch)
        since.append(loss.item())
        first_loss = since[0] if step == 1 else first_loss
        if not math.isfinite(since[-1]) or since[-1] > EXPLODED * (first_loss + 1):
            note, exploded = f"exploded at step {step}: loss {since[-1]:.3g} after {first_loss:.3g} at the start", True
            break
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(values, 1.0)
        optimizer.step()
        schedule.step()
        if progress:
            progress(step, steps)
        if step % check_every == 0 or step == steps:
            rows.append(_look(model, data, step, sum(since) / len(since)))
            since = since[-1:]
            if not math.isfinite(rows[-1]["validation_loss"]):
                note, exploded = f"exploded at step {step}: validation loss {rows[-1]['validation_loss']}", True
                break
            if rows[-1]["validation_loss"] < min(r["validation_loss"] for r in rows[:-1]):
                best, best_step, waited = [v.detach().clone() for v in values], step, 0
            else:
                waited += 1
            if waited >= patience and step < steps:
                note = f"stopped at step {step}: no better validation loss since step {best_step}"
                break
    with torch.no_grad():
        for value, kept in zip(values, best, strict=True):
            value.copy_(kept)
    curve = pd.DataFrame(rows)
    return _Run(curve, best_step, math.inf if exploded else min(r["validation_loss"] for r in rows), exploded, note)


def _look(model: Any, data: _Data, step: int, train_loss: float) -> dict[str, Any]:
    loss, exact = answer_scores(model, [p for p, _ in data.validation], [a for _, a in data.validation])
    return {
        "step": step,
        "train_loss": train_loss,
        "validation_loss": float(loss.mean()),
        "validation_exact": float(exact.mean()),
    }


def _best_rate(model: Any, arm: Arm, data: _Data, seed: int, first: float | None = None) -> float:
    """Climb: up from the first rate while that helps, else down while that helps."""
    data = _Data(data.batches[:RATE_STEPS], data.validation)
    reached: dict[float, float] = {}

    def loss_at(rate: float) -> float:
        if rate not in reached:
            with trainable(model, arm, seed) as parameters:
                reached[rate] = _train(model, parameters, data, rate, len(data.batches), 1).best_loss
        return reached[rate]

    best = first or FIRST_RATE[arm.method]
    loss_at(best)
    for factor in (RATE_FACTOR, 1 / RATE_FACTOR):
        moved = False
        while len(reached) < MOST_TRIES and (
            loss_at(best * factor) < reached[best] or (not math.isfinite(reached[best]) and factor < 1)
        ):
            best, moved = best * factor, True
        if moved:
            break
    if not math.isfinite(reached[best]):
        raise NoRateError(f"the loss of {arm} exploded at every rate of {sorted(reached)}; pass a lower first one")
    log.info("%s: validation loss by rate %s", arm.name, {f"{r:g}": round(v, 4) for r, v in sorted(reached.items())})
    return best


def _unmeasured(scores: TaskScores) -> TaskScores:
    """The same examples without values."""
    return scores.__class__(
        **{name: getattr(scores, name) for name in scores.__dataclass_fields__}
        | {
            "values": torch.full_like(scores.values, math.nan),
            "log_probabilities": torch.full_like(scores.log_probabilities, math.nan),
            "predicted": ("",) * len(scores.predicted),
        }
    )


def _untuned(
    model: LensModel, arm: Arm, task: Task, seed: int, before: TaskScores, clock: Stopwatch, exploded: str = ""
) -> Tuned:
    """A run that trained nothing: an empty arm, or one whose loss exploded at every rate."""
    columns = ["step", "train_loss", "validation_loss", "validation_exact"]
    return Tuned(
        arm=arm,
        task=task.name,
        seed=seed,
        rate=0.0,
        steps=0,
        best_step=0,
        exploded=bool(exploded),
        note=exploded or "nothing is trained",
        curve=pd.DataFrame(columns=columns, dtype=float),
        before=before,
        after=_unmeasured(before) if exploded else before,
        trained={},
        seconds=0.0,
        cpu_seconds=0.0,
        peak_megabytes=math.nan,
        provenance=model_info(model).provenance.updated(
            seed=seed, stimuli_hash=before.provenance.stimuli_hash, elapsed_seconds=clock.seconds
        ),
    )


class _Cost:
    """Wall-clock seconds, processor seconds and peak memory from here on."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.monotonic(), time.process_time()
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts anew (Linux)

    def spent(self) -> tuple[float, float, float]:
        peak = math.nan
        with contextlib.suppress(OSError):
            status = Path("/proc/self/status").read_text(encoding="utf-8")
            peak = next(
                (float(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmHWM")), peak
            )
        return time.monotonic() - self._wall, time.process_time() - self._cpu, peak
