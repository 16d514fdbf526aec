"""Steering: an emotion's direction added to the residual stream, in doses that mean the same in every model.

A strength is a share of the residual stream's mean norm at the layer, over ordinary positions of a fixed set of texts, so position 0 and other
attention sinks do not set the dose. Directions are unit vectors: scaling a vector changes nothing. With one layer, strength 0.4 moves an
ordinary position by 0.4 of its norm, whatever the direction; with several, one scalar for all layers is found that moves the output of the
last of them as far (`calibrate`).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lens_affect.activations import DEFAULT_BATCH_TOKENS, SINK_RATIO
from lens_affect.adapter import (
    CHANGED,
    LensModel,
    add_hooks,
    device_of,
    encode,
    model_info,
    pad_right,
    pad_token_id,
    run_trunk,
)
from lens_affect.generation import (
    Intervention,
    Mode,
    Scope,
    change_along,
    in_scope,
    measured_positions,
    told_response,
)
from lens_affect.selfchecks import ensure_checked
from lens_affect.sites import resolve_site
from lens_affect.stimuli import NEUTRAL, load_stimuli
from lens_affect.vectors import EmotionVectors

Protocol = Literal["lens_affect", "jeong2026"]
STRENGTH_LIMIT = 10.0
"""Largest absolute strength: ten times the residual stream's own norm leaves nothing of it."""
_NORMS: "WeakKeyDictionary[Any, tuple[Any, Tensor]]" = WeakKeyDictionary()


