"""The Hugging Face model inside a bridge, without the bridge's wrappers, for as long as a reading lasts.

A bridge computes attention step by step, so that every step can be hooked, and passes every linear map through hook points: about a tenth of a forward
pass. Reading the residual stream between blocks needs none of that. Inside `plain_trunk` the same weights compute as they would in a model that was
never booted; afterwards, also after an exception, the wrappers are back.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from lens_affect.adapter import is_bridge, model_info

CHECK = "the residual stream reads the same without the bridge's wrappers"
"""Self-check that a model must have passed to be read so."""
_FUSED = ("phi3",)
"""Families whose bridge computes with pieces of fused maps, which somebody may have changed."""
Edit = Callable[[Tensor], Any]


def can_be_plain(model: Any) -> bool:
    """Whether the wrappers can come off: a bridge with Hugging Face's own numerics, whose blocks are known, and on which no hook hangs.

    Args:
        model: a bridge or a HookedTransformer.
    """
    if not is_bridge(model) or model_info(model).provenance.numerics != "hf":
        return False
    layers = getattr(model.original_model.base_model, "layers", None)
    if not isinstance(layers, nn.ModuleList) or len(layers) != int(model.cfg.n_layers):
        return False
    points = model.hook_dict.values()
    if any(p._forward_pre_hooks or p._forward_hooks or getattr(p, "fwd_hooks", ()) for p in points):
        return False
    if any(fused in str(getattr(model.original_model.config, "model_type", "")) for fused in _FUSED):
        return False
    wrappers = (m for m in model.original_model.modules() if "_original_component" in m._modules)
    hooks = (hook for m in wrappers for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values()))
    return all(str(getattr(hook, "__module__", "")).startswith("transformer_lens.") for hook in hooks)  # its own ones


def reads_plain(model: Any) -> bool:
    """Whether a model may be read without its wrappers: they can come off, and its self-check has seen that nothing changes.

    Args:
        model: a bridge or a HookedTransformer.
    """
    return can_be_plain(model) and model_info(model).provenance.checks.get(CHECK, "").startswith("passed")


@contextlib.contextmanager
def plain_trunk(model: Any) -> Iterator[list[nn.Module]]:
    """Take the wrappers off inside a block.

    Args:
        model: a bridge for which `can_be_plain` holds.

    Yields:
        The blocks, as plain modules: their input and output are resid_pre and resid_post.
    """
    inner = model.original_model
    swapped: list[tuple[nn.Module, str, nn.Module]] = []
    config, attention = inner.config, getattr(inner.config, "_attn_implementation", None)
    try:
        _take_off(inner, swapped, set())
        if _may_use_sdpa(inner):
            config._attn_implementation = "sdpa"
        yield list(inner.base_model.layers)
    finally:
        for parent, name, wrapper in reversed(swapped):
            parent._modules[name] = wrapper
        config._attn_implementation = attention


def _take_off(parent: nn.Module, swapped: list[tuple[nn.Module, str, nn.Module]], seen: set[int]) -> None:
    if id(parent) in seen:
        return
    seen.add(id(parent))
    for name, child in list(parent._modules.items()):
        if child is None:
            continue
        plain = child._modules.get("_original_component")
        if plain is not None:
            swapped.append((parent, name, child))
            parent._modules[name] = plain
        _take_off(plain if plain is not None else child, swapped, seen)


def _may_use_sdpa(inner: Any) -> bool:
    """What a model that was never booted uses by default; fused attention has no soft cap."""
    return bool(getattr(inner, "_supports_sdpa", False)) and not getattr(inner.config, "attn_logit_softcapping", None)


@contextlib.contextmanager
def plain_hooks(blocks: list[nn.Module], inputs: dict[int, Edit], outputs: dict[int, Edit]) -> Iterator[None]:
    """Call functions on what goes into and comes out of blocks.

    Args:
        blocks: of plain_trunk.
        inputs: by 0-based block.
        outputs: by 0-based block.
    """
    handles = []
    try:
        for layer, edit in inputs.items():
            handles.append(blocks[layer].register_forward_pre_hook(_on_input(edit), with_kwargs=True))
        for layer, edit in outputs.items():
            handles.append(blocks[layer].register_forward_hook(_on_output(edit)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _on_input(edit: Edit) -> Callable[..., None]:
    def hook(module: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        edit(positional[0] if positional else named["hidden_states"])

    return hook


def _on_output(edit: Edit) -> Callable[..., None]:
    def hook(module: nn.Module, positional: tuple[Any, ...], output: Any) -> None:
        edit(output[0] if isinstance(output, tuple) else output)

    return hook
