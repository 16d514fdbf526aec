"""Train the head of the embedded judge on GoEmotions, measure it, and write what the package ships.

    LENS_AFFECT_DATA=folder/with/goemotions/and/meld python analyses/train_judge.py

1. `states`: the encoder's states after its third layer for every token, and its own sentence vectors, once.
2. `train`: low-rank updates of the upper three layers and a small network on the mean over tokens, against all labels of a text at once.
3. `choose`: against the same network on the untouched sentence vectors, by mean AUC on the development split; calibration and thresholds
   come from there too. Writes data/judge_head.safetensors.
4. `measure`: the published test split, read once; logistic regression as the bar; MELD; our passages. Writes data/judge_scores.json.

States and epochs are kept in LENS_AFFECT_RUNS/judge: a second start reads no text again and resumes after the last whole epoch. Only the
upper layers run in training, which took half an hour on one shared core. Name stages to run only these.
"""

import argparse
import copy
import json
import logging
import math
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, normalize

import lens_affect as la
from lens_affect.embedded_judge import ADAPTED, LINEARS, EmbeddedJudge, encoder_folder
from lens_affect.judge_labels import label_schemes, namings
from lens_affect.statistics import derive_generator, derive_seed, mean_interval, resample_clusters

DATA = Path(os.environ.get("LENS_AFFECT_DATA", "data"))
HERE = Path(__file__).resolve().parent
RUNS = Path(os.environ.get("LENS_AFFECT_RUNS", HERE.parent / "runs")) / "judge"
SHIPPED = HERE.parent / "lens_affect" / "data"
SEED, RANK, HIDDEN, EPOCHS, BATCH, RATE = 0, 32, 256, 2, 32, 7e-4
LONGEST = 64  # word pieces in training; all but three of the 43,410 comments are shorter
CHECKED = 4  # every fourth row of the test split is what the tests recompute
MELD_CHECKED = 16  # every sixteenth utterance of MELD
log = logging.getLogger("train_judge")


def read_split(split: str) -> tuple[list[str], Tensor]:
    """Texts and their labels (0 or 1) of a published split."""
    text = (DATA / "goemotions" / f"{split}.tsv").read_text(encoding="utf-8")
    rows = [line.split("\t") for line in text.rstrip("\n").split("\n")]
    labels = torch.zeros(len(rows), len(label_names()))
    for row, (_, ids, _) in enumerate(rows):
        labels[row, [int(i) for i in ids.split(",")]] = 1
    return [text for text, _, _ in rows], labels


def label_names() -> list[str]:
    """The 28 labels in the order of their ids."""
    return (DATA / "goemotions" / "labels.txt").read_text(encoding="utf-8").split()


# States


@torch.no_grad()
def write_states(split: str) -> None:
    """Token states below the adapted layers (float16, one text after the other), lengths, and sentence vectors."""
    from transformers import AutoTokenizer, BertModel

    if (RUNS / f"{split}.safetensors").is_file():
        return
    texts, _ = read_split(split)
    tokenizer = AutoTokenizer.from_pretrained(encoder_folder())
    encoder = BertModel.from_pretrained(encoder_folder(), add_pooling_layer=False).eval()
    ids = tokenizer(texts, truncation=True, max_length=LONGEST)["input_ids"]
    order = np.argsort([len(i) for i in ids], kind="stable")
    below: list[Tensor] = [torch.empty(0)] * len(ids)
    vectors = torch.zeros(len(ids), encoder.config.hidden_size)
    start = time.monotonic()
    for first in range(0, len(order), 64):
        rows = order[first : first + 64].tolist()
        batch = tokenizer.pad({"input_ids": [ids[r] for r in rows]}, return_tensors="pt")
        found = encoder(**batch, output_hidden_states=True)
        mask = batch["attention_mask"].unsqueeze(-1)
        vectors[rows] = normalize((found.last_hidden_state * mask).sum(1) / mask.sum(1), dim=-1)
        for at, row in enumerate(rows):
            below[row] = found.hidden_states[ADAPTED[0]][at, : len(ids[row])].half()
        if first // 64 % 50 == 0:
            log.info("%s: %d of %d texts, %.0f s", split, first, len(ids), time.monotonic() - start)
    lengths = torch.tensor([len(i) for i in ids])
    save_file({"states": torch.cat(below), "lengths": lengths, "vectors": vectors}, RUNS / f"{split}.safetensors.part")
    (RUNS / f"{split}.safetensors.part").rename(RUNS / f"{split}.safetensors")


