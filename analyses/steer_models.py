"""Make the sweeps of "what happens when you push?" one after the other; can be killed at any time and started again.

    python analyses/steer_models.py [neutral scenarios spread inside languages paper boundaries] [--extra file.gguf:layer] [--publish analyses/results]

LENS_AFFECT_RUNS/steering/<model> is a folder that SteeringStudy.load reads. Beside each result stands what was asked for; a result that was asked
for otherwise is made anew, one that is there is kept. Every control is written until its texts change the residual stream as much as the steered
texts beside it (sweep_strengths). Blocks: `neutral`, dose and response on matter-of-fact openings; `scenarios`, each steered to its own target,
beside random directions and another emotion, `spread`, beside random directions within the emotions' spread; `inside`, steered by vectors from one half of the topics and read by those from the other;
`languages`, what vectors bring up and whether they hold in other languages; `paper`, the regime rule of arXiv:2604.04064; `boundaries`, where the
labels of an emotion change. --publish copies what there is, without vectors, to where the analyses read it.
"""

import argparse
import json
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from filelock import FileLock

import lens_affect as la
from lens_affect.results import write_text_atomically

HERE = Path(__file__).resolve().parent
RUNS = Path(os.environ.get("LENS_AFFECT_RUNS", HERE.parent / "runs")) / "steering"
LAYERS = {"smollm2-135m-instruct": 14, "gemma-3-270m": 11}  # where emotions are told apart best (01_layer_sweep)
EMOTIONS = ("happy", "sad", "afraid", "angry")
BISECTED = {
    "smollm2-135m-instruct": EMOTIONS,
    "gemma-3-270m": ("angry",),
}
DECLARED = 0.2  # strength that the verification is about, set before the scenarios were looked at
TOKENS = 48
LANGUAGES = {"English": "passages", "Spanish": "passages_es", "Chinese": "passages_zh"}
log = logging.getLogger("steer_models")


@dataclass
class Subject:
    """One model and what of it is kept."""

    name: str
    file: str
    layer: int
    _models: list[Any] = field(default_factory=list)

    @property
    def model(self) -> Any:
        """Loaded when it is first asked for."""
        if not self._models:
            self._models.append(la.load_model(self.file, dtype="float32"))
        return self._models[0]

    def kept(self, name: str, asked: dict[str, Any], make: Callable[[], Any]) -> bool:
        """Make and save a result, unless it is there and was asked for alike; whether it was made."""
        folder, said = RUNS / self.name / name, json.dumps(asked, indent=1, sort_keys=True)
        note = folder.with_suffix(".json")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            if (folder / "manifest.json").is_file() and note.is_file() and note.read_text(encoding="utf-8") == said:
                return False
            log.info("%s: %s", self.name, name)
            found = make()
            note.unlink(missing_ok=True)  # or a kill between the two would leave an old note beside a new result
            found.save(folder, overwrite=True)
            write_text_atomically(note, said)
        print(found, flush=True)
        return True

    def kept_table(self, name: str, make: Callable[[], pd.DataFrame]) -> None:
        """Make and save a plain table, unless it is there."""
        place = RUNS / self.name / f"{name}.csv"
        place.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(place.with_suffix(".lock")):
            if not place.is_file():
                write_text_atomically(place, make().to_csv(index=False))
        print(pd.read_csv(place).to_string(), flush=True)

    def vectors(self, which: str = "vectors") -> la.EmotionVectors:
        """Emotion vectors from our passages: of all topics (`vectors`), or of every second one (`vectors-0`, `vectors-1`)."""
        passages = la.load_stimuli("passages")
        topics = list(dict.fromkeys(passages.groups))
        chosen = topics if which == "vectors" else topics[int(which[-1]) :: 2]

        def fit() -> la.EmotionVectors:
            read = la.extract_activations(self.model, passages.select(groups=chosen), pooling="mean_without_sinks")
            return la.fit_vectors(read)

        self.kept(which, {"topics": chosen, "pooling": "mean_without_sinks"}, fit)
        return la.EmotionVectors.load(RUNS / self.name / which)

    def sweep(
        self, prompts: la.Scenarios, of: str = "", which: str = "vectors", **asked: Any
    ) -> tuple[la.DoseResponse, la.Judgement, bool]:
        """One sweep with what the judge reads in it, in folders that begin with `of`, and whether either was made now."""
        options = {"layers": self.layer, "n_tokens": TOKENS, **asked}
        said = options | {"vectors": which, "prompts": len(prompts)}
        texts = lambda: la.sweep_strengths(self.model, self.vectors(which), prompts, **options)  # noqa: E731
        made = self.kept(f"{of}dose", said, texts)
        dose = la.DoseResponse.load(RUNS / self.name / f"{of}dose")
        if made:
            self.forget(f"{of}judgement")
        made |= self.kept(f"{of}judgement", {"of": said}, lambda: la.judge_texts(la.load_judge(), dose.texts))
        return dose, la.Judgement.load(RUNS / self.name / f"{of}judgement"), made

    def forget(self, *names: str) -> None:
        """Results that were computed from something that is new now."""
        for name in names:
            shutil.rmtree(RUNS / self.name / name, ignore_errors=True)
            (RUNS / self.name / f"{name}.csv").unlink(missing_ok=True)


