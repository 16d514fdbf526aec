"""Runs of a tuning comparison with planted scores, without a model."""

import numpy as np
import pandas as pd
import torch

from lens_affect.arms import Arm
from lens_affect.results import Provenance
from lens_affect.tasks import TaskScores
from lens_affect.tuned import Tuned

MODEL = Provenance(model="planted", stimuli_hash="same")


def scores(values, *, better="high", log_probabilities=None, task="t"):
    n = len(values)
    return TaskScores(
        task=task,
        title="a task",
        metric="accuracy" if better == "high" else "nats per token",
        better=better,
        affective=True,
        values=torch.tensor(np.asarray(values), dtype=torch.float32),
        log_probabilities=torch.zeros(n, 0) if log_probabilities is None else log_probabilities,
        labels=() if log_probabilities is None else ("a", "b"),
        gold=(("a",),) * n,
        predicted=tuple("a" if v == 1 else "b" for v in values) if log_probabilities is not None else ("",) * n,
        groups=tuple(map(str, range(n))),
        scoring="planted",
        provenance=MODEL,
    )


def run(name, seed, before, after, *, n_parameters=100, exploded=False):
    rows = [
        {"step": s, "train_loss": 1.0, "validation_loss": 2.0 - s / 10 - seed / 100, "validation_exact": s / 20}
        for s in (0, 5, 10)
    ]
    return Tuned(
        arm=Arm(name, "lora", {"layers.0.gate": 1}, n_parameters, n_parameters),
        task="t",
        seed=seed,
        rate=0.01,
        steps=10,
        best_step=10,
        exploded=exploded,
        note="planted",
        curve=pd.DataFrame(rows),
        before=before,
        after=after,
        trained={"model.layers.0.mlp.gate_proj.lora_A.weight": torch.ones(1, 2)},
        seconds=2.0,
        cpu_seconds=1.0,
        peak_megabytes=10.0,
        provenance=MODEL,
    )


def campaign(rates, *, n=400, seeds=3, base=0.2, draw=0, spread=0.02):
    """Arms whose accuracy is planted: {label: share right} with an SD of `spread` over seeds; every arm's answers on an example are correlated through a common
    difficulty."""
    rng = np.random.default_rng(draw)
    difficulty = rng.random(n)

    def answers(rate):
        right = (difficulty < rate).astype(float)
        return scores(right, log_probabilities=torch.tensor(np.stack([right, 1 - right], axis=1)).float())

    before = answers(base)
    return {
        label: [
            run(label, seed, before, answers(rate + rng.normal(0, spread)), n_parameters=size) for seed in range(seeds)
        ]
        for label, (rate, size) in rates.items()
    }