# Training


class LowRank(nn.Module):
    """A frozen linear map plus a trained one of low rank."""

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(rank, linear.in_features) / math.sqrt(linear.in_features))
        self.up = nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + (x @ self.down.T) @ self.up.T


class Adapted(nn.Module):
    """The upper layers with their updates, the mean over tokens, and the small network."""

    def __init__(self, rank: int = RANK) -> None:
        from transformers import BertModel

        super().__init__()
        encoder = BertModel.from_pretrained(encoder_folder(), add_pooling_layer=False).requires_grad_(False)
        self.layers = nn.ModuleDict({str(i): encoder.encoder.layer[i] for i in ADAPTED})
        for layer in self.layers.values():
            for name in LINEARS:
                parent, last = name.rsplit(".", 1)
                owner = layer.get_submodule(parent)
                setattr(owner, last, LowRank(getattr(owner, last), rank))
        self.head = make_head()

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        bias = torch.zeros(mask.shape).masked_fill(~mask, -1e9)[:, None, None, :]
        for layer in self.layers.values():
            states = layer(states, bias)
        weights = mask.unsqueeze(-1)
        return self.head(unit((states * weights).sum(1) / weights.sum(1)))

    def trained(self) -> dict[str, Tensor]:
        """The parameters that are trained."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}


def unit(vectors: Tensor) -> Tensor:
    """Vectors of length sqrt(width), so that their entries are of order 1."""
    return normalize(vectors, dim=-1) * math.sqrt(vectors.shape[-1])


def make_head() -> nn.Sequential:
    """Sentence vector -> logits of the labels."""
    return nn.Sequential(
        nn.Dropout(0.1), nn.Linear(384, HIDDEN), nn.GELU(), nn.Dropout(0.2), nn.Linear(HIDDEN, len(label_names()))
    )


def positive_weights(labels: Tensor) -> Tensor:
    """Square root of negatives over positives, at most 10: rare labels count more, without drowning the rest."""
    positive = labels.sum(0)
    return ((len(labels) - positive) / positive).sqrt().clamp(max=10)


def batches(lengths: Tensor, *labels: object) -> Iterator[list[int]]:
    """Shuffled batches of texts of similar length."""
    rng = derive_generator(SEED, "batches", *labels)
    order = rng.permutation(len(lengths))
    found = []
    for first in range(0, len(order), BATCH * 50):
        part = order[first : first + BATCH * 50]
        part = part[np.argsort(lengths[part].numpy(), kind="stable")]
        found += [part[i : i + BATCH].tolist() for i in range(0, len(part), BATCH)]
    for i in rng.permutation(len(found)):
        yield found[i]


class States:
    """Token states of one split, a batch at a time."""

    def __init__(self, split: str) -> None:
        found = load_file(RUNS / f"{split}.safetensors")
        self.states, self.lengths, self.vectors = found["states"], found["lengths"], found["vectors"]
        self.starts = torch.cat([torch.zeros(1, dtype=torch.long), self.lengths.cumsum(0)])
        self.labels = read_split(split)[1]

    def batch(self, rows: list[int]) -> tuple[Tensor, Tensor]:
        """Padded states and the mask of what is no padding."""
        parts = [self.states[self.starts[r] : self.starts[r + 1]].float() for r in rows]
        mask = torch.arange(max(map(len, parts))) < self.lengths[rows].unsqueeze(1)
        return nn.utils.rnn.pad_sequence(parts, batch_first=True), mask


def train_adapted() -> None:
    """Two passes over the training split; an exponential moving average of the parameters is what is kept."""
    data, dev = States("train"), States("dev")
    torch.manual_seed(derive_seed(SEED, "adapted"))
    model = Adapted()
    trained = model.trained()
    log.info("%d trained parameters", sum(p.numel() for p in trained.values()))
    optimizer = torch.optim.AdamW(list(trained.values()), lr=RATE, weight_decay=0.01)
    per_epoch = math.ceil(len(data.lengths) / BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=EPOCHS * per_epoch + 2, pct_start=0.06)
    average = {name: p.detach().clone() for name, p in trained.items()}
    weights, first_epoch = positive_weights(data.labels), 0
    for epoch in range(EPOCHS):
        if (RUNS / f"adapted-{epoch}.pt").is_file():
            kept = torch.load(RUNS / f"adapted-{epoch}.pt", weights_only=True)
            optimizer.load_state_dict(kept["optimizer"])
            schedule.load_state_dict(kept["schedule"])
            model.load_state_dict(kept["parameters"], strict=False)
            average, first_epoch = kept["average"], epoch + 1
    for epoch in range(first_epoch, EPOCHS):
        torch.manual_seed(derive_seed(SEED, "dropout", epoch))
        model.train()
        start, losses = time.monotonic(), []
        for step, rows in enumerate(batches(data.lengths, epoch)):
            loss = binary_cross_entropy_with_logits(
                model(*data.batch(rows)), data.labels[rows], pos_weight=weights, reduction="sum"
            ) / len(rows)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(list(trained.values()), 1.0)
            optimizer.step()
            schedule.step()
            decay = min(0.999, (1 + epoch * per_epoch + step) / (20 + epoch * per_epoch + step))
            for name, p in trained.items():
                average[name].lerp_(p.detach(), 1 - decay)
            losses.append(loss.item())
            if step % 100 == 99:
                log.info(
                    "epoch %d step %d loss %.3f, %.0f s", epoch, step, np.mean(losses[-100:]), time.monotonic() - start
                )
        torch.save(
            {
                "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(),
                "parameters": {n: p.detach() for n, p in trained.items()},
                "average": average,
            },
            RUNS / f"adapted-{epoch}.pt",
        )
        averaged = copy.deepcopy(model)
        averaged.load_state_dict(average, strict=False)
        log.info("epoch %d: AUC on dev %s", epoch, mean_auc(adapted_logits(averaged, dev).numpy(), dev.labels.numpy()))
    save_file(average, RUNS / "adapted.safetensors")


@torch.no_grad()
def adapted_logits(model: Adapted, data: States) -> Tensor:
    """Logits of all texts, in evaluation mode."""
    model.eval()
    order = torch.argsort(data.lengths, stable=True).tolist()
    logits = torch.zeros(len(order), len(label_names()))
    for first in range(0, len(order), 64):
        rows = order[first : first + 64]
        logits[rows] = model(*data.batch(rows))
    return logits


def mean_auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Area under the ROC curve, averaged over labels."""
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(labels, scores, average="macro"))


