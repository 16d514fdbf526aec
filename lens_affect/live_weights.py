"""Weights of a model in memory, written in place and put back exactly.

A bridge computes with its Hugging Face model's own parameters, so writing them changes both. Where a family fuses q, k and v (GPT-2, Phi-3) or gate
and up (Phi-3), a bridge computes with pieces that share the fused tensor's memory until the model is cast; every copy is written.
"""

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lens_affect.adapter import CHANGED, ModelInfo, model_info, set_model_info
from lens_affect.checkpoints import (
    NO_LAYER,
    OTHERS,
    Checkpoint,
    Part,
    has_lora,
    open_checkpoint,
    piece_place,
    plain_name,
    stored_tensors,
    unwrapped,
)
from lens_affect.sizes import MODULES, choose_blocks, choose_modules

EVERYTHING = "everything"
"""Stands for every tensor: linear modules, embeddings, norms, biases."""


def choose_keys(
    checkpoint: Checkpoint, modules: str | Sequence[str], layers: Sequence[int] | None = None
) -> tuple[str, ...]:
    """Keys of the tensors that a choice of modules and blocks names; a linear module brings its bias along.

    Args:
        checkpoint: whose tensors.
        modules: names, groups (sizes.GROUPS), `embed`, `unembed`, `norm`, `bias`, `other`, or `everything`.
        layers: 0-based blocks; None is all of them, and what lies outside the blocks.

    Raises:
        ValueError: a name or block that is not there.
    """
    present = {part.module for part in checkpoint.parts.values()}
    chosen = choose_modules(
        modules, present=checkpoint.modules, extra=(*(name for name in OTHERS if name in present), EVERYTHING)
    )
    blocks = (
        {NO_LAYER, *range(checkpoint.n_layers)} if layers is None else set(choose_blocks(layers, checkpoint.n_layers))
    )
    return tuple(
        key
        for key, part in checkpoint.parts.items()
        if part.layer in blocks and (EVERYTHING in chosen or part.module in chosen or _bias_of(part) in chosen)
    )


def _bias_of(part: Part) -> str | None:
    """The linear module whose bias this is."""
    owner = part.key.removesuffix(".bias").rsplit(".", maxsplit=1)[-1]
    return owner if part.module == "bias" and owner in MODULES else None


class LiveWeights:
    """The weights of one model in memory, by key."""

    def __init__(self, model: Any) -> None:
        inner = unwrapped(model)
        if has_lora(inner):
            raise ValueError(
                "received a model with LoRA layers, whose weights are not what it computes with; allowed is one without: merge_and_unload() it"
            )
        self.model = model
        self.checkpoint = open_checkpoint(model)
        tensors = stored_tensors(inner)
        self._places: dict[str, list[Tensor]] = {
            key: [part.cut(tensors[part.tensor].detach())] for key, part in self.checkpoint.parts.items()
        }
        for name, tensor in inner.named_parameters(remove_duplicate=False):
            key = piece_place(plain_name(name))
            part = self.checkpoint.parts.get(key or "")
            if part is not None and not part.whole and part.shape == tuple(tensor.shape):
                self._places[part.key].append(tensor.detach())

    def read(self, key: str) -> Tensor:
        """A copy of what is there now."""
        return self._places[key][0].clone()

    def write(self, key: str, value: Tensor) -> None:
        """Write it wherever the model keeps it, rounded to the model's precision."""
        with torch.no_grad():
            for place in self._places[key]:
                place.copy_(value)


@contextlib.contextmanager
def replaced(live: LiveWeights, values: Iterable[tuple[str, Tensor]], title: str) -> Iterator[None]:
    """Give a model other weights inside a block; after it, and after an exception, every bit is as before.

    Args:
        live: the model's weights.
        values: new ones by key; read one at a time, the old ones are kept meanwhile.
        title: what was done, for the provenance of results made inside the block.
    """
    before: list[tuple[str, Tensor]] = []
    known = _noted(live.model, title)
    try:
        for key, value in values:
            before.append((key, live.read(key)))
            live.write(key, value)
        yield
    finally:
        for key, old in reversed(before):
            live.write(key, old)
        if known is not None:
            set_model_info(live.model, known)


def _noted(model: Any, title: str) -> ModelInfo | None:
    """Let results that are made inside the block say so; returns what was known before, or None for a plain Hugging Face model."""
    if not hasattr(model, "hook_dict") or getattr(model, "tokenizer", None) is None:
        return None
    known = model_info(model)
    earlier = known.provenance.checks.get(CHANGED)
    checks = {**known.provenance.checks, CHANGED: f"{earlier}; {title}" if earlier else title}
    set_model_info(model, dataclasses.replace(known, provenance=known.provenance.updated(checks=checks)))
    return known
