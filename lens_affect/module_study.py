"""Is one module special for affect? Tuned alone, transferred, taken back, and set against siblings of its size and controls, in one call and one folder.

`necessity_sufficiency_efficiency` tunes what has to be tuned and measures the rest; `study_modules` measures runs that are there already.
"""

import dataclasses
import html
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lens_affect.adapter import model_info
from lens_affect.arms import plan_arm
from lens_affect.landing import Landing, measure_landing
from lens_affect.live_weights import EVERYTHING
from lens_affect.module_table import ModuleTable, compare_arms
from lens_affect.part_scores import KINDS, PartScores, fingerprint, join_parts, score_parts
from lens_affect.selectivity import AblationTable, scan_ablations
from lens_affect.sizes import module_shapes
from lens_affect.task_data import Example
from lens_affect.tasks import Task, examples_hash
from lens_affect.transfers import transfer_modules
from lens_affect.tuned import Tuned
from lens_affect.tuning import arm_size, run_arms, silent

ARMS = ("gate", "up", "down", "attention")
"""What is compared: the gate, its two siblings of equal size, and all of attention."""
TRANSFERRED = (*ARMS, "gate+up", "mlp")
"""What is put alone into the base: the arms and two pairs."""
PARTS: dict[str, type] = {
    "equal_rank": ModuleTable,
    "equal_size": ModuleTable,
    "landing": Landing,
    **dict.fromkeys(KINDS, PartScores),
    "control": ModuleTable,
    "control_transfer": PartScores,
    "control_revert": PartScores,
    "control_equal_damage": PartScores,
    "writing": ModuleTable,
    "writing_transfer": PartScores,
    "writing_revert": PartScores,
    "bands": AblationTable,
}
"""Parts of a study, each a folder; those from `control` on may be missing."""
OPTIONAL = tuple(PARTS)[tuple(PARTS).index("control") :]
MOST_SCANNED = 256
"""Examples of each task that a scan of bands scores at most, drawn at random: it scores them once per module and band."""
Runs = Mapping[str, Sequence[Tuned]]
Report = Callable[[str], Any]


