"""A steering study: texts at every dose, what a judge reads in them, their regimes and scripts, and in how many scenarios steering works.

One call and one folder for what otherwise takes five; a report and a scorecard read the folder without a model.
"""

import html
import inspect
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lens_affect.activations import extract_activations
from lens_affect.adapter import LensModel, model_info
from lens_affect.boundaries import SEARCH, RegimeBoundaries, compare_onsets, locate_boundaries
from lens_affect.crosslingual import ScriptTable, script_entanglement
from lens_affect.doses import UNSTEERED, DoseResponse, SweepPlan, plan_sweep, sweep_strengths
from lens_affect.inside import InsideOutside, correlate_inside
from lens_affect.judge_labels import MINIMUM_AUC
from lens_affect.judgements import Judgement, can_name, judge_texts
from lens_affect.judges import Judge
from lens_affect.languages import TransferTable, language_transfer
from lens_affect.meaning import MeaningTable, foreign_meaning
from lens_affect.pushed_texts import RANDOM
from lens_affect.regimes import RegimeMap, classify_regimes, in_words
from lens_affect.results import content_hash, write_text_atomically
from lens_affect.scenarios import Scenarios, load_scenarios
from lens_affect.scripts import script_shares, text_languages
from lens_affect.statistics import cluster_means, mean_interval
from lens_affect.steering import require_steerable
from lens_affect.stimuli import Stimuli
from lens_affect.vectors import EmotionVectors
from lens_affect.verification import Verification, verify_steering

EMOTIONS = ("happy", "sad", "afraid", "angry")
"""Targets on neutral prompts: four that every judge of ours can name, one of each quadrant but the quiet pleasant one."""
VERIFIED_AT = (0.2, 0.4)
"""Strengths at which the scenarios are continued; the first is the declared one, the second for comparison."""
PARTS: dict[str, type] = {
    "dose": DoseResponse,
    "judgement": Judgement,
    "regimes": RegimeMap,
    "scenario_dose": DoseResponse,
    "scenario_judgement": Judgement,
    "verification": Verification,
    "scripts": ScriptTable,
    "meaning": MeaningTable,
    "transfer": TransferTable,
    "inside": InsideOutside,
}
"""Parts of a study, each a folder; all but the first three may be missing."""
LANGUAGES = ("English", "Chinese", "Spanish", "French", "German", "Japanese", "Russian", "Arabic", "Hindi")
"""Languages between which lingua chooses: English, and those of our word lists."""
CONFIDENT = 0.8
"""Smallest probability (among the candidates) at which a text counts as being in a language."""
ASKED = "asked.json"
"""File beside the parts that says what was asked for."""
BOUNDARIES = "boundaries"
"""Folder with one more part per emotion that was bisected."""


