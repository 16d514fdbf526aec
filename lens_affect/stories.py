"""Generation-based stimuli: stories that the model itself writes about an emotion.

Greedy decoding of five templates used twice gives every story twice (arXiv:2604.04064's code), so stories here are
sampled, and near-copies, refusals, empty and looping texts are drawn again and counted.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from lens_affect.adapter import LensModel, model_info
from lens_affect.generation import generate
from lens_affect.results import Provenance, Stopwatch, load_result, save_result
from lens_affect.stimuli import NEUTRAL, PromptSet, Stimuli, load_prompts, named_emotion

_REFUSAL = re.compile(
    r"\bas an AI\b|\bI(['’]m| am) sorry,? but\b|\bI(['’]m| am) (unable|not able) to (write|help|assist|create|provide|generate|fulfil)"
    r"|\bI (cannot|can['’]t) (write|help|assist|create|provide|generate|fulfil)",
    re.IGNORECASE,
)
MAXIMUM_OVERLAP = 0.5
"""Two stories of one emotion count as distinct below this Jaccard overlap of their token 3-grams."""
MAXIMUM_REPETITION = 0.5
"""A story is repetitive when more than this share of its token 3-grams occurred before in it."""


@dataclass(frozen=True)
class Stories:
    """Stories as stimuli, with an account of what was drawn and why it was refused."""

    stimuli: Stimuli
    """The accepted stories, each with its prompt, its topic (or template) as group, and the model as source."""
    table: pd.DataFrame
    """One row per draw: emotion, slot, round, tokens, verdict (accepted, empty, short, refusal, repetitive, copy), names_emotion."""
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

    def __str__(self) -> str:
        counts = ", ".join(f"{n} {verdict}" for verdict, n in self.counts.items())
        return f"{len(self.stimuli)} stories by {self.provenance.title} ({self.form} prompts)\n{len(self.table)} draws: {counts}"


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
    just as in the passages. A draw that is empty, short, a refusal, repetitive or a near-copy is drawn again; one that names
    its emotion is drawn again too, and kept only if every round named it.

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
        The stories and the account of all draws.

    Raises:
        ValueError: an unknown emotion form, or a story that could not be had within `max_rounds` draws.
    """
    clock = Stopwatch()
    asked = load_prompts(prompts) if isinstance(prompts, str) else prompts
    slots = _slots(asked, [*emotions, *([NEUTRAL] if neutral else [])], n_stories)
    accepted: dict[tuple[str, int], str] = {}
    reserve: dict[tuple[str, int], tuple[str, int, set[tuple[int, ...]]]] = {}
    draws: list[dict[str, Any]] = []
    seen: dict[str, list[set[tuple[int, ...]]]] = {}
    form = "plain"
    for attempt in range(max_rounds):
        pending = [slot for slot in slots if slot not in accepted]
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
                verdict = _verdict(text, tokens, minimum_tokens, seen.setdefault(slot[0], []))
                names = slot[0] != NEUTRAL and named_emotion(text, slot[0]) is not None
                draws.append(
                    {
                        "emotion": slot[0],
                        "slot": slot[1],
                        "round": attempt,
                        "tokens": len(tokens),
                        "verdict": verdict,
                        "names_emotion": names,
                    }
                )
                if verdict == "accepted" and names and attempt + 1 < max_rounds:
                    draws[-1]["verdict"] = "names emotion"
                    reserve.setdefault(slot, (text, len(draws) - 1, _trigrams(tokens)))
                elif verdict == "accepted":
                    accepted[slot] = text
                    seen[slot[0]].append(_trigrams(tokens))
            if progress:
                progress(len(accepted), len(slots))
    for slot, (text, row, trigrams) in reserve.items():
        if slot not in accepted:
            draws[row]["verdict"] = "copy" if _is_copy(trigrams, seen[slot[0]]) else "accepted"
            if draws[row]["verdict"] == "accepted":
                accepted[slot] = text
                seen[slot[0]].append(trigrams)
    _require_all(slots, accepted, draws)
    info = model_info(model).provenance
    stimuli = Stimuli(
        texts=tuple(accepted[slot] for slot in slots),
        emotions=tuple(emotion for emotion, _ in slots),
        groups=tuple(group for _, group in slots.values()),
        sources=(info.title,) * len(slots),
        prompts=tuple(prompt for prompt, _ in slots.values()),
        name=f"stories by {info.model}",
    )
    provenance = info.updated(stimuli_hash=stimuli.hash, seed=seed, elapsed_seconds=clock.seconds)
    return Stories(stimuli, pd.DataFrame(draws), form, provenance)


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


def _require_all(
    slots: dict[tuple[str, int], tuple[str, str]],
    accepted: dict[tuple[str, int], str],
    draws: list[dict[str, Any]],
) -> None:
    missing = [slot for slot in slots if slot not in accepted]
    if missing:
        reasons = Counter(d["verdict"] for d in draws if (d["emotion"], d["slot"]) in missing)
        raise ValueError(
            f"could not get {len(missing)} of {len(slots)} stories (first: {missing[0][0]!r}); their draws were {dict(reasons)}. Allow more "
            "rounds (max_rounds), a smaller minimum_tokens or another temperature, or use a model that can write stories"
        )
