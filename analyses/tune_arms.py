"""Tune the arms of "is the gate special?" one after the other; can be killed at any time and started again.

    LENS_AFFECT_DATA=folder/with/goemotions python analyses/tune_arms.py

Each arm is a folder below LENS_AFFECT_RUNS/tuning: `tuned` (scores of every example before and after, learning curve, cost, trained weights),
`adapter` (peft's format) and `controls` (other tasks scored with the same weights). A finished arm is skipped. Arms come in blocks, and within a
block seed by seed, so that what is there at any time is a balanced comparison. Several processes may run at once: each takes arms that no other
one has. 05_modules.py reads them.

Blocks: `equal`, equal rank and equal size (SmolLM2-135M-Instruct, GoEmotions, 27 labels, LoRA rank 4 against the gate's number of weights
at rank 4); `landing`, everything tuned on the control tasks; `parts`, the modules of everything-tuned models scored one by one, and
`bands`, noise in thirds of their blocks and in all of them (25 minutes on one core); `topics` of our passages and `shuffled` labels, controls of single modules; `writing`, as `equal` for
sentences that express an emotion; `rank1`, as `equal` with rank 1; `full`, whole weights; `delta`, where everything-tuned weights changed and
whether other fine-tunes changed them alike; `study`, all that is there about each task as one result. Name blocks to run only these, and tasks
with --task; `--publish analyses/results` keeps everything but weights where the analyses 05_*.py find it. Learning rates are chosen once per
kind of arm (seed 0) and kept in `rates`.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

import lens_affect as la
from lens_affect.arms import plan_arm
from lens_affect.results import write_text_atomically
from lens_affect.tasks import TaskScores

HERE = Path(__file__).resolve().parent
RUNS = Path(os.environ.get("LENS_AFFECT_RUNS", HERE.parent / "runs")) / "tuning"
MODEL = "smollm2-135m-instruct"
MAX_WORDS = 12  # of a comment: at most 12 words keep a step at 16 rows of some 15 tokens
N_TEST = 2048
N_PARTS = 768
DAMAGE = 0.3  # rise of the loss on neutral text at which damaged modules are compared, nats per token
STEPS, CHECK_EVERY, RANK = 64, 16, 4
STUDIES = {"goemotions": "study", "writing": "study_writing"}
"""Task -> folder of what was found about it."""
CONTROL_PARTS = "control"
KINDS = ("transfer", "revert", "random_equal_norm", "equal_damage")
TRANSFERRED = ("gate", "up", "down", "attention", "gate+up", "mlp")
log = logging.getLogger("tune_arms")


@dataclass(frozen=True)
class Job:
    """One arm of the campaign; in the block `parts`, what is done to the modules of a model with everything tuned."""

    block: str
    modules: str
    seed: int
    size: str = "rank"  # equal `rank`, or equal `size`: as many weights as the gate has at that rank
    task: str = "goemotions"
    rank: int = RANK
    method: str = "lora"
    rate: float | None = None  # by the rule

    @property
    def kind(self) -> str:
        """What arms that differ in their seed only have in common."""
        if self.block in NO_ARM:
            return f"{self.block}-{self.modules}" + f"-{self.task}" * (self.task != "goemotions")
        how = f"rank{self.rank}" if self.size == "rank" else f"size-of-gate-rank{self.rank}"
        given = "" if self.rate is None else f"-rate{self.rate:g}"
        return f"{self.task}-{self.modules}-{how if self.method == 'lora' else 'full'}{given}"

    @property
    def name(self) -> str:
        """Folder of the arm."""
        return f"{self.kind}-seed{self.seed}"


def campaign() -> list[Job]:
    """All arms in order. The gate, up and down have equal shapes: at equal rank they are of equal size too."""

    def equal(seed: int, rank: int, block: str) -> list[Job]:
        jobs = [Job(block, m, seed, rank=rank) for m in ("gate", "up", "attention", "down", "all")]
        return jobs + [Job(block, m, seed, "size", rank=rank) for m in ("attention", "random")]

    def controls(seed: int) -> list[Job]:
        tasks = {"topics": "topics", "shuffled": "goemotions_shuffled"}
        return [
            Job(block, m, seed, task=task) for m in ("gate", "up", "attention", "down") for block, task in tasks.items()
        ]

    def writing(seed: int) -> list[Job]:
        jobs = [Job("writing", m, seed, task="writing") for m in ("gate", "up", "attention", "all", "down")]
        return jobs + [Job("writing", m, seed, "size", task="writing") for m in ("attention", "random")]

    def landing(seed: int) -> list[Job]:
        return [Job("landing", "all", seed, task=task) for task in ("topics", "goemotions_shuffled")]

    def parts(seed: int, task: str = "goemotions") -> list[Job]:
        kinds = ("transfer", "revert", "equal_damage") if task == "topics" else KINDS
        return [Job("parts", kind, seed, task=task) for kind in kinds]

    def all_equal(seed: int) -> list[Job]:
        bands = [Job("bands", "all", seed)] * (seed == 0)
        return [*equal(seed, RANK, "equal"), *landing(seed), *parts(seed), *bands]

    jobs = [job for seed in range(3) for job in all_equal(seed)]
    jobs += [job for seed in range(3) for job in parts(seed, "topics")]
    jobs += [job for seed in range(2) for job in controls(seed)]
    jobs += [job for seed in range(3) for job in (*writing(seed), *parts(seed, "writing"))]
    for seed in range(3):
        jobs += equal(seed, 1, "rank1")
        # at the rate that the rule chose (0.032, by a hair) all three seeds of this arm came apart later on
        jobs.append(Job("rank1", "attention", seed, rank=1, rate=0.008))
    jobs += [Job("full", m, 0, method="full") for m in ("gate", "up", "attention")]
    return [*jobs, Job("delta", "all", 0), *(Job("study", "all", 0, task=task) for task in STUDIES)]


def options(job: Job, model: Any) -> dict[str, Any]:
    """What tune_module and choose_rate are asked for."""
    asked: dict[str, Any] = {"modules": job.modules, "method": job.method}
    if job.method == "full":
        return asked
    if job.size == "size" and job.modules != "random":
        return asked | {"n_parameters": plan_arm(model.original_model.config, "gate", rank=job.rank).n_parameters}
    return asked | {"rank": job.rank}


@functools.cache
def task_of(name: str) -> Any:
    """A task by its name in the campaign."""
    if name == "goemotions_shuffled":
        return task_of("goemotions").shuffled(seed=0)
    # the 27 labels start with different tokens, so the first one tells them apart, in one forward pass
    scoring = "first_token" if name == "goemotions" else "likelihood"
    return la.load_task(name, scoring=scoring, max_words=MAX_WORDS)


def test_of(name: str) -> Any:
    """Examples that arms are scored on."""
    task = task_of(name)
    most = N_TEST // 4 if name == "goemotions_shuffled" else N_TEST  # a control that should be at chance
    return task.examples("test", n=min(most, len(task.examples("test"))))


CONTROLS = ("neutral_text", "arithmetic")


def control_scores(model: Any, folder: Path) -> None:
    """Score the other tasks with the weights that the model has now."""
    for name in CONTROLS:
        if not (folder / name / "manifest.json").is_file():
            task_of(name).score(model, test_of(name), seed=0).save(folder / name)


def base_scores(model: Any, name: str) -> TaskScores:
    """Of the untuned model, once."""
    return kept(RUNS / "base" / name, lambda: task_of(name).score(model, test_of(name), seed=0))


def kept(folder: Path, score: Callable[[], TaskScores]) -> TaskScores:
    """Scores from a folder, taken first where they are not there."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not (folder / "manifest.json").is_file():
            score().save(folder)
    return TaskScores.load(folder)