@torch.no_grad()
def residual_norms(model: LensModel) -> Float[Tensor, " layer"]:
    """Mean norm of resid_post at every layer over the ordinary positions of our 36 neutral passages.

    Left out are position 0, special tokens, and tokens whose norm exceeds activations.SINK_RATIO times the median of their text at that
    layer. Measured once per model and numerics, then remembered.

    Raises:
        ValueError: activations that are not finite.
    """
    facts = model_info(model).provenance
    key = facts.numerics, facts.dtype, facts.checks.get(CHANGED)
    known = _NORMS.get(model)
    if known is not None and known[0] == key:
        return known[1]
    encoded = [encode(model, text) for text in load_stimuli("passages").select(emotions=[NEUTRAL]).texts]
    n_layers = int(model.cfg.n_layers)
    sums, counts = torch.zeros(n_layers, dtype=torch.float64), torch.zeros(n_layers, dtype=torch.float64)
    ordinary = torch.empty(0)

    def measure(layer: int) -> Callable[..., None]:
        def hook(value: Tensor, hook: Any = None) -> None:
            norms = torch.where(ordinary, value.float().norm(dim=-1), torch.nan)
            counted = norms <= SINK_RATIO * norms.nanmedian(dim=1, keepdim=True).values
            sums[layer] += norms[counted].sum().double()
            counts[layer] += counted.sum()

        return hook

    site = resolve_site(model, "resid_post")
    at_once = max(1, DEFAULT_BATCH_TOKENS // max(len(e.ids) for e in encoded))
    with add_hooks(model, [(site.at(layer), measure(layer)) for layer in range(n_layers)]):
        for start in range(0, len(encoded), at_once):
            batch = encoded[start : start + at_once]
            tokens, mask = pad_right(batch, pad_token_id(model), device_of(model))
            ordinary = torch.zeros(tokens.shape, dtype=torch.bool, device=tokens.device)
            for row, one in enumerate(batch):
                ordinary[row, list(one.content)] = True
            run_trunk(model, tokens, mask)
    if not bool((sums / counts).isfinite().all()):
        raise ValueError(
            f"received activations that are not finite in {model_info(model).provenance.dtype}; load the model with dtype=torch.float32 or bfloat16"
        )
    found = (sums / counts).float()
    _NORMS[model] = key, found
    return found


@dataclass(frozen=True)
class Push:
    """What is done to the residual stream: one vector per layer, its length already the dose."""

    layers: tuple[int, ...]
    """0-based blocks whose output is changed, in order."""
    vectors: Float[Tensor, "layer d_model"]
    """What is added, ablated or clamped to, per layer."""
    mode: Mode
    """`add`, `ablate` or `clamp` (generation.Intervention)."""
    scope: Scope
    """`response`, `prompt` or `all`."""
    relative: bool
    """Whether each pass scales the vectors by its own mean norm (protocol jeong2026)."""
    emotion: str
    """Whose direction it is, or a name for it."""
    strength: float
    """The dose, as a share of the residual norm; 0 of `ablate`."""

    def interventions(self, rows: tuple[int, ...] | None = None) -> tuple[Intervention, ...]:
        """For generation.generate, on these rows or on all."""
        return tuple(
            Intervention(layer, "resid_post", vector, self.mode, self.scope, rows, self.relative)
            for layer, vector in zip(self.layers, self.vectors, strict=True)
        )


def make_push(
    model: LensModel,
    vectors: EmotionVectors,
    emotion: str,
    *,
    layers: int | Sequence[int] | None = None,
    strength: float | None = None,
    scope: Scope = "response",
    mode: Mode = "add",
    protocol: Protocol = "lens_affect",
) -> Push:
    """Turn an emotion and a strength into vectors to be added.

    Args:
        model: what is steered; its reference norms are measured.
        vectors: directions of this model, read at resid_post.
        emotion: one of theirs.
        layers: one block, several (each gets its own direction and the same strength; see calibrate), or None for the middle one.
        strength: share of the residual norm; negative pushes away. `ablate` needs none.
        scope: `response` (positions whose output predicts a response token), `prompt` or `all`.
        mode: `add` the direction; `ablate` what lies along it; `clamp` that component to the dose (to 0 is to ablate it, and Push.mode says so).
        protocol: `jeong2026` follows the author's rule: by default all layers, one vector (from layer n_layers // 2, or the only one in `layers`'s
            place of `vectors.layers`), all positions, and a dose that each pass takes from its own mean norm, first token included.

    Raises:
        ValueError: a strength that is missing, not finite or beyond STRENGTH_LIMIT, a layer or emotion that is not there, a direction of length 0 to
            ablate or clamp, or vectors of another model or site.
    """
    if mode == "ablate":
        strength = 0.0
    if strength is None:
        raise ValueError(
            f"received no strength for mode={mode!r}; allowed is none for 'ablate' only: pass strength=0.4, say"
        )
    check_strength(strength)
    if mode == "clamp" and strength == 0:
        mode = "ablate"  # a component set to 0: the same operation, and a dose of 0 has no direction
    require_steerable(model, vectors)
    n_layers = int(model.cfg.n_layers)
    jeong = protocol == "jeong2026"
    chosen = tuple(range(n_layers)) if jeong and layers is None else choose_layers(layers, n_layers)
    unit = torch.stack([vectors.vector(emotion, n_layers // 2 if jeong else layer) for layer in chosen])
    if mode != "add" and bool((unit == 0).all(dim=-1).any()):
        raise ValueError(
            f"received {emotion!r}, whose direction has length 0 at one of layers {list(chosen)}; nothing can be set along it: choose others"
        )
    if jeong:
        return Push(chosen, unit if mode == "ablate" else strength * unit, mode, "all", True, emotion, strength)
    lengths = torch.ones(len(chosen)) if mode == "ablate" else strength * residual_norms(model)[list(chosen)]
    return Push(chosen, unit * lengths[:, None], mode, scope, False, emotion, strength)


def choose_layers(layers: int | Sequence[int] | None, n_layers: int) -> tuple[int, ...]:
    """0-based blocks in order; the middle one (n_layers // 2) by default.

    Raises:
        ValueError: none, a layer twice, or one that is not there.
    """
    chosen = (n_layers // 2,) if layers is None else (layers,) if isinstance(layers, int) else tuple(sorted(layers))
    if not chosen or len(set(chosen)) != len(chosen) or any(not 0 <= layer < n_layers for layer in chosen):
        raise ValueError(f"received layers {list(chosen)}; allowed are different ones of 0 to {n_layers - 1}")
    return chosen


def require_steerable(model: LensModel, vectors: EmotionVectors) -> None:
    """Raises ValueError where vectors are of another model, or were not read at resid_post."""
    vectors.require_match(model_info(model).provenance)
    if vectors.site != "resid_post":
        raise ValueError(f"received vectors read at {vectors.site}; steering adds to resid_post: fit vectors there")


def check_strength(strength: float) -> None:
    """Raises ValueError where a strength is no number or beyond STRENGTH_LIMIT."""
    if not math.isfinite(strength) or abs(strength) > STRENGTH_LIMIT:
        raise ValueError(
            f"received strength {strength}; allowed are numbers from -{STRENGTH_LIMIT:g} to {STRENGTH_LIMIT:g}, as a share of the residual norm "
            "(0.1 to 1 covers most effects)"
        )


@contextmanager
def steer(
    model: LensModel,
    vectors: EmotionVectors,
    emotion: str,
    *,
    layers: int | Sequence[int] | None = None,
    strength: float | None = None,
    scope: Scope = "response",
    mode: Mode = "add",
    protocol: Protocol = "lens_affect",
    prompt_length: int | None = None,
) -> Iterator[Push]:
    """Steer every forward pass inside the block; after it, and after an exception, the model is as before.

    generation.generate and scoring.score_texts say where each row's response begins. Other passes do not: one over a single position is response;
    of one over several positions those from `prompt_length - 1` on are, or only the last where no length is given. Give generate
    `make_push(...).interventions()` to steer each row its own way.

    Args:
        model: a bridge or a HookedTransformer.
        vectors: directions of this model, read at resid_post.
        emotion: one of theirs.
        layers: see make_push, as for the other arguments.
        strength: share of the residual norm; `ablate` needs none.
        scope: `response`, `prompt` or `all`.
        mode: `add`, `ablate` or `clamp`.
        protocol: `lens_affect` or `jeong2026`.
        prompt_length: tokens of the prompt, special ones included, for other passes over a whole text.

    Yields:
        What is added.

    Raises:
        ValueError: as make_push.

    Example:
        >>> with steer(model, vectors, "calm", layers=14, strength=0.4):  # doctest: +SKIP
        ...     generate(model, ["Tell me about your day."])
    """
    push = make_push(
        model, vectors, emotion, layers=layers, strength=strength, scope=scope, mode=mode, protocol=protocol
    )
    ensure_checked(model)  # which generate would do inside the block, where it would find another model
    with add_hooks(model, _hooks(model, push, prompt_length)):
        yield push


def _hooks(model: LensModel, push: Push, prompt_length: int | None) -> list[Any]:
    site = resolve_site(model, "resid_post")
    return [
        (site.at(layer), _edit(push, vector, prompt_length))
        for layer, vector in zip(push.layers, push.vectors, strict=True)
    ]


def _edit(push: Push, vector: Float[Tensor, " d_model"], prompt_length: int | None) -> Callable[..., Tensor]:
    def hook(value: Tensor, hook: Any = None) -> Tensor:
        direction = vector.to(value)
        if push.relative:
            direction = direction * value.norm(dim=-1).mean(1)[:, None, None]
        told = told_response(value.shape[1])
        response = _response(value.shape[1], prompt_length) if told is None else told
        inside = in_scope(push.scope, response).to(value.device)[..., None]
        return torch.where(inside, change_along(value, direction, push.mode), value)

    return hook


def _response(n: int, prompt_length: int | None) -> Bool[Tensor, " position"]:
    first = 0 if n == 1 else (n if prompt_length is None else prompt_length) - 1
    return torch.arange(n) >= first


def calibrate(
    model: LensModel,
    directions: Float[Tensor, "layer d_model"],
    layers: Sequence[int],
    target: float,
    heads: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    *,
    scope: Scope = "response",
    mode: Mode = "add",
    precision: float = 0.05,
) -> float:
    """The strength at which vectors at several layers move the output of the last one by `target` of its norm, by bisection.

    With one layer that strength is the target itself, as the norms set it.

    Args:
        model: what is steered.
        directions: unit vectors, one per layer.
        layers: their blocks, in order.
        target: achieved change: mean over measured positions (generation.measured_positions) of |x' - x| / |x|.
        heads: tokens of each prompt, special ones included, of texts to measure on.
        responses: tokens of each response.
        scope: `response`, `prompt` or `all`.
        mode: `add` or `clamp`.
        precision: allowed relative deviation from the target.

    Raises:
        ValueError: the target is not reached below STRENGTH_LIMIT, or any strength moves further (clamping does away with what was there).
    """
    if len(layers) == 1 or target == 0:
        return target
    site, norms = resolve_site(model, "resid_post"), residual_norms(model)
    lengths = torch.tensor([len(h) + len(r) for h, r in zip(heads, responses, strict=True)])[:, None]
    first = torch.tensor([len(h) for h in heads])[:, None]
    tokens = torch.zeros(len(heads), int(lengths.max()), dtype=torch.long)
    for i, (head, response) in enumerate(zip(heads, responses, strict=True)):
        tokens[i, : lengths[i]] = torch.tensor([*head, *response])
    place, device = torch.arange(tokens.shape[1]), device_of(model)
    real = place < lengths
    steered = (in_scope(scope, place >= first - 1) & real)[:, :, None].to(device)
    measured = measured_positions(scope, place, first, real).to(device)
    kept: list[Tensor] = []

    def stream(strength: float) -> Tensor:
        def edit(vector: Tensor) -> Callable[..., Tensor]:
            return lambda value, hook=None: torch.where(steered, change_along(value, vector.to(value), mode), value)

        def keep(value: Tensor, hook: Any = None) -> None:
            kept.append(value[measured].float())

        doses = strength * norms[list(layers)]
        hooks: list[Any] = [
            (site.at(layer), edit(v * n)) for layer, v, n in zip(layers, directions, doses, strict=True)
        ]
        with add_hooks(model, [*(hooks if strength else []), (site.at(layers[-1]), keep)]):
            run_trunk(model, tokens.to(device), real.long().to(device))
        return kept.pop()

    base = stream(0.0)

    def achieved(strength: float) -> float:
        return float(((stream(strength) - base).norm(dim=-1) / base.norm(dim=-1)).mean())

    sign, wanted = math.copysign(1.0, target), abs(target)
    low, high = 0.0, wanted / len(layers) ** 0.5
    while achieved(sign * high) < wanted:
        low, high = high, 2 * high
        if high > STRENGTH_LIMIT:
            raise ValueError(
                f"received a target change of {target} over layers {list(layers)}, which no strength below {STRENGTH_LIMIT:g} reaches; lower it"
            )
    while True:
        middle = (low + high) / 2
        found = achieved(sign * middle)
        if abs(found - wanted) <= precision * wanted:
            return sign * middle
        if high - low < 1e-6:
            raise ValueError(
                f"received a target change of {target} over layers {list(layers)}; with mode={mode!r} even the smallest strength moves the stream by "
                f"{found:.3g}: raise it, or use mode='add'"
            )
        low, high = (middle, high) if found < wanted else (low, middle)
