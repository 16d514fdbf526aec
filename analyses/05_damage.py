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
# # Is the change alike in other fine-tunes, and which module does affect need most?
#
# 05_modules asks where the weights of SmolLM2-135M-Instruct change when everything is tuned on the 27 emotions of GoEmotions. Two questions are left.
# Does a fine-tune on something else, or one from another seed, change a module in the same directions? And where noise costs *language* the same in
# every place, does it cost affect more than it costs a task without affect? The runs are made by `tune_arms.py` (blocks `equal`, `landing`, `delta`
# and `bands`); this page reads what it has published into `results`.

# %%
import logging
import os
import sys
from pathlib import Path

import plotly.io as pio

import lens_affect as la

logging.getLogger("lens_affect").addHandler(logging.StreamHandler(sys.stdout))
QUICK = bool(os.environ.get("LENS_AFFECT_QUICK"))
HERE = Path(__file__).resolve().parent if "__file__" in globals() else Path.cwd()
FIGURES, RUNS = HERE.parent / "figures", Path(os.environ.get("LENS_AFFECT_RUNS", HERE / "results")) / "tuning"
pio.renderers.default = "json" if QUICK else "svg"


def save(figure, name, *results):
    """Into figures/, unless this is a quick run."""
    if not QUICK:
        la.save_figure(figure, FIGURES / name, *results)
    return figure


# %% [markdown]
# ## Where the weights change
#
# Everything tuned with LoRA of rank 4, against the same model tuned on the topics of our passages. `concentration` is the share of the squared change
# over the share of the parameters: 1 is a fair share.

# %%
delta = la.ModuleDelta.load(RUNS / "delta" / "goemotions")
print(delta)
save(la.plot_delta(delta, measure="concentration"), "module_change", delta).show()
delta.by_module().round(4)

# %% [markdown]
# ## Do two fine-tunes change a module alike?
#
# Cosine of the changes; of their strongest directions the smallest principal angle in degrees and the overlap (mean squared cosine of the angles;
# `chance` is that of random subspaces). Runs of one seed start from the same random input maps of LoRA, which move little: their input directions
# agree for that reason alone, so across tasks the output directions are the ones to read.

# %%
for name in ("another_seed", "topics", "shuffled_labels"):
    if (RUNS / "delta" / name / "manifest.json").is_file():
        alike = la.DeltaAgreement.load(RUNS / "delta" / name)
        print(f"{name.replace('_', ' ')}\n{alike}")
        print(alike.by_module().round(4).to_string(index=False), end="\n\n")

# %% [markdown]
# ## What affect loses where language loses the same
#
# In the model with everything tuned: noise in each module of each third of the blocks, and of all of them, in each place as much as raises the loss on
# neutral text by 0.3 nats. Selectivity is what affect loses minus what telling topics apart loses (and beside it sums and differences), in standard
# deviations over examples of the tuned model's scores. The controls have less to lose, so a value above 0 says little; the differences between the
# gate and the others say more.

# %%
bands = la.AblationTable.load(RUNS / "study" / "bands")
print(bands)
save(la.plot_selectivity(bands), "module_selectivity_equal_damage", bands).show()
bands.to_frame().round(3)

# %%
for other in [arm for arm in ("up", "down", "attention") if arm in bands.arms]:
    print(f"gate minus {other}\n{bands.compare('gate', other).round(3).to_string(index=False)}", end="\n\n")

# %% [markdown]
# ## What this supports, and what not
#
# One model, one seed of the affect task, a few hundred examples and one draw of noise per place. A difference whose interval holds 0 was not seen; a
# difference at one place among many, without correction, is a hint.
