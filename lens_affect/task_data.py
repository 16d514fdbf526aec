"""Examples of affect tasks and of control tasks, from published data in a folder, from our own texts, or made here. Nothing here knows a model.

GoEmotions (Demszky et al., 2020, arXiv:2005.00547), MELD (Poria et al., 2019, arXiv:1810.02508). Both are read from LENS_AFFECT_DATA, as
`goemotions/{train,dev,test}.tsv` with `labels.txt`, and `meld/{train,dev,test}_sent_emo.csv`; the package ships neither. Where that variable is not
set, GoEmotions is fetched from the Hugging Face hub.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pandas as pd

from lens_affect.scenarios import load_scenarios
from lens_affect.statistics import derive_generator
from lens_affect.stimuli import NEUTRAL, load_stimuli
from lens_affect.tables import FORMATS, read_table, require_columns

SPLITS = ("train", "validation", "test")
"""Parts of a task's examples."""
EKMAN = {
    "anger": ("anger", "annoyance", "disapproval"),
    "disgust": ("disgust",),
    "fear": ("fear", "nervousness"),
    "joy": (
        *(
            "joy",
            "amusement",
            "approval",
            "excitement",
            "gratitude",
            "love",
            "optimism",
            "relief",
            "pride",
            "admiration",
        ),
        *("desire", "caring"),
    ),
    "sadness": ("sadness", "disappointment", "embarrassment", "grief", "remorse"),
    "surprise": ("surprise", "realization", "confusion", "curiosity"),
}
"""Ekman's six with the GoEmotions labels that the data set's authors put under each."""
N_VALIDATION = 1024
"""Rows of the published training split that are kept for validation where a data set is large."""
HUB_GOEMOTIONS = "google-research-datasets/go_emotions"
"""The same rows on the hub, as `simplified/{train,validation,test}-*.parquet`."""


@dataclass(frozen=True)
class Example:
    """One text with what is right for it."""

    text: str
    """What is read."""
    labels: tuple[str, ...]
    """Right answers; any of them counts. Empty where a task has none."""
    group: str
    """Dialogue, topic or passage: examples of one group are resampled together and stay on one side of every split."""


Examples = dict[str, tuple[Example, ...]]


def data_folder(name: str) -> Path:
    """Folder of one data set below LENS_AFFECT_DATA.

    Raises:
        FileNotFoundError: the variable is not set, or the folder is not there.
    """
    place = Path(os.environ.get("LENS_AFFECT_DATA") or "data") / name
    if not place.is_dir():
        raise FileNotFoundError(_missing(name))
    return place


def _missing(name: str) -> str:
    root = os.environ.get("LENS_AFFECT_DATA")
    state = f"LENS_AFFECT_DATA is {root!r}" if root else "LENS_AFFECT_DATA is not set"
    return (
        f"received no folder {Path(root or 'data') / name} ({state}); set LENS_AFFECT_DATA to a folder that holds {name}/ (lens_affect/task_data.py says "
        "which files), or use a task that needs none: passages, topics, arithmetic, neutral_text, writing, or a CSV"
    )


def goemotions(*, ekman: bool = False, max_words: int | None = None) -> Examples:
    """Comments with exactly one of the 27 emotions (neutral and comments with several labels are left out).

    Args:
        ekman: Ekman's six instead of the 27.
        max_words: longest comment.

    Raises:
        FileNotFoundError: neither the folder nor the hub has them.

    Returns:
        `train` and `validation` from the published training split, `test` from the published test split, and behind it the published
        development split. Comments whose text is in training too, or is there twice, are left out of `test`.
    """
    rows, names = _read_goemotions()
    group_of = {label: group for group, members in EKMAN.items() for label in members}

    def read(split: str) -> list[Example]:
        found = []
        for text, ids, row in rows[split]:
            if len(ids) == 1 and names[ids[0]] != NEUTRAL and (max_words is None or len(text.split()) <= max_words):
                label = group_of[names[ids[0]]] if ekman else names[ids[0]]
                found.append(Example(" ".join(text.split()), (label,), row))
        return found

    train = read("train")
    seen = {example.text.lower() for example in train}
    test = [
        e for e in {e.text.lower(): e for e in (*read("test"), *read("dev"))}.values() if e.text.lower() not in seen
    ]
    return _with_validation(train, test)


