"""What tuning an arm will take, in memory and time, from a config alone: no weight is read.

Time comes from the number of multiplications and the speed of one large product on this machine (under a second). Nothing but products is counted,
and other jobs on the processor are not known to it.
"""

import functools
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from lens_affect.arms import Arm, plan_arm
from lens_affect.catalogue import CATALOGUE, FetchError, fetch
from lens_affect.sizes import count_layers, module_shapes, read_config

RATE_STEPS = 20
"""Steps of each try of a learning rate."""
MOST_TRIES = 5
"""Learning rates that are tried at most."""
TOKENS_PER_ROW = 16
"""Tokens that a training or test row is assumed to have."""
ACTIVATIONS = 40
"""Numbers kept per token and layer for the way back, in units of the hidden size."""


@dataclass(frozen=True)
class TuningPlan:
    """What tune_module will take."""

    arm: Arm
    """What is trained."""
    parameters: int
    """Weights of the whole model, from its config."""
    share: float
    """Trained over all weights."""
    memory_bytes: int
    """Model, gradients, AdamW's moments, the kept copy and activations, in float32."""
    training_seconds: float
    """Estimated time of the steps on this machine."""
    scoring_seconds: float
    """Estimated time of scoring the test rows twice."""
    threads: int
    """Threads that torch has now."""
    steps: int
    """Steps of training."""
    n_test: int
    """Test rows."""

    def to_frame(self) -> pd.DataFrame:
        """One row with the fields."""
        values = {k: v for k, v in self.__dict__.items() if k != "arm"}
        return pd.DataFrame([{"arm": self.arm.name, "n_parameters": self.arm.n_parameters, **values}])

    def __str__(self) -> str:
        return (
            f"{self.arm} ({self.share:.2%} of {self.parameters:,})\n"
            f"memory about {self.memory_bytes / 1e9:.1f} GB in float32; {self.steps} steps about {_duration(self.training_seconds)}, "
            f"scoring {self.n_test} rows before and after about {_duration(self.scoring_seconds)} ({self.threads} threads); choosing the learning rate "
            f"takes 3 to {MOST_TRIES} times {RATE_STEPS} steps more, once per arm"
        )


def plan_tuning(
    config: Any,
    modules: str | Sequence[str],
    *,
    method: str = "lora",
    rank: int | None = None,
    n_parameters: int | None = None,
    layers: Sequence[int] | None = None,
    steps: int = 100,
    batch_size: int = 16,
    n_test: int = 2000,
    tokens_per_row: int = TOKENS_PER_ROW,
    seed: int = 0,
    speed: float | None = None,
) -> TuningPlan:
    """Plan one arm.

    Args:
        config: of the model: a dict, a transformers config, a JSON file, or a folder with a `config.json`.
        modules: as in `plan_arm`, like the following ones.
        method: `lora` or `full`.
        rank: of LoRA; 4 where no size is given.
        n_parameters: weights to train instead.
        layers: 0-based blocks; all by default.
        steps: of training.
        batch_size: rows in a step.
        n_test: rows that are scored, before and after.
        tokens_per_row: mean length of a row.
        seed: of random maps.
        speed: float32 operations per second; measured by default.

    Raises:
        ValueError: as `plan_arm`.

    Example:
        >>> qwen = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "vocab_size": 152064}
        >>> qwen |= {"num_attention_heads": 28, "num_key_value_heads": 4}
        >>> plan_tuning(qwen, "gate", rank=16, speed=1e12).arm.n_parameters
        10092544
    """
    if method == "lora" and rank is None and n_parameters is None:
        rank = 4
    arm = plan_arm(config, modules, method=method, rank=rank, n_parameters=n_parameters, layers=layers, seed=seed)
    found, n_layers = read_config(config), count_layers(config)
    hidden, vocabulary = int(found.get("hidden_size") or found.get("n_embd") or 0), int(found.get("vocab_size") or 0)
    linear = n_layers * sum(outputs * inputs for outputs, inputs in module_shapes(config).values())
    embedding = vocabulary * hidden
    total = linear + embedding * (1 if found.get("tie_word_embeddings") else 2)
    flops = speed or machine_speed()
    row = tokens_per_row * linear + embedding  # one position per row is unembedded
    # forwards 2 operations per weight, backwards as many for the activations, and as many again for the weights that learn
    backwards = 1 + arm.n_parameters / linear if method == "full" else 1.2
    kept = arm.n_parameters * (1 if method == "full" else 0)
    memory = 4 * (total + 3 * arm.n_parameters + kept + arm.n_parameters * (method == "lora"))
    memory += 4 * batch_size * tokens_per_row * ACTIVATIONS * hidden * n_layers
    return TuningPlan(
        arm=arm,
        parameters=total,
        share=arm.n_parameters / total,
        memory_bytes=int(memory),
        training_seconds=steps * batch_size * 2 * row * (1 + backwards) / flops if arm.ranks else 0.0,
        scoring_seconds=2 * n_test * 2 * row / flops,
        threads=torch.get_num_threads(),
        steps=steps,
        n_test=n_test,
    )


def locate_config(name_or_path: str | os.PathLike[str]) -> Any:
    """A model's config without its weights: of a folder, a hub model (its config alone is fetched), or a catalogue model (fetched as a whole).

    Args:
        name_or_path: catalogue name, hub id or folder.

    Raises:
        ValueError: a folder without a config.
        FetchError: neither is reached.
    """
    path = Path(name_or_path)
    entry = CATALOGUE.get(str(name_or_path))
    if path.is_dir() or path.suffix == ".json":
        return read_config(path)
    if entry is not None and entry.source != "hub":
        return read_config(fetch(entry))
    from transformers import AutoConfig

    name = str(entry.hub_id) if entry is not None else str(name_or_path)
    try:
        return read_config(AutoConfig.from_pretrained(name))
    except (OSError, ValueError) as error:
        raise FetchError(
            f"could not fetch the config of {name} ({str(error).splitlines()[0]}). Check the name and the network, or pass a folder with a "
            "config.json"
        ) from error


@functools.cache
def machine_speed() -> float:
    """Float32 operations per second of one product of the size that a small model makes (best of five)."""
    a, b = torch.ones(256, 1024), torch.ones(1024, 1024)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - start)
    return 2 * 256 * 1024 * 1024 / best


def _duration(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )
