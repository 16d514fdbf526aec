"""External judges: classifiers that say which emotion a text expresses, and that never saw the model under study.

What a steered text expresses must not be read off the model that wrote it. A judge is small: labels, and a probability of each for
each text. Three kinds are here: the embedded one (no hub needed), any text classifier from the Hugging Face hub or a folder, and a word
list as a sanity check. A judge's probability says what readers of comments would label, not what anybody feels.
"""

import functools
import json
import logging
import math
import os
import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from lens_affect.catalogue import FetchError, quiet_transformers
from lens_affect.embedded_judge import EmbeddedJudge
from lens_affect.judge_labels import measured_auc
from lens_affect.stimuli import EMOTIONS, NEUTRAL

log = logging.getLogger(__name__)

KNOWN_HUB_JUDGES = ("j-hartmann/emotion-english-distilroberta-base", "SamLowe/roberta-base-go_emotions")
"""Classifiers whose labels data/judge_labels.csv maps: Ekman's six and neutral (softmax); GoEmotions' 28 (multi-label)."""


@runtime_checkable
class Judge(Protocol):
    """What a judge must offer."""

    @property
    def name(self) -> str:
        """Short name, as given to `load_judge`."""
        ...

    @property
    def title(self) -> str:
        """Name for printed results."""
        ...

    @property
    def labels(self) -> tuple[str, ...]:
        """What it can say."""
        ...

    @property
    def multi_label(self) -> bool:
        """True: each label has a probability of its own; False: they sum to 1."""
        ...

    def score(self, texts: Sequence[str]) -> Float[Tensor, "text label"]:
        """Probability of each label for each text; NaN for an empty text."""
        ...

    def auc(self, emotion: str) -> float:
        """Measured AUC for one of our emotions; NaN where it was not measured."""
        ...


def load_judge(name: str | os.PathLike[str] = "embedded") -> "EmbeddedJudge | LexiconJudge | HuggingFaceJudge":
    """Load a judge; its weights are read when it first scores a text.

    Args:
        name: `embedded` (28 labels, multi-label; the encoder, 84 MB, comes from the package index), `lexicon` (our word list), or a text
            classifier: a hub id such as `j-hartmann/emotion-english-distilroberta-base` or `SamLowe/roberta-base-go_emotions`, or a folder.

    Raises:
        ValueError: neither a name of ours, nor a folder, nor a hub id.

    Example:
        >>> load_judge("lexicon").name
        'lexicon'
    """
    if name == "embedded":
        return EmbeddedJudge()
    if name == "lexicon":
        return LexiconJudge()
    if not Path(name).is_dir() and not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)):
        raise ValueError(
            f"received judge {str(name)!r}; allowed are 'embedded', 'lexicon', a folder with a text classifier, or a hub id such as "
            f"{KNOWN_HUB_JUDGES[0]}"
        )
    return HuggingFaceJudge(name)


class HuggingFaceJudge:
    """A text classifier from the Hugging Face hub or a folder.

    Args:
        source: hub id or folder.
        multi_label: whether each label has a probability of its own; by default what the classifier's config says.
        batch_size: texts in one forward pass.
    """

    def __init__(
        self, source: str | os.PathLike[str], *, multi_label: bool | None = None, batch_size: int = 32
    ) -> None:
        self.name = str(source)
        self._multi_label = multi_label
        self._batch_size = batch_size

    @property
    def title(self) -> str:
        """Last part of its id or folder."""
        return self.name.rstrip("/").rsplit("/", maxsplit=1)[-1]

    @property
    def labels(self) -> tuple[str, ...]:
        """The classifier's labels in lower case."""
        config = self._loaded[1].config
        return tuple(str(config.id2label[i]).lower() for i in range(config.num_labels))

    @property
    def multi_label(self) -> bool:
        """As given, or from the config's `problem_type`."""
        if self._multi_label is not None:
            return self._multi_label
        return self._loaded[1].config.problem_type == "multi_label_classification"

    @functools.cached_property
    def _loaded(self) -> tuple[Any, Any]:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        try:
            with quiet_transformers():
                tokenizer = AutoTokenizer.from_pretrained(self.name)
                model = AutoModelForSequenceClassification.from_pretrained(self.name, dtype=torch.float32)
        except OSError as error:
            raise FetchError(
                f"could not load the classifier {self.name} ({str(error).splitlines()[0]}). Connect to its hub (and unset HF_HUB_OFFLINE), "
                "pass a folder that holds it, or use load_judge('embedded'), which needs a package index only"
            ) from error
        return tokenizer, model.eval()

    @property
    def longest(self) -> int:
        """Tokens that are read of a text."""
        tokenizer, model = self._loaded
        # RoBERTa and its kin count positions from the padding id on.
        offset = model.config.pad_token_id + 1 if "roberta" in model.config.model_type else 0
        return min(tokenizer.model_max_length, model.config.max_position_embeddings - offset)

    @torch.no_grad()
    def score(self, texts: Sequence[str]) -> Float[Tensor, "text label"]:
        """Probability of each label; NaN for an empty text. Texts that are too long are cut, and their number is logged."""
        tokenizer, model = self._loaded
        found = torch.full((len(texts), len(self.labels)), math.nan)
        lengths = [len(tokenizer(text, verbose=False)["input_ids"]) for text in texts]
        cut = sum(length > self.longest for length in lengths)
        if cut:
            log.warning(
                "%d of %d texts are longer than %d tokens; the rest of each is not read", cut, len(texts), self.longest
            )
        order = sorted((row for row, text in enumerate(texts) if text.strip()), key=lambda row: lengths[row])
        for first in range(0, len(order), self._batch_size):
            rows = order[first : first + self._batch_size]
            batch = tokenizer(
                [texts[row] for row in rows],
                padding=True,
                truncation=True,
                max_length=self.longest,
                return_tensors="pt",
            )
            logits = model(**batch).logits
            found[rows] = torch.sigmoid(logits) if self.multi_label else torch.softmax(logits, dim=-1)
        return found

    def auc(self, emotion: str) -> float:
        """NaN: we did not measure it."""
        return measured_auc(self.name, emotion)


NEGATIONS = frozenset(
    ["not", "no", "never", "none", "neither", "nor", "without", "hardly", "cannot", "nothing", "nobody"]
)
REACH = 3
"""Words after a negation that it turns off, up to the next punctuation mark."""


class LexiconJudge:
    """Counts words of our own list (data/lexicon.json): a check that another judge is not far off, no main judge.

    A label's probability is its count over (1 + all counts); `neutral` has the rest. Words within three after a negation do not count.
    """

    name = "lexicon"
    multi_label = False
    labels = (*EMOTIONS, NEUTRAL)

    @property
    def title(self) -> str:
        """Name for printed results."""
        return "word list"

    def score(self, texts: Sequence[str]) -> Float[Tensor, "text label"]:
        """Shares of the counted words; they sum to 1. NaN for an empty text."""
        found = torch.full((len(texts), len(self.labels)), math.nan)
        for row, text in enumerate(texts):
            if text.strip():
                counts = torch.tensor([*self._counts(text), 1.0])
                found[row] = counts / counts.sum()
        return found

    def _counts(self, text: str) -> list[float]:
        words, reach = [], 0
        for token in re.findall(r"[a-z]+(?:'[a-z]+)?|[.,;:!?]", text.lower().replace("’", "'")):
            if not token[0].isalpha():
                reach = 0
            elif token in NEGATIONS or token.endswith("n't"):
                reach = REACH
            elif reach:
                reach -= 1
            else:
                words.append(token)
        return [float(sum(bool(pattern.fullmatch(word)) for word in words)) for pattern in _patterns().values()]

    def auc(self, emotion: str) -> float:
        """Measured AUC for one of our emotions on the test split of GoEmotions; NaN where there is none."""
        return measured_auc(self.name, emotion)


@functools.cache
def _patterns() -> dict[str, re.Pattern[str]]:
    """One pattern per emotion; a star in the list stands for any ending."""
    lists = json.loads(files("lens_affect.data").joinpath("lexicon.json").read_text(encoding="utf-8"))["words"]
    return {e: re.compile("|".join(re.escape(w).replace(r"\*", "[a-z]*") for w in lists[e])) for e in EMOTIONS}
