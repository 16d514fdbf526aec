"""Tune chosen linear maps of a model on a task, and put the model back exactly as it was.

Only the arm's maps learn: through LoRA (peft), or themselves. The loss is on the answer's tokens over the whole vocabulary. Every arm gets its
learning rate by the same rule: the one with the lowest validation loss after a few steps, looked for up or down from a first one. A loss that is not finite, or that explodes,
ends the arm; it is recorded as such, and the model is restored all the same.
"""

import contextlib
import logging
import math
import os
import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from lens_affect.adapter import LensModel, model_info
from lens_affect.answers import AnswerBatch, answer_loss, answer_scores, encode_rows, make_batch, require_bridge
from lens_affect.arms import Arm, plan_arm
from lens_affect.results import Provenance, Stopwatch, load_result, save_result
from lens_affect.sizes import MODULES
from lens_affect.statistics import derive_generator, derive_seed
from lens_affect.task_data import Example
from lens_affect.tasks import Task, TaskScores

log = logging.getLogger(__name__)

FIRST_RATE = {"lora": 8e-3, "full": 1e-4}
"""Learning rate that the rule tries first, by method."""
RATE_FACTOR = 4.0
"""The next rate is this many times higher or lower."""
RATE_STEPS = 20
"""Steps of each try."""
MOST_TRIES = 5
SCALE = 2.0
"""alpha / r of LoRA at every rank, as AffectGPT has it (r 16, alpha 32; arXiv:2501.16566)."""
WARM_UP = 0.1
"""Share of the steps in which the rate rises; it falls to 0 along a line after that."""
EXPLODED = 3.0
"""A training loss above this many times the first one, in nats plus one, counts as exploded."""


