"""Tune the rule that labels damaged texts on one half of a labelled set, and measure it on the other.

    python analyses/tune_regimes.py collect LABELS.jsonl    # adds what the rule measures of each text, writes data/regime_texts.jsonl (needs the models)
    python analyses/tune_regimes.py                         # tunes and prints, from that file alone

LABELS.jsonl has one object per text: text, language, origin (`written`, or the model's name), what (kind of case, or kind and strength), first and second
(labels of two readers). Outputs of models are looked up by their text in the sweeps of steer_models.py (LENS_AFFECT_RUNS, else analyses/results); one that
no sweep holds any more keeps what the data file has of it. The half that tunes is every other text of each label and origin, so both halves have the same
mixture. The rule: regimes.damage_of.
"""

import argparse
import itertools
import json
import math
import os
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from statsmodels.stats.proportion import proportion_confint

import lens_affect as la
from lens_affect.adapter import encode_prompt, token_ids
from lens_affect.labelled_texts import LabelledTexts, load_labelled_texts
from lens_affect.regimes import R_OK, Thresholds
from lens_affect.repetition import compression_ratio, longest_loop, repetition_limits, repetition_share
from lens_affect.scoring import score_texts

HERE = Path(__file__).resolve().parent
DATA = HERE.parent / "lens_affect" / "data" / "regime_texts.jsonl"
RUNS = Path(os.environ.get("LENS_AFFECT_RUNS", HERE.parent / "runs"))
MEASURED = ("log_ratio", "repetition", "n_tokens", "limit", "r_ok", "nll")
"""What the rule needs of a text, and its mean negative log-likelihood per token."""
SCORER = "gemma-3-270m"
"""Scorer of written texts: its vocabulary covers their languages."""


def collect(labels: Path) -> None:
    """Measure every text and write the data file."""
    rows: list[dict[str, Any]] = [json.loads(line) for line in labels.read_text(encoding="utf-8").splitlines()]
    kept = [json.loads(line) for line in DATA.read_text(encoding="utf-8").splitlines()] if DATA.is_file() else []
    doses = {o: load_dose(o) for o in dict.fromkeys(row["origin"] for row in rows) if o != "written"}
    measure_outputs(rows, doses, kept)
    written = [row for row in rows if row["origin"] == "written"]
    measure_written(written)
    with DATA.open("w", encoding="utf-8") as file:
        for row in rows:
            values = {
                k: None if isinstance(v, float) and math.isnan(v) else round(v, 4) if isinstance(v, float) else v
                for k, v in row.items()
            }
            file.write(json.dumps(values, ensure_ascii=False) + "\n")
    print(f"{len(rows)} texts, {len(written)} written, in {DATA.name}")


def load_dose(origin: str) -> la.DoseResponse:
    """The sweep of a model's neutral openings: that of steer_models.py, else the committed one."""
    places = [folder / "steering" / origin / "dose" for folder in (RUNS, HERE / "results")]
    there = [place for place in places if (place / "manifest.json").is_file()]
    if not there:
        raise FileNotFoundError(
            f"received texts of {origin}, but no sweep in {places[0]} or {places[1]}; make it: python analyses/steer_models.py neutral"
        )
    return la.DoseResponse.load(there[0])


