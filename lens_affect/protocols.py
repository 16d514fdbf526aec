"""Published protocols, step by step. Ours differ from the original in wording only, and not at all when its files are given."""

import html
import logging
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import pandas as pd

from lens_affect.activations import Activations, extract_activations
from lens_affect.adapter import LensModel, model_info
from lens_affect.generation import generate, stop_tokens
from lens_affect.results import Provenance, Stopwatch, load_result, save_result
from lens_affect.stimuli import EMOTIONS, NEUTRAL, PromptSet, Stimuli, load_prompts, load_stimuli
from lens_affect.vectors import EmotionVectors, fit_vectors

log = logging.getLogger(__name__)

STORIES = 10
"""Stories per class in arXiv:2604.04064's code: each template twice, decoded greedily, so every story stands there twice."""


@dataclass(frozen=True)
class ProtocolStories:
    """Stories of a protocol with the tokens that were generated, so that they are read just as they were written."""

    stimuli: Stimuli
    """The stories that hold a word, each with its request; a story that was asked for twice stands here twice."""
    tokens: tuple[tuple[int, ...], ...]
    """Ids of each story as generated. The token that ended it is one of them: the paper's midpoint counts it."""
    empty: dict[str, int]
    """Stories left out because nothing was written, by emotion; emotions without any are not listed."""
    form: str
    """`chat`, or `plain` for a model without a chat template."""
    provenance: Provenance
    """Model and versions."""

    @property
    def n_empty(self) -> int:
        """Stories left out."""
        return sum(self.empty.values())

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Save as a folder (see results.py)."""
        return save_result(self, folder, overwrite=overwrite)

    @classmethod
    def load(cls, folder: str | Path) -> "ProtocolStories":
        """Load what `save` wrote."""
        return load_result(cls, folder)

    def to_frame(self) -> pd.DataFrame:
        """One row per story."""
        columns = {"emotion": self.stimuli.emotions, "group": self.stimuli.groups, "text": self.stimuli.texts}
        return pd.DataFrame(columns | {"n_tokens": [len(t) for t in self.tokens]})

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(str(self)).replace(chr(10), '<br>')}</p>"

    def __str__(self) -> str:
        distinct = len(set(zip(self.stimuli.prompts, self.stimuli.texts, strict=True)))
        asked = len(self.stimuli) + self.n_empty
        return (
            f"{len(self.stimuli)} stories by {self.provenance.title} ({self.form} prompts), {distinct} of them distinct\n"
            f"{self.n_empty} of {asked} were empty and are left out"
        )


def write_protocol_stories(
    model: LensModel,
    *,
    prompts: PromptSet | str | os.PathLike[str] | None = None,
    emotions: tuple[str, ...] = tuple(EMOTIONS),
    n_stories: int = STORIES,
    max_new_tokens: int = 256,
    progress: Callable[[int, int], None] | None = None,
) -> ProtocolStories:
    """Stories as the generation protocol of arXiv:2604.04064 makes them: five templates in turn, greedy, ten neutral requests.

    A request that occurs twice is generated once and counted twice: greedy decoding gives the same text both times. A model
    without a chat template gets the request and an empty line, with a BOS only if its tokenizer adds one by itself. Empty
    stories are left out, counted in the result and warned of.

    Args:
        model: who writes.
        prompts: a prompt set, a file with the author's wording, or None for ours.
        emotions: which.
        n_stories: per class.
        max_new_tokens: length of each.
        progress: called with (tokens done, limit).

    Returns:
        The stories and their tokens.

    Raises:
        ValueError: every story is empty, or a request does not fit the context window.
    """
    clock = Stopwatch()
    asked = prompts if isinstance(prompts, PromptSet) else load_prompts(prompts or "jeong2026")
    rows = [
        (e, k % len(asked.templates), asked.templates[k % len(asked.templates)].replace("{emotion}", e))
        for e in emotions
        for k in range(n_stories)
    ]
    rows += [(NEUTRAL, k % len(asked.neutral), asked.neutral[k % len(asked.neutral)]) for k in range(n_stories)]
    distinct = list(dict.fromkeys(prompt for _, _, prompt in rows))
    out = generate(model, distinct, greedy=True, max_new_tokens=max_new_tokens, own_bos=True, progress=progress)
    # nothing is read at the stop token or after it, so it only has to be counted: which of several it was makes no difference
    ends = [stop_tokens(model)[:1] if finished else () for finished in out.finished]
    written = {p: (text, (*t, *e)) for p, text, t, e in zip(distinct, out.texts, out.tokens, ends, strict=True)}
    kept = [row for row in rows if written[row[2]][0].strip()]
    empty = dict(Counter(e for e, _, prompt in rows if not written[prompt][0].strip()))
    if not kept:
        raise ValueError(
            f"received {len(rows)} empty stories from {model_info(model).provenance.title}; use a model that answers requests, or give "
            "stories with stimuli=..."
        )
    if empty:
        log.warning("%d of %d stories are empty and left out: %s", sum(empty.values()), len(rows), empty)
    info = model_info(model).provenance
    stimuli = Stimuli(
        texts=tuple(written[prompt][0] for _, _, prompt in kept),
        emotions=tuple(e for e, _, _ in kept),
        groups=tuple(f"template {k}" for _, k, _ in kept),
        sources=(info.title,) * len(kept),
        prompts=tuple(prompt for _, _, prompt in kept),
        name=f"jeong2026 stories ({asked.name} wording)"
        + (f", {sum(empty.values())} of {len(rows)} empty and left out" if empty else ""),
    )
    provenance = info.updated(stimuli_hash=stimuli.hash, elapsed_seconds=clock.seconds)
    return ProtocolStories(stimuli, tuple(written[prompt][1] for _, _, prompt in kept), empty, out.form, provenance)


def protocol_activations(
    model: LensModel,
    *,
    source: Literal["generation", "comprehension"],
    prompts: PromptSet | str | os.PathLike[str] | None = None,
    stimuli: Stimuli | ProtocolStories | str | os.PathLike[str] | None = None,
    n_stories: int = STORIES,
    max_new_tokens: int = 256,
    progress: Callable[[int, int], None] | None = None,
) -> Activations:
    """The paper's readout: the midpoint token of each story, or the last token of each passage; the tokenizer's own BOS.

    Stories are read from the tokens that were generated; given ones (a table, or Stimuli) are cut by the tokenizer.
    """
    if source not in ("generation", "comprehension"):
        raise ValueError(f"received source={source!r}; allowed are 'generation' and 'comprehension'")
    if source == "comprehension":
        texts = stimuli.stimuli if isinstance(stimuli, ProtocolStories) else stimuli
        texts = texts if isinstance(texts, Stimuli) else load_stimuli(texts or "passages")
        return extract_activations(model, texts, pooling="last", own_bos=True)
    given = load_stimuli(stimuli) if isinstance(stimuli, str | os.PathLike) else stimuli
    if isinstance(given, Stimuli):
        return extract_activations(model, given, pooling="midpoint", own_bos=True)
    stories = given or write_protocol_stories(
        model, prompts=prompts, n_stories=n_stories, max_new_tokens=max_new_tokens, progress=progress
    )
    return extract_activations(model, stories.stimuli, pooling="midpoint", own_bos=True, tokens=stories.tokens)


def extract_protocol(
    model: LensModel,
    protocol: Literal["jeong2026"] = "jeong2026",
    *,
    source: Literal["generation", "comprehension"],
    prompts: PromptSet | str | os.PathLike[str] | None = None,
    stimuli: Stimuli | ProtocolStories | str | os.PathLike[str] | None = None,
    n_stories: int = STORIES,
    max_new_tokens: int = 256,
    progress: Callable[[int, int], None] | None = None,
) -> EmotionVectors:
    """Emotion vectors exactly as a published protocol makes them.

    `jeong2026` (arXiv:2604.04064): five story templates in turn, greedy, 256 tokens, one midpoint token, neutral mean subtracted; or given
    passages at their last token, neutral mean subtracted. Ten greedy stories from five templates are five distinct ones.

    Args:
        model: whose vectors.
        protocol: `jeong2026`.
        source: `generation` or `comprehension`.
        prompts: file with the author's prompts (keys templates, neutral); None for our wording of them.
        stimuli: file with the author's passages (columns emotion, text); None for our passages. For `generation`,
            stories made before: by write_protocol_stories, or a table of your own.
        n_stories: per class; 10 in the paper.
        max_new_tokens: per story; 256 in the paper.
        progress: called with (tokens done, limit).

    Returns:
        Unit vectors with the neutral baseline at every layer; the paper uses layer n_layers // 2.

    Raises:
        ValueError: an unknown protocol or source, or passages without a neutral class.

    Example:
        >>> extract_protocol(model, "jeong2026", source="comprehension").similarity(15)  # doctest: +SKIP
    """
    if protocol != "jeong2026":
        raise ValueError(f"received protocol {protocol!r}; allowed is 'jeong2026'")
    activations = protocol_activations(
        model,
        source=source,
        prompts=prompts,
        stimuli=stimuli,
        n_stories=n_stories,
        max_new_tokens=max_new_tokens,
        progress=progress,
    )
    vectors = fit_vectors(activations, baseline="neutral")
    return replace(vectors, source=f"{vectors.source}, protocol jeong2026")
