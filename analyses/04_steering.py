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
# # What happens when you push? Dose, response and regimes of steering
#
# arXiv:2604.04064 says that emotion vectors steer what small models write, in three regimes told apart by perplexity ratios. Here each
# emotion's direction is added at one middle layer in doses that are shares of the residual stream's norm, beside random directions of the same
# dose; every text is scored by the unsteered model and read by a classifier that never saw it. Sweeps are saved, so a second start repeats none.

# %%
import logging
import os
import sys
from pathlib import Path

import pandas as pd
import plotly.io as pio

import lens_affect as la

logging.getLogger("lens_affect").addHandler(logging.StreamHandler(sys.stdout))  # our warnings belong to the story
QUICK = bool(os.environ.get("LENS_AFFECT_QUICK"))  # two prompts and strengths of one model: what the tests run
HERE = Path(__file__).resolve().parent if "__file__" in globals() else Path.cwd()
FIGURES, RUNS = HERE.parent / "figures", Path(os.environ.get("LENS_AFFECT_RUNS", HERE.parent / "runs"))
LAYERS = {"smollm2-135m-instruct": 14, "gemma-3-270m": 11}  # where emotions are told apart best (01_layer_sweep)
MODELS = list(LAYERS)[: 1 if QUICK else 2]
EMOTIONS = ["happy", "sad", "afraid", "angry"][: 1 if QUICK else 4]
pio.renderers.default = "json" if QUICK else "svg"


def save(figure, name, *results):
    """Into figures/, unless this is a quick run."""
    if not QUICK:
        la.save_figure(figure, FIGURES / name, *results)
    return figure


def kept(kind, folder, make):
    """A result, made once."""
    if not (RUNS / "steering" / folder / "manifest.json").is_file():
        make().save(RUNS / "steering" / folder)
    return kind.load(RUNS / "steering" / folder)


def loaded(name):
    """A model, loaded once."""
    if name not in models:
        models[name] = la.load_model(name, dtype="float32")
    return models[name]


def fitted(name):
    """Emotion vectors of a model from our passages."""
    passages = la.load_stimuli("passages")
    if QUICK:
        passages = passages.select(groups=["train", "garden", "school"])
    return la.fit_vectors(la.extract_activations(loaded(name), passages, pooling="mean_without_sinks"))


def swept(name, prompts, **asked):
    """Texts of one model at every dose, with random directions beside them."""
    return la.sweep_strengths(
        loaded(name), vectors[name], prompts, layers=LAYERS[name], n_tokens=16 if QUICK else 48, **asked
    )


# %%
models = {}
vectors = {name: kept(la.EmotionVectors, f"{name}/vectors", lambda name=name: fitted(name)) for name in MODELS}
neutral, scenarios = la.load_scenarios("neutral"), la.load_scenarios()
neutral = neutral.select(rows=range(0, len(neutral), 12 if QUICK else 2))
doses = {
    name: kept(
        la.DoseResponse,
        f"{name}/neutral",
        lambda name=name: swept(name, neutral, emotions=EMOTIONS, strengths=[0.2, 0.8] if QUICK else "auto"),
    )
    for name in MODELS
}
for dose in doses.values():
    print(dose, end="\n\n")

# %% [markdown]
# ## Dose and response

# %%
for name, dose in doses.items():
    for measure in ("perplexity_ratio", "repetition"):
        save(la.plot_dose(dose, measure=measure), f"dose_{measure}_{name}", dose).show()

# %% [markdown]
# ## Does a classifier that never saw the model read the emotion, and in which regime is the text?
#
# A cell is surgical where its texts are sound and the judge sees more of the target than under random directions of the same dose.

# %%
judge = la.load_judge("lexicon" if QUICK else "embedded")
judgements = {name: la.judge_texts(judge, dose.texts) for name, dose in doses.items()}
regimes = {name: la.classify_regimes(dose, judgements[name]) for name, dose in doses.items()}
for name, found in regimes.items():
    print(found, end="\n\n")
    save(la.plot_regimes(found), f"regimes_{name}", found).show()

# %%
columns = [
    "kind",
    "emotion",
    "strength",
    "regime",
    "perplexity_ratio",
    "repetition",
    "change",
    "gain",
    "gain_low",
    "gain_high",
]
pd.concat({name: found.table[columns] for name, found in regimes.items()}, names=["model"]).round(3)

# %% [markdown]
# ## What it looks like
#
# The same prompt at every strength of one emotion.

# %%
for name, dose in doses.items():
    for text, strength, kind in dose.table.query(
        "prompt == 0 and emotion in ['', @EMOTIONS[0]] and kind in ['unsteered', 'steered']"
    )[["text", "strength", "kind"]].itertuples(index=False):
        print(f"{name}, {kind} {strength:+g}: {' '.join(text.split())[:300]}")