def measure_outputs(
    rows: list[dict[str, Any]], doses: Mapping[str, la.DoseResponse], kept: list[dict[str, Any]]
) -> None:
    """What the rule measures of models' outputs, by their text; a text that its sweep no longer holds keeps what was stored of it.

    Raises:
        ValueError: a text that neither a sweep nor the data file holds.
    """
    stored = {(row["origin"], row["text"]): row for row in kept}
    limits = {origin: Thresholds.of(dose).r_ok for origin, dose in doses.items()}
    places = {origin: {text: i for i, text in reversed(list(enumerate(dose.texts)))} for origin, dose in doses.items()}
    gone = 0
    for row in rows:
        row.pop("row", None)
        if row["origin"] == "written":
            continue
        dose, i = doses[row["origin"]], places[row["origin"]].get(row["text"])
        if i is None:
            before = stored.get((row["origin"], row["text"]))
            if before is None:
                raise ValueError(
                    f"received {row['text'][:60]!r}, which neither a sweep of {row['origin']} nor {DATA.name} holds; remove it"
                )
            row |= {name: before.get(name) for name in MEASURED}
            gone += 1
            continue
        n = int(dose.column("n_tokens")[i])
        values = (
            dose.log_ratio[i],
            dose.column("repetition")[i],
            n,
            dose.limits[n],
            limits[row["origin"]],
            dose.column("nll")[i],
        )
        row |= dict(zip(MEASURED, (float(v) if k != 2 else n for k, v in enumerate(values)), strict=True))
    print(f"{gone} texts are in no sweep any more and keep what was stored of them")


def measure_written(rows: list[dict[str, Any]]) -> None:
    """A written text has no unsteered one beside it: its perplexity is taken against the mean of our passages in its language (English where there are none)."""
    model = la.load_model(SCORER, dtype=torch.float32)
    head = encode_prompt(model, "", form="continue")[0]
    usual: dict[str, np.ndarray] = {}
    for language, name in (("en", "passages"), ("zh", "passages_zh"), ("es", "passages_es")):
        texts = la.load_stimuli(name).texts[::6]  # every topic and emotion in turn
        found = score_texts(model, [head] * len(texts), [token_ids(model.tokenizer, t) for t in texts])
        usual[language] = found.nll.double().numpy()
    ids = [token_ids(model.tokenizer, row["text"]) if row["text"].strip() else () for row in rows]
    scores = score_texts(model, [head] * len(ids), ids)
    references = [token_ids(model.tokenizer, text) for text in la.load_stimuli("passages").texts]
    limits = repetition_limits(references, max(map(len, ids)))
    spread = np.concatenate([np.subtract.outer(x, x)[np.triu_indices(len(x), 1)] for x in usual.values()])
    r_ok = max(1.5, float(np.exp(np.quantile(np.abs(spread), 0.95))))
    for row, tokens, nll in zip(rows, ids, scores.nll.tolist(), strict=True):
        base = usual.get(row["language"], usual["en"]).mean()
        row |= {"log_ratio": nll - float(base), "repetition": repetition_share(tokens), "n_tokens": len(tokens)}
        row |= {"limit": float(limits[len(tokens)]), "r_ok": r_ok, "nll": nll}


def tune() -> None:
    """Print agreement of the readers, the number that is best on the tuning half, and what it reaches on the other half.

    One number is tuned; those of the perplexity ratio were declared. What tuning all three would give is printed beside it.
    """
    texts = load_labelled_texts()
    print(texts)
    half = texts.halves()
    grid = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4)
    best = max(grid, key=lambda least: texts.accuracy(half, texts.predict(least))[0])
    every = max(
        itertools.product(grid, (1.5, 2.0, 2.5, 3.0, 4.0), (1.25, 1.5, 2.0, 2.5)),
        key=lambda c: texts.accuracy(half, texts.predict(c[0], floor=c[1], power=c[2]))[0],
    )
    ways = {
        "no floor": texts.predict(0.0),
        f"floor of repetition tuned: {best}": texts.predict(best),
        f"all three tuned: {every}": texts.predict(every[0], floor=every[1], power=every[2]),
    }
    for name, predicted in ways.items():
        for part, members in (("tuning half", half), ("other half", ~half)):
            shares = []
            for label in ("", "repetitive", "clean", "noise"):
                right, n = texts.accuracy(members, predicted, label)
                low, high = proportion_confint(right, n, method="wilson")
                shares.append(f"{label + ' or not' if label else 'label'} {right / n:.2f} [{low:.2f}, {high:.2f}]")
            print(f"{name}, {part} (n = {n}): {'; '.join(shares)}")
    other_ways(texts, half)
    own = [(a, b) for a, b, m in zip(texts.labels, texts.predict(best), ~half, strict=True) if m and a and a != b]
    print("errors on the other half:", ", ".join(f"{a} as {b} {n}" for (a, b), n in Counter(own).most_common()))