def neutral(subject: Subject) -> None:
    """Every second opening, four emotions, all strengths; and how far two judges agree about what came out."""
    openings = la.load_scenarios("neutral")
    some = openings.select(rows=list(range(0, len(openings), 2)))
    dose, read, new = subject.sweep(some, emotions=list(EMOTIONS), strengths="auto")
    if new:
        subject.forget("regimes", "agreement")
    subject.kept("regimes", {}, lambda: la.classify_regimes(dose, read))
    judges = [la.load_judge(), la.load_judge("lexicon")]
    steered = dose.table[dose.table["kind"] == "steered"]
    told = lambda: la.judge_agreement(judges, list(steered["text"]), list(EMOTIONS), groups=list(steered["group"]))  # noqa: E731
    subject.kept_table("agreement", told)


def scenarios(subject: Subject) -> None:
    """Each to its own target, five random directions and another emotion beside it."""
    asked = {"strengths": [DECLARED, 2 * DECLARED], "n_random": 5, "controls": ["random", "other_emotion"]}
    prompts = la.load_scenarios()
    dose, read, new = subject.sweep(prompts, "scenario_", **asked)
    if new:
        subject.forget("verification")
    found = lambda: la.verify_steering(dose, read, strength=DECLARED, scenarios=prompts)  # noqa: E731
    subject.kept("verification", {"strength": DECLARED}, found)


def spread(subject: Subject) -> None:
    """The scenarios at the declared strength beside random directions within the spread of the emotions' vectors, which break texts less than isotropic ones."""
    asked = {"strengths": [DECLARED], "n_random": 5, "controls": ["random_in_spread"]}
    prompts = la.load_scenarios()
    dose, read, new = subject.sweep(prompts, "spread_", **asked)
    if new:
        subject.forget("spread_verification")
    found = lambda: la.verify_steering(dose, read, strength=DECLARED, scenarios=prompts)  # noqa: E731
    subject.kept("spread_verification", {"strength": DECLARED}, found)


def inside(subject: Subject) -> None:
    """All openings at the declared strength by vectors of one half of the topics, read by vectors of the other half."""
    asked = {"emotions": list(EMOTIONS), "strengths": [DECLARED]}
    dose, read, new = subject.sweep(la.load_scenarios("neutral"), "halves-", "vectors-0", **asked)
    if new:
        subject.forget("inside")
    found = lambda: la.correlate_inside(subject.model, dose, read, subject.vectors("vectors-1"))  # noqa: E731
    subject.kept("inside", {}, found)


def languages(subject: Subject) -> None:
    """Scripts and meaning of the tokens that the vectors raise at the steered layer; vectors of one language in another."""
    at = {"layer": subject.layer}
    subject.kept("scripts", at, lambda: la.script_entanglement(subject.model, subject.vectors(), **at))
    subject.kept("meaning", at, lambda: la.foreign_meaning(subject.model, subject.vectors(), **at))

    def transfer() -> la.TransferTable:
        texts = {language: la.load_stimuli(name) for language, name in LANGUAGES.items()}
        read = {n: la.extract_activations(subject.model, t, pooling="mean_without_sinks") for n, t in texts.items()}
        return la.language_transfer(read, model=subject.model)

    subject.kept("transfer", {"passages": LANGUAGES}, transfer)


def paper(subject: Subject) -> None:
    """The rule in the paper's code, on its two scenarios."""

    def samples() -> pd.DataFrame:
        label, found = la.run_jeong_regime(subject.model, subject.vectors())
        return found.assign(label=label)

    subject.kept_table("paper_rule", samples)


def boundaries(subject: Subject) -> None:
    """Of the emotions in BISECTED, told apart from random directions by the judge."""
    openings = la.load_scenarios("neutral")
    some = openings.select(rows=list(range(0, len(openings), 2)))
    asked = {"layers": subject.layer, "strengths": (0.1, 0.2, 0.4, 0.8, 1.6), "precision": 0.25, "n_tokens": TOKENS}
    for emotion in BISECTED[subject.name]:
        find = lambda emotion=emotion: la.locate_boundaries(  # noqa: E731
            subject.model, subject.vectors(), some, emotion, judge=la.load_judge(), **asked
        )
        subject.kept(f"boundaries/{emotion}", asked | {"prompts": len(some)}, find)


BLOCKS = {block.__name__: block for block in (neutral, scenarios, spread, inside, languages, paper, boundaries)}
EXTRA = ("neutral", "languages", "paper")
"""Of a model that is given by its file."""


def publish(folder: Path) -> None:
    """Copy what there is, without vectors and locks."""
    if RUNS.is_dir():
        left = shutil.ignore_patterns("*.lock", "vectors*")
        shutil.copytree(RUNS, folder / "steering", dirs_exist_ok=True, ignore=left)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("blocks", nargs="*", help=f"of {', '.join(BLOCKS)}; all by default")
    parser.add_argument(
        "--extra", help=f"a model in a local file, and its layer: file.gguf:12; only {', '.join(EXTRA)}"
    )
    parser.add_argument("--models", help="comma-separated names; all by default")
    parser.add_argument("--publish", type=Path, help="afterwards copy the results into this folder")
    said = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    subjects = [Subject(name, name, layer) for name, layer in LAYERS.items()]
    if said.extra:
        file, _, layer = said.extra.rpartition(":")
        subjects.append(Subject(Path(file).stem, file, int(layer)))
    if said.models:
        subjects = [s for s in subjects if s.name in said.models.split(",")]
    for name in said.blocks or BLOCKS:
        for subject in subjects:
            if name in EXTRA or subject.name in LAYERS:
                BLOCKS[name](subject)
    if said.publish:
        publish(said.publish)


if __name__ == "__main__":
    main()