def rate_of(model: Any, job: Job) -> float:
    """Learning rate of a kind of arm, chosen with seed 0. Shuffled labels take the one of the true labels: they have nothing to validate on."""
    kind = job.kind.replace("_shuffled", "")
    path = RUNS / "rates" / f"{kind}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):  # another process may be choosing it
        if not path.is_file():
            task = task_of(job.task.removesuffix("_shuffled"))
            found = la.choose_rate(model, task, **options(job, model), seed=0)
            write_text_atomically(path, json.dumps(found))
    return json.loads(path.read_text(encoding="utf-8"))


def run(model: Any, job: Job) -> None:
    """One arm, from the choice of its rate to its scores on the other tasks."""
    if job.block in NO_ARM:
        NO_ARM[job.block](model, job)
        return
    folder, start = RUNS / job.name, time.monotonic()
    if (folder / "done.json").is_file():
        return
    task = task_of(job.task)
    for name in CONTROLS:
        base_scores(model, name)
    if not (folder / "tuned" / "manifest.json").is_file():
        rate, chosen = job.rate or rate_of(model, job), time.monotonic()
        tuned = la.tune_module(
            *(model, task),
            **options(job, model),
            steps=STEPS,
            check_every=CHECK_EVERY,
            seed=job.seed,
            rate=rate,
            test=test_of(job.task),
            before=base_scores(model, job.task),
        )
        tuned.save(folder / "tuned")
        print(tuned)
        print(tuned.curve.round(4).to_string(index=False))
        log.info("%s: rate %.0f s, arm %.0f s", job.name, chosen - start, time.monotonic() - chosen)
    tuned = la.Tuned.load(folder / "tuned")
    if not (folder / "adapter").is_dir():
        la.write_adapter(tuned, folder / "adapter", base=MODEL)
    if not tuned.exploded:
        with la.tuned_weights(model, tuned):
            control_scores(model, folder / "controls")
    about = {"block": job.block, "size": job.size, "kind": job.kind, "seconds": time.monotonic() - start}
    write_text_atomically(folder / "done.json", json.dumps(about | {"name": job.name}, indent=1))
    log.info("%s done in %.0f s", job.name, time.monotonic() - start)


