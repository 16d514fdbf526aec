"""Contrast pairs: two texts that differ in little but their emotion, and the words that would come next in each."""

import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import pandas as pd

from lens_affect.results import content_hash
from lens_affect.statistics import derive_generator
from lens_affect.tables import FORMATS, read_table, require_columns

SETS = {
    "affect": "everyday situations with opposite outcomes; the next word is an emotion",
    "number": "one or several of something; the next word is a verb that agrees (no emotion)",
    "tense": "yesterday or tomorrow; the next word is a verb in its tense (no emotion)",
}
"""Our sets of pairs (data/pairs.md)."""

Words = tuple[str, ...]


@dataclass(frozen=True)
class ContrastPairs:
    """Pairs of texts. All tuples have one entry per pair."""

    clean: tuple[str, ...]
    """Texts with the behaviour of interest."""
    corrupted: tuple[str, ...]
    """Their counterparts, alike but for a few words."""
    clean_words: tuple[Words, ...]
    """Words that may follow the clean text."""
    corrupted_words: tuple[Words, ...]
    """Words that may follow the corrupted text."""
    clean_emotions: tuple[str, ...]
    """Label of each clean text."""
    corrupted_emotions: tuple[str, ...]
    """Label of each corrupted text."""
    groups: tuple[str, ...]
    """Topic of each pair; pairs of one topic stay on one side of every split and are resampled together."""
    name: str = field(default="pairs")
    """Name of the set, for titles."""

    def __post_init__(self) -> None:
        columns = (self.clean, self.corrupted, self.clean_words, self.corrupted_words, self.clean_emotions)
        sizes = {len(c) for c in (*columns, self.corrupted_emotions, self.groups)}
        if len(sizes) != 1:
            raise ValueError(
                f"received columns of unequal lengths {sorted(sizes)}; allowed is one entry per pair in each"
            )
        if not self.clean:
            raise ValueError("received no pairs; allowed is at least one")
        for row, (a, b, mine, theirs) in enumerate(
            zip(self.clean, self.corrupted, self.clean_words, self.corrupted_words, strict=True)
        ):
            if not a.strip() or not b.strip():
                raise ValueError(f"received an empty text in pair {row}; remove or fill it")
            if a == b:
                raise ValueError(f"received the same text twice in pair {row}; a contrast needs two different texts")
            if not mine or not theirs or not all(w.strip() for w in (*mine, *theirs)):
                raise ValueError(f"received a side without words in pair {row}; both texts need words that may follow")
            if set(mine) & set(theirs):
                shared = sorted(set(mine) & set(theirs))
                raise ValueError(
                    f"received {shared} on both sides of pair {row}; a word may follow one of the texts only"
                )

    @classmethod
    def from_texts(
        cls,
        pairs: Iterable[tuple[str, str]],
        answers: tuple[str | Sequence[str], str | Sequence[str]],
        *,
        groups: Sequence[str] | None = None,
        name: str = "pairs",
    ) -> "ContrastPairs":
        """Pairs of one contrast from plain texts.

        Args:
            pairs: (clean, corrupted) texts.
            answers: words that may follow the clean texts, and words that may follow the corrupted ones.
            groups: topic of each pair; by default every pair is a group of its own.
            name: of the set.

        Raises:
            ValueError: no pairs, an empty text, a side without words, or a word on both sides.

        Example:
            >>> len(ContrastPairs.from_texts([("He won. He felt", "He lost. He felt")], (["glad", "proud"], ["sad"])))
            1
        """
        texts = list(pairs)
        sides = [(a,) if isinstance(a, str) else tuple(a) for a in answers]
        return cls(
            clean=tuple(a for a, _ in texts),
            corrupted=tuple(b for _, b in texts),
            clean_words=(sides[0],) * len(texts),
            corrupted_words=(sides[1],) * len(texts),
            clean_emotions=(next(iter(sides[0]), ""),) * len(texts),
            corrupted_emotions=(next(iter(sides[1]), ""),) * len(texts),
            groups=tuple(groups) if groups is not None else tuple(f"pair {i}" for i in range(len(texts))),
            name=name,
        )

    def __len__(self) -> int:
        return len(self.clean)

    @property
    def hash(self) -> str:
        """First 16 hex digits of the SHA-256 over texts, words, emotions and groups."""
        words = (" ".join(w) for w in (*self.clean_words, *self.corrupted_words))
        return content_hash(
            self.clean, self.corrupted, tuple(words), self.clean_emotions, self.corrupted_emotions, self.groups
        )

    def select(self, rows: Sequence[int]) -> "ContrastPairs":
        """The pairs at these row numbers, in this order.

        Raises:
            ValueError: no rows.
        """
        columns = [n for n in self.__dataclass_fields__ if n != "name"]
        return ContrastPairs(**{n: tuple(getattr(self, n)[i] for i in rows) for n in columns}, name=self.name)

    def sample(self, n: int, *, seed: int = 0) -> "ContrastPairs":
        """n pairs, spread as evenly as possible over groups and over contrasts (which emotion is clean, which corrupted).

        Every n-th pair would not do: in a set that alternates, all of them could have the same side clean.

        Args:
            n: how many.
            seed: which ones, among those that are equally good.

        Raises:
            ValueError: n is not between 1 and the number of pairs.
        """
        if not 1 <= n <= len(self):
            raise ValueError(f"received n={n}; allowed are 1 to {len(self)} pairs")
        contrasts = list(zip(self.clean_emotions, self.corrupted_emotions, strict=True))
        left = derive_generator(seed, "sample pairs").permutation(len(self)).tolist()
        of_contrast, of_group, of_both = Counter[Any](), Counter[Any](), Counter[Any]()
        chosen = []
        for _ in range(n):
            row = min(
                left,
                key=lambda r: (
                    of_group[self.groups[r]],
                    of_contrast[contrasts[r]],
                    of_both[self.groups[r], contrasts[r]],
                ),
            )
            left.remove(row)
            chosen.append(row)
            of_group[self.groups[row]] += 1
            of_contrast[contrasts[row]] += 1
            of_both[self.groups[row], contrasts[row]] += 1
        return self.select(sorted(chosen))

    def to_frame(self) -> pd.DataFrame:
        """One row per pair."""
        return pd.DataFrame({n: list(getattr(self, n)) for n in self.__dataclass_fields__ if n != "name"})

    def __str__(self) -> str:
        contrasts = Counter(zip(self.clean_emotions, self.corrupted_emotions, strict=True))
        most = ", ".join(f"{a} against {b} ({n})" for (a, b), n in contrasts.most_common(4))
        return f"{self.name}: {len(self)} pairs, {len(set(self.groups))} groups\n{most}"