@dataclass(frozen=True)
class ModuleStudy:
    """Everything that was asked about the modules of one model and one affect task."""

    equal_rank: ModuleTable
    """Single modules tuned with one rank."""
    equal_size: ModuleTable
    """Single modules tuned with as many weights as the gate."""
    landing: Landing
    """Where tuning everything landed, on the task and on controls."""
    transfer: PartScores
    """Each module's change alone in the untuned model."""
    revert: PartScores
    """Each module's change taken out of the tuned one."""
    random_equal_norm: PartScores
    """Noise in its place."""
    equal_damage: PartScores
    """Modules damaged until language has lost the same."""
    control: ModuleTable | None = None
    """Single modules tuned on a task without affect."""
    control_transfer: PartScores | None = None
    """As `transfer`, of a model with everything tuned on that task."""
    control_revert: PartScores | None = None
    """As `revert`, of that model."""
    control_equal_damage: PartScores | None = None
    """As `equal_damage`, of that model."""
    writing: ModuleTable | None = None
    """Single modules tuned to write affect."""
    writing_transfer: PartScores | None = None
    """As `transfer`, of a model with everything tuned to write."""
    writing_revert: PartScores | None = None
    """As `revert`, of that model."""
    bands: AblationTable | None = None
    """Modules ablated in bands of layers: affect lost beside language lost."""

    def save(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Save every part in a folder of its own; a part that this study lacks is not left from an earlier one."""
        for name in PARTS:
            part, place = getattr(self, name), Path(folder) / name
            if part is not None:
                part.save(place, overwrite=overwrite)
            elif overwrite and (place / "manifest.json").is_file():
                shutil.rmtree(place)
        return Path(folder)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "ModuleStudy":
        """Load what `save` wrote.

        Raises:
            FileNotFoundError: a part that every study has is not there.
        """
        there = {n: kind for n, kind in PARTS.items() if (Path(folder) / n / "manifest.json").is_file()}
        missing = [n for n in PARTS if n not in there and n not in OPTIONAL]
        if missing:
            raise FileNotFoundError(
                f"received {folder}, which has no {', '.join(missing)}; give a folder that study_modules saved"
            )
        return cls(**{name: kind.load(Path(folder) / name) for name, kind in there.items()})

    def __str__(self) -> str:
        lines = [str(self.equal_rank).splitlines()[0]]
        for name, table in (("equal rank", self.equal_rank), ("equal size", self.equal_size)):
            lines.append(f"tuned alone, {name}: {str(table).splitlines()[1]}")
        lines += [str(part).splitlines()[1] for part in (self.transfer, self.revert)]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(str(self)).replace(chr(10), '<br>')}</p>"


def study_modules(
    model: Any,
    task: Task,
    *,
    equal_rank: Runs,
    equal_size: Runs,
    controls: Runs,
    control: Runs | None = None,
    control_task: Task | None = None,
    writing: Runs | None = None,
    writing_task: Task | None = None,
    bands: AblationTable | None = None,
    arms: Sequence[str] = ARMS,
    transferred: Sequence[str] | None = None,
    examples: Sequence[Example] | None = None,
    target: float = 0.3,
    folder: str | os.PathLike[str] | None = None,
    report: Report | None = None,
) -> ModuleStudy:
    """Measure runs that are there: tables, landing, transfers, reverts, noise, equal damage.

    Args:
        model: the base, a bridge in memory.
        task: the affect task that the runs learned.
        equal_rank: arm -> runs, one per seed, `all` among them: it is transferred and reverted.
        equal_size: the same at equal size; `all` may be the same runs.
        controls: what else everything was tuned on -> runs, for the landing.
        control: arm -> runs on a task without affect.
        control_task: that task; with it the modules of the control's `all` are transferred, reverted and damaged too.
        writing: arm -> runs on writing.
        writing_task: that task, as control_task.
        bands: what scan_ablations found, where it was asked.
        arms: what is reverted, replaced by noise and damaged.
        transferred: what is put alone into the base; the arms, gate+up and mlp by default.
        examples: that transfers and reverts are scored on; the task's test split by default. Noise and damage are scored on the same.
        target: rise of the loss on neutral text for equal damage, nats per token.
        folder: where the study is saved; what was scored for one seed is kept there too, and read instead of scored again.
        report: `report(name)` gives a context manager for one part; what it yields is called with (arms done, arms).

    Raises:
        ValueError: no runs of `all`, or parts that do not fit.

    Example:
        >>> study_modules(model, task, equal_rank=runs, equal_size=fitted, controls={"topics": others})  # doctest: +SKIP
    """
    whole = _whole(equal_rank)
    if not whole:
        raise ValueError(
            f"received the arms {list(equal_rank)}, without a run of 'all' that did not explode; transfers and reverts need one"
        )
    if task.name in controls:
        raise ValueError(f"received a control with the task's own name, {task.name!r}; give the control another name")
    place = Path(folder) if folder is not None else None
    pairs = tuple(transferred or _transferred(arms))

    def parts(kind: str, learned: Task = task, runs: Sequence[Tuned] = whole, prefix: str = "") -> PartScores:
        return _parts_of_seeds(
            *(model, learned, runs),
            kind=kind,
            arms=pairs if kind == "transfer" else tuple(arms),
            examples=tuple(examples) if examples is not None and learned is task else learned.examples("test"),
            target=target,
            folder=place / "seeds" if place is not None else None,
            prefix=prefix,
            report=report,
        )

    others: dict[str, Any] = {}
    for name, runs, learned in (("control", control, control_task), ("writing", writing, writing_task)):
        if runs:
            others[name] = compare_arms(runs, reference="all")
            if learned is not None and _whole(runs):
                kinds = ("transfer", "revert", "equal_damage") if name == "control" else ("transfer", "revert")
                others |= {f"{name}_{k}": parts(k, learned, _whole(runs), f"{name}_") for k in kinds}
    study = ModuleStudy(
        equal_rank=compare_arms(equal_rank, reference="all"),
        equal_size=compare_arms(equal_size, reference="all"),
        landing=measure_landing(model, {task.name: whole, **controls}),
        **{kind: parts(kind) for kind in KINDS},
        **others,
        bands=bands,
    )
    if place is not None:
        study.save(place, overwrite=True)
    return study


def scan_bands(
    model: Any,
    tuned: Any,
    task: Task,
    *,
    control_task: Task,
    other_tasks: Sequence[Task] = (),
    arms: Sequence[str] = ARMS,
    bands: int = 3,
    target: float = 0.3,
    examples: Sequence[Example] | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> AblationTable:
    """Noise in each module of a tuned model, in each band of its blocks and in all of them, each at equal damage to language: what the task loses
    minus what a control task loses.

    It takes as long as scan_ablations with `target` says.

    Args:
        model: the base, a bridge in memory; it is as before afterwards.
        tuned: as for score_parts.
        task: an affect task.
        control_task: one without affect, and not the loss on neutral text, which is made equal.
        other_tasks: further controls.
        arms: modules.
        bands: number of bands of blocks.
        target: rise of the loss on neutral text, nats per token.
        examples: of the task; at most MOST_SCANNED of its test split by default, as of the other tasks.
        seed: of the noise.
        progress: called with (ablations done, ablations in all).

    Raises:
        ValueError: as scan_ablations.

    Example:
        >>> scan_bands(model, run, task, control_task=load_task("topics")).compare("gate", "up")  # doctest: +SKIP
    """
    chosen = tuple(examples) if examples is not None else _few(task)
    asked = [(other, _few(other)) for other in (control_task, *other_tasks)]
    with transfer_modules(model, tuned, modules=EVERYTHING, any_base=True):
        found = scan_ablations(
            model,
            arms=arms,
            affect=_scoring(task, chosen),
            control=_scoring(*asked[0]),
            others={other.name: _scoring(other, some) for other, some in asked[1:]},
            bands=bands,
            whole=True,
            target=target,
            affect_groups=[e.group for e in chosen],
            control_groups=[e.group for e in asked[0][1]],
            others_groups={other.name: [e.group for e in some] for other, some in asked[1:]},
            control_name=control_task.name,
            seed=seed,
            progress=progress,
        )
    hashed = examples_hash(task, chosen)
    return dataclasses.replace(
        found, tuned=fingerprint(tuned), provenance=found.provenance.updated(stimuli_hash=hashed)
    )


def _few(task: Task) -> tuple[Example, ...]:
    return task.examples("test", n=min(MOST_SCANNED, len(task.examples("test"))))


def _scoring(task: Task, examples: Sequence[Example]) -> Callable[[Any], Any]:
    """Model in, a task's scores out; high is good."""

    def score(model: Any) -> Any:
        found = task.score(model, examples, seed=0)
        return (found.values if found.better == "high" else -found.values).double().numpy()

    return score


def _whole(runs: Runs) -> list[Tuned]:
    """Runs with everything tuned, without those that exploded."""
    return [run for run in runs.get("all", ()) if not run.exploded]


def _parts_of_seeds(
    model: Any,
    task: Task,
    runs: Sequence[Tuned],
    *,
    kind: str,
    arms: tuple[str, ...],
    examples: Sequence[Example],
    target: float,
    folder: Path | None,
    prefix: str,
    report: Report | None,
) -> PartScores:
    """One kind of part over the seeds; what a folder holds of it is read."""
    each = []
    for run in runs:
        saved = folder / f"{prefix}{kind}-seed{run.seed}" if folder is not None else None
        if saved is not None and (saved / "manifest.json").is_file():
            facts = {
                "arms": arms,
                "tuned": (fingerprint(run),),
                "target": str(target if kind == "equal_damage" else math.nan),
                "examples": examples_hash(task, examples),
                "base": model_info(model).provenance.weights_sha256,
            }
            each.append(_require_same(PartScores.load(saved), saved, facts))
            continue
        asked: dict[str, Any] = {"arms": arms, "kind": kind, "examples": examples, "target": target, "seed": run.seed}
        with (report or silent)(f"{prefix}{kind}, seed {run.seed}".replace("_", " ")) as progress:
            each.append(score_parts(model, run, task, **asked, progress=progress))
        if saved is not None:
            each[-1].save(saved)
    return join_parts(each)


def _require_same(found: PartScores, folder: Path, asked: Mapping[str, Any]) -> PartScores:
    there = {
        "arms": found.arms,
        "tuned": found.tuned,
        "target": str(found.target),
        "examples": found.provenance.stimuli_hash,
        "base": found.provenance.weights_sha256,
    }
    _refuse_other(folder, there, asked)
    return found


def _refuse_other(folder: Path, there: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    other = [name for name, value in asked.items() if there[name] != value]
    if other:
        raise ValueError(
            f"received {folder}, which holds scores with other {', '.join(other)} than asked for: choose another folder, or delete that one"
        )


def _transferred(arms: Sequence[str]) -> tuple[str, ...]:
    return TRANSFERRED if tuple(arms) == ARMS else tuple(arms)


def necessity_sufficiency_efficiency(
    model: Any,
    task: Task,
    control_task: Task,
    *,
    writing_task: Task | None = None,
    arms: Sequence[str] | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    rank: int = 4,
    steps: int = 100,
    n_test: int | None = None,
    target: float = 0.3,
    bands: int | None = 3,
    folder: str | os.PathLike[str] | None = None,
    report: Report | None = None,
) -> ModuleStudy:
    """The whole chain: tune single modules and everything, on the task and on a control, and measure what each module is worth.

    Args:
        model: a bridge in float32; it is as before afterwards.
        task: an affect task with training examples.
        control_task: one without affect.
        writing_task: one of writing affect, for the claims about generation; not asked by default.
        arms: single modules or groups; the gate (where there is one), up, down and attention by default.
        seeds: one run of each arm per seed; at least two, or the landing has no interval.
        rank: of LoRA.
        steps: of training.
        n_test: test examples, drawn at random; all by default.
        target: rise of the loss on neutral text for equal damage, nats per token.
        bands: bands of blocks in which noise in the modules of the first seed's model is scored (scan_bands); None leaves that out.
        folder: where runs and parts are kept; finished ones are read instead of run again.
        report: `report(name)` gives a context manager for one run or part.

    Returns:
        The study; `module_scorecard` judges the claims about gate_proj by it.

    Raises:
        ValueError: as tune_module and score_parts.

    Example:
        >>> study = necessity_sufficiency_efficiency(model, load_task("goemotions"), load_task("topics"))  # doctest: +SKIP
    """
    config = model.original_model.config
    present = module_shapes(config)
    chosen = tuple(arms) if arms is not None else tuple(a for a in ARMS if a in present or a == "attention")
    place = Path(folder) if folder is not None else None
    common: dict[str, Any] = {"seeds": seeds, "rank": rank, "steps": steps, "report": report}

    def runs(name: str, learned: Task, modules: Sequence[str], **options: Any) -> dict[str, list[Tuned]]:
        there = place / name if place is not None else None
        return run_arms(model, learned, modules=modules, folder=there, **common, **options)

    ranked = runs("equal_rank_runs", task, (*chosen, "all"), n_test=n_test)
    fitted = [a for a in chosen if not _same_size(config, a, rank)]
    sized = runs("equal_size_runs", task, (*fitted, "random"), n_test=n_test, equal_size=True)
    equal_size = {a: sized[a] if a in sized else ranked[a] for a in (*chosen, "random", "all")}
    others = runs("control_runs", control_task, (*chosen, "all"))
    written = runs("writing_runs", writing_task, (*chosen, "all")) if writing_task is not None else None
    return study_modules(
        *(model, task),
        equal_rank=ranked,
        equal_size=equal_size,
        controls={control_task.name: others["all"]},
        control=others,
        control_task=control_task,
        writing=written,
        writing_task=writing_task,
        bands=_scanned(model, _whole(ranked), task, control_task, chosen, bands, target, place, report),
        arms=chosen,
        examples=task.examples("test", n=n_test) if n_test else None,
        target=target,
        folder=place,
        report=report,
    )


def _scanned(
    model: Any,
    whole: Sequence[Tuned],
    task: Task,
    control_task: Task,
    arms: tuple[str, ...],
    bands: int | None,
    target: float,
    folder: Path | None,
    report: Report | None,
) -> AblationTable | None:
    """The scan of bands, read where a folder holds it."""
    if bands is None or not whole:
        return None
    saved = folder / "bands" if folder is not None else None
    if saved is not None and (saved / "manifest.json").is_file():
        found = AblationTable.load(saved)
        there = {
            "arms": tuple(dict.fromkeys(found.arms)),
            "bands": len(set(found.bands) - {found.bands[-1]}) or 1,
            "tuned": found.tuned,
            "target": found.target,
            "examples": found.provenance.stimuli_hash,
            "control": found.control_name,
            "base": found.provenance.weights_sha256,
        }
        asked = {
            "arms": arms,
            "bands": bands,
            "tuned": fingerprint(whole[0]),
            "target": target,
            "examples": examples_hash(task, _few(task)),
            "control": control_task.name,
            "base": model_info(model).provenance.weights_sha256,
        }
        _refuse_other(saved, there, asked)
        return found
    with (report or silent)(f"noise in {bands} bands of blocks") as progress:
        found = scan_bands(
            *(model, whole[0], task),
            control_task=control_task,
            arms=arms,
            bands=bands,
            target=target,
            seed=whole[0].seed,
            progress=progress,
        )
    if saved is not None:
        found.save(saved)
    return found


def _same_size(config: Any, arm: str, rank: int) -> bool:
    """Whether an arm of this rank has as many weights as the gate at it, so that one run serves both comparisons."""
    ranked = plan_arm(config, arm, rank=rank)
    return ranked.n_parameters == arm_size(config, arm, "lora", rank, True).get("n_parameters")
