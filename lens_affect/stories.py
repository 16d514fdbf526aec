"""Generation-based stimuli: stories that the model itself writes about an emotion.

Greedy decoding of five templates used twice gives every story twice (arXiv:2604.04064's code), so stories here are
sampled, and near-copies, refusals, empty and looping texts are drawn again and counted.
"""

import html
import logging
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from lens_affect.adapter import LensModel, form_of, model_info
from lens_affect.generation import generate
from lens_affect.results import Provenance, Stopwatch, load_result, save_result
from lens_affect.stimuli import NEUTRAL, PromptSet, Stimuli, load_prompts, named_emotion

log = logging.getLogger(__name__)

_REFUSAL = re.compile(
    r"\bas an AI\b|\bI(['’]m| am) sorry,? but\b|\bI(['’]m| am) (unable|not able) to (write|help|assist|create|provide|generate|fulfil)"
    r"|\bI (cannot|can['’]t) (write|help|assist|create|provide|generate|fulfil)",
    re.IGNORECASE,
)
MAXIMUM_OVERLAP = 0.5
"""Two stories of one emotion count as distinct below this Jaccard overlap of their token 3-grams."""
FEWEST_STORIES = 2
"""An emotion needs this many, so that one can be held out."""
MAXIMUM_REPETITION = 0.5
"""A story is repetitive when more than this share of its token 3-grams occurred before in it."""


