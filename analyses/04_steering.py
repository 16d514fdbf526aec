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
# beside random directions of the same dose; every text is scored by the unsteered model and read by a classifier that never saw it. What was
# made once is kept, so a second start repeats nothing. A model in a local file takes part through LENS_AFFECT_EXTRA=file.gguf:layer.

# %%
import logging
import os
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import plotly.io as pio

import lens_affect as la

logging.getLogger("lens_affect").addHandler(logging.StreamHandler(sys.stdout))  # our warnings belong to the story
QUICK = bool(os.environ.get("LENS_AFFECT_QUICK"))  # two prompts and strengths of one model: what the tests run
HERE = Path(__file__).resolve().parent if "__file__" in globals() else Path.cwd()
FIGURES, RUNS = HERE.parent / "figures", Path(os.environ.get("LENS_AFFECT_RUNS", HERE.parent / "runs"))
LAYERS = {"smollm2-135m-instruct": 14, "gemma-3-270m": 11}  # where emotions are told apart best (01_layer_sweep)
FILES = {name: name for name in LAYERS}
if QUICK:
    LAYERS = {"smollm2-135m-instruct": 14}
elif extra := os.environ.get("LENS_AFFECT_EXTRA"):
    file, _, layer = extra.rpartition(":")
    FILES[Path(file).stem], LAYERS[Path(file).stem] = file, int(layer)
EMOTIONS = ["happy", "sad", "afraid", "angry"][: 1 if QUICK else 4]
DECLARED = 0.2  # strength that the verification is about, set before the scenarios were looked at: the largest at which neutral texts stayed sound
JUDGE = "lexicon" if QUICK else "embedded"
TOKENS = 12 if QUICK else 48
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
        models[name] = la.load_model(FILES[name], dtype="float32")
    return models[name]


def fitted(name, topics=slice(None)):
    """Emotion vectors of a model from our passages about some of the topics."""
    passages = la.load_stimuli("passages")
    chosen = list(dict.fromkeys(passages.groups))[topics]
    passages = passages.select(groups=["train", "garden", "school"] if QUICK else chosen)
    if QUICK:
        passages = passages.select(emotions=["happy", "loving", "calm", "hostile"])
    return la.fit_vectors(la.extract_activations(loaded(name), passages, pooling="mean_without_sinks"))


def swept(name, prompts, directions=None, **asked):
    """Texts of one model at every dose, with random directions beside them."""
    return la.sweep_strengths(
        loaded(name), directions or vectors[name], prompts, layers=LAYERS[name], n_tokens=TOKENS, **asked
    )


def judged(folder, dose):
    """What the judge reads in the texts of a sweep."""
    return kept(la.Judgement, f"{folder}-judgement", lambda: la.judge_texts(judge, dose.texts))


models, judge = {}, la.load_judge(JUDGE)
vectors = {name: kept(la.EmotionVectors, f"{name}/vectors", lambda name=name: fitted(name)) for name in LAYERS}
neutral, scenarios = la.load_scenarios("neutral"), la.load_scenarios()
neutral = neutral.select(rows=range(0, len(neutral), 12 if QUICK else 2))
if QUICK:
    scenarios = scenarios.select(emotions=["loving"])  # of this the word list knows enough

# %% [markdown]
# ## Dose and response
#
# 12 matter-of-fact beginnings, four target emotions, strengths from -0.8 to 1.6 of the residual norm. Dotted: random directions.

# %%
doses, judgements, regimes = {}, {}, {}
for name in LAYERS:
    asked = {"emotions": EMOTIONS, "strengths": [0.2, 0.8] if QUICK else "auto"}
    doses[name] = kept(la.DoseResponse, f"{name}/neutral", lambda name=name, asked=asked: swept(name, neutral, **asked))
    judgements[name] = judged(f"{name}/neutral", doses[name])
    print(doses[name], end="\n\n")
    for measure in ("perplexity_ratio", "repetition"):
        save(la.plot_dose(doses[name], measure=measure), f"dose_{measure}_{name}", doses[name]).show()

# %% [markdown]
# ## Regimes
#
# A cell is surgical where its texts are sound and the judge sees more of the target than under random directions of the same dose.

# %%
for name in LAYERS:
    regimes[name] = la.classify_regimes(doses[name], judgements[name])
    print(regimes[name], end="\n\n")
    save(la.plot_regimes(regimes[name]), f"regimes_{name}", regimes[name]).show()

# %%
columns = ["kind", "emotion", "strength", "regime", "perplexity_ratio", "repetition", "change", "gain", "gain_low", "gain_high"]  # fmt: skip
pd.concat({name: found.table[columns] for name, found in regimes.items()}, names=["model"]).round(3)

# %% [markdown]
# ## What it looks like
#
# Texts of every damage label, with what was done to them.

# %%
studies = {name: la.SteeringStudy(doses[name], judgements[name], regimes[name]) for name in LAYERS}
for name, study in studies.items():
    for heading, text in study.samples():
        print(f"{name}, {heading}: {text[:240]}")
    print()

