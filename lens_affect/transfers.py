"""Module transfer: put some modules of a tuned model into the base, or of the base into the tuned model, and take them out again exactly.

Transfer asks whether a module's change is enough, reverting whether it is needed. Both leave out how modules were tuned to each other, so the parts
need not add up to the whole.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lens_affect.checkpoint_pairs import CheckpointPair, open_pair
from lens_affect.checkpoints import Checkpoint, open_checkpoint
from lens_affect.live_weights import LiveWeights, choose_keys, replaced
from lens_affect.sizes import MODULES


@dataclass(frozen=True)
class Transfer:
    """Which weights are replaced inside a transfer's block."""

    keys: tuple[str, ...]
    """Tensors that were asked for, such as `layers.3.gate`."""
    n_parameters: int
    """Their entries."""
    n_changed: int
    """Tensors among them that differ between the two models; 0 means that nothing happens."""
    share: float
    """Entries over those of all linear modules."""
    title: str
    """What was done, in words."""

    def __str__(self) -> str:
        return (
            f"{self.title}: {len(self.keys)} tensors, {self.n_parameters:,} entries ({self.share:.1%} of the linear modules), {self.n_changed} of "
            "them differ"
        )


@contextlib.contextmanager
def transfer_modules(
    base: Any, tuned: Any, *, modules: str | Sequence[str], layers: Sequence[int] | None = None, any_base: bool = False
) -> Iterator[Transfer]:
    """Put modules of the tuned model into the base inside a block; after it, and after an exception, every bit is as before.

    Args:
        base: the model that is changed, in memory: a TransformerBridge or a Hugging Face model.
        tuned: where weights are read: the same, a folder, hub id, catalogue name, or a LoRA adapter.
        modules: names and groups as for sizes.choose_modules, such as `gate`, `gate+up`, `attention`; also `embed`, `unembed`, `norm`, `bias`,
            `other`, `everything` and `none`. A linear module brings its bias along.
        layers: 0-based blocks; all by default.
        any_base: take an adapter whose config names another base.

    Yields:
        What is replaced. With `everything` the model equals the tuned one bit by bit, with `none` the base, where both are kept in one precision.

    Raises:
        ValueError: shapes that differ, a module or block that is not there, processed weights (compatibility mode), or LoRA layers in `base`.
        TypeError: a model that is not in memory.

    Example:
        >>> with transfer_modules(base, tuned, modules="gate"):  # doctest: +SKIP
        ...     generate(base, ["How was your day?"])
    """
    with _replacing(base, tuned, modules, layers, any_base, "{} of {}") as found:
        yield found


@contextlib.contextmanager
def revert_modules(
    tuned: Any, base: Any, *, modules: str | Sequence[str], layers: Sequence[int] | None = None
) -> Iterator[Transfer]:
    """Put modules of the base back into the tuned model inside a block; after it, and after an exception, every bit is as before.

    Args:
        tuned: the model that is changed, in memory; a model with LoRA layers must be merged first.
        base: where weights are read: a full set.
        modules: as for transfer_modules.
        layers: 0-based blocks; all by default.

    Yields:
        What is replaced.

    Raises:
        ValueError: as transfer_modules, or an adapter as `base`.
        TypeError: a model that is not in memory.

    Example:
        >>> with revert_modules(tuned, base, modules="gate", layers=range(10)):  # doctest: +SKIP
        ...     generate(tuned, ["How was your day?"])
    """
    with _replacing(tuned, open_checkpoint(base), modules, layers, False, "{} back to {}") as found:
        yield found


@contextlib.contextmanager
def _replacing(
    model: Any, source: Any, modules: str | Sequence[str], layers: Sequence[int] | None, any_base: bool, words: str
) -> Iterator[Transfer]:
    live = live_weights(model)
    pair = open_pair(live.checkpoint, source, any_base=any_base)
    keys = choose_keys(live.checkpoint, modules, layers)
    _require_known(pair, keys)
    name = modules if isinstance(modules, str) else "+".join(modules) or "none"
    where = "" if layers is None else f" in layers {', '.join(map(str, layers))}"
    title = words.format(name, pair.tuned.title) + where
    parts = live.checkpoint.parts
    linear = sum(part.size for part in parts.values() if part.is_linear)
    size = sum(parts[key].size for key in keys)
    differ: list[bool] = []

    def values() -> Iterator[tuple[str, Tensor]]:
        for key in keys:
            mine, other = live.read(key), pair.tuned_weight(key)
            differ.append(not torch.equal(mine, other.to(mine)))
            yield key, other

    with replaced(live, values(), title):
        yield Transfer(keys, size, sum(differ), size / linear, title)


def live_weights(model: Any) -> LiveWeights:
    """The weights of a model in memory.

    Raises:
        TypeError: a name or folder.
        ValueError: processed weights, or LoRA layers.
    """
    if isinstance(model, str | Checkpoint) or hasattr(model, "__fspath__"):
        raise TypeError(
            f"received {model if isinstance(model, str) else type(model).__name__} as the model that is changed; allowed is a model in memory: "
            "load_model(name)"
        )
    return LiveWeights(model)


def _require_known(pair: CheckpointPair, keys: Sequence[str]) -> None:
    """Every tensor that is asked for must be there on the other side, as a whole."""
    partial = [key for key in keys if key in pair.rows]
    lost = [] if not isinstance(pair.tuned, Checkpoint) else [key for key in keys if key not in pair.keys]
    if partial or lost:
        key, there = (partial + lost)[0], getattr(pair.tuned, "parts", {})
        # what is there, and was left out all the same: rows that stand for other tokens
        moved = key in there or (key == "unembed" and "embed" in there)
        why = (
            "has other rows in"
            if partial
            else "has rows of other tokens (their ids differ) in"
            if moved
            else "is not in"
        )
        raise ValueError(
            f"received {key}, which {why} {pair.tuned.title}; allowed are tensors that both "
            f"models have alike: choose linear modules ({', '.join(MODULES)})"
        )
    alone = [key for key in getattr(pair.tuned, "parts", {}) if key not in pair.base.parts]
    if alone and {part.key for part in pair.base.parts.values()} == set(keys):
        raise ValueError(
            f"received everything of {pair.tuned.title}, which has tensors that the model lacks, such as {alone[0]}; choose modules that both have"
        )