def load_pairs(name_or_path: str | os.PathLike[str] = "affect") -> ContrastPairs:
    """Load our pairs or a user's table.

    Args:
        name_or_path: `affect`, or the non-affective `number` and `tense` (contrasts.SETS, data/pairs.md); or a CSV, TSV, Parquet or
            JSON-lines file with columns `clean, corrupted, clean_words, corrupted_words` (words separated by `|`) and optionally
            `group, clean_emotion, corrupted_emotion`.

    Raises:
        ValueError: unknown name or format, missing columns, empty texts, or a side without words.
    """
    if str(name_or_path) in SETS:
        text = files("lens_affect.data").joinpath(f"pairs_{name_or_path}.jsonl").read_text(encoding="utf-8")
        return _from_frame(pd.DataFrame([json.loads(line) for line in text.splitlines()]), str(name_or_path))
    path = Path(name_or_path)
    if not path.is_file():
        raise ValueError(f"received pairs {str(name_or_path)!r}; allowed are {list(SETS)} or a file: {FORMATS}")
    return _from_frame(read_table(path), path.stem)


def _from_frame(frame: pd.DataFrame, name: str) -> ContrastPairs:
    needed, optional = (
        ["clean", "corrupted", "clean_words", "corrupted_words"],
        ["group", "clean_emotion", "corrupted_emotion"],
    )
    require_columns(frame, needed, optional, name)
    clean_words, corrupted_words = (tuple(map(_words, frame[c])) for c in ("clean_words", "corrupted_words"))

    def column(key: str, default: Sequence[str]) -> tuple[str, ...]:
        return tuple(frame[key].astype(str)) if key in frame else tuple(default)

    return ContrastPairs(
        clean=tuple(frame["clean"].fillna("").astype(str)),
        corrupted=tuple(frame["corrupted"].fillna("").astype(str)),
        clean_words=clean_words,
        corrupted_words=corrupted_words,
        clean_emotions=column("clean_emotion", [next(iter(w), "") for w in clean_words]),
        corrupted_emotions=column("corrupted_emotion", [next(iter(w), "") for w in corrupted_words]),
        groups=column("group", [f"pair {i}" for i in range(len(frame))]),
        name=name,
    )


def _words(cell: object) -> Words:
    parts = cell.split("|") if isinstance(cell, str) else cell if isinstance(cell, Iterable) else ()
    return tuple(str(p).strip() for p in parts if str(p).strip())
