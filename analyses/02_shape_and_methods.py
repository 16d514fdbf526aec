# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Is the curve a U, and does written text beat read text?
#
# Two claims of arXiv:2604.04064, tested on the two models whose weights a package ships. Every number is from topics that the directions have
# not seen; intervals are over topics. The runs are resumable: a second start repeats no finished step. Gemma-3-270M is a base model: asked for a
# story it writes about it, or lists questions, as often as it tells one; those texts are read as they are, and repetitive ones are drawn again.

# %%
import logging
import os
import sys
from pathlib import Path

import pandas as pd
import plotly.io as pio

import lens_affect as la

logging.basicConfig(stream=sys.stdout, format="%(message)s")  # warnings belong to the story
QUICK = bool(os.environ.get("LENS_AFFECT_QUICK"))  # three emotions, one model: what the tests run
DATA = os.environ.get(
    "LENS_AFFECT_DATA"
)  # folder with goemotions/ and jeong/ (third-party texts, not part of this repository)
HERE = Path(__file__).resolve().parent if "__file__" in globals() else Path.cwd()
FIGURES, RUNS = HERE.parent / "figures", Path(os.environ.get("LENS_AFFECT_RUNS", HERE.parent / "runs"))
MODELS = ("smollm2-135m-instruct", "gemma-3-270m")[: 1 if QUICK else 2]
SIZE = {"n_stories": 12, "story_tokens": 120, "n_permutations": 1000, "compare_methods": True}
# Half as many and shorter stories: Gemma-3-270M writes slowly here, and many of its draws are repetitive.
OF_MODEL = {"gemma-3-270m": {"n_stories": 6, "story_tokens": 80, "story_rounds": 3}}
if QUICK:
    SIZE |= {"n_permutations": 20, "compare_methods": False, "methods": ("comprehension",)}
    SIZE["emotions"] = ("happy", "angry", "sad")
pio.renderers.default = "json" if QUICK else "png"


def save(figure, name, *results):
    """Into figures/, unless this is a quick run."""
    if not QUICK:
        la.save_figure(figure, FIGURES / name, *results)
    return figure


def finding(start, curves):
    """Best depth of every curve with its 95 % interval over topics."""
    parts = []
    for c in curves:
        low, high = c.best_depth_interval()
        parts.append(f"depth {c.depth[c.row(c.best_layer)]:.2f} [{low:.2f}, {high:.2f}] in {c.provenance.title}")
    return f"{start}<br>" + "<br>and ".join(parts)


# %%
runs = {
    name: la.run_sweep(
        la.make_spec(model=name, **SIZE | OF_MODEL.get(name, {})), RUNS / f"analysis-{name}", resume=True
    )
    for name in MODELS
}
for run in runs.values():
    for method in run.spec.methods:
        print(run.headline(method))

# %% [markdown]
# ## Curves of both models, and their shapes

# %%
read = [run.curves["comprehension", "nearest_mean"] for run in runs.values()]
bar = next(iter(runs.values())).bars["comprehension"].accuracy
save(
    la.plot_curves(read, bar=bar, title=finding("20 emotions are told apart best at", read)),
    "curves_both_models",
    *read,
)

# %%
paper = [run.curves["comprehension", "mean_cosine_neutral"] for run in runs.values()]
title = finding("The paper's statistic (lower is called better) is lowest at", paper)
save(la.plot_curves(paper, title=title), "paper_statistic_both_models", *paper)

# %%
for run in runs.values():
    for (method, score), curve in run.curves.items():
        print(f"{curve.provenance.title}, {method}, {score}: {curve.shape()}")
read[0].shape().table.round(3)

# %% [markdown]
# ## Anisotropy: how alike are sentences that have nothing in common?

# %%
measures = [run.anisotropy for run in runs.values()]
for measure in measures:
    print(measure)
save(la.plot_anisotropy(measures), "anisotropy_both_models", *measures)

# %% [markdown]
# ## One choice at a time
#
# The reference is a story of the model's own, read after the request that asked for it. Filled points stay significant after correction.