@dataclass(frozen=True)
class SteeringStudy:
    """Everything that was asked about pushing one model."""

    dose: DoseResponse
    """Texts on neutral prompts."""
    judgement: Judgement
    """Of these texts."""
    regimes: RegimeMap
    """Of their cells."""
    scenario_dose: DoseResponse | None = None
    """Texts on the scenarios, each steered to its own target."""
    scenario_judgement: Judgement | None = None
    """Of those texts."""
    verification: Verification | None = None
    """Successes against random directions."""
    scripts: ScriptTable | None = None
    """Scripts of the tokens that the vectors raise, at the steered layer."""
    meaning: MeaningTable | None = None
    """Whether foreign tokens among them mean the emotion."""
    transfer: TransferTable | None = None
    """Whether vectors of one language tell emotions apart in another (language_transfer)."""
    inside: InsideOutside | None = None
    """Whether what the judge reads in the texts goes with what other vectors of the model read in them."""
    boundaries: tuple[RegimeBoundaries, ...] = ()
    """Strengths at which the regime of an emotion changes, by bisection, where that was asked."""

    def script_table(self) -> pd.DataFrame:
        """Scripts of the texts, dose by dose: kind, strength, then one column per script with its mean share of letters, texts_with_foreign (share of texts with a
        letter that is not Latin) with `_low` and `_high` (95 %, t over groups of prompts), n."""
        shares = script_shares(self.dose.texts)
        names = [c for c in shares.columns if c != "n_letters"]
        foreign = shares[[c for c in names if c not in ("Latin", "Common")]].sum(axis=1).to_numpy() > 0
        return self._by_dose(pd.DataFrame(shares[names]), foreign, "texts_with_foreign")

    def language_table(self, candidates: Sequence[str] = LANGUAGES) -> pd.DataFrame:
        """Languages of the texts, dose by dose, as lingua names them: kind, strength, one column per language with its share of texts, `undecided` (empty texts, and
        those below CONFIDENT: noise has no language), texts_in_foreign (share in a language other than English) with `_low` and `_high` (95 %, t over groups of
        prompts), n.

        Args:
            candidates: English names of languages to choose between.

        Raises:
            ModuleNotFoundError: lingua is not installed.
        """
        found = text_languages(self.dose.texts, candidates=candidates)
        sure = found["confidence"].to_numpy(float) >= CONFIDENT
        named = np.where(sure, found["language"].to_numpy(object), "undecided")
        order = [*(c.lower() for c in candidates if c.lower() in named), "undecided"]
        table = pd.DataFrame({name: (named == name).astype(float) for name in order})
        return self._by_dose(table, ~np.isin(named, ("english", "undecided")), "texts_in_foreign")

    def _by_dose(self, shares: pd.DataFrame, foreign: np.ndarray, name: str) -> pd.DataFrame:
        kind, strength, group = (self.dose.column(c) for c in ("kind", "strength", "group"))
        rows = []
        for key in dict.fromkeys(zip(kind.tolist(), strength.tolist(), strict=True)):
            own = (kind == key[0]) & (strength == key[1])
            row: dict[str, Any] = {"kind": key[0], "strength": key[1]} | dict(shares[own].mean())
            limits = mean_interval(cluster_means(foreign[own].astype(float), group[own].tolist()))
            row |= {name: float(foreign[own].mean()), f"{name}_low": max(0.0, float(limits.low))}
            rows.append(row | {f"{name}_high": min(1.0, float(limits.high)), "n": int(own.sum())})
        return pd.DataFrame(rows)

    def samples(self, per_regime: int = 2) -> list[tuple[str, str]]:
        """Texts of every damage label that occurs, with what was done, the first ones of each in the order of the table."""
        found: dict[str, list[tuple[str, str]]] = {}
        columns = [self.dose.column(c) for c in ("kind", "emotion", "strength")]
        for i, (label, kind, emotion, strength) in enumerate(zip(self.regimes.damage, *columns, strict=True)):
            if kind in UNSTEERED or not self.dose.texts[i].strip():
                continue
            pushed = f"{emotion} {strength:+g}" if kind == "steered" else f"{in_words(str(kind))} {strength:+g}"
            kept = found.setdefault(str(label), [])
            if len(kept) < per_regime and all(pushed != other for other, _ in kept):
                kept.append((pushed, " ".join(self.dose.texts[i].split())))
        return [(f"{in_words(label)} ({pushed})", text) for label, rows in found.items() for pushed, text in rows]

    def save(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Save every part in a folder of its own.

        Args:
            folder: of the study.
            overwrite: replace a study that is there; parts that this one has not are removed.

        Raises:
            FileExistsError: the folder holds a part of a study, and `overwrite` is False.
        """
        there = saved_parts(folder)
        if there and not overwrite:
            raise FileExistsError(
                f"received {folder}, which holds {', '.join(there)} of a study; choose another folder, or overwrite=True"
            )
        parts = {name: getattr(self, name) for name in PARTS} | {_boundary(b.emotion): b for b in self.boundaries}
        kept = {name: part for name, part in parts.items() if part is not None}
        (Path(folder) / ASKED).unlink(missing_ok=True)  # of the study that was there
        for name, part in kept.items():
            part.save(Path(folder) / name, overwrite=overwrite)
        for name in there:
            if name not in kept:
                shutil.rmtree(Path(folder) / name)
        return Path(folder)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "SteeringStudy":
        """Load what `save` wrote.

        Raises:
            FileNotFoundError: no dose-response, judgement or regimes there.
        """
        there = {n: kind for n, kind in PARTS.items() if (Path(folder) / n / "manifest.json").is_file()}
        missing = [n for n in ("dose", "judgement", "regimes") if n not in there]
        if missing:
            raise FileNotFoundError(
                f"received {folder}, which has no {', '.join(missing)}; give a folder that study_steering saved"
            )
        searched = sorted(path.parent for path in (Path(folder) / BOUNDARIES).glob("*/manifest.json"))
        return cls(
            **{name: kind.load(Path(folder) / name) for name, kind in there.items()},
            boundaries=tuple(RegimeBoundaries.load(path) for path in searched),
        )

    def __str__(self) -> str:
        lines = [str(self.regimes).splitlines()[0], str(self.regimes).splitlines()[1]]
        if len([s for s in self.dose.strengths if s > 0]) > 1:
            lines.append(str(compare_onsets({self.dose.provenance.title: self.dose})))
        if self.verification is not None:
            lines += str(self.verification).splitlines()[:2]
        lines += map(str, self.boundaries)
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(str(self)).replace(chr(10), '<br>')}</p>"


def saved_parts(folder: str | os.PathLike[str]) -> tuple[str, ...]:
    """Parts of a study that a folder holds, boundaries as `boundaries/EMOTION`."""
    there = [name for name in PARTS if (Path(folder) / name / "manifest.json").is_file()]
    searched = sorted(path.parent.name for path in (Path(folder) / BOUNDARIES).glob("*/manifest.json"))
    return (*there, *map(_boundary, searched))


def _boundary(emotion: str) -> str:
    return f"{BOUNDARIES}/{emotion}"


def study_steering(
    model: LensModel,
    vectors: EmotionVectors,
    judge: Judge,
    *,
    prompts: Scenarios | Sequence[str] | None = None,
    emotions: Sequence[str] = EMOTIONS,
    layers: int | Sequence[int] | None = None,
    strengths: Sequence[float] | str = "auto",
    scenarios: Scenarios | None = None,
    verified_at: Sequence[float] = VERIFIED_AT,
    n_random: int = 5,
    languages: bool = False,
    transfer: Mapping[str, Stimuli] | None = None,
    bisected: Sequence[str] = (),
    reading: EmotionVectors | None = None,
    folder: str | os.PathLike[str] | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    **asked: Any,
) -> SteeringStudy:
    """Sweep doses on neutral prompts, judge and classify; verify on scenarios; look at scripts.

    Whatever can be refused is refused before the first text is written.

    Args:
        model: what is steered.
        vectors: directions of this model, read at resid_post.
        judge: an external classifier (load_judge).
        prompts: what is continued at every dose; every second of our neutral scenarios by default.
        emotions: targets on the prompts.
        layers: one block, several, or None for the middle one.
        strengths: of the sweep.
        scenarios: each is steered to its own target (load_scenarios()); None leaves the verification out.
        verified_at: strengths on the scenarios; the first is the declared one.
        n_random: random directions per scenario.
        languages: also look at scripts and meaning of the tokens that the vectors raise.
        transfer: matched texts per language, such as {"English": load_stimuli("passages"), "Spanish": load_stimuli("passages_es")}: they are read, and
            vectors of each language are tried in the others (language_transfer).
        bisected: emotions whose boundaries between regimes are located by bisection, with new texts at every strength tried.
        reading: vectors from other texts than those that steer (half of the topics each, say): the texts on the prompts are projected on them, and that is
            correlated with the judge (correlate_inside).
        folder: every part is saved there as soon as it is finished; parts that are there already and were asked for alike are taken as they are.
        seed: of sampling and controls.
        progress: called with (texts done, texts in all) of the sweep that runs.
        asked: further options of sweep_strengths, for all sweeps; `controls` are not for the search of boundaries.

    Raises:
        ValueError: as sweep_strengths, judge_texts, verify_steering, correlate_inside and language_transfer; a judge that can name none of the targets of the
            scenarios well enough, or none of the reading vectors' emotions; a folder with a study that was asked for otherwise.

    Example:
        >>> study_steering(model, vectors, load_judge(), layers=14, scenarios=load_scenarios())  # doctest: +SKIP
    """
    neutral = load_scenarios("neutral")
    openings = neutral.select(rows=range(0, len(neutral), 2)) if prompts is None else prompts
    common: dict[str, Any] = {"layers": layers, "seed": seed, "progress": progress} | asked
    swept: dict[str, Any] = {"emotions": emotions, "strengths": strengths} | common
    tried: dict[str, Any] = {"strengths": verified_at, "n_random": n_random} | common
    searched = {k: v for k, v in common.items() if k not in ("controls", "n_random", "progress")}
    _check_judge(judge)
    at = _check_sweep(model, vectors, openings, swept).layers[-1]
    for emotion in _listed(bisected):
        _check_sweep(
            model, vectors, openings, searched | {"emotions": [emotion], "strengths": SEARCH, "controls": ("random",)}
        )
    if scenarios is not None:
        _check_scenarios(judge, _check_sweep(model, vectors, scenarios, tried), tried)
    if reading is not None:
        _check_reading(model, judge, reading, at)
    if transfer is not None and len(transfer) < 2:
        raise ValueError(f"received transfer with {list(transfer)}; allowed are the texts of two languages or more")
    part = _Parts(folder)
    if folder is not None:
        part.open(
            {
                "model": _of_model(model),
                "vectors": _of_vectors(vectors),
                "judge": judge.title,
                "prompts": content_hash(
                    openings.to_frame().to_dict() if isinstance(openings, Scenarios) else list(openings)
                ),
                "scenarios": scenarios and content_hash(scenarios.to_frame().to_dict()),
                "transfer": transfer and {name: content_hash(texts.texts) for name, texts in transfer.items()},
                "reading": reading and _of_vectors(reading),
                **{
                    "languages": languages,
                    "bisected": list(bisected),
                    "verified_at": list(verified_at),
                    "n_random": n_random,
                },
                **{"emotions": list(emotions), "layers": layers, "strengths": strengths, "seed": seed},
                **{k: v for k, v in asked.items() if k not in ("scorer", "rows_at_once")},
                "scorer": asked.get("scorer") and _of_model(asked["scorer"]),
            }
        )
    dose = part("dose", lambda: sweep_strengths(model, vectors, openings, **swept))
    judgement = part("judgement", lambda: judge_texts(judge, dose.texts))
    regimes = part("regimes", lambda: classify_regimes(dose, judgement))
    found: dict[str, Any] = {"dose": dose, "judgement": judgement, "regimes": regimes}
    if scenarios is not None:
        texts = part("scenario_dose", lambda: sweep_strengths(model, vectors, scenarios, **tried))
        read = part("scenario_judgement", lambda: judge_texts(judge, texts.texts))
        verify = lambda: verify_steering(texts, read, strength=verified_at[0], scenarios=scenarios)  # noqa: E731
        found |= {"scenario_dose": texts, "scenario_judgement": read, "verification": part("verification", verify)}
    if languages:
        found["scripts"] = part("scripts", lambda: script_entanglement(model, vectors, layer=at))
        found["meaning"] = part("meaning", lambda: foreign_meaning(model, vectors, layer=at))
    if transfer is not None:
        found["transfer"] = part("transfer", lambda: _transfer(model, transfer, seed))
    if reading is not None:
        found["inside"] = part("inside", lambda: correlate_inside(model, dose, judgement, reading, seed=seed))
    found["boundaries"] = tuple(
        part(
            _boundary(emotion),
            lambda emotion=emotion: locate_boundaries(model, vectors, openings, emotion, judge=judge, **searched),
        )
        for emotion in bisected
    )
    return SteeringStudy(**found)


@dataclass
class _Parts:
    """Makes the parts of a study, and keeps each in the folder as soon as it is there."""

    folder: str | os.PathLike[str] | None

    def open(self, asked: dict[str, Any]) -> None:
        """Note what is asked for.

        Raises:
            ValueError: the folder holds parts that were asked for otherwise.
        """
        assert self.folder is not None
        note, there = Path(self.folder) / ASKED, saved_parts(self.folder)
        said = json.loads(
            json.dumps(asked, sort_keys=True, default=lambda x: list(x) if hasattr(x, "__iter__") else str(x))
        )
        if there:
            before = json.loads(note.read_text(encoding="utf-8")) if note.is_file() else None
            if before != said:
                raise ValueError(
                    f"received {self.folder}, which holds a study {different(before, said)}; choose another folder, or remove it"
                )
        note.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(note, json.dumps(said, indent=1, sort_keys=True))

    def __call__(self, name: str, make: Callable[[], Any]) -> Any:
        if self.folder is None:
            return make()
        place = Path(self.folder) / name
        if not (place / "manifest.json").is_file():
            return self._saved(make(), place)
        kind: Any = PARTS.get(name, RegimeBoundaries)
        return kind.load(place)

    @staticmethod
    def _saved(part: Any, place: Path) -> Any:
        part.save(place)
        return part


def different(before: Mapping[str, Any] | None, asked: Mapping[str, Any]) -> str:
    """In what a study that is there differs from the one that is asked for, in words.

    Args:
        before: what was asked for; None where nothing says so.
        asked: what is asked for now.
    """
    if before is None:
        return "that does not say what was asked for"
    names = [k for k in dict.fromkeys((*before, *asked)) if before.get(k) != asked.get(k)]
    shown = [f"{k} {before.get(k)!r} and not {asked.get(k)!r}" for k in names]
    return f"that was asked for with {', '.join(shown)}"


def _of_model(model: LensModel) -> dict[str, Any]:
    facts = model_info(model).provenance
    return {k: getattr(facts, k) for k in ("model", "revision", "weights_sha256", "dtype", "numerics")}


def _of_vectors(vectors: EmotionVectors) -> str:
    return content_hash(vectors.emotions, vectors.layers, vectors.directions.double().sum(-1).tolist(), vectors.source)


def _listed(emotions: Sequence[str]) -> Sequence[str]:
    if isinstance(emotions, str):
        raise ValueError(f"received bisected={emotions!r}; allowed is a list of emotions")
    return emotions


def _check_sweep(model: LensModel, vectors: EmotionVectors, prompts: Any, asked: Mapping[str, Any]) -> SweepPlan:
    """Refuse what sweep_strengths would, before any other sweep has run."""
    known = inspect.signature(plan_sweep).parameters
    unknown = [k for k in asked if k not in inspect.signature(sweep_strengths).parameters]
    if unknown:
        raise TypeError(f"received {unknown}; allowed are options of sweep_strengths")
    return plan_sweep(model, vectors, prompts, **{k: v for k, v in asked.items() if k in known})


def _check_judge(judge: Judge) -> None:
    """Let it read one text: a judge that cannot load, or names none of our emotions, is known before hours of writing."""
    judge_texts(judge, ["A text."])


def _check_scenarios(judge: Judge, plan: SweepPlan, asked: Mapping[str, Any]) -> None:
    targets = list(dict.fromkeys(e for of_prompt in plan.targets for e in of_prompt))
    if not any(can_name(judge, e) and judge.auc(e) >= MINIMUM_AUC for e in targets):
        raise ValueError(
            f"received scenarios with the targets {targets}; {judge.title} was measured good enough (AUC of {MINIMUM_AUC:.2f}) for none of them: use another "
            "judge, or other scenarios"
        )
    if not any(row.kind in RANDOM for row in plan.pushed):
        raise ValueError(
            f"received controls={list(asked.get('controls', ()))!r} with scenarios; a success rate needs random directions: add 'random', or leave scenarios out"
        )


def _check_reading(model: LensModel, judge: Judge, reading: EmotionVectors, layer: int) -> None:
    require_steerable(model, reading)
    reading.vector(reading.emotions[0], layer)
    if not any(can_name(judge, e) for e in reading.emotions):
        raise ValueError(
            f"received reading vectors of {list(reading.emotions)}; {judge.title} can name none of them: use another judge, or vectors of other emotions"
        )


def _transfer(model: LensModel, texts: Mapping[str, Stimuli], seed: int) -> TransferTable:
    read = {name: extract_activations(model, t, pooling="mean_without_sinks") for name, t in texts.items()}
    return language_transfer(read, model=model, seed=seed)
