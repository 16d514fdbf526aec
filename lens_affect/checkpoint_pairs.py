"""A base and what it was tuned to, place by place; what cannot be compared is refused, what is left out is said.

Shapes must agree. A resized vocabulary is compared on the rows that both have, tied embeddings once, and tensors that only one side has are
listed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lens_affect.adapter import model_info
from lens_affect.checkpoints import Checkpoint, has_lora, locate_weights, open_checkpoint
from lens_affect.lora import (
    Adapter,
    LowRank,
    is_adapter_folder,
    multiplied,
    open_adapter_folder,
    open_adapter_model,
    open_adapter_run,
)
from lens_affect.tuned import Tuned


@dataclass(frozen=True)
class CheckpointPair:
    """Two sets of weights of one architecture, opened and matched."""

    base: Checkpoint
    """Before tuning."""
    tuned: Checkpoint | Adapter
    """After it: a full set, or an adapter of the base."""
    keys: tuple[str, ...]
    """Places that both have."""
    rows: Mapping[str, int]
    """Rows that are compared, where only part of a tensor is."""
    notes: tuple[str, ...]
    """What was left out or not checked, in words."""

    @property
    def linear_keys(self) -> tuple[str, ...]:
        """Places of linear modules, block by block."""
        return tuple(key for key in self.keys if self.base.parts[key].is_linear)

    @property
    def untouched_keys(self) -> tuple[str, ...]:
        """Places of linear modules that an adapter leaves alone: they count as unchanged, not as absent."""
        if not isinstance(self.tuned, Adapter):
            return ()
        return tuple(key for key, part in self.base.parts.items() if part.is_linear and key not in self.keys)

    def base_weight(self, key: str, rows: slice = slice(None)) -> Tensor:
        """A tensor of the base, float32."""
        return self.base.read(key, self._cut(key, rows)).float()

    def change(self, key: str, rows: slice = slice(None)) -> Tensor | LowRank:
        """Tuned minus base, float32: a product where an adapter says so, else a tensor."""
        rows = self._cut(key, rows)
        if isinstance(self.tuned, Adapter):
            return self._adapted(self.tuned, key, rows)
        return self.tuned.read(self._tuned_key(key), rows).float() - self.base.read(key, rows).float()

    def _adapted(self, adapter: Adapter, key: str, rows: slice) -> Tensor | LowRank:
        found = adapter.change(self.base.parts[key])
        product = None if found is None else LowRank(found.left[rows], found.right)
        if key in adapter.saved:  # peft saves embeddings whole beside their LoRA matrices
            part = adapter.saved[key]
            replaced = (
                part.cut(adapter.store.read(part.tensor, slice(None)))[rows].float() - self.base.read(key, rows).float()
            )
            return replaced if product is None else replaced + product.dense()
        if product is None:
            raise KeyError(key)
        return product

    def tuned_weight(self, key: str) -> Tensor:
        """A tensor of the tuned model, in the precision it is stored in; base plus change for an adapter, float32."""
        if isinstance(self.tuned, Checkpoint):
            return self.tuned.read(self._tuned_key(key), self._cut(key, slice(None)))
        if key not in self.keys:
            return self.base.read(key)
        return self.base_weight(key) + multiplied(self.change(key))

    def _tuned_key(self, key: str) -> str:
        """The tuned side's own name: an output that is tied there is its embedding."""
        assert isinstance(self.tuned, Checkpoint)
        return key if key in self.tuned.parts else "embed"

    def _cut(self, key: str, rows: slice) -> slice:
        first, last, _ = rows.indices(
            self.rows.get(key, self.base.parts[key].shape[0] if self.base.parts[key].shape else 0)
        )
        return slice(first, last)


def open_pair(base: Any, tuned: Any, *, any_base: bool = False) -> CheckpointPair:
    """Open two checkpoints and match them, tensor by tensor; only names and shapes are read.

    Args:
        base: as for checkpoints.open_checkpoint.
        tuned: the same, or a LoRA adapter (its folder or hub id, or a PeftModel), or a run of tune_module.
        any_base: take an adapter whose config names another base.

    Returns:
        The pair, with what both have and what was left out.

    Raises:
        ValueError: other shapes, no linear module in common, an adapter of another base, or an adapter that changes nothing here.
        TypeError: something that holds no weights.
        FetchError: neither the package index nor the hub can be reached.
    """
    opened = open_checkpoint(base)
    other = _open_tuned(tuned)
    if isinstance(other, Adapter):
        return _with_adapter(opened, other, any_base=any_base)
    return _with_checkpoint(opened, other)


def require_same_base(base: Any, run: Any) -> None:
    """Refuse a run of tune_module that was tuned from other weights than those of a bridge; anything else is not known here and passes.

    Args:
        base: what stands for the base.
        run: what was tuned.

    Raises:
        ValueError: another base of the same shape.
    """
    if not isinstance(run, Tuned) or not hasattr(base, "hook_dict"):
        return
    here = model_info(base).provenance
    if run.provenance.weights_sha256 != here.weights_sha256:
        raise ValueError(
            f"received a run of {run.provenance.title} for {here.title} (weights differ); load the model it was tuned from"
        )


def _open_tuned(tuned: Any) -> Checkpoint | Adapter:
    if isinstance(tuned, str | Path):
        folder = locate_weights(tuned)
        return open_adapter_folder(folder, str(tuned)) if is_adapter_folder(folder) else open_checkpoint(tuned)
    if isinstance(tuned, Adapter):
        return tuned
    if isinstance(tuned, Tuned):
        return open_adapter_run(tuned)
    inner = getattr(tuned, "original_model", tuned)
    return open_adapter_model(inner) if has_lora(inner) else open_checkpoint(tuned)