# %%
comparisons = {name: run.comparison for name, run in runs.items() if run.comparison}
for name, comparison in comparisons.items():
    print(comparison)
    for metric in ("accuracy", "mean_cosine", "shift", "spread"):
        figure = save(la.plot_methods(comparison, metric=metric), f"methods_{metric}_{name}", comparison)
        if metric == "accuracy":
            figure.show()

# %%
pd.concat([c.table.query("metric in ['accuracy', 'named_accuracy']") for c in comparisons.values()]).round(
    3
) if comparisons else None

# %%
pd.concat([c.main_effects.query("metric == 'accuracy'") for c in comparisons.values()], keys=comparisons).round(
    3
) if comparisons else None

# %% [markdown]
# ## Sinks: what a plain mean does to the curve

# %%
model = la.load_model(MODELS[0])
passages = la.load_stimuli("passages")
if QUICK:
    passages = passages.select(emotions=["happy", "angry", "neutral"])
plain = la.localize(la.extract_activations(model, passages, pooling="mean"), n_permutations=SIZE["n_permutations"])
print(f"plain mean: {plain}")
print(f"without sinks: {read[0]}")

# %% [markdown]
# ## Other texts: does the curve depend on the stimuli?
#
# GoEmotions (single-label comments of eight emotions, the published split: directions from 100 training comments per emotion, accuracy on at most 50
# test comments per emotion) and the paper's own 63 passages (three per emotion).

# %%
EIGHT = ("admiration", "anger", "curiosity", "gratitude", "joy", "love", "sadness", "surprise")


def goemotions(part, per_emotion):
    """The first single-label rows of each emotion."""
    names = (Path(DATA) / "goemotions" / "labels.txt").read_text().split()
    rows = pd.read_csv(
        Path(DATA) / "goemotions" / f"{part}.tsv", sep="\t", header=None, names=["text", "labels", "id"], quoting=3
    )
    rows = rows[~rows["labels"].astype(str).str.contains(",")].assign(
        emotion=lambda r: [names[int(i)] for i in r["labels"]]
    )
    rows = rows[rows["emotion"].isin(EIGHT) & (rows["text"].str.split().str.len() >= 5)]
    return rows.groupby("emotion").head(per_emotion)[["text", "emotion", "id"]].rename(columns={"id": "group"})


others = {}
if DATA and not QUICK:
    train, test = goemotions("train", 100), goemotions("test", 50)
    table = RUNS / "goemotions.csv"
    pd.concat([train, test]).to_csv(table, index=False)
    comments, author = la.load_stimuli(table), la.load_stimuli(Path(DATA) / "jeong" / "emotion_comprehension_texts.csv")
    for name in MODELS:
        model = la.load_model(name)
        seen = la.extract_activations(model, comments, pooling="mean_without_sinks")
        others[name, "GoEmotions"] = la.localize(seen, test_groups=list(test["group"]), n_permutations=1000)
        seen = la.extract_activations(model, author, pooling="mean_without_sinks")
        others[name, "the paper's passages"] = la.localize(seen, n_splits=3, n_permutations=1000)
for (name, texts), curve in others.items():
    print(f"{texts}: {curve}\n{curve.shape()}")
    save(la.plot_curves(curve), f"curve_{texts.split()[-1].lower()}_{name}", curve)
print("" if others else "LENS_AFFECT_DATA is not set: the third-party texts were not read in this run")

# %% [markdown]
# ## Do the two models arrange emotions alike?

# %%
if len(runs) == 2:
    pair = [run.activations("comprehension") for run in runs.values()]
    print(la.compare_geometry(*pair, layers=[c.best_layer for c in read], n_permutations=1000))

# %% [markdown]
# ## What holds

# %%
card = la.make_scorecard(list(runs.values()))
print(card)
card.table[
    ["id", "claim", "model", "source", "paper_statistic", "sound_statistic", "low", "high", "null", "n", "verdict"]
].round(3)

# %%
for run in runs.values():
    print(la.recommend(run))