# %% [markdown]
# ## How far can a model be pushed, and where is the boundary?
#
# On the scale of the achieved change of the residual stream, which means the same in every model: the change at which half of the texts are damaged; and,
# by bisection with new texts at every strength tried, where the labels of the last emotion change.

# %%
onsets = la.compare_onsets(doses)
print(onsets, end="\n\n")
save(la.plot_onsets(onsets), "steering_onsets", onsets).show()
for name in [] if QUICK else list(LAYERS)[:2]:
    search = {"strengths": (0.1, 0.2, 0.4, 0.8, 1.6), "precision": 0.5}
    found = kept(
        la.RegimeBoundaries,
        f"{name}/boundaries",
        lambda name=name, search=search: la.locate_boundaries(
            loaded(name), vectors[name], neutral, EMOTIONS[-1], layers=LAYERS[name], n_tokens=TOKENS, **search
        ),
    )
    print(found)

# %% [markdown]
# ## Is it causal? 40 scenarios, each steered to its own target
#
# Half of the scenarios pull towards the target, half away from it. The paper's criterion is that the classifier's probability of the target rises; five
# random directions of the same size per scenario are judged by the same criterion.

# %%
for name in LAYERS:
    if name not in list(LAYERS)[:2]:
        continue
    asked = {"strengths": [DECLARED] if QUICK else [0.2, 0.4], "n_random": 2 if QUICK else 5}
    tried = kept(la.DoseResponse, f"{name}/scenarios", lambda name=name, asked=asked: swept(name, scenarios, **asked))
    read = judged(f"{name}/scenarios", tried)
    found = la.verify_steering(tried, read, strength=DECLARED, scenarios=scenarios)
    studies[name] = la.SteeringStudy(doses[name], judgements[name], regimes[name], tried, read, found)
    print(found, end="\n\n")
    save(la.plot_verification(found), f"verification_{name}", found).show()
pd.concat(
    {name: study.verification.to_frame() for name, study in studies.items() if study.verification}, names=["model"]
).round(2)

# %% [markdown]
# ## Behaviour and inside together
#
# Vectors from one half of the topics steer, vectors from the other half read; the correlation with the judge is taken within each dose.

# %%
for name in list(LAYERS)[:2]:
    halves = [
        kept(
            la.EmotionVectors, f"{name}/vectors-{half}", lambda name=name, half=half: fitted(name, slice(half, None, 2))
        )
        for half in (() if QUICK else (0, 1))
    ] or [vectors[name]] * 2
    every = la.load_scenarios("neutral")
    if QUICK:
        every = every.select(rows=range(5))
    asked = {"emotions": EMOTIONS, "strengths": [DECLARED]}
    tried = kept(
        la.DoseResponse,
        f"{name}/halves",
        lambda name=name, halves=halves, every=every, asked=asked: swept(name, every, halves[0], **asked),
    )
    found = la.correlate_inside(
        loaded(name), tried, judged(f"{name}/halves", tried), halves[1], n_permutations=99 if QUICK else 1000
    )
    print(found, end="\n\n")
    save(la.plot_inside(found), f"inside_{name}", found).show()

# %% [markdown]
# ## The paper's own regime rule
#
# Two scenarios, five strengths at all layers, 20 greedy tokens, and a rule that counts whitespace words and uses no perplexity.

# %%
for name in LAYERS:
    label, samples = la.run_jeong_regime(
        loaded(name), vectors[name], **({"strengths": (0.01,), "max_new_tokens": 4} if QUICK else {})
    )
    print(f"{name}: {label}")
    for row in samples.itertuples(index=False):
        print(f"  {row.emotion} {row.strength:g}: {' '.join(row.text.split())[:100]}")

# %% [markdown]
# ## Scripts of what is written, dose by dose

# %%
for name, study in studies.items():
    save(la.plot_scripts(study), f"scripts_{name}", study.dose).show()

# %% [markdown]
# ## Foreign tokens at the steered layer
#
# What the directions that were added bring up through the unembedding; 04_foreign_tokens has the middle layer and the languages one by one.

# %%
if not QUICK:
    for name, study in studies.items():
        at = {"layer": LAYERS[name]}
        scripts = kept(
            la.ScriptTable,
            f"{name}/scripts",
            lambda name=name, at=at: la.script_entanglement(loaded(name), vectors[name], **at),
        )
        meaning = kept(
            la.MeaningTable,
            f"{name}/meaning",
            lambda name=name, at=at: la.foreign_meaning(loaded(name), vectors[name], **at),
        )
        studies[name] = replace(study, scripts=scripts, meaning=meaning)
        print(scripts, meaning, sep="\n", end="\n\n")

# %% [markdown]
# ## Claims against these runs

# %%
card = la.steering_scorecard(studies)
print(card)
card.to_frame()[["id", "claim", "model", "source", "paper_statistic", "sound_statistic", "low", "high", "null", "n", "verdict", "note"]].round(3)  # fmt: skip
