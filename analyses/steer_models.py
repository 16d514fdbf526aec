"""Make the sweeps of "what happens when you push?" one after the other; can be killed at any time and started again.

    python analyses/steer_models.py [neutral boundaries scenarios halves] [--extra file.gguf:layer] [--publish analyses/results]

Each result is a folder below LENS_AFFECT_RUNS/steering/<model> with a file beside it that says what was asked for; a result that was asked for
otherwise is made anew, one that is there is kept. Every control is written until its texts change the residual stream as much as the steered
texts beside it (sweep_strengths). Blocks: `neutral`, dose and response on matter-of-fact openings; `boundaries`, where the labels of each emotion
change; `scenarios`, each steered to its own target, beside random directions and another emotion; `halves`, steered by vectors from one half of
the topics and to be read by those from the other. --publish copies what there is to where the analyses read it.
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

from filelock import FileLock

import lens_affect as la
from lens_affect.results import write_text_atomically

HERE = Path(__file__).resolve().parent
RUNS = Path(os.environ.get("LENS_AFFECT_RUNS", HERE.parent / "runs")) / "steering"
LAYERS = {"smollm2-135m-instruct": 14, "gemma-3-270m": 11}  # where emotions are told apart best (01_layer_sweep)
EMOTIONS = ("happy", "sad", "afraid", "angry")
DECLARED = 0.2  # strength that the verification is about, set before the scenarios were looked at
TOKENS = 48
BLOCKS = ("neutral", "boundaries", "scenarios", "halves")
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

    def sweep(self, name: str, prompts: la.Scenarios, which: str = "vectors", **asked: Any) -> None:
        """One sweep, and what the judge reads in it."""
        options = {"layers": self.layer, "n_tokens": TOKENS, **asked}
        said = options | {"vectors": which, "prompts": len(prompts)}
        texts = lambda: la.sweep_strengths(self.model, self.vectors(which), prompts, **options)  # noqa: E731
        made = self.kept(name, said, texts)
        dose = la.DoseResponse.load(RUNS / self.name / name)
        read = RUNS / self.name / f"{name}-judgement"
        if made and read.is_dir():
            shutil.rmtree(read)
        self.kept(f"{name}-judgement", {"of": said}, lambda: la.judge_texts(la.load_judge(), dose.texts))


def neutral(subject: Subject) -> None:
    """Every second opening, four emotions, all strengths."""
    openings = la.load_scenarios("neutral")
    rows = list(range(0, len(openings), 2))
    subject.sweep("neutral", openings.select(rows=rows), emotions=list(EMOTIONS), strengths="auto")


def boundaries(subject: Subject) -> None:
    """Of each emotion, told apart from random directions by the judge."""
    openings = la.load_scenarios("neutral")
    some = openings.select(rows=list(range(0, len(openings), 2)))
    asked = {"layers": subject.layer, "strengths": (0.1, 0.2, 0.4, 0.8, 1.6), "precision": 0.25, "n_tokens": TOKENS}
    for emotion in EMOTIONS:
        find = lambda emotion=emotion: la.locate_boundaries(  # noqa: E731
            subject.model, subject.vectors(), some, emotion, judge=la.load_judge(), **asked
        )
        subject.kept(f"boundaries-{emotion}", asked | {"prompts": len(some)}, find)


def scenarios(subject: Subject) -> None:
    """Each to its own target, five random directions and another emotion beside it."""
    asked = {"strengths": [DECLARED, 2 * DECLARED], "n_random": 5, "controls": ["random", "other_emotion"]}
    subject.sweep("scenarios", la.load_scenarios(), **asked)


def halves(subject: Subject) -> None:
    """All openings at the declared strength, by vectors of one half of the topics."""
    subject.vectors("vectors-1")
    asked = {"emotions": list(EMOTIONS), "strengths": [DECLARED]}
    subject.sweep("halves", la.load_scenarios("neutral"), "vectors-0", **asked)


def publish(folder: Path) -> None:
    """Copy what there is, without locks."""
    if RUNS.is_dir():
        shutil.copytree(RUNS, folder / "steering", dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.lock"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("blocks", nargs="*", help=f"of {', '.join(BLOCKS)}; all by default")
    parser.add_argument("--extra", help="a model in a local file, and its layer: file.gguf:12; its neutral sweep only")
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
    blocks = {"neutral": neutral, "boundaries": boundaries, "scenarios": scenarios, "halves": halves}
    for name, make in blocks.items():
        for subject in subjects:
            if (not said.blocks or name in said.blocks) and (name == "neutral" or subject.name in LAYERS):
                make(subject)
    if said.publish:
        publish(said.publish)


if __name__ == "__main__":
    main()
