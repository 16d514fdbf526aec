"""Weights of a model in memory, written in place and put back exactly.

A bridge computes with its Hugging Face model's own parameters, so writing them changes both. Where a family fuses q, k and v (GPT-2, Phi-3) or gate
and up (Phi-3), a bridge computes with pieces that share the fused tensor's memory until the model is cast; every copy is written.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
        self._outputs = self._find_outputs(inner, tensors)

    def _find_outputs(self, inner: Any, tensors: dict[str, Tensor]) -> dict[str, list[tuple[torch.nn.Module, slice]]]:
        """Which torch module gives a linear map's output, and where in it; several where a bridge has pieces."""
        names = {id(tensor): name for name, tensor in tensors.items()}
        held: dict[str, list[Part]] = {}
        for part in self.checkpoint.parts.values():
            if part.is_linear:
                held.setdefault(part.tensor, []).append(part)
        found: dict[str, list[tuple[torch.nn.Module, slice]]] = {}
        for path, module in inner.named_modules():
            weight = module._parameters.get("weight")
            if weight is None:
                continue
            if id(weight) in names:
                for part in held.get(names[id(weight)], []):
                    found.setdefault(part.key, []).append((module, slice(part.start, part.start + part.shape[0])))
                continue
            part = self.checkpoint.parts.get(piece_place(f"{plain_name(path)}.weight") or "")
            if part is not None and not part.whole and part.shape == tuple(weight.shape):
                found.setdefault(part.key, []).append((module, slice(0, part.shape[0])))
        return found

    @contextlib.contextmanager
    def hooked(self, edits: Mapping[str, Callable[[Tensor], Tensor | None]]) -> Iterator[None]:
        """Call a function on the outputs of linear modules inside a block, by key; what it returns takes their place."""
        handles = []
        try:
            for key, edit in edits.items():
                for module, where in self._outputs[key]:
                    handles.append(module.register_forward_hook(_on_output(edit, where)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def read(self, key: str) -> Tensor:
        """A copy of what is there now."""
        return self._places[key][0].clone()

    def write(self, key: str, value: Tensor) -> None:
        """Write it wherever the model keeps it, rounded to the model's precision."""
        with torch.no_grad():
            for place in self._places[key]:
                place.copy_(value)


def _on_output(edit: Callable[[Tensor], Tensor | None], where: slice) -> Callable[..., Tensor | None]:
    def hook(module: torch.nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
        changed = edit(output[..., where])
        if changed is None:
            return None
        found = output.clone()
        found[..., where] = changed
        return found

    return hook


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
