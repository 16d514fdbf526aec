"""Published protocols, step by step. Ours differ from the original in wording only, and not at all when its files are given."""

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

from lens_affect.activations import Activations, extract_activations
from lens_affect.adapter import LensModel, model_info
from lens_affect.generation import generate
from lens_affect.stimuli import EMOTIONS, NEUTRAL, PromptSet, Stimuli, load_prompts, load_stimuli
from lens_affect.vectors import EmotionVectors, fit_vectors

STORIES = 10
"""Stories per class in arXiv:2604.04064's code: each template twice, decoded greedily, so every story stands there twice."""


def protocol_stimuli(
    model: LensModel,
    *,
    prompts: PromptSet | str | os.PathLike[str] | None = None,
    emotions: tuple[str, ...] = tuple(EMOTIONS),
    n_stories: int = STORIES,
    max_new_tokens: int = 256,
    progress: Callable[[int, int], None] | None = None,
) -> Stimuli:
    """Stories as the paper's generation protocol makes them: five templates in turn, greedy, ten neutral requests.

    A request that occurs twice is generated once and counted twice: greedy decoding gives the same text both times.

    Args:
        model: who writes.
        prompts: a prompt set, a file with the author's wording, or None for ours.
        emotions: which.
        n_stories: per class.
        max_new_tokens: length of each.
        progress: called with (tokens done, limit).
    """
    asked = prompts if isinstance(prompts, PromptSet) else load_prompts(prompts or "jeong2026")
    rows = [
        (e, k % len(asked.templates), asked.templates[k % len(asked.templates)].replace("{emotion}", e))
        for e in emotions
        for k in range(n_stories)
    ]
    rows += [(NEUTRAL, k % len(asked.neutral), asked.neutral[k % len(asked.neutral)]) for k in range(n_stories)]
    distinct = list(dict.fromkeys(prompt for _, _, prompt in rows))
    out = generate(model, distinct, greedy=True, max_new_tokens=max_new_tokens, progress=progress)
    written = dict(zip(distinct, out.texts, strict=True))
    kept = [row for row in rows if written[row[2]].strip()]
    return Stimuli(
        texts=tuple(written[prompt] for _, _, prompt in kept),
        emotions=tuple(e for e, _, _ in kept),
        groups=tuple(f"template {k}" for _, k, _ in kept),
        sources=(model_info(model).provenance.title,) * len(kept),
        prompts=tuple(prompt for _, _, prompt in kept),
        name=f"jeong2026 stories ({asked.name} wording)",
    )


def protocol_activations(
    model: LensModel,
    *,
    source: Literal["generation", "comprehension"],
    prompts: PromptSet | str | os.PathLike[str] | None = None,
    stimuli: Stimuli | str | os.PathLike[str] | None = None,
    n_stories: int = STORIES,
    max_new_tokens: int = 256,
    progress: Callable[[int, int], None] | None = None,
) -> Activations:
    """The paper's readout: the midpoint token of each story, or the last token of each passage; the tokenizer's own BOS."""
    if source == "generation":
        given = load_stimuli(stimuli) if isinstance(stimuli, str | os.PathLike) else stimuli
        texts = given or protocol_stimuli(
            model, prompts=prompts, n_stories=n_stories, max_new_tokens=max_new_tokens, progress=progress
        )
        return extract_activations(model, texts, pooling="midpoint", own_bos=True)
    if source != "comprehension":
        raise ValueError(f"received source={source!r}; allowed are 'generation' and 'comprehension'")
    texts = stimuli if isinstance(stimuli, Stimuli) else load_stimuli(stimuli or "passages")
    return extract_activations(model, texts, pooling="last", own_bos=True)


def extract_protocol(
    model: LensModel,
    protocol: Literal["jeong2026"] = "jeong2026",
    *,
    source: Literal["generation", "comprehension"],
    prompts: PromptSet | str | os.PathLike[str] | None = None,
    stimuli: Stimuli | str | os.PathLike[str] | None = None,
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
        stimuli: file with the author's passages (columns emotion, text); None for our passages. For `generation`, stories made before.
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