@dataclass(frozen=True)
class Stories:
    """Stories as stimuli, with an account of what was drawn and why it was refused."""

    stimuli: Stimuli
    """The accepted stories, each with its prompt, its topic (or template) as group, and the model as source."""
    table: pd.DataFrame
    """One row per draw: emotion, slot, round, tokens, verdict (accepted, empty, short, refusal, repetitive, copy), names_emotion."""
    n_wanted: int
    """Stories asked for; those that no round gave are left out."""
    form: str
    """`chat` or `plain`: a model without a chat template gets plain prompts."""
    provenance: Provenance
    """Model, seed, versions."""

    @property
    def counts(self) -> dict[str, int]:
        """Number of draws by verdict, and of accepted stories that name their emotion."""
        counts = Counter(self.table["verdict"])
        naming = [n for n, v in zip(self.table["names_emotion"], self.table["verdict"], strict=True) if v == "accepted"]
        return {str(k): int(v) for k, v in counts.items()} | {"accepted, naming the emotion": sum(naming)}

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Save as a folder (see results.py)."""
        return save_result(self, folder, overwrite=overwrite)

    @classmethod
    def load(cls, folder: str | Path) -> "Stories":
        """Load what `save` wrote."""
        return load_result(cls, folder)

    def to_frame(self) -> pd.DataFrame:
        """One row per draw."""
        return self.table

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(str(self)).replace(chr(10), '<br>')}</p>"

    def __str__(self) -> str:
        counts = ", ".join(f"{n} {verdict}" for verdict, n in self.counts.items())
        missing = "" if len(self.stimuli) == self.n_wanted else f" of {self.n_wanted}"
        return f"{len(self.stimuli)}{missing} stories by {self.provenance.title} ({self.form} prompts)\n{len(self.table)} draws: {counts}"


def write_stories(
    model: LensModel,
    emotions: Sequence[str],
    *,
    n_stories: int = 12,
    prompts: PromptSet | str = "ours",
    neutral: bool = True,
    minimum_tokens: int = 64,
    max_new_tokens: int = 256,
    temperature: float = 0.7,
    top_p: float = 0.95,
    max_rounds: int = 4,
    batch_rows: int = 64,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Stories:
    """Let a model write distinct stories about emotions.

    Story k of every emotion answers template k and takes place at topic k (both in turn), so emotions are crossed with topics
    just as in the passages. Topics are the groups that splits keep together; templates are crossed with emotions as topics are, so
    stories that share one across folds say nothing of the emotion, and relabelling within topics stays a fair null. A draw that is empty, short, a refusal, repetitive or a near-copy is drawn again; one that names
    its emotion is drawn again too, and kept only if every round named it. A story that no round gives is left out, with a warning.

    Args:
        model: who writes.
        emotions: adjectives.
        n_stories: per emotion.
        prompts: a prompt set, or the name or file of one (stimuli.load_prompts).
        neutral: also write `n_stories` neutral stories with the set's neutral prompts.
        minimum_tokens: shorter stories are drawn again.
        max_new_tokens: length limit.
        temperature: of sampling.
        top_p: of sampling.
        max_rounds: draws per story at most.
        batch_rows: stories per batch.
        seed: of all draws.
        progress: called with (stories accepted, stories wanted).

    Returns:
        The stories and the account of all draws. A model without a chat template gets plain prompts, with a warning.

    Raises:
        ValueError: an unknown emotion form, or an emotion with fewer than FEWEST_STORIES stories after `max_rounds` draws of each.
    """
    clock = Stopwatch()
    if form_of(model) == "plain":
        log.warning(
            "%s has no chat template: it gets each request as plain text with an empty line behind it, which a model that was not "
            "trained to answer requests may not take up",
            model_info(model).provenance.title,
        )
    asked = load_prompts(prompts) if isinstance(prompts, str) else prompts
    slots = _slots(asked, [*emotions, *([NEUTRAL] if neutral else [])], n_stories)
    drawn, form = _Drawn(list(slots), minimum_tokens), "plain"
    for attempt in range(max_rounds):
        pending = drawn.pending()
        for start in range(0, len(pending), batch_rows):
            batch = pending[start : start + batch_rows]
            out = generate(
                model,
                [slots[slot][0] for slot in batch],
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_p=top_p,
                seed=seed,
                row_seeds=[f"{emotion}/{k}/{attempt}" for emotion, k in batch],
            )
            form = out.form
            for slot, text, tokens in zip(batch, out.texts, out.tokens, strict=True):
                drawn.judge(slot, text, tokens, attempt, again=attempt + 1 < max_rounds)
            if progress:
                progress(len(drawn.accepted), len(slots))
    drawn.take_reserves()
    _require_enough(drawn, min(FEWEST_STORIES, n_stories))
    info = model_info(model).provenance
    kept = {slot: slots[slot] for slot in slots if slot in drawn.accepted}
    stimuli = Stimuli(
        texts=tuple(drawn.accepted[slot] for slot in kept),
        emotions=tuple(emotion for emotion, _ in kept),
        groups=tuple(group for _, group in kept.values()),
        sources=(info.title,) * len(kept),
        prompts=tuple(prompt for prompt, _ in kept.values()),
        name=f"stories by {info.model}",
    )
    provenance = info.updated(stimuli_hash=stimuli.hash, seed=seed, elapsed_seconds=clock.seconds)
    return Stories(stimuli, pd.DataFrame(drawn.rows), len(slots), form, provenance)


Slot = tuple[str, int]
"""Emotion and number of a story."""


class _Drawn:
    """Every draw with its verdict, and the stories that were accepted."""

    def __init__(self, slots: Sequence[Slot], minimum_tokens: int) -> None:
        self.slots, self.minimum_tokens = slots, minimum_tokens
        self.accepted: dict[Slot, str] = {}
        self.rows: list[dict[str, Any]] = []
        self._seen: dict[str, list[set[tuple[int, ...]]]] = {emotion: [] for emotion, _ in slots}
        self._reserve: dict[Slot, tuple[int, str, set[tuple[int, ...]]]] = {}

    def pending(self) -> list[Slot]:
        """Slots without a story."""
        return [slot for slot in self.slots if slot not in self.accepted]

    def judge(self, slot: Slot, text: str, tokens: Sequence[int], attempt: int, *, again: bool) -> None:
        """Accept a draw, or say why not; one that names its emotion waits in reserve while it can be drawn again."""
        emotion, k = slot
        names = emotion != NEUTRAL and named_emotion(text, emotion) is not None
        verdict, trigrams = _verdict(text, tokens, self.minimum_tokens, self._seen[emotion]), _trigrams(tokens)
        if verdict == "accepted" and names and again:
            verdict = "names emotion"
            self._reserve.setdefault(slot, (len(self.rows), text, trigrams))
        elif verdict == "accepted":
            self._accept(slot, text, trigrams)
        self.rows.append(
            {
                "emotion": emotion,
                "slot": k,
                "round": attempt,
                "tokens": len(tokens),
                "verdict": verdict,
                "names_emotion": names,
            }
        )

    def take_reserves(self) -> None:
        """Fill the slots whose every draw named the emotion, near-copies excepted."""
        for slot, (row, text, trigrams) in self._reserve.items():
            if slot not in self.accepted:
                copy = _is_copy(trigrams, self._seen[slot[0]])
                self.rows[row]["verdict"] = "copy" if copy else "accepted"
                if not copy:
                    self._accept(slot, text, trigrams)

    def reasons(self, slots: Sequence[Slot]) -> dict[str, int]:
        """Draws of some slots by verdict."""
        return dict(Counter(str(row["verdict"]) for row in self.rows if (row["emotion"], row["slot"]) in slots))

    def _accept(self, slot: Slot, text: str, trigrams: set[tuple[int, ...]]) -> None:
        self.accepted[slot] = text
        self._seen[slot[0]].append(trigrams)


def _slots(prompts: PromptSet, emotions: Sequence[str], n_stories: int) -> dict[tuple[str, int], tuple[str, str]]:
    """(emotion, k) -> (prompt, group)."""
    slots: dict[tuple[str, int], tuple[str, str]] = {}
    topics = list(prompts.topics)
    for emotion in emotions:
        templates = prompts.neutral if emotion == NEUTRAL else prompts.templates
        for k in range(n_stories):
            text = templates[k % len(templates)].replace("{emotion}", emotion)
            group = topics[k % len(topics)] if topics else f"template {k % len(templates)}"
            place = f" The story takes place {prompts.topics[group]}." if topics else ""
            slots[emotion, k] = (text + place, group)
    return slots


def _trigrams(tokens: Sequence[int]) -> set[tuple[int, ...]]:
    return set(zip(tokens, tokens[1:], tokens[2:], strict=False))


def _verdict(text: str, tokens: Sequence[int], minimum_tokens: int, others: list[set[tuple[int, ...]]]) -> str:
    if not text.strip():
        return "empty"
    if _REFUSAL.search(text[:200]):
        return "refusal"
    if len(tokens) < minimum_tokens:
        return "short"
    trigrams = _trigrams(tokens)
    if 1 - len(trigrams) / max(len(tokens) - 2, 1) > MAXIMUM_REPETITION:
        return "repetitive"
    return "copy" if _is_copy(trigrams, others) else "accepted"


def _is_copy(trigrams: set[tuple[int, ...]], others: list[set[tuple[int, ...]]]) -> bool:
    return any(len(trigrams & other) / max(len(trigrams | other), 1) >= MAXIMUM_OVERLAP for other in others)


def _require_enough(drawn: _Drawn, fewest: int) -> None:
    """Leave missing stories out with a warning; an emotion with fewer than `fewest` is an error."""
    missing = drawn.pending()
    if not missing:
        return
    reasons = drawn.reasons(missing)
    left = Counter(emotion for emotion, _ in drawn.accepted)
    poor = [emotion for emotion in dict.fromkeys(e for e, _ in missing) if left[emotion] < fewest]
    if poor:
        raise ValueError(
            f"could not get {len(missing)} of {len(drawn.slots)} stories and {poor[0]!r} has {left[poor[0]]}, fewer than {fewest}; the draws of the "
            f"missing ones were {reasons}. Allow more rounds (max_rounds), a smaller minimum_tokens or another temperature, or use a model that can "
            "write stories"
        )
    log.warning(
        "%d of %d stories could not be had and are left out (their draws: %s)", len(missing), len(drawn.slots), reasons
    )
