"""A layer sweep from one spec: steps that are pure functions of the spec, saved when they are done, resumed when interrupted.

A step's folder appears under its name only when it is complete, so `kill -9` at any moment and `resume` repeat no finished
step and give the same tables.
"""

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lens_affect.activations import Activations, check_pooling, extract_activations
from lens_affect.adapter import model_info
from lens_affect.anisotropy import Anisotropy, measure_anisotropy
from lens_affect.comparison import MethodComparison, compare_methods
from lens_affect.designs import Design, draw_labellings, make_design
from lens_affect.lexical import LexicalBar, lexical_bar
from lens_affect.localization import LocalizationCurve, check_design, check_labels, localize
from lens_affect.nulls import p_text
from lens_affect.patching import PatchingMap
from lens_affect.results import Stopwatch, content_hash, load_result, save_result, write_text_atomically
from lens_affect.scores import SCORES
from lens_affect.steering_study import SteeringStudy
from lens_affect.stimuli import EMOTIONS, NEUTRAL, Stimuli, load_stimuli
from lens_affect.stories import Stories, write_stories
from lens_affect.vectors import EmotionVectors, fit_vectors

log = logging.getLogger(__name__)

Method = Literal["comprehension", "generation"]
SPEC = "spec.json"
PRECISION = "precision.json"
"""File of a run with automatic precision: what the model ran in when each step was done."""
MAPS = "patching"
"""Folder of a run that holds patching maps."""
STEERING = "steering"
"""Folder of a run that holds its steering studies."""


class SweepSpec(BaseModel):
    """Everything that decides a sweep's numbers. An unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    """Catalogue name, hub id, folder or GGUF file."""
    methods: tuple[Method, ...] = ("comprehension", "generation")
    """`comprehension` reads given passages; `generation` reads stories that the model writes."""
    emotions: tuple[str, ...] = tuple(EMOTIONS)
    """Which emotions; make_spec takes those of the stimuli by default."""
    stimuli: str = "passages"
    """Passages, or a user's table."""
    stimuli_hash: str = ""
    """Of the texts, labels and groups, by make_spec: a table that was edited since is another run."""
    scores: tuple[str, ...] = ("nearest_mean", "dprime", "valence", "mean_cosine_neutral")
    """Scores per layer; make_spec leaves out, of the default ones, those that the labels or the folds do not allow."""
    pooling: str = "mean_without_sinks"
    """Plain means are dominated by single attention-sink tokens in some models (activations.SINK_RATIO)."""
    n_stories: int = Field(default=12, ge=2)
    """Stories per emotion."""
    story_tokens: int = Field(default=256, ge=16)
    """Longest story."""
    minimum_story_tokens: int = Field(default=64, ge=1)
    """Shortest story."""
    story_rounds: int = Field(default=4, ge=1)
    """Draws per story at most."""
    n_permutations: int = Field(default=1000, ge=0)
    """Relabellings behind each null."""
    compare_methods: bool = False
    """Also read stories and passages in every context and pooling (comparison.compare_methods); about ten more readings."""
    seed: int = 0
    """Of everything that is drawn."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the forward pass."""

    @property
    def hash(self) -> str:
        """First 16 hex digits of the SHA-256 of the spec."""
        return content_hash(self.model_dump())


def make_spec(**settings: Any) -> SweepSpec:
    """A spec from settings, checked before any long work starts.

    Emotions are those of the stimuli unless named; a default score that the stimuli's labels or folds do not allow is left out, with a warning.

    Raises:
        ValueError: an unknown key, emotion, score or pooling, a number out of range, a shortest story longer than the longest, texts that allow no null or no held-out topics, or no named score.
    """
    try:
        spec = SweepSpec(**settings)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise ValueError(
            f"received {place} = {first['input']!r}: {first['msg']}; allowed keys are {', '.join(SweepSpec.model_fields)}"
        ) from error
    if spec.compare_methods and set(spec.methods) != {"comprehension", "generation"}:
        raise ValueError(
            f"received compare_methods=True with methods {list(spec.methods)}; both are needed: leave methods at its default"
        )
    if spec.minimum_story_tokens > spec.story_tokens:
        raise ValueError(
            f"received minimum_story_tokens={spec.minimum_story_tokens} with story_tokens={spec.story_tokens}; no story is at least that long and at "
            f"most this long: allowed is a minimum of up to {spec.story_tokens}, or longer stories"
        )
    check_pooling(spec.pooling)
    unknown = [s for s in spec.scores if s not in SCORES]
    if unknown:
        raise ValueError(f"received scores {unknown}; allowed are {list(SCORES)}")
    if "emotions" not in settings:
        labels = load_stimuli(spec.stimuli).labels  # names missing columns and unreadable files now
        spec = spec.model_copy(update={"emotions": tuple(e for e in labels if e != NEUTRAL)})
    texts = _load_selected(spec)  # names unknown emotions now
    spec = spec.model_copy(update={"stimuli_hash": texts.hash})
    designs = []
    if "comprehension" in spec.methods:
        designs.append(_require_design(texts, spec.seed, spec.n_permutations, f"the stimuli {spec.stimuli!r}"))
    if "generation" in spec.methods:
        designs.append(
            _require_design(_planned_stories(spec), spec.seed, spec.n_permutations, f"n_stories={spec.n_stories}")
        )
    return _with_possible_scores(spec, texts, designs, named="scores" in settings)