Rows = list[tuple[str, tuple[int, ...], str]]


def _read_goemotions() -> tuple[dict[str, Rows], list[str]]:
    """(text, label numbers, id) of the published splits, and the labels' names; from a folder, or from the hub where none is named."""
    if "LENS_AFFECT_DATA" not in os.environ and not Path("data/goemotions").is_dir():
        return _goemotions_from_hub()
    place = data_folder("goemotions")
    found: dict[str, Rows] = {}
    for split in ("train", "dev", "test"):
        lines = (place / f"{split}.tsv").read_text(encoding="utf-8").rstrip("\n").split("\n")
        parts = [line.split("\t") for line in lines]
        found[split] = [(text, tuple(int(i) for i in ids.split(",")), row) for text, ids, row in parts]
    return found, (place / "labels.txt").read_text(encoding="utf-8").split()


def _goemotions_from_hub() -> tuple[dict[str, Rows], list[str]]:
    from huggingface_hub import snapshot_download

    try:
        place = Path(snapshot_download(HUB_GOEMOTIONS, repo_type="dataset", allow_patterns=["simplified/*.parquet"]))
    except Exception as error:  # the hub's client raises a dozen kinds, and the network more
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(f"{_missing('goemotions')}. The Hugging Face hub did not help: {reason}") from error
    found: dict[str, Rows] = {}
    for split, name in (("train", "train"), ("dev", "validation"), ("test", "test")):
        tables = [pd.read_parquet(path) for path in sorted((place / "simplified").glob(f"{name}-*.parquet"))]
        table = pd.concat(tables, ignore_index=True)
        each = zip(table["text"], table["labels"], table["id"], strict=True)
        found[split] = [(str(text), tuple(int(i) for i in ids), str(row)) for text, ids, row in each]
    # the hub's label numbers are those of the published labels.txt
    return found, [*sorted(label for members in EKMAN.values() for label in members), NEUTRAL]


