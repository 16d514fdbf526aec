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
# beside random directions that move the stream as far; every text is scored by the unsteered model and read by a classifier that never saw it. What was
# made once is kept with the arguments it was made with, so a second start repeats nothing and other arguments are run anew. A model in a local file takes part through LENS_AFFECT_EXTRA=file.gguf:layer.

# %%
import json
import logging
import os
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pandas as pd
import plotly.io as pio

import lens_affect as la
from lens_affect.results import content_hash

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


def kept(kind, folder, make, **asked):
    """A result, made once for these arguments, which stand beside it."""
    place, note = RUNS / "steering" / folder, RUNS / "steering" / f"{folder}.json"
    wanted = json.loads(json.dumps(asked | {"layer": LAYERS[folder.split("/")[0]]}))
    if not note.is_file() or json.loads(note.read_text()) != wanted or not (place / "manifest.json").is_file():
        make(**asked).save(place, overwrite=True)
        note.write_text(json.dumps(wanted))
    return kind.load(place)


def loaded(name):
    """A model, loaded once."""
    if name not in models:
        models[name] = la.load_model(FILES[name], dtype="float32")
    return models[name]


def fitted(name, half=None):
    """Emotion vectors of a model from our passages, or from every second of their topics."""

    def fit(topics):
        passages = la.load_stimuli("passages").select(groups=topics)
        if QUICK:
            passages = passages.select(emotions=["happy", "loving", "calm", "hostile"])
        return la.fit_vectors(la.extract_activations(loaded(name), passages, pooling="mean_without_sinks"))

    topics = list(dict.fromkeys(la.load_stimuli("passages").groups))
    topics = ["train", "garden", "school"] if QUICK else topics if half is None else topics[half::2]
    return kept(la.EmotionVectors, f"{name}/vectors" + ("" if half is None else f"-{half}"), fit, topics=topics)


def swept(name, what, prompts, directions=None, **asked):
    """Texts of one model at every dose, with controls beside them that move the stream as far, and what the judge reads in them."""

    def sweep(prompts, **asked):
        return la.sweep_strengths(loaded(name), directions or vectors[name], prompts, layers=LAYERS[name], **asked)

    asked |= {"n_tokens": TOKENS}
    dose = kept(
        *(la.DoseResponse, f"{name}/{what}", lambda n_prompts, **how: sweep(prompts, **how)),
        n_prompts=len(prompts),
        **asked,
    )
    read = kept(
        *(la.Judgement, f"{name}/{what}-judgement", lambda **_: la.judge_texts(judge, dose.texts)),
        judge=JUDGE,
        texts=content_hash(dose.texts),
    )
    return dose, read


models, judge = {}, la.load_judge(JUDGE)
vectors = {name: fitted(name) for name in LAYERS}
neutral, scenarios = la.load_scenarios("neutral"), la.load_scenarios()
neutral = neutral.select(rows=range(0, len(neutral), 12 if QUICK else 2))
if QUICK:
    scenarios = scenarios.select(emotions=["loving"])  # of this the word list knows enough

# %% [markdown]
# ## Dose and response
#
# 12 matter-of-fact beginnings, four target emotions, strengths from -0.8 to 1.6 of the residual norm. Dotted: random directions. The steered layer is the one
# where emotions are told apart best (01_layer_sweep), and the middle one of a model from a local file.

# %%
doses, judgements, regimes = {}, {}, {}
for name in LAYERS:
    asked = {"emotions": EMOTIONS, "strengths": [0.2, 0.8] if QUICK else "auto"}
    doses[name], judgements[name] = swept(name, "neutral", neutral, **asked)
    print(doses[name], end="\n\n")
    for measure in ("perplexity_ratio", "repetition"):
        save(la.plot_dose(doses[name], measure=measure), f"dose_{measure}_{name}", doses[name]).show()

# %% [markdown]
# ## Regimes
#
# A cell is surgical where its texts are sound and the judge sees more of the target than under random directions that move the stream as far.

# %%
for name in LAYERS:
    regimes[name] = la.classify_regimes(doses[name], judgements[name])
    print(regimes[name], end="\n\n")
    save(la.plot_regimes(regimes[name]), f"regimes_{name}", regimes[name]).show()
    save(la.plot_judged(doses[name], judgements[name]), f"judged_{name}", doses[name]).show()

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
    found = kept(
        *(la.RegimeBoundaries, f"{name}/boundaries"),
        lambda emotion, name=name, **asked: la.locate_boundaries(
            *(loaded(name), vectors[name], neutral, emotion), layers=LAYERS[name], n_tokens=TOKENS, **asked
        ),
        emotion=EMOTIONS[-1],
        strengths=(0.1, 0.2, 0.4, 0.8, 1.6),
        precision=0.25,
    )
    print(found)
    save(la.plot_boundaries([found]), f"boundaries_{name}", found).show()

# %% [markdown]
# ## Is it causal? 40 scenarios, each steered to its own target
#
# Half of the scenarios pull towards the target, half away from it. The paper's criterion is that the classifier's probability of the target rises; five
# random directions per scenario, and the direction of another emotion, that move the stream as far are judged by the same criterion.

# %%
for name in LAYERS:
    if name not in list(LAYERS)[:2]:
        continue
    asked = {"strengths": [DECLARED] if QUICK else [0.2, 0.4], "n_random": 2 if QUICK else 5}
    tried, read = swept(name, "scenarios", scenarios, controls=["random", "other_emotion"], **asked)
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
    halves = [vectors[name]] * 2 if QUICK else [fitted(name, half) for half in (0, 1)]
    every = la.load_scenarios("neutral")
    if QUICK:
        every = every.select(rows=range(5))
    tried, read = swept(name, "halves", every, halves[0], emotions=EMOTIONS, strengths=[DECLARED])
    found = la.correlate_inside(loaded(name), tried, read, halves[1], n_permutations=99 if QUICK else 1000)
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
# ## Scripts and languages of what is written, dose by dose

# %%
for name, study in studies.items():
    save(la.plot_scripts(study), f"scripts_{name}", study.dose).show()
    if not QUICK and find_spec("lingua"):  # the extra `languages`
        save(la.plot_languages(study), f"languages_{name}", study.dose).show()

# %% [markdown]
# ## Foreign tokens at the steered layer
#
# What the directions that were added bring up through the unembedding; 04_foreign_tokens has the middle layer and the languages one by one.

# %%
if not QUICK:
    for name, study in studies.items():
        scripts, meaning = (
            kept(
                kind, f"{name}/{what}", lambda name=name, ask=ask: ask(loaded(name), vectors[name], layer=LAYERS[name])
            )
            for kind, what, ask in (
                (la.ScriptTable, "scripts", la.script_entanglement),
                (la.MeaningTable, "meaning", la.foreign_meaning),
            )
        )
        studies[name] = replace(study, scripts=scripts, meaning=meaning)
        print(scripts, meaning, sep="\n", end="\n\n")

# %% [markdown]
# ## Claims against these runs

# %%
card = la.steering_scorecard(studies)
print(card)
card.to_frame()[["id", "claim", "model", "source", "paper_statistic", "sound_statistic", "low", "high", "null", "n", "verdict", "note"]].round(3)  # fmt: skip