def _with_possible_scores(
    spec: SweepSpec, texts: Stimuli, designs: Sequence[tuple[Design, tuple[str, ...]]], *, named: bool
) -> SweepSpec:
    """Without the default scores that the labels, or the folds of one of the methods, do not allow."""
    reasons: dict[str, str] = {}
    for score in spec.scores:
        try:
            check_labels(score, texts.labels)
            for design, emotions in designs:
                check_design(score, design, emotions)
        except ValueError as error:
            reasons[score] = str(error)
    if named and reasons:
        raise ValueError(next(iter(reasons.values())))
    for score, reason in reasons.items():
        log.warning("without %s: %s", score, reason)
    return spec.model_copy(update={"scores": tuple(s for s in spec.scores if s not in reasons)})


def _planned_stories(spec: SweepSpec) -> Stimuli:
    """Stand-ins for the stories to be written: one of each emotion about each topic."""
    cells = [(emotion, f"topic {i}") for emotion in spec.emotions for i in range(spec.n_stories)]
    emotions, topics = zip(*cells, strict=True)
    return Stimuli(emotions, emotions, topics, ("",) * len(cells), ("",) * len(cells))


def _require_design(texts: Stimuli, seed: int, n_permutations: int, received: str) -> tuple[Design, tuple[str, ...]]:
    """Folds and relabellings as the curves will ask for them, before anything is read or written; and the emotions."""
    try:
        design, emotions = make_design(texts, seed=seed)
        draw_labellings(texts, design, min(n_permutations, 1), seed)
        return design, emotions
    except ValueError as error:
        raise ValueError(
            f"received {received} with {len(texts.labels)} labels, which allows no curve: {error}"
        ) from error


QUICK: dict[str, Any] = {"n_stories": 6, "story_tokens": 80, "story_rounds": 3, "n_permutations": 200}
"""Settings of the demo's size: 6 stories of 64 to 80 tokens per emotion, 200 permutations."""


def quick(spec: SweepSpec) -> SweepSpec:
    """A spec at the demo's size (QUICK), whatever size it had; everything else as in the full run."""
    shortest = min(spec.minimum_story_tokens, QUICK["story_tokens"])
    return spec.model_copy(update=QUICK | {"minimum_story_tokens": shortest})


