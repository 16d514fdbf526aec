"""Destructive ablation: take a module's weights, or its output, part of the way to something that carries less, and put them back exactly.

Every kind is a way from the weights as they are (scale 0) to a target (scale 1), so that kinds and modules can be compared at equal damage
(damage.py). Zeroing gate, up or down gives one and the same function, because act(0) * up = gate * 0 = 0: such arms say nothing about the gate.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lens_affect.activations import DEFAULT_BATCH_TOKENS
from lens_affect.adapter import device_of, encode, pad_right, pad_token_id, require_model, run_trunk
from lens_affect.checkpoint_pairs import CheckpointPair, open_pair
from lens_affect.live_weights import LiveWeights, choose_keys, replaced
from lens_affect.lora import multiplied
from lens_affect.sizes import choose_modules
from lens_affect.spectra import squared_norm
from lens_affect.statistics import derive_generator
from lens_affect.stimuli import NEUTRAL, load_stimuli
from lens_affect.transfers import live_weights

HOWS = ("base", "random_equal_norm", "mean", "shuffle", "zero")
"""Kinds of ablation."""
ONE_FUNCTION = ("gate", "up", "down")
"""Modules of which zeroing any gives the same function."""
LARGEST_SCALE = 1024.0
"""Largest scale of random_equal_norm; the others end at 1."""


@dataclass(frozen=True)
class Ablation:
    """What is ablated inside a block."""

    modules: tuple[str, ...]
    """Linear modules."""
    layers: tuple[int, ...]
    """0-based blocks."""
    how: str
    """One of HOWS."""
    scale: float
    """Share of the way: 0 changes nothing, 1 is all of it."""
    n_parameters: int
    """Weights and biases concerned."""
    change: float
    """Frobenius norm of what is added to the weights over the norm of the weights; NaN for `mean`, which leaves weights alone."""

    def __str__(self) -> str:
        norm = "" if math.isnan(self.change) else f", a change of {self.change:.3g} of the weights' norm"
        return (
            f"{'+'.join(self.modules)} ablated in {len(self.layers)} blocks by {self.how} at scale {self.scale:g}: {self.n_parameters:,} "
            f"entries{norm}"
        )


@contextlib.contextmanager
def ablate_modules(
    model: Any,
    *,
    modules: str | Sequence[str],
    layers: Sequence[int] | None = None,
    how: str = "base",
    base: Any = None,
    tuned: Any = None,
    scale: float = 1.0,
    seed: int = 0,
    means: Mapping[str, Tensor] | None = None,
) -> Iterator[Ablation]:
    """Ablate linear modules inside a block; after it, and after an exception, every bit is as before.

    Args:
        model: a TransformerBridge or a Hugging Face model, in memory.
        modules: names and groups as for sizes.choose_modules; each brings its bias along.
        layers: 0-based blocks; all by default.
        how: the target at scale 1. `base`: the base's weights, so the module's delta is reverted. `random_equal_norm`: with a base, Gaussian
            noise of the delta's Frobenius norm in the delta's place; without one, noise of the weight's own norm on top of it, so that `scale`
            is the c of c |W|. `mean`: the module's output is its mean over reference tokens. `shuffle`: its output neurons change places.
            `zero`: its output is 0.
        base: what the model was tuned from, for `base` and `random_equal_norm`: anything that holds weights.
        tuned: instead of a base, for `random_equal_norm` in the base: what was tuned from the model. The noise then stands where the tuned model's
            change would.
        scale: share of the way from the weights as they are (0) to the target (1).
        seed: of the streams "ablation", by kind, module and block.
        means: of mean_outputs, to measure them once for several ablations.

    Yields:
        What is ablated.

    Raises:
        ValueError: an unknown kind, module or block, nothing to ablate, a scale outside 0 to 1 (`random_equal_norm`: to LARGEST_SCALE), `base` without
            a base, a base of other shapes, or processed weights.
        TypeError: a model that is not in memory, or `mean` for one without a tokenizer.

    Example:
        >>> with ablate_modules(model, modules="gate", how="shuffle", layers=[3]):  # doctest: +SKIP
        ...     generate(model, ["How was your day?"])
    """
    live = live_weights(model)
    chosen = choose_modules(modules, present=live.checkpoint.modules)
    _check(how, scale, base, tuned, chosen)
    keys = choose_keys(live.checkpoint, chosen, layers)
    blocks = tuple(sorted({live.checkpoint.parts[key].layer for key in keys}))
    size = sum(live.checkpoint.parts[key].size for key in keys)
    title = f"{'+'.join(chosen)} ablated by {how} at scale {scale:g} in layers {', '.join(map(str, blocks))}"
    if how == "mean":
        linear = [key for key in keys if live.checkpoint.parts[key].is_linear]
        known = means if means is not None else mean_outputs(model, modules=chosen, layers=blocks)
        with replaced(live, (), title), live.hooked({key: _towards(known[key], scale) for key in linear}):
            yield Ablation(chosen, blocks, how, scale, size, math.nan)
        return
    pair = open_pair(base, live.checkpoint) if base is not None and how in ("base", "random_equal_norm") else None
    pair = open_pair(live.checkpoint, tuned, any_base=True) if tuned is not None else pair
    moved = [0.0, 0.0]

    def values() -> Iterator[tuple[str, Tensor]]:
        for key in keys:
            now = live.read(key)
            value = _ablated(live, pair, key, how, scale, seed)
            moved[0] += squared_norm(value.float() - now.float())
            moved[1] += squared_norm(now.float())
            yield key, value

    with replaced(live, values(), title):
        yield Ablation(chosen, blocks, how, scale, size, math.sqrt(moved[0] / moved[1]))


def _check(how: str, scale: float, base: Any, tuned: Any, chosen: tuple[str, ...]) -> None:
    if how not in HOWS:
        raise ValueError(f"received how={how!r}; allowed are {list(HOWS)}: choose one")
    largest = LARGEST_SCALE if how == "random_equal_norm" else 1.0
    if not 0 <= scale <= largest:
        raise ValueError(f"received scale {scale} for {how!r}; allowed are numbers from 0 (as it is) to {largest:g}")
    if how == "base" and base is None:
        raise ValueError(
            "received how='base' without a base; pass base=, what the model was tuned from, or choose another kind"
        )
    if tuned is not None and (base is not None or how != "random_equal_norm"):
        raise ValueError(
            f"received tuned= for how={how!r}{' beside a base' if base is not None else ''}; allowed is one of the two, and tuned= for "
            "'random_equal_norm' only"
        )
    if not chosen:
        raise ValueError("received no module to ablate; name at least one, such as 'gate'")


def _ablated(live: LiveWeights, pair: CheckpointPair | None, key: str, how: str, scale: float, seed: int) -> Tensor:
    """The weights that are written, `scale` of the way to the target."""
    now = live.read(key)
    if scale == 0:
        return now
    part = live.checkpoint.parts[key]
    stem = key.removesuffix(".bias")  # a bias moves with the outputs of its weight
    draw = derive_generator(seed, "ablation", how, stem, "bias" if key != stem else "weight")
    if how == "base":
        assert pair is not None
        target = pair.base.read(key)
    elif how == "zero":
        target = torch.zeros_like(now)
    elif how == "shuffle":
        order = derive_generator(seed, "ablation", how, stem).permutation(part.shape[0])
        target = now[torch.from_numpy(order)]
    elif pair is not None:
        if key not in pair.keys:  # an adapter leaves it alone
            return now
        delta = multiplied(pair.change(key))
        standing = torch.zeros_like(delta) if live.checkpoint is pair.base else delta
        target = now.float() - standing + _noise(draw, delta)
    elif part.module == "bias":  # c |W| speaks of weights
        target = now
    else:
        target = now.float() + _noise(draw, now.float())
    return target if scale == 1 else now.float() + scale * (target.float() - now.float())


def _noise(draw: Any, like: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Gaussian noise of a tensor's shape and Frobenius norm."""
    noise = torch.from_numpy(draw.standard_normal(tuple(like.shape), dtype="float32"))
    return noise * (squared_norm(like) / max(squared_norm(noise), 1e-30)) ** 0.5


