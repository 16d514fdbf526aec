"""A task that a tiny model can learn in a moment."""

from lens_affect.task_data import Example
from lens_affect.tasks import ChoiceTask

WORDS = {"joy": ("sun", "cake", "song", "gift"), "anger": ("theft", "insult", "lie", "shove")}


def examples(n, start):
    return tuple(
        Example(f"{word} {i}", (label,), f"{label}{i}")
        for i in range(start, start + n)
        for label, words in WORDS.items()
        for word in words
    )


TASK = ChoiceTask(
    name="planted",
    title="words that give the label away",
    affective=True,
    splits={"train": examples(8, 0), "validation": examples(2, 20), "test": examples(2, 30)},
    labels=("anger", "joy"),
    question="Emotion",
)
QUICK = {"steps": 8, "check_every": 4, "n_validation": 4, "batch_size": 4}