def _with_checkpoint(base: Checkpoint, tuned: Checkpoint) -> CheckpointPair:
    notes, rows, keys = [], {}, []
    wrong = []
    for key, part in base.parts.items():
        other = tuned.parts.get(key)
        if other is None and key == "unembed" and "embed" in tuned.parts:
            other = tuned.parts["embed"]
            notes.append("the tuned model's output is tied to its embedding, and is compared with the base's output")
        if other is None:
            continue
        if part.shape == other.shape:
            keys.append(key)
        elif part.module in ("embed", "unembed") and part.shape[1:] == other.shape[1:]:
            rows[key] = min(part.shape[0], other.shape[0])
            keys.append(key)
            notes.append(
                f"{key} has {part.shape[0]} rows in the base and {other.shape[0]} in the tuned model; the first {rows[key]} are compared"
            )
        else:
            wrong.append(f"{key} is {part.shape} and {other.shape}")
    if wrong:
        raise ValueError(
            f"received checkpoints of different shapes: {'; '.join(wrong[:3])} ({len(wrong)} tensors in all); allowed is a base and what was "
            "tuned from it"
        )
    keys, vocabulary_notes = _same_tokens(base, tuned, keys)
    pair = CheckpointPair(base, tuned, tuple(keys), rows, (*notes, *vocabulary_notes, *_one_sided(base, tuned, keys)))
    if not pair.linear_keys:
        raise ValueError(
            f"received checkpoints without a linear module in common: {base.title} has {list(base.parts)[:3]}, {tuned.title} {list(tuned.parts)[:3]}"
        )
    return pair


def _same_tokens(base: Checkpoint, tuned: Checkpoint, keys: list[str]) -> tuple[list[str], list[str]]:
    """Embeddings are comparable only where a row is the same token on both sides."""
    if base.vocabulary is None or tuned.vocabulary is None:
        return keys, [
            "one side has no tokenizer here, so that rows of the embedding are the same tokens was not checked"
        ]
    moved = [t for t, i in base.vocabulary.items() if tuned.vocabulary.get(t, i) != i]
    if moved:
        kept = [key for key in keys if base.parts[key].module not in ("embed", "unembed")]
        return kept, [
            f"the tokenizers differ ({len(moved)} tokens have other ids, such as {moved[0]!r}), so embeddings are not compared"
        ]
    added = len(set(tuned.vocabulary) - set(base.vocabulary))
    gone = len(set(base.vocabulary) - set(tuned.vocabulary))
    return keys, [f"the tuned tokenizer has {added} tokens more and {gone} fewer"] if added or gone else []


def _one_sided(base: Checkpoint, tuned: Checkpoint, keys: list[str]) -> list[str]:
    notes = []
    for mine, others, whose in ((base, tuned, "base"), (tuned, base, "tuned model")):
        alone = [key for key in mine.parts if key not in others.parts and key not in keys]
        if alone == ["unembed"] and "embed" in others.parts:
            notes.append(f"only the {whose} has an output of its own; the other's is tied to its embedding")
        elif alone:
            linear = sum(mine.parts[key].is_linear for key in alone)
            notes.append(
                f"{len(alone)} tensors are only in the {whose} ({linear} of linear modules), such as {alone[0]}; they are left out"
            )
    return notes


def _with_adapter(base: Checkpoint, adapter: Adapter, *, any_base: bool) -> CheckpointPair:
    notes = _check_base(base, adapter, any_base)
    keys = [key for key, part in base.parts.items() if part.owner in adapter.targets and part.module != "bias"]
    keys += [key for key in adapter.saved if key in base.parts and key not in keys]
    for owner in adapter.targets:
        parts = [part for part in base.parts.values() if part.owner == owner and part.module != "bias"]
        outputs, inputs = adapter.shape(owner)
        if not parts or sum(p.shape[0] for p in parts) != outputs or parts[0].shape[1] != inputs:
            there = f"{sum(p.shape[0] for p in parts)} x {parts[0].shape[1]}" if parts else "nothing"
            raise ValueError(
                f"received the adapter {adapter.title}, which adds {outputs} x {inputs} to {owner}, where {base.title} has {there}; it was made "
                f"for another base ({adapter.base or 'which it does not name'})"
            )
    for key in adapter.saved:
        if key not in base.parts or base.parts[key].shape != adapter.saved[key].shape:
            raise ValueError(
                f"received the adapter {adapter.title} with a tensor {key} of shape {adapter.saved[key].shape}, which does not fit {base.title}; "
                "merge it and pass the merged folder"
            )
    return CheckpointPair(base, adapter, tuple(k for k in base.parts if k in set(keys)), {}, tuple(notes))


def _check_base(base: Checkpoint, adapter: Adapter, any_base: bool) -> list[str]:
    if not adapter.base or not base.names:
        return ["that the adapter was made for this base was not checked by name, only by shape"]
    named = {name.rstrip("/").rsplit("/", maxsplit=1)[-1].lower() for name in base.names}
    if adapter.base.rstrip("/").rsplit("/", maxsplit=1)[-1].lower() in named:
        return []
    if any_base:
        return [f"the adapter names {adapter.base!r} as its base"]
    raise ValueError(
        f"received the adapter {adapter.title} for the base {adapter.base!r}; here the base is {base.names[0]!r}: name that base, or pass "
        "any_base=True (--any-base) if it is the same model under another name"
    )