def _with_validation(train: Sequence[Example], test: Sequence[Example]) -> Examples:
    """The published training split in two; the same rows are kept aside always."""
    order = derive_generator(0, "validation rows").permutation(len(train)).tolist()
    kept = set(order[: min(N_VALIDATION, len(train) // 5)])
    return {
        "train": tuple(e for i, e in enumerate(train) if i not in kept),
        "validation": tuple(e for i, e in enumerate(train) if i in kept),
        "test": tuple(test),
    }


def meld(column: Literal["Emotion", "Sentiment"], *, max_words: int | None = None) -> Examples:
    """Utterances of MELD (text only) in their published splits; dialogues are groups."""
    place = data_folder("meld")

    def read(split: str) -> tuple[Example, ...]:
        # Windows-1252 characters stand in places of the published files.
        frame = pd.read_csv(place / f"{split}_sent_emo.csv", encoding="utf-8", encoding_errors="replace", dtype=str)
        rows = zip(frame["Utterance"], frame[column], frame["Dialogue_ID"], strict=True)
        return tuple(
            Example(" ".join(str(text).split()), (str(label).lower(),), f"{split} {dialogue}")
            for text, label, dialogue in rows
            if str(text).strip() and (max_words is None or len(str(text).split()) <= max_words)
        )

    return {"train": read("train"), "validation": read("dev"), "test": read("test")}


def passages() -> Examples:
    """Our passages with their emotion, 20 classes; topics are groups and never on two sides."""
    chosen = load_stimuli("passages")
    rows = [
        Example(text, (emotion,), group)
        for text, emotion, group in zip(chosen.texts, chosen.emotions, chosen.groups, strict=True)
        if emotion != NEUTRAL
    ]
    return _by_group(rows)


def topics() -> Examples:
    """Sentences of our passages with the passage's topic (12 classes): not affective. Emotions are groups and never on two sides."""
    chosen = load_stimuli("passages")
    rows = [
        Example(sentence, (group,), emotion)
        for text, emotion, group in zip(chosen.texts, chosen.emotions, chosen.groups, strict=True)
        for sentence in re.split(r"(?<=[.!?])\s+", text)
        if len(sentence.split()) >= 4
    ]
    return _by_group(rows)


def _by_group(rows: Sequence[Example]) -> Examples:
    """A quarter of the groups is for testing, an eighth for validation."""
    groups = sorted({row.group for row in rows})
    order = [groups[i] for i in derive_generator(0, "held-out groups").permutation(len(groups))]
    n_test, n_validation = max(1, len(order) // 4), max(1, len(order) // 8)
    sides = {
        "test": set(order[:n_test]),
        "validation": set(order[n_test : n_test + n_validation]),
        "train": set(order[n_test + n_validation :]),
    }
    return {split: tuple(row for row in rows if row.group in sides[split]) for split in SPLITS}


SOLVED = "3 + 4 = 7\n9 - 2 = 7\n"
"""What stands before every question of arithmetic: small models guess the form from it, not the answer."""


def arithmetic() -> Examples:
    """Sums and differences of numbers up to 20, made here: 400 questions, each once, split at random; none of them is solved in `SOLVED`."""
    pairs = [(a, b, sign) for a in range(1, 21) for b in range(1, 21) for sign in "+-" if sign == "+" or a > b]
    pairs = [(a, b, sign) for a, b, sign in pairs if f"{a} {sign} {b} =" not in SOLVED]
    order = derive_generator(0, "arithmetic").permutation(len(pairs))[:400].tolist()
    rows = [
        Example(f"{a} {sign} {b} =", (str(a + b if sign == "+" else a - b),), f"{a} {sign} {b}")
        for a, b, sign in (pairs[i] for i in order)
    ]
    return {"test": tuple(rows[:100]), "validation": tuple(rows[100:150]), "train": tuple(rows[150:])}


def neutral_text() -> Examples:
    """Our texts without emotion: 24 descriptions and the neutral passages, all of them for testing."""
    plain, chosen = load_scenarios("neutral"), load_stimuli("passages").select(emotions=[NEUTRAL])
    texts = [*plain.openings, *chosen.texts]
    rows = tuple(Example(text, (), f"text {i}") for i, text in enumerate(texts))
    return {"train": (), "validation": (), "test": rows}


def table_examples(path: Path) -> Examples:
    """A user's table: columns `text, label` (several labels are separated by `|`), optionally `split` and `group`.

    Raises:
        ValueError: not a table, missing columns, empty texts or labels, an unknown split, or only one label.
    """
    frame = read_table(path)
    require_columns(frame, ["text", "label"], ["split", "group"], path.stem)
    rows: list[tuple[str, Example]] = []
    for i, record in enumerate(frame.to_dict("records")):
        labels = tuple(p.strip() for p in str(record["label"]).split("|") if p.strip())
        text = " ".join(str(record["text"]).split())
        if not text or not labels:
            raise ValueError(f"received an empty text or label in row {i} of {path.name}; fill or remove it")
        rows.append((str(record.get("split", "")), Example(text, labels, str(record.get("group", f"row {i}")))))
    unknown = sorted({split for split, _ in rows} - {*SPLITS, ""})
    if unknown or ("split" in frame and any(not split for split, _ in rows)):
        raise ValueError(
            f"received the splits {unknown or ['']} in {path.name}; allowed are {list(SPLITS)} in every row, or no such column"
        )
    if "split" in frame:
        return {split: tuple(e for s, e in rows if s == split) for split in SPLITS}
    return _by_group([example for _, example in rows])


def require_table(name: str | os.PathLike[str], known: Sequence[str]) -> Path:
    """The path of a user's table.

    Raises:
        ValueError: neither a task of ours nor a file.
    """
    path = Path(name)
    if not path.is_file():
        raise ValueError(
            f"received task {str(name)!r}; allowed are {list(known)}, or a table with columns text and label: {FORMATS}"
        )
    return path