def _towards(mean: Float[Tensor, " outputs"], scale: float) -> Callable[[Tensor], Tensor]:
    return lambda output: output + scale * (mean.to(output) - output)


@torch.no_grad()
def mean_outputs(
    model: Any, *, modules: str | Sequence[str], layers: Sequence[int] | None = None, texts: Sequence[str] | None = None
) -> dict[str, Float[Tensor, " outputs"]]:
    """Mean output of linear modules over reference tokens: content tokens of our 36 neutral passages, never position 0.

    Args:
        model: a TransformerBridge, or anything with a tokenizer that encode accepts.
        modules: as for ablate_modules.
        layers: 0-based blocks; all by default.
        texts: other reference texts.

    Returns:
        The means by key, such as `layers.3.gate`.

    Raises:
        TypeError: a model without a tokenizer.
    """
    require_model(model)
    live = live_weights(model)
    chosen = choose_modules(modules, present=live.checkpoint.modules)
    keys = [k for k in choose_keys(live.checkpoint, chosen, layers) if live.checkpoint.parts[k].is_linear]
    reference = texts if texts is not None else load_stimuli("passages").select(emotions=[NEUTRAL]).texts
    encoded = [encode(model, text) for text in reference]
    sums: dict[str, Tensor] = {}
    counted: Int[Tensor, "row position"] = torch.zeros(0, 0, dtype=torch.long)
    n = 0

    def add(key: str) -> Callable[[Tensor], None]:
        def edit(output: Tensor) -> None:
            found = output.flatten(2)[counted.bool()].double().sum(0).cpu()
            sums[key] = sums[key] + found if key in sums else found

        return edit

    at_once = max(1, DEFAULT_BATCH_TOKENS // max(len(e.ids) for e in encoded))
    with live.hooked({key: add(key) for key in keys}):
        for start in range(0, len(encoded), at_once):
            batch = encoded[start : start + at_once]
            tokens, mask = pad_right(batch, pad_token_id(model), device_of(model))
            counted = torch.zeros_like(tokens)
            for row, one in enumerate(batch):
                counted[row, list(one.content)] = 1
            n += int(counted.sum())
            run_trunk(model, tokens, mask)
    silent = [key for key in keys if key not in sums]
    if silent:
        raise RuntimeError(
            f"{silent[0]} gave no output in a forward pass; its mean cannot be measured in this architecture"
        )
    return {key: (sums[key] / n).float() for key in keys}