def other_ways(texts: LabelledTexts, half: np.ndarray) -> None:
    """What rules of another kind reach: whether the aim is missed for want of thresholds, or of measures.

    First, bits per byte, which need no unsteered text beside them: a text above a limit is noise even if it repeats itself, and a low perplexity is no
    damage. Then classifiers on all measures at once: inside the tuning half by cross-validation, and trained there for the other half.
    """
    table, labels = texts.table, np.array(texts.labels)
    text = table["text"].tolist()
    size = np.array([max(1, len(t.encode())) for t in text])
    bits = table["nll"].to_numpy(float) * table["n_tokens"].to_numpy(float) / size / math.log(2)
    rule = np.array(texts.predict())
    ratio, limit = table["log_ratio"].to_numpy(float), np.maximum(table["r_ok"].to_numpy(float), R_OK)

    def unreadable(most: float) -> np.ndarray:
        found = np.where((rule == "degraded") & (ratio < 0), "clean", rule)
        found = np.where((found == "noise") & (ratio <= 2 * np.log(limit)), "degraded", found)
        return np.where((bits > most) & (rule != "empty"), "noise", found)

    def reached(found: np.ndarray, members: np.ndarray) -> str:
        known = members & (labels != "")
        right = int((found == labels)[known].sum())
        low, high = proportion_confint(right, known.sum(), method="wilson")
        return f"{right / known.sum():.2f} [{low:.2f}, {high:.2f}]"

    most = max(np.arange(1.6, 3.6, 0.1), key=lambda x: (unreadable(x) == labels)[half & (labels != "")].mean())
    found = unreadable(most)
    print(
        f"noise above {most:.1f} bits per byte, before repetition: tuning half {reached(found, half)}, other half {reached(found, ~half)}"
    )
    measures = pd.DataFrame(
        {
            "log_ratio": ratio,
            "nll": table["nll"].to_numpy(float),
            "bits": bits,
            "repetition": table["repetition"].to_numpy(float),
            "of_words": [repetition_share(t) for t in text],
            "of_pairs": [repetition_share(t, n=2) for t in text],
            "loop": [longest_loop(t) for t in text],
            "compression": [compression_ratio(t) for t in text],
            "letters": [sum(c.isalpha() or c == " " for c in t) / max(1, len(t)) for t in text],
            "n_tokens": table["n_tokens"].to_numpy(float),
        }
    ).fillna(0.0)
    train, test = half & (labels != ""), ~half & (labels != "")
    for name, model in (
        ("logistic regression", make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))),
        ("random forest", RandomForestClassifier(500, min_samples_leaf=2, random_state=0)),
    ):
        inside = np.full(len(labels), "", dtype=object)
        folds = StratifiedKFold(5, shuffle=True, random_state=0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the fewest labels are in fewer texts than there are folds
            inside[train] = cross_val_predict(model, measures[train], labels[train], cv=folds)
        outside = np.full(len(labels), "", dtype=object)
        outside[test] = model.fit(measures[train], labels[train]).predict(measures[test])
        print(
            f"{name} on {measures.shape[1]} measures: tuning half, cross-validated, {reached(inside, train)}, other half {reached(outside, test)}"
        )


if __name__ == "__main__":
    options = argparse.ArgumentParser()
    options.add_argument("step", nargs="?", choices=["collect", "tune"], default="tune")
    options.add_argument("labels", nargs="?", type=Path)
    chosen = options.parse_args()
    if chosen.step == "collect":
        collect(chosen.labels)
    else:
        tune()
