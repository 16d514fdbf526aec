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
# # Do emotion vectors bring up foreign tokens, and do these mean the emotion?
#
# Scripts of the tokens that vectors of English passages raise most, against random directions and the vocabulary; words that name the emotion
# in eight languages, against other emotions' vectors; and directions from one language applied to another. Nothing is generated here.
# Activations are saved, so a second start reads nothing again. Other models: their names, comma-separated, in LENS_AFFECT_MODELS.

# %%
import logging
import os
import sys
from pathlib import Path

import pandas as pd

import lens_affect as la

logging.getLogger("lens_affect").addHandler(logging.StreamHandler(sys.stdout))  # our warnings belong to the story
QUICK = bool(os.environ.get("LENS_AFFECT_QUICK"))  # three emotions of one model: what the tests run
HERE = Path(__file__).resolve().parent if "__file__" in globals() else Path.cwd()
RUNS = Path(os.environ.get("LENS_AFFECT_RUNS", HERE.parent / "runs"))
MODELS = os.environ.get("LENS_AFFECT_MODELS", "smollm2-135m-instruct,gemma-3-270m").split(",")[: 1 if QUICK else None]
SETS = {"English": "passages", "Spanish": "passages_es", "Chinese": "passages_zh"}


def read(model, name, stimuli):
    """Activations of one set of passages, read once."""
    folder = RUNS / "languages" / f"{Path(name).stem}-{stimuli}"
    if not (folder / "manifest.json").is_file():
        texts = la.load_stimuli(stimuli)
        if QUICK:
            some = la.load_stimuli("passages_es")
            texts = texts.select(emotions=list(some.labels[:3]), groups=list(dict.fromkeys(some.groups))[:4])
        la.extract_activations(model, texts, pooling="mean_without_sinks").save(folder)
    return la.Activations.load(folder)


# %%
tables = {}
N = {"n_permutations": 99} if QUICK else {}
for name in MODELS:
    model = la.load_model(name, dtype="float32")
    activations = {language: read(model, name, stimuli) for language, stimuli in SETS.items()}
    vectors = la.fit_vectors(activations["English"])
    scripts = la.script_entanglement(model, vectors)  # at the middle layer, chosen before any was looked at
    meaning = la.foreign_meaning(model, vectors, **N)
    transfer = la.language_transfer(activations, model=model, **N)
    tables[name] = scripts, meaning, transfer
    print(scripts, meaning, transfer, sep="\n", end="\n\n")

# %% [markdown]
# ## Language by language
#
# Percentile points that an emotion's own words stand above the same words under other emotions' vectors, and above everyday words under the same vector.

# %%
shown = ["language", "effect", "low", "high", "p_family", "control_effect", "own", "n_emotions", "n_words", "verdict"]
pd.concat({name: meaning.to_frame()[shown] for name, (_, meaning, _) in tables.items()}, names=["model"]).round(2)

# %%
pd.concat({name: transfer.to_frame() for name, (_, _, transfer) in tables.items()}, names=["model"]).round(2).head(40)