@dataclass(frozen=True)
class Sweep:
    """Everything a finished sweep holds."""

    spec: SweepSpec
    """What was asked."""
    folder: Path
    """Where it lies."""
    stimuli: dict[str, Stimuli]
    """Texts per method."""
    vectors: dict[str, EmotionVectors]
    """Emotion vectors per method (grand-mean baseline)."""
    curves: dict[tuple[str, str], LocalizationCurve]
    """Curve per (method, score)."""
    bars: dict[str, LexicalBar]
    """What a bag of words reaches per method."""
    directions: dict[str, LocalizationCurve]
    """nearest_mean per method against random directions in the place of random labels; empty if that score was not asked for."""
    anisotropy: Anisotropy
    """How narrow the residual stream is, on neutral sentences."""
    stories: Stories | None
    """Account of the generated stories."""
    comparison: MethodComparison | None
    """What text, context, pooling and baseline change; None unless `compare_methods` was asked for."""

    def headline(self, method: str) -> str:
        """The finding of one method as a sentence, with interval, null, the bag-of-words bar, and stories that are missing."""
        curve = (
            self.curves[method, "nearest_mean"]
            if (method, "nearest_mean") in self.curves
            else self.curves[method, self.spec.scores[0]]
        )
        i = curve.row(curve.best_layer)
        low, high = curve.best_depth_interval()
        number = f"{curve.unit} {curve.values[i]:.2f} [{curve.low[i]:.2f}, {curve.high[i]:.2f}]"
        null = (
            f"{curve.null_mean[i]:.2f} with shuffled labels ({p_text(float(curve.p_family[i]), curve.n_permutations)}, over all layers)"
            if curve.n_permutations
            else "no null computed"
        )
        sentence = (
            f"{curve.provenance.title}, {method}: {curve.n_emotions} emotions are told apart best at layer {curve.best_layer} of "
            f"{len(curve.layer_rows)} (depth {curve.depth[i]:.2f}, 95 % interval {low:.2f} to {high:.2f}), {number}, against {null}"
        )
        return f"{sentence}; {self.bar_sentence(method)}{self._shortfall(method)}."

    def _shortfall(self, method: str) -> str:
        """How many stories the emotion with the fewest has, where that is less than was asked for."""
        if method != "generation" or self.stories is None:
            return ""
        counts = {emotion: self.stories.stimuli.emotions.count(emotion) for emotion in self.spec.emotions}
        fewest = min(counts, key=lambda emotion: counts[emotion])
        if counts[fewest] >= self.spec.n_stories:
            return ""
        return f"; not every story could be had: {fewest!r} has the fewest, {counts[fewest]} of {self.spec.n_stories}"

    def bar_sentence(self, method: str) -> str:
        """Whether the vectors clear the bag-of-words bar, each topic scored at the layer that is best on the other topics."""
        bar, curve = self.bars[method], self.curves.get((method, "nearest_mean"))
        if curve is None:
            return f"a bag of words reaches {bar.accuracy:.2f}"
        gap = bar.compare(curve)
        verdict = "clear" if gap.low > 0 else "do not clear"
        return (
            f"the vectors {verdict} the bag-of-words bar of {bar.accuracy:.2f} [{bar.low:.2f}, {bar.high:.2f}] "
            f"(difference {float(gap.estimate):+.2f} [{float(gap.low):+.2f}, {float(gap.high):+.2f}], layer chosen on other topics)"
        )

    def activations(self, method: str) -> Activations:
        """The pooled activations of one method, memory-mapped from the run's folder.

        Raises:
            ValueError: a method that was not run.
        """
        if method not in self.stimuli:
            raise ValueError(f"received method {method!r}; this run has {list(self.stimuli)}")
        return Activations.load(self.folder / "steps" / f"activations-{method}")

    @property
    def maps(self) -> dict[str, PatchingMap]:
        """Patching maps that were added to the run (`lens-affect patch MODEL --run FOLDER`), by name."""
        found = sorted((self.folder / MAPS).glob("*/manifest.json"))
        return {manifest.parent.name: PatchingMap.load(manifest.parent) for manifest in found}

    @property
    def steering(self) -> dict[str, SteeringStudy]:
        """Steering studies that were added to the run (`lens-affect regimes MODEL --run FOLDER`), by name."""
        found = sorted((self.folder / STEERING).glob("*/regimes/manifest.json"))
        return {m.parent.parent.name: SteeringStudy.load(m.parent.parent) for m in found}

    def to_frame(self) -> pd.DataFrame:
        """All curves in long form with columns method and score in front."""
        parts = []
        for (method, score), curve in self.curves.items():
            parts.append(curve.to_frame().rename(columns={"score": "value"}).assign(method=method, score=score))
        return pd.concat(parts, ignore_index=True).loc[
            :,
            [
                "method",
                "score",
                "row",
                "depth",
                "value",
                "low",
                "high",
                "null_mean",
                "null_low",
                "null_high",
                "threshold",
                "p",
                "p_family",
                "n",
            ],
        ]


Report = Callable[[str], AbstractContextManager[Callable[[int, int], None]]]
"""Called with a step's name; gives a context manager around the step, which gives a progress function."""


def _silent(step: str) -> AbstractContextManager[Callable[[int, int], None]]:
    return nullcontext(lambda done, total: None)