# The encoder untouched


def train_frozen(kind: str) -> nn.Sequential:
    """A linear map, or the same network as above, on the sentence vectors as they are."""
    data = States("train")
    torch.manual_seed(derive_seed(SEED, kind))
    head = make_head() if kind == "network" else nn.Sequential(nn.Linear(384, len(label_names())))
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3, weight_decay=0.01)
    epochs, weights = 12, positive_weights(data.labels)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    rng = derive_generator(SEED, "frozen", kind)
    for _ in range(epochs):
        for rows in np.array_split(rng.permutation(len(data.labels)), len(data.labels) // 128):
            logits = head(unit(data.vectors[rows]))
            loss = binary_cross_entropy_with_logits(logits, data.labels[rows], pos_weight=weights)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    return head.eval()


def baseline() -> dict[str, Any]:
    """Multinomial logistic regression on sentence vectors, one label per text, as usual: what is to be beaten."""
    from sklearn.linear_model import LogisticRegression

    (x, y), (dev_x, dev_y), (test_x, test_y) = (_single(States(s)) for s in ("train", "dev", "test"))
    fits = {c: LogisticRegression(C=c, max_iter=500).fit(x, y) for c in (1.0, 10.0)}
    c, best = max(fits.items(), key=lambda item: item[1].score(dev_x, dev_y))
    return {"C": c, "n_train": len(y), **single_label_scores(best.predict(test_x), test_y)}


def _single(data: States) -> tuple[np.ndarray, np.ndarray]:
    rows = single_rows(data.labels)
    return data.vectors[rows].numpy(), data.labels[rows].argmax(1).numpy()


def single_rows(labels: Tensor) -> Tensor:
    """Texts with one label, which is an emotion."""
    return torch.nonzero((labels.sum(1) == 1) & (labels[:, label_names().index("neutral")] == 0)).flatten()


def single_label_scores(said: np.ndarray, truth: np.ndarray) -> dict[str, Any]:
    """Accuracy and macro-F1 over the 27 emotions, with 95 % bootstrap intervals over texts."""
    classes = range(len(label_names()) - 1)
    correct = (said == truth).astype(float)
    asked, given = (np.stack([labels == k for k in classes], axis=1) for labels in (truth, said))
    weights = np.vstack([np.ones(len(truth)), draws_over(range(len(truth)), "single label")])
    f1 = f1_of(weights @ (asked & given), weights @ given, weights @ asked).mean(1)
    accuracy = weights @ correct / weights.sum(1)
    return {"n": len(truth), "accuracy": limits(accuracy), "macro_f1": limits(f1)}


def f1_of(hits: np.ndarray, given: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """F1 from counts; 0 where a label is neither given nor asked for."""
    return 2 * hits / np.maximum(given + asked, 1e-12)


def draws_over(clusters: Sequence[Any], *labels: object) -> np.ndarray:
    """Weights of all rows in 1,000 bootstrap draws of whole clusters, [draw, row]."""
    names = {name: i for i, name in enumerate(dict.fromkeys(clusters))}
    member = np.array([names[c] for c in clusters])
    draws = resample_clusters(len(names), 1000, SEED, *labels)
    counts = np.stack([np.bincount(draw, minlength=len(names)) for draw in draws]).astype(np.float32)
    return counts[:, member]


def limits(values: np.ndarray) -> dict[str, float]:
    """First entry with the percentile interval of the others; draws without a positive (grief has six) are left out."""
    low, high = np.nanpercentile(values[1:], [2.5, 97.5])
    return {"estimate": round(float(values[0]), 4), "low": round(float(low), 4), "high": round(float(high), 4)}


# Choice, on the development split


def choose() -> None:
    """Calibrate and ship the candidate with the best mean AUC on the development split."""
    dev = States("dev")
    adapted = Adapted()
    adapted.load_state_dict(load_file(RUNS / "adapted.safetensors"), strict=False)
    heads = {kind: train_frozen(kind) for kind in ("linear", "network")}
    with torch.no_grad():
        logits = {kind: head(unit(dev.vectors)) for kind, head in heads.items()}
    logits["adapted"] = adapted_logits(adapted, dev)
    found = {kind: round(mean_auc(z.numpy(), dev.labels.numpy()), 4) for kind, z in logits.items()}
    log.info("mean AUC on dev: %s", found)
    best = max(("network", "adapted"), key=lambda kind: found[kind])  # both have the shape that the judge reads
    scale, shift = platt(logits[best], dev.labels)
    calibrated = torch.sigmoid(logits[best] * scale + shift)
    tensors = {f"head.{name}": p for name, p in (adapted.head if best == "adapted" else heads[best]).named_parameters()}
    if best == "adapted":
        tensors |= {name: p for name, p in adapted.trained().items() if name.startswith("layers.")}
    tensors = {name: p.detach().half().contiguous() for name, p in tensors.items()}
    tensors |= {"scale": scale, "shift": shift, "thresholds": thresholds(calibrated, dev.labels)}
    save_file(tensors, SHIPPED / "judge_head.safetensors", metadata={"labels": json.dumps(label_names())})
    (RUNS / "choice.json").write_text(json.dumps({"chosen": best, "dev_mean_auc": found}))


def platt(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and shift per label: logistic regression of the label on its own logit."""
    from sklearn.linear_model import LogisticRegression

    fits = [LogisticRegression().fit(z[:, None].numpy(), y.numpy()) for z, y in zip(logits.T, labels.T, strict=True)]
    return torch.tensor([f.coef_[0, 0] for f in fits]).float(), torch.tensor([f.intercept_[0] for f in fits]).float()


def thresholds(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Probability with the best F1 per label."""
    from sklearn.metrics import precision_recall_curve

    best = []
    for p, y in zip(probabilities.T.numpy(), labels.T.numpy(), strict=True):
        precision, recall, cuts = precision_recall_curve(y, p)
        f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
        best.append(float(cuts[min(int(f1.argmax()), len(cuts) - 1)]))
    return torch.tensor(best)


# Measurement


def measure() -> None:
    """Everything that data/judge.md states, from the shipped file through the public judge."""
    judges = {name: la.load_judge(name) for name in ("embedded", "lexicon")}
    texts, labels = read_split("test")
    scores = {name: judge.score(texts).numpy() for name, judge in judges.items()}
    truth = labels.numpy().astype(bool)
    meld = read_meld()
    outcome: dict[str, Any] = {
        "about": "Measured by analyses/train_judge.py; read by lens_affect.judge_labels. Intervals are 95 %.",
        **json.loads((RUNS / "choice.json").read_text()),
        "baseline": baseline(),
        "judges": {name: {"emotions": emotion_scores(judge, texts, truth)} for name, judge in judges.items()},
    }
    embedded = outcome["judges"]["embedded"]
    cuts = judges["embedded"].thresholds.numpy()
    embedded["labels"], embedded["macro"] = label_scores(scores["embedded"], truth, cuts)
    embedded["check"] = check_scores(scores["embedded"][::CHECKED], truth[::CHECKED], cuts)
    rows = single_rows(labels).numpy()
    said = scores["embedded"][rows][:, : len(label_names()) - 1].argmax(1)
    embedded["single_label"] = single_label_scores(said, truth[rows].argmax(1))
    for name, judge in judges.items():
        outcome["judges"][name]["meld"] = meld_scores(judge, meld)
        outcome["judges"][name]["passages"] = passage_scores(judge)
    (SHIPPED / "judge_scores.json").write_text(json.dumps(outcome, indent=1) + "\n")


def label_scores(scores: np.ndarray, truth: np.ndarray, cuts: np.ndarray) -> tuple[dict[str, Any], dict[str, Any]]:
    """AUC and F1 of every label on all rows of the test split, and their means over the 28 labels."""
    weights = np.vstack([np.ones(len(truth)), draws_over(range(len(truth)), "labels")])
    given = scores >= cuts
    f1 = f1_of(weights @ (given & truth), weights @ given, weights @ truth)
    auc = np.stack([weighted_auc(scores[:, k], truth[:, k], weights) for k in range(truth.shape[1])], axis=1)
    found = {
        label: {"positives": int(truth[:, k].sum()), "threshold": round(float(cuts[k]), 4)}
        | {"auc": limits(auc[:, k]), "f1": limits(f1[:, k])}
        for k, label in enumerate(label_names())
    }
    return found, {"n": len(truth), "auc": limits(auc.mean(1)), "f1": limits(f1.mean(1))}


def check_scores(scores: np.ndarray, truth: np.ndarray, cuts: np.ndarray) -> dict[str, Any]:
    """What a test finds again on every fourth row: mean AUC over the labels with 20 positives there, and F1 of every label."""
    common, given = truth.sum(0) >= 20, scores >= cuts
    f1 = f1_of((given & truth).sum(0), given.sum(0), truth.sum(0))
    return {
        "every": CHECKED,
        "labels": [name for name, kept in zip(label_names(), common, strict=True) if kept],
        "mean_auc": round(mean_auc(scores[:, common], truth[:, common]), 4),
        "f1": {name: round(float(value), 4) for name, value in zip(label_names(), f1, strict=True)},
    }


def emotion_scores(judge: la.Judge, texts: list[str], truth: np.ndarray) -> dict[str, Any]:
    """AUC for our emotions that a label of GoEmotions means (for the word list too); the truth is that any of them was given."""
    judged = la.judge_texts(judge, texts)
    names = label_schemes()["goemotions"]
    weights = np.vstack([np.ones(len(texts)), draws_over(range(len(texts)), "emotions")])
    found = {}
    for emotion in (e for e in judged.emotions if e in names):
        asked = truth[:, [label_names().index(label) for label in names[emotion].labels]].any(1)
        auc = limits(weighted_auc(judged.probability(emotion).numpy(), asked, weights))
        found[emotion] = {"auc": auc.pop("estimate"), **auc, "positives": int(asked.sum()), "n": len(texts)}
    return found


def weighted_auc(scores: np.ndarray, truth: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Area under the ROC curve for each row of weights; ties count half."""
    order = np.argsort(scores, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(scores[order]) > 0])
    found = []
    for part in np.array_split(weights[:, order], max(1, len(weights) // 100)):
        positive = np.add.reduceat(part * truth[order], starts, axis=1, dtype=np.float64)
        negative = np.add.reduceat(part * ~truth[order], starts, axis=1, dtype=np.float64)
        below = negative.cumsum(1) - negative / 2
        pairs = positive.sum(1) * negative.sum(1)
        found.append((positive * below).sum(1) / np.where(pairs > 0, pairs, np.nan))  # NaN where a draw has no positive
    return np.concatenate(found)


GROUPS = {
    "embedded": {  # the grouping of the GoEmotions paper
        "anger": "anger annoyance disapproval",
        "disgust": "disgust",
        "fear": "fear nervousness",
        "joy": "joy amusement approval excitement gratitude love optimism relief pride admiration desire caring",
        "sadness": "sadness disappointment embarrassment grief remorse",
        "surprise": "surprise realization confusion curiosity",
        "neutral": "neutral",
    },
    "lexicon": {
        "anger": "angry hostile exasperated",
        "fear": "afraid nervous anxious",
        "joy": "happy proud hopeful enthusiastic loving blissful grateful",
        "sadness": "sad gloomy guilty",
        "neutral": "neutral",
    },
}
"""MELD's emotions as labels of the judges."""


def read_meld() -> pd.DataFrame:
    """All utterances of MELD (no split was used here), with the dialogue each is from."""
    parts = [
        pd.read_csv(DATA / "meld" / f"{split}_sent_emo.csv", encoding="utf-8", encoding_errors="replace").assign(
            split=split
        )
        for split in ("train", "dev", "test")
    ]
    frame = pd.concat(parts, ignore_index=True)
    return frame.assign(dialogue=frame["split"] + frame["Dialogue_ID"].astype(str))


def meld_scores(judge: la.Judge, meld: pd.DataFrame) -> dict[str, Any]:
    """AUC per emotion of MELD, with intervals over dialogues; F1 where the judge has thresholds, those of GoEmotions: any label of the group is given."""
    texts = [str(text) if str(text).strip() else "." for text in meld["Utterance"]]
    scores = judge.score(texts).double().numpy()
    weights = np.vstack([np.ones(len(texts)), draws_over(meld["dialogue"].tolist(), "meld")])
    cuts = judge.thresholds.numpy() if isinstance(judge, EmbeddedJudge) else None
    found, f1, check = {}, [], {}
    for emotion, names in GROUPS[judge.name].items():
        columns = scores[:, [judge.labels.index(name) for name in names.split()]]
        score = 1 - (1 - columns).prod(1) if judge.multi_label else columns.sum(1)
        truth = (meld["Emotion"] == emotion).to_numpy()
        auc = limits(weighted_auc(score, truth, weights))
        found[emotion] = {"auc": auc.pop("estimate"), **auc, "positives": int(truth.sum()), "n": len(texts)}
        if cuts is not None:
            given = (columns >= cuts[[judge.labels.index(name) for name in names.split()]]).any(1)
            f1.append(f1_of(weights @ (given & truth), weights @ given, weights @ truth))
            found[emotion]["f1"] = limits(f1[-1])
            some = slice(None, None, MELD_CHECKED)
            check[emotion] = round(float(f1_of((given & truth)[some].sum(), given[some].sum(), truth[some].sum())), 4)
    found["dialogues"] = int(meld["dialogue"].nunique())
    if cuts is not None:
        found |= {"macro_f1": limits(np.mean(f1, axis=0)), "check": {"every": MELD_CHECKED, "f1": check}}
    return found


def passage_scores(judge: la.Judge) -> dict[str, Any]:
    """Our passages of the emotions that the judge names exactly: how often its top emotion is the intended one, by topic."""
    emotions = [e for e, naming in namings(judge.labels).items() if naming.match == "exact"]
    passages = la.load_stimuli("passages").select(emotions=emotions)
    judged = la.judge_texts(judge, passages.texts, emotions)
    frame = passages.to_frame().assign(correct=[t == e for t, e in zip(judged.top, passages.emotions, strict=True)])
    interval = mean_interval(frame.groupby("group")["correct"].mean().to_numpy(dtype=float))
    return {
        "n": len(passages),
        "chance": round(1 / len(emotions), 4),
        "accuracy": {k: round(float(getattr(interval, k)), 4) for k in ("estimate", "low", "high")},
        "correct": {e: int(frame.loc[frame["emotion"] == e, "correct"].sum()) for e in emotions},
        "auc": {
            e: round(
                float(
                    weighted_auc(
                        judged.probability(e).numpy(), np.array(passages.emotions) == e, np.ones((1, len(passages)))
                    )[0]
                ),
                4,
            )
            for e in emotions
        },
    }


STAGES = {
    "states": lambda: [write_states(split) for split in ("dev", "train", "test")],
    "train": train_adapted,
    "choose": choose,
    "measure": measure,
}

if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("stages", nargs="*", choices=[*STAGES, []], default=[])
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    RUNS.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    for name in options.parse_args().stages or STAGES:
        STAGES[name]()