def finished(kind: str) -> list[la.Tuned]:
    """Runs of a kind, seed by seed, as many as there are."""
    folders = (RUNS / f"{kind}-seed{seed}" for seed in range(3))
    return [la.Tuned.load(f / "tuned") for f in folders if (f / "done.json").is_file()]


def score_modules(model: Any, job: Job) -> None:
    """Transfer, revert, replace by noise or damage the modules of one model with everything tuned."""
    prefix = "control_" if job.task == "topics" else ""
    folder = RUNS / STUDIES.get(job.task, CONTROL_PARTS) / f"seeds/{prefix}{job.modules}-seed{job.seed}"
    whole = RUNS / f"{job.task}-all-rank{RANK}-seed{job.seed}"
    if (folder / "manifest.json").is_file() or not (whole / "done.json").is_file():
        return
    task, run = task_of(job.task), la.Tuned.load(whole / "tuned")
    examples = task.examples("test", n=N_PARTS if job.task == "goemotions" else None)
    before = kept(RUNS / "base" / f"{prefix}parts{len(examples)}", lambda: task.score(model, examples, seed=0))
    with la.tuned_weights(model, run):
        after = kept(whole / f"parts{len(examples)}", lambda: task.score(model, examples, seed=0))
    found = la.score_parts(
        *(model, run, task),
        arms=TRANSFERRED if job.modules == "transfer" else TRANSFERRED[:4],
        kind=job.modules,
        examples=examples,
        target=DAMAGE,
        before=before,
        after=after,
        seed=job.seed,
    )
    found.save(folder)
    print(found)


