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
# # What happens when you push? Dose, response, regimes and causality of steering
#
# arXiv:2604.04064 says that emotion vectors steer what small models write (37 of 40 scenarios), in three regimes told apart by perplexity ratios, and
# by architecture rather than scale. Here each emotion's direction is added at one middle layer in doses that are shares of the residual stream's norm,
# beside random directions that move the stream as far; every text is scored by the unsteered model and read by a classifier that never saw it.
# `steer_models.py` has made the texts; what came out is in `results`, each folder with what was asked for, and is read here without a model.

# %%
import logging
import os
import sys
from importlib.util import find_spec
from pathlib import Path

import pandas as pd
import plotly.io as pio

import lens_affect as la

logging.getLogger("lens_affect").addHandler(logging.StreamHandler(sys.stdout))  # our warnings belong to the story
QUICK = bool(os.environ.get("LENS_AFFECT_QUICK"))
HERE = Path(__file__).resolve().parent if "__file__" in globals() else Path.cwd()
FIGURES, RUNS = HERE.parent / "figures", Path(os.environ.get("LENS_AFFECT_RUNS", HERE / "results")) / "steering"
pio.renderers.default = "json" if QUICK else "svg"


def save(figure, name, *results):
    """Into figures/, unless this is a quick run."""
    if not QUICK:
        la.save_figure(figure, FIGURES / name, *results)
    return figure


studies = {folder.name: la.SteeringStudy.load(folder) for folder in sorted(RUNS.iterdir(), key=lambda f: f.name[::-1])}
for name, study in studies.items():
    print(f"{name}:\n{study}", end="\n\n")

# %% [markdown]
# ## Dose and response
#
# 12 matter-of-fact beginnings, four target emotions, strengths from -0.8 to 1.6 of the residual norm. Dotted: random directions. The steered layer is the one
# where emotions are told apart best (01_layer_sweep), and the middle one of a model from a local file.

# %%
for name, study in studies.items():
    print(study.dose, end="\n\n")
    for measure in ("perplexity_ratio", "repetition"):
        save(la.plot_dose(study.dose, measure=measure), f"dose_{measure}_{name}", study.dose).show()

# %% [markdown]
# ## Regimes
#
# A cell is surgical where its texts are sound and the judge sees more of the target than under random directions that move the stream as far.

# %%
for name, study in studies.items():
    print(study.regimes, end="\n\n")
    save(la.plot_regimes(study.regimes), f"regimes_{name}", study.regimes).show()
    save(la.plot_judged(study.dose, study.judgement), f"judged_{name}", study.dose, study.judgement).show()

# %%
columns = ["kind", "emotion", "strength", "regime", "perplexity_ratio", "repetition", "change", "gain", "gain_low", "gain_high"]  # fmt: skip
pd.concat({name: study.regimes.table[columns] for name, study in studies.items()}, names=["model"]).round(3)

# %% [markdown]
# ## What it looks like
#
# Texts of every damage label, with what was done to them.

# %%
for name, study in studies.items():
    for heading, text in study.samples():
        print(f"{name}, {heading}: {text[:240]}")
    print()

# %% [markdown]
# ## How far can a model be pushed, and where is the boundary?
#
# On the scale of the achieved change of the residual stream, which means the same in every model: the change at which half of the texts are damaged; and,
# by bisection with new texts at every strength tried, where the labels of an emotion change.

# %%
onsets = la.compare_onsets({name: study.dose for name, study in studies.items()})
print(onsets, end="\n\n")
save(la.plot_onsets(onsets), "steering_onsets", onsets).show()
for name, study in studies.items():
    for found in study.boundaries:
        print(found)
    if study.boundaries:
        save(la.plot_boundaries(study.boundaries), f"boundaries_{name}", *study.boundaries).show()

# %% [markdown]
# ## Is it causal? 40 scenarios, each steered to its own target
#
# Half of the scenarios pull towards the target, half away from it. The paper's criterion is that the classifier's probability of the target rises; five
# random directions per scenario, and the direction of another emotion, that move the stream as far are judged by the same criterion. Strength 0.2
# was declared before the scenarios were looked at.

# %%
verified = {name: study.verification for name, study in studies.items() if study.verification}
for name, found in verified.items():
    print(found, end="\n\n")
    save(la.plot_verification(found), f"verification_{name}", found).show()

# %%
pd.concat({name: found.to_frame() for name, found in verified.items()}, names=["model"]).round(2)

# %% [markdown]
# Isotropic random directions may break a text that an emotion's direction of the same length leaves whole (the shares of sound texts above). The
# fairer null: random directions within the spread of the emotions' own vectors, five per scenario, the steered texts written again beside them.

# %%
fairer = {
    name: la.Verification.load(RUNS / name / "spread_verification")
    for name in studies
    if (RUNS / name / "spread_verification" / "manifest.json").is_file()
}
for found in fairer.values():
    print(found, end="\n\n")

# %% [markdown]
# ## Behaviour and inside together
#
# Vectors from one half of the topics steer, vectors from the other half read; the correlation with the judge is taken within each dose.

# %%
for name, study in studies.items():
    if study.inside:
        print(study.inside, end="\n\n")
        save(la.plot_inside(study.inside), f"inside_{name}", study.inside).show()

# %% [markdown]
# ## Do two judges agree about steered texts?
#
# Rank correlation of the trained judge with a word list, over all steered texts and doses, prompts resampled as a whole.

# %%
pd.concat({name: pd.read_csv(RUNS / name / "agreement.csv") for name in studies}, names=["model"]).round(2)

# %% [markdown]
# ## The paper's own regime rule
#
# Two scenarios, five strengths at all layers, 20 greedy tokens, and a rule that counts whitespace words and uses no perplexity.

# %%
for name in studies:
    samples = pd.read_csv(RUNS / name / "paper_rule.csv", keep_default_na=False)
    print(f"{name}: {samples['label'][0]}")
    for row in samples.itertuples(index=False):
        print(f"  {row.emotion} {row.strength:g}: {' '.join(row.text.split())[:100]}")

# %% [markdown]
# ## Scripts and languages of what is written, dose by dose

# %%
for name, study in studies.items():
    save(la.plot_scripts(study), f"scripts_{name}", study.dose).show()
    if not QUICK and find_spec("lingua"):  # the extra `languages`
        save(la.plot_languages(study), f"languages_{name}", study.dose).show()

# %% [markdown]
# ## Foreign tokens at the steered layer, and vectors across languages
#
# What the directions that were added bring up through the unembedding; whether words of eight languages that come up mean the emotion; and whether
# vectors of passages in one language tell emotions apart in another. 04_foreign_tokens has the middle layer and the languages one by one.

# %%
for study in studies.values():
    print(study.scripts, study.meaning, study.transfer, sep="\n", end="\n\n")

# %%
shown = ["language", "effect", "low", "high", "p_family", "control_effect", "own", "n_emotions", "n_words", "verdict"]
pd.concat({name: study.meaning.to_frame()[shown] for name, study in studies.items()}, names=["model"]).round(2)

# %% [markdown]
# ## Claims against these runs

# %%
card = la.steering_scorecard(studies)
print(card)
card.to_frame()[["id", "claim", "model", "source", "paper_statistic", "sound_statistic", "low", "high", "null", "n", "verdict", "note"]].round(3)  # fmt: skip