def run_sweep(
    spec: SweepSpec,
    out: str | Path,
    *,
    resume: bool = False,
    load: Callable[[str, str], Any] | None = None,
    report: Report = _silent,
) -> Sweep:
    """Run a sweep, or finish an interrupted one.

    Args:
        spec: what to do.
        out: folder of the run.
        resume: go on in a folder that holds an unfinished (or finished) run of the same spec.
        load: makes the model from (name, dtype); called only if some step still needs it.
        report: shows progress.

    Returns:
        The results, all saved in the folder.

    Raises:
        FileExistsError: the folder holds a run and `resume` is False.
        ValueError: the folder holds a run of another spec, or an unknown model's name (before anything is written).
    """
    folder = Path(out)
    if load is None and not (folder / SPEC).is_file():
        from lens_affect.models import require_known

        require_known(spec.model)  # a folder that a misspelt name has claimed would refuse the right one
    _claim(folder, spec, resume)
    run = _Run(spec, folder, load or _load_default, report)
    stimuli: dict[str, Stimuli] = {}
    vectors: dict[str, EmotionVectors] = {}
    curves: dict[tuple[str, str], LocalizationCurve] = {}
    bars: dict[str, LexicalBar] = {}
    directions: dict[str, LocalizationCurve] = {}
    stories: Stories | None = None
    for method in spec.methods:
        if method == "generation":
            written: Stories = run.step("stories", Stories, run.write_stories)
            stories, texts = written, written.stimuli
        else:
            texts = run.step("stimuli", Stimuli, lambda p: _load_selected(spec))
        stimuli[method] = texts
        activations = run.step(f"activations-{method}", Activations, lambda p, t=texts: run.extract(t, p))
        vectors[method] = run.step(
            f"vectors-{method}", EmotionVectors, lambda p, a=activations: fit_vectors(a, seed=spec.seed)
        )
        for score in spec.scores:
            curves[method, score] = run.step(
                f"curve-{method}-{score}",
                LocalizationCurve,
                lambda p, a=activations, s=score: localize(
                    a, score=s, n_permutations=spec.n_permutations, seed=spec.seed, progress=p
                ),
            )
        if "nearest_mean" in spec.scores and spec.n_permutations:
            directions[method] = run.step(
                f"curve-{method}-nearest_mean-directions",
                LocalizationCurve,
                lambda p, a=activations: localize(
                    a, n_permutations=spec.n_permutations, null="directions", seed=spec.seed, progress=p
                ),
            )
        bars[method] = run.step(f"bar-{method}", LexicalBar, lambda p, t=texts: lexical_bar(t, seed=spec.seed))
    anisotropy: Anisotropy = run.step("anisotropy", Anisotropy, lambda p: measure_anisotropy(run.model))
    comparison = None
    if spec.compare_methods:
        comparison = run.step(
            "comparison",
            MethodComparison,
            lambda p: compare_methods(
                run.model, stimuli["generation"], stimuli["comprehension"], seed=spec.seed, progress=p
            ),
        )
    sweep = Sweep(spec, folder, stimuli, vectors, curves, bars, directions, anisotropy, stories, comparison)
    write_text_atomically(folder / "curves.csv", sweep.to_frame().to_csv(index=False))
    return sweep


def load_sweep(out: str | Path) -> Sweep:
    """A finished sweep from its folder; no model is needed.

    Raises:
        FileNotFoundError: the folder holds no finished sweep.
    """
    folder = Path(out)
    if not (folder / SPEC).is_file():
        raise FileNotFoundError(
            f"received {folder}, which holds no sweep (no {SPEC}); run `lens-affect sweep MODEL --out {folder}` first"
        )

    def refuse(name: str, dtype: str) -> Any:
        raise FileNotFoundError(f"the sweep in {folder} is not finished; run it again with --resume")

    return run_sweep(_read_spec(folder), folder, resume=True, load=refuse)


def _read_spec(folder: Path) -> SweepSpec:
    return SweepSpec(**json.loads((folder / SPEC).read_text(encoding="utf-8"))["spec"])