@dataclass(frozen=True)
class Tuned:
    """One arm: what was trained, how it went, and what the model reached before and after."""

    arm: Arm
    """The maps, their ranks and the number of trained weights."""
    task: str
    """Name of the task that was learned."""
    seed: int
    """Of the weights' start, of the batches, and of random maps."""
    rate: float
    """Highest learning rate."""
    steps: int
    """Steps that were planned."""
    best_step: int
    """Step whose weights were kept: the lowest validation loss; 0 is the untuned model."""
    exploded: bool
    """Whether the loss exploded; the scores after are NaN then."""
    note: str
    """How it ended, in words."""
    curve: pd.DataFrame
    """Columns step, train_loss (mean since the last row), validation_loss, validation_exact (share of answers whose every token is likeliest)."""
    before: TaskScores
    """Of the untuned model."""
    after: TaskScores
    """Of the tuned one, on the same examples."""
    trained: dict[str, Tensor]
    """LoRA factors (`... .lora_A.weight`, `... .lora_B.weight`) or whole weights, under Hugging Face's names."""
    seconds: float
    """Wall-clock time of training, validation included, without the choice of the rate and the scoring."""
    cpu_seconds: float
    """Processor time of the same: what it cost where other jobs share the machine."""
    peak_megabytes: float
    """Highest resident memory of the process while training; NaN where the system does not say."""
    provenance: Provenance
    """Of the model and this step."""

    @property
    def gain(self) -> float:
        """Score after minus score before, in the task's better direction."""
        sign = 1.0 if self.after.better == "high" else -1.0
        return sign * (self.after.value - self.before.value)

    def to_frame(self) -> pd.DataFrame:
        """One row: the arm, its size and cost, and its scores."""
        row = {
            "task": self.task,
            "arm": self.arm.name,
            "method": self.arm.method,
            "seed": self.seed,
            "n_parameters": self.arm.n_parameters,
            "n_wanted": self.arm.n_wanted,
            "rate": self.rate,
            "steps": self.steps,
            "best_step": self.best_step,
            "metric": self.after.metric,
            "before": self.before.value,
            "after": self.after.value,
            "n": self.before.n,
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            "peak_megabytes": self.peak_megabytes,
            "exploded": self.exploded,
        }
        return pd.DataFrame([row])

    def save(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Save as a folder; see results.save_result."""
        return save_result(self, folder, overwrite=overwrite)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "Tuned":
        """Load what `save` wrote."""
        return load_result(cls, folder)

    def __str__(self) -> str:
        after = self.after.interval()
        return (
            f"{self.arm}; seed {self.seed}, rate {self.rate:g}, best step {self.best_step} of {self.steps} ({self.note})\n"
            f"{self.after.title}: {self.after.metric} {self.before.value:.3f} before, {self.after.value:.3f} "
            f"[{float(after.low):.3f}, {float(after.high):.3f}] after, n = {self.before.n}; {self.cpu_seconds:.0f} s of processor time"
        )


def linear_maps(model: Any) -> dict[str, tuple[str, torch.nn.Linear]]:
    """Linear maps of a bridge by place (`layers.3.gate`): Hugging Face's name of the map, and the map itself.

    Raises:
        ValueError: a model whose maps have other names (GPT-2, Phi-3 with its fused maps, mixtures of experts).
    """
    require_bridge(model, "tuning")
    found = {}
    for name, part in model.original_model.named_modules():
        plain = name.replace("._original_component", "")
        place = re.search(r"layers\.(\d+)\.(?:self_attn|mlp)\.(\w+)_proj$", plain)
        if isinstance(part, torch.nn.Linear) and place and place[2] in MODULES:
            found[f"layers.{place[1]}.{place[2]}"] = (plain, part)
    if not found:
        raise ValueError(
            f"received {type(model.original_model).__name__}, which has no linear maps named q_proj to down_proj; allowed are models of the "
            "Llama, Qwen, Mistral and Gemma types"
        )
    return found


def tune_module(
    model: LensModel,
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
        rate = _best_rate(model, arm, data, seed)
    with _trainable(model, arm, seed) as parameters:
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
    model: LensModel,
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
        RuntimeError: the loss exploded at every rate.
    """
    arm = _plan(model, modules, method, rank, n_parameters, layers, seed)
    data = _read_data(model, task, seed, RATE_STEPS, batch_size, max_tokens, n_validation)
    return _best_rate(model, arm, data, seed, first)


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
    if method == "lora" and rank is None and n_parameters is None:
        rank = 4
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
    return _Run(curve, best_step, math.inf if exploded else float(curve["validation_loss"].min()), exploded, note)


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
            with _trainable(model, arm, seed) as parameters:
                reached[rate] = _train(model, parameters, data, rate, len(data.batches), 1).best_loss
        return reached[rate]

    best = first or FIRST_RATE[arm.method]
    loss_at(best)
    for factor in (RATE_FACTOR, 1 / RATE_FACTOR):
        moved = False
        while len(reached) < MOST_TRIES and (
            loss_at(best * factor) < reached[best] or not math.isfinite(reached[best]) and factor < 1
        ):
            best, moved = best * factor, True
        if moved:
            break
    if not math.isfinite(reached[best]):
        raise RuntimeError(f"the loss of {arm} exploded at every rate of {sorted(reached)}; pass a lower first one")
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


def _untuned(model: LensModel, arm: Arm, task: Task, seed: int, before: TaskScores, clock: Stopwatch) -> Tuned:
    columns = ["step", "train_loss", "validation_loss", "validation_exact"]
    return Tuned(
        arm=arm,
        task=task.name,
        seed=seed,
        rate=0.0,
        steps=0,
        best_step=0,
        exploded=False,
        note="nothing is trained",
        curve=pd.DataFrame(columns=columns, dtype=float),
        before=before,
        after=before,
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


# What learns, and how the model gets back


@contextlib.contextmanager
def _trainable(model: Any, arm: Arm, seed: int) -> Iterator[dict[str, torch.nn.Parameter]]:
    """Only the arm's parameters learn inside; afterwards, also after an exception, the model is as it was."""
    flags = {name: p.requires_grad for name, p in model.original_model.named_parameters()}
    for parameter in model.original_model.parameters():
        parameter.requires_grad_(False)
    try:
        with (_lora if arm.method == "lora" else _whole)(model, arm, seed) as parameters:
            yield parameters
    finally:
        for name, parameter in model.original_model.named_parameters():
            parameter.requires_grad_(flags[name])
            parameter.grad = None


@contextlib.contextmanager
def _lora(model: Any, arm: Arm, seed: int) -> Iterator[dict[str, torch.nn.Parameter]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft asks transformers by a name that is about to change
        from peft import LoraConfig, get_peft_model

        maps = linear_maps(model)
        inner = {id(part): name for name, part in model.original_model.named_modules()}
        ranks = {inner[id(maps[place][1])]: rank for place, rank in arm.ranks.items()}
        # A bridge's wrappers answer for what they hold, so peft's own unload would take them out too.
        parents = [(model.original_model.get_submodule(n.rpartition(".")[0]), n.rpartition(".")[2]) for n in ranks]
        kept = [(parent, name, parent._modules[name]) for parent, name in parents]
        config = LoraConfig(
            target_modules=list(ranks),
            rank_pattern={re.escape(name): rank for name, rank in ranks.items()},
            alpha_pattern={re.escape(name): SCALE * rank for name, rank in ranks.items()},
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(seed, "LoRA"))
            get_peft_model(model.original_model, config)
    try:
        parameters = {}
        for name, parameter in model.original_model.named_parameters():
            if ".lora_" in name:
                plain = name.replace("._original_component", "").replace(".default", "")
                parameters[plain] = parameter.requires_grad_(True)
        trained = sum(parameter.numel() for parameter in parameters.values())
        if trained != arm.n_parameters:
            raise RuntimeError(
                f"peft trains {trained} weights and the plan was {arm.n_parameters}; report this with the versions"
            )
        yield parameters
    finally:
        for parent, name, original in kept:
            parent._modules[name] = original
        # peft notes on the model that it was there
        for left in ("peft_config", "_hf_peft_config_loaded"):
            if left in model.original_model.__dict__:
                delattr(model.original_model, left)


@contextlib.contextmanager
def _whole(model: Any, arm: Arm, seed: int) -> Iterator[dict[str, torch.nn.Parameter]]:
    maps = linear_maps(model)
    parameters = {f"{maps[place][0]}.weight": maps[place][1].weight for place in arm.ranks}
    kept = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    try:
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        yield parameters
    finally:
        _copy_back(parameters, kept)


@torch.no_grad()
def _copy_back(parameters: Mapping[str, torch.nn.Parameter], kept: Mapping[str, Tensor]) -> None:
    for name, value in kept.items():
        parameters[name].copy_(value)


@contextlib.contextmanager
def tuned_weights(model: LensModel, tuned: Tuned) -> Iterator[LensModel]:
    """The model with an arm's weights in place; afterwards, also after an exception, bit for bit as before.

    Args:
        model: the bridge that was tuned.
        tuned: the arm.

    Raises:
        ValueError: an arm of another model.
    """
    if tuned.provenance.weights_sha256 != model_info(model).provenance.weights_sha256:
        raise ValueError(
            f"received an arm of {tuned.provenance.title} for {model_info(model).provenance.title} (weights differ); load the model it was "
            "tuned from"
        )
    maps = linear_maps(model)
    kept = {place: maps[place][1].weight.detach().clone() for place in tuned.arm.ranks}
    try:
        with torch.no_grad():
            for place, change in weight_changes(tuned).items():
                weight = maps[place][1].weight
                weight.add_(change) if tuned.arm.method == "lora" else weight.copy_(change)
        yield model
    finally:
        with torch.no_grad():
            for place, value in kept.items():
                maps[place][1].weight.copy_(value)


def weight_changes(tuned: Tuned) -> dict[str, Tensor]:
    """By place (`layers.3.gate`): what LoRA adds, (alpha / r) B A; or in full tuning the new weight itself."""
    found = {}
    for name, value in tuned.trained.items():
        parts = re.search(r"layers\.(\d+)\.(?:self_attn|mlp)\.(\w+)_proj\.(.+)$", name)
        if parts is None:
            raise ValueError(
                f"received a trained tensor {name!r}, which is no linear map of a block; tune the arm again"
            )
        place = f"layers.{parts[1]}.{parts[2]}"
        if parts[3] == "weight":
            found[place] = value
        elif parts[3] == "lora_B.weight":
            found[place] = SCALE * value @ tuned.trained[name.replace("lora_B", "lora_A")]
    return found


def write_adapter(tuned: Tuned, folder: str | os.PathLike[str], *, base: str | None = None) -> Path:
    """Write an arm for other tools: a LoRA adapter in peft's format, or the trained tensors as `model.safetensors`.

    Args:
        tuned: the arm.
        folder: where to; it must not be there.
        base: name or folder of the base model that peft should load; by default where the model came from.

    Raises:
        FileExistsError: the folder is there already.
        ValueError: an arm that trained nothing.
    """
    from safetensors.torch import save_file

    if not tuned.trained:
        raise ValueError(f"received the arm {tuned.arm.name!r}, which trained nothing; there is no adapter to write")
    place = Path(folder)
    place.mkdir(parents=True)
    if tuned.arm.method == "full":
        save_file(dict(tuned.trained), place / "model.safetensors", metadata={"format": "pt"})
        return place
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from peft import LoraConfig

        names = [name.removesuffix(".lora_A.weight") for name in tuned.trained if name.endswith(".lora_A.weight")]
        ranks = {name: tuned.trained[f"{name}.lora_A.weight"].shape[0] for name in names}
        config = LoraConfig(
            target_modules=names,
            rank_pattern=ranks,
            alpha_pattern={name: SCALE * rank for name, rank in ranks.items()},
            task_type="CAUSAL_LM",
            base_model_name_or_path=base or tuned.provenance.source,
            inference_mode=True,
        )
        config.save_pretrained(str(place))
    tensors = {f"base_model.model.{name}": value.contiguous() for name, value in tuned.trained.items()}
    save_file(tensors, place / "adapter_model.safetensors", metadata={"format": "pt"})
    return place