def scan_bands(model: Any, job: Job) -> None:
    """Noise in each module of each third of the blocks, and of all of them, at equal damage to language: affect lost minus topics lost, sums beside."""
    folder, whole = RUNS / "study" / "bands", RUNS / f"goemotions-all-rank{RANK}-seed{job.seed}"
    made = la.AblationTable.load(folder) if (folder / "manifest.json").is_file() else None
    if not (whole / "done.json").is_file() or (made and math.isfinite(made.target)):
        return  # a table without a target has scales that were found for all blocks, and is made again
    task = task_of("goemotions")
    found = la.scan_bands(
        *(model, la.Tuned.load(whole / "tuned"), task),
        control_task=task_of("topics"),
        other_tasks=[task_of("arithmetic")],
        target=DAMAGE,
        examples=task.examples("test", n=N_PARTS // 4),
        seed=job.seed,
    )
    found.save(folder, overwrite=True)
    print(found)
    for other in ("up", "down", "attention"):
        print(found.compare("gate", other).round(3).to_string(index=False))


def compare_deltas(model: Any, job: Job) -> None:
    """Where the weights of an everything-tuned model changed, beside its control, and whether other fine-tunes changed them alike."""
    whole, topics = finished(f"{job.task}-all-rank{RANK}"), finished(f"topics-all-rank{RANK}")
    own = [run for run in whole if run.seed == job.seed]
    if not own or not topics:
        return
    place, known = RUNS / "delta", None

    def delta() -> la.ModuleDelta:
        """Of this session, which still knows its weights."""
        return known or la.compare_modules(model, own[0], control=topics[0])

    if not (place / job.task / "manifest.json").is_file():
        known = delta()
        known.save(place / job.task)
        print(known)
    others = {
        "another_seed": [run for run in whole if run.seed != job.seed],
        "topics": topics,
        "shuffled_labels": finished(f"{job.task}_shuffled-all-rank{RANK}"),
    }
    for name, runs in others.items():
        if runs and not (place / name / "manifest.json").is_file():
            known = delta()
            alike = known.compare(la.compare_modules(model, runs[0], spectrum=False))
            alike.save(place / name)
            print(alike)


def study(model: Any, job: Job) -> None:
    """Everything that is there by now about one task, as one result."""
    ranked = {m: finished(f"{job.task}-{m}-rank{RANK}") for m in ("gate", "up", "down", "attention", "all")}
    fitted = {m: finished(f"{job.task}-{m}-size-of-gate-rank{RANK}") for m in ("attention", "random")}
    others = {t: finished(f"{t}-all-rank{RANK}") for t in ("topics", "goemotions_shuffled")}
    control = {m: finished(f"topics-{m}-rank{RANK}") for m in ("gate", "up", "down", "attention", "all")}
    folder, task = RUNS / STUDIES[job.task], task_of(job.task)
    if not ranked["all"]:
        return
    for part in (RUNS / CONTROL_PARTS / "seeds").glob("control_*"):  # one control serves both studies
        shutil.copytree(part, folder / "seeds" / part.name, dirs_exist_ok=True)
    bands = folder / "bands"
    found = la.study_modules(
        *(model, task),
        equal_rank=ranked,
        equal_size={m: fitted.get(m) or ranked[m] for m in ("gate", "up", "down", "attention", "random", "all")},
        controls={t: runs for t, runs in others.items() if runs},
        control={m: runs for m, runs in control.items() if runs} if control["all"] else None,
        control_task=task_of("topics") if control["all"] else None,
        bands=la.AblationTable.load(bands) if (bands / "manifest.json").is_file() else None,
        examples=task.examples("test", n=N_PARTS if job.task == "goemotions" else None),
        target=DAMAGE,
        folder=folder,
    )
    print(found)
    print(la.module_scorecard(found))


def publish(folder: Path) -> None:
    """Everything that there is but weights: scores, curves, costs, rates, studies and deltas, small enough to be kept beside the analyses."""

    def copy(name: str) -> None:
        if (RUNS / name).is_dir():
            no_locks = shutil.ignore_patterns("*.lock", ".*")
            shutil.copytree(RUNS / name, folder / name, dirs_exist_ok=True, ignore=no_locks)

    for done in sorted(RUNS.glob("*/done.json")):
        arm = done.parent.name
        light = dataclasses.replace(la.Tuned.load(done.parent / "tuned"), trained={})
        light.save(folder / arm / "tuned", overwrite=True)
        copy(f"{arm}/controls")
    for name in ("base", "rates", "delta"):
        copy(name)
    for name in STUDIES.values():
        if (RUNS / name / "transfer" / "manifest.json").is_file():
            la.ModuleStudy.load(RUNS / name).save(folder / name, overwrite=True)


NO_ARM = {"parts": score_modules, "bands": scan_bands, "delta": compare_deltas, "study": study}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("blocks", nargs="*", help="blocks to run; all by default")
    parser.add_argument("--task", help="only what is about this task")
    parser.add_argument(
        "--publish", type=Path, help="afterwards copy what is finished, without weights, into this folder"
    )
    said = parser.parse_args()
    asked = said.blocks
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    jobs = [job for job in campaign() if (not asked or job.block in asked) and said.task in (None, job.task)]
    model = la.load_model(MODEL, dtype="float32")
    for name in (*dict.fromkeys(job.task for job in jobs), *CONTROLS):
        print(base_scores(model, name))
    for i, job in enumerate(jobs):
        with contextlib.suppress(Timeout), FileLock(RUNS / f"{job.name}.lock", timeout=0):
            log.info("%d of %d: %s", i + 1, len(jobs), job.name)
            try:
                run(model, job)
            except la.NoRateError as error:  # of this kind of arm; the others go on
                log.warning("%s: %s", job.name, error)
    if said.publish:
        publish(said.publish / "tuning")


if __name__ == "__main__":
    main()