def _claim(folder: Path, spec: SweepSpec, resume: bool) -> None:
    path = folder / SPEC
    if not path.is_file():
        # what a process that was killed while it wrote the spec left behind is no run
        if folder.is_dir() and any(not path.name.startswith(f".{SPEC}.") for path in folder.iterdir()):
            raise FileExistsError(
                f"received the folder {folder}, which holds other files; choose an empty or a new one with --out"
            )
        write_text_atomically(path, json.dumps({"hash": spec.hash, "spec": spec.model_dump()}, indent=1))
        return
    there = _read_spec(folder)
    if there.hash != spec.hash:
        mine, theirs = spec.model_dump(), there.model_dump()
        differing = {k: (theirs[k], mine[k]) for k in mine if mine[k] != theirs[k]}
        told = "; ".join(f"{k} is {a!r} there and {b!r} here" for k, (a, b) in differing.items())
        raise ValueError(
            f"received the folder {folder}, which holds another run ({told}); choose another folder with --out"
        )
    if not resume:
        raise FileExistsError(
            f"received the folder {folder}, which holds this run already; go on with --resume, or choose another with --out"
        )


def _load_selected(spec: SweepSpec) -> Stimuli:
    stimuli = load_stimuli(spec.stimuli)
    return stimuli.select(emotions=[*spec.emotions, *([NEUTRAL] if NEUTRAL in stimuli.labels else [])])


def _load_default(name: str, dtype: str) -> Any:
    import torch

    from lens_affect.models import load_model

    return load_model(name, dtype="auto" if dtype == "auto" else getattr(torch, dtype))


class _Run:
    """Steps of one run; the model is loaded when the first unfinished step asks for it."""

    def __init__(self, spec: SweepSpec, folder: Path, load: Callable[[str, str], Any], report: Report) -> None:
        self.spec, self.folder, self.report = spec, folder, report
        self._load, self._model = load, None

    @property
    def model(self) -> Any:
        if self._model is None:
            with self.report("load the model"):
                self._model = self._load_as_before()
        return self._model

    def _load_as_before(self) -> Any:
        """The model in the precision in which the last finished step left it.

        `dtype="auto"` decides by a measurement, and a reader that finds bfloat16 too coarse goes back to float32 for the rest of the
        run; a run that is resumed has to go on from there, whatever a new measurement would say.
        """
        name, dtype = self.spec.model, self.spec.dtype
        done = [kept for step, kept in self._precisions().items() if self._is_done(step)]
        if dtype != "auto" or not done:
            return self._load(name, dtype)
        model = self._load(name, "float32")
        if done[-1] == "bfloat16":
            from lens_affect.models import use_bfloat16

            use_bfloat16(model, lambda: self._load(name, "float32"))
        return model

    def _precisions(self) -> dict[str, str]:
        """Precision after each step, in the order of the steps."""
        path = self.folder / PRECISION
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def _note_precision(self, step: str) -> None:
        """Written before the step is saved, and believed only once it is: whenever a run is killed, both are there or neither counts."""
        if self._model is None or self.spec.dtype != "auto":
            return
        kept = {name: precision for name, precision in self._precisions().items() if name != step}
        kept[step] = str(model_info(self._model).provenance.dtype)
        write_text_atomically(self.folder / PRECISION, json.dumps(kept, indent=1))

    def _is_done(self, step: str) -> bool:
        return (self.folder / "steps" / step / "manifest.json").is_file()

    def step(self, name: str, kind: Any, work: Callable[[Callable[[int, int], None]], Any]) -> Any:
        place = self.folder / "steps" / name
        if self._is_done(name):
            try:
                return load_result(kind, place)
            except ValueError as error:
                log.warning("%s: doing this step again", error)
        clock = Stopwatch()
        with self._reported(name) as progress:
            result = work(progress)
            self._note_precision(name)
            save_result(result, place, overwrite=True)
        log.info("%s took %.1f s", name, clock.seconds)
        return load_result(kind, place)

    @contextmanager
    def _reported(self, name: str) -> Iterator[Callable[[int, int], None]]:
        if name in ("stories", "anisotropy", "comparison") or name.startswith("activations"):
            _ = self.model  # loaded before the step's own progress starts
        with self.report(name.replace("-", " ")) as progress:
            yield progress

    def write_stories(self, progress: Callable[[int, int], None]) -> Stories:
        spec = self.spec
        return write_stories(
            self.model,
            spec.emotions,
            n_stories=spec.n_stories,
            minimum_tokens=spec.minimum_story_tokens,
            max_new_tokens=spec.story_tokens,
            max_rounds=spec.story_rounds,
            seed=spec.seed,
            progress=progress,
        )

    def extract(self, stimuli: Stimuli, progress: Callable[[int, int], None]) -> Activations:
        return extract_activations(self.model, stimuli, pooling=self.spec.pooling, progress=progress)
