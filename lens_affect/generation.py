"""Batched generation, greedy or sampled with one random stream per row, with interventions per row.

Each row's text depends on its prompt, its seed and its own interventions, not on which other rows share the batch: a
row draws its random numbers from its own stream, and prompts are padded on the left behind a mask. A prompt that several rows share is read once.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lens_affect.adapter import (
    Form,
    Hook,
    LensModel,
    add_hooks,
    context_window,
    device_of,
    encode_prompt,
    form_of,
    is_bridge,
    pad_token_id,
)
from lens_affect.prefixes import is_hooked, pad_left, read_prefix
from lens_affect.selfchecks import ensure_checked
from lens_affect.sites import resolve_site
from lens_affect.statistics import derive_generator

Scope = Literal["response", "prompt", "all"]
Mode = Literal["add", "ablate", "clamp"]
Which = Callable[[], Bool[Tensor, "*row position"]]
"""Which positions of the pass that is running predict a response token."""
_WHICH: ContextVar[Which | None] = ContextVar("which positions predict a response token", default=None)
CANDIDATES = (128, 1024, 8192)
"""Likeliest tokens among which the nucleus is looked for, before the whole vocabulary is."""
FLAT_ROWS = 128
"""Rows whose nucleus is larger than that, at once."""


@dataclass(frozen=True)
class Intervention:
    """A change of one site at one layer while text is generated."""

    layer: int
    """0-based block."""
    site: str
    """One of sites.SITES."""
    vector: Float[Tensor, "width"] | Float[Tensor, "row width"]
    """What is added; or the direction that is ablated or clamped. One for all rows, or one per row of `rows`."""
    mode: Mode = "add"
    """`add` the vector; `ablate` the component along it; `clamp` that component to the vector's norm."""
    scope: Scope = "response"
    """`response`: positions whose output predicts a response token (the last prompt position is one of them); `prompt`; `all`."""
    rows: tuple[int, ...] | None = None
    """Row numbers of the prompts it acts on; all by default."""
    relative: bool = False
    """The vector is scaled, in each pass, by the mean norm of the row's own activation there, first token included (arXiv:2604.04064 doses so).
    With a key-value cache a pass sees one position only: generate(use_cache=False)."""


@dataclass(frozen=True)
class Generated:
    """Generated texts. All tuples have one entry per prompt."""

    texts: tuple[str, ...]
    """Continuations without special tokens."""
    tokens: tuple[tuple[int, ...], ...]
    """Their token ids, without the stop token."""
    finished: tuple[bool, ...]
    """True if the model stopped by itself, False if the length limit did."""
    finite: tuple[bool, ...]
    """False where logits were not finite; the text ends there."""
    prompts: tuple[str, ...]
    """What was asked."""
    form: Form
    """How prompts stood before the texts."""


def generate(
    model: LensModel,
    prompts: Sequence[str],
    *,
    interventions: Sequence[Intervention] = (),
    max_new_tokens: int = 128,
    temperature: float = 0.7,
    top_p: float = 0.95,
    greedy: bool = False,
    seed: int = 0,
    row_seeds: Sequence[int | str] | None = None,
    stop: Sequence[int] | None = None,
    form: Form | None = None,
    own_bos: bool = False,
    use_cache: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Generated:
    """Generate one continuation per prompt, all rows in one batch.

    Args:
        model: a bridge (with a key-value cache) or a HookedTransformer (without one, so slower).
        prompts: user requests, or openings to be gone on with (form="continue").
        interventions: changes to activations, each for some rows.
        max_new_tokens: length limit per row.
        temperature: of sampling; above 0.
        top_p: nucleus sampling: the smallest set of tokens with at least this probability.
        greedy: take the likeliest token instead of sampling.
        seed: of all rows.
        row_seeds: name of each row's random stream; rows with the same name draw the same numbers. Row numbers by default.
        stop: token ids that end a row; by default the model's end-of-text and end-of-turn tokens.
        form: `chat` (the default where the model has a chat template), `plain` (an empty line behind the prompt), or `continue`.
        own_bos: keep the tokenizer's own BOS default (protocol jeong2026).
        use_cache: keep keys and values; without them every token reads the whole text again.
        progress: called with (tokens done per row, limit).

    Returns:
        Texts and tokens, in the order of the prompts.

    Raises:
        ValueError: an empty prompt list, prompts beyond the context window, or numbers out of range.

    Example:
        >>> generate(model, ["How does he feel?"], max_new_tokens=8, seed=0).texts  # doctest: +SKIP
    """
    _check(prompts, temperature, top_p, max_new_tokens, row_seeds)
    for change in interventions:
        _check_intervention(model, change, len(prompts))
    ensure_checked(model)
    form = form or form_of(model)
    heads = [encode_prompt(model, prompt, own_bos=own_bos, form=form)[0] for prompt in prompts]
    room = context_window(model) - max(map(len, heads))
    if room < max_new_tokens:
        raise ValueError(
            f"received a prompt of {max(map(len, heads))} tokens and max_new_tokens={max_new_tokens}; the context window holds "
            f"{context_window(model)}: shorten the prompt or ask for at most {max(room, 0)}"
        )
    stops = set(stop_tokens(model) if stop is None else stop)
    names = list(range(len(prompts))) if row_seeds is None else list(row_seeds)
    draws = np.stack([derive_generator(seed, "sample", name).random(max_new_tokens) for name in names])

    untouched = all(change.scope == "response" and not change.relative for change in interventions)
    state = _Batch(model, heads, use_cache=use_cache and is_bridge(model), share=untouched and not is_hooked(model))
    with (
        telling_response(lambda: state.response),
        add_hooks(model, _hooks(model, interventions, state)) if interventions else nullcontext(),
    ):
        tokens, finished, finite = _decode(
            state, draws, stops, max_new_tokens, greedy=greedy, temperature=temperature, top_p=top_p, progress=progress
        )
    return Generated(
        texts=tuple(str(model.tokenizer.decode(t, skip_special_tokens=True)) for t in tokens),
        tokens=tuple(map(tuple, tokens)),
        finished=tuple(finished),
        finite=tuple(finite),
        prompts=tuple(prompts),
        form=form,
    )


def _decode(
    state: "_Batch",
    draws: np.ndarray,
    stops: Collection[int],
    max_new_tokens: int,
    *,
    greedy: bool,
    temperature: float,
    top_p: float,
    progress: Callable[[int, int], None] | None,
) -> tuple[list[list[int]], list[bool], list[bool]]:
    """Tokens of every row up to its stop token, whether it came to one, and whether its logits were finite."""
    tokens: list[list[int]] = [[] for _ in state.active]
    finished, finite = [False] * len(tokens), [True] * len(tokens)
    for step in range(max_new_tokens):
        logits, active = state.next_logits(), state.active
        sound = logits.amax(-1).isfinite()
        if not bool(sound.all()):
            logits = torch.where(sound[:, None], logits, 0.0)  # their draw is thrown away below
        uniform = torch.from_numpy(draws[active, step]).to(logits.device)
        chosen = logits.argmax(-1) if greedy else sample(logits, uniform, temperature=temperature, top_p=top_p)
        still = []
        for i, (row, token) in enumerate(zip(active, chosen.tolist(), strict=True)):
            if not sound[i]:
                finite[row] = False
            elif token in stops:
                finished[row] = True
            else:
                tokens[row].append(token)
                still.append(i)
        if progress:
            progress(step + 1, max_new_tokens)
        if not still or step + 1 == max_new_tokens:
            break
        if len(still) < len(active):
            state.keep(still)
            chosen = chosen[still]
        state.append(chosen)
    return tokens, finished, finite


def _check(
    prompts: Sequence[str],
    temperature: float,
    top_p: float,
    max_new_tokens: int,
    row_seeds: Sequence[int | str] | None,
) -> None:
    if isinstance(prompts, str) or not prompts:
        raise ValueError(f"received prompts={prompts!r}; allowed is a list with at least one prompt")
    if not temperature > 0 or not 0 < top_p <= 1 or max_new_tokens < 1:
        raise ValueError(
            f"received temperature={temperature}, top_p={top_p}, max_new_tokens={max_new_tokens}; allowed are temperature above 0 "
            "(greedy=True for none), top_p in (0, 1], at least one token"
        )
    if row_seeds is not None and len(row_seeds) != len(prompts):
        raise ValueError(f"received {len(row_seeds)} row_seeds for {len(prompts)} prompts; allowed is one per prompt")


def _check_intervention(model: LensModel, change: Intervention, n_prompts: int) -> None:
    site, n_layers = resolve_site(model, change.site), int(model.cfg.n_layers)
    if not 0 <= change.layer < n_layers:
        raise ValueError(f"received an intervention at layer {change.layer}; allowed are 0 to {n_layers - 1}")
    rows = tuple(range(n_prompts)) if change.rows is None else change.rows
    outside = [row for row in rows if not 0 <= row < n_prompts]
    if outside:
        raise ValueError(
            f"received an intervention on rows {outside}; allowed are 0 to {n_prompts - 1}, one per prompt"
        )
    if change.vector.ndim == 2 and len(change.vector) != len(rows):
        raise ValueError(
            f"received {len(change.vector)} vectors for {len(rows)} rows; allowed is one vector for all, or one per row"
        )
    if change.vector.shape[-1] != site.width:
        raise ValueError(
            f"received a vector of width {change.vector.shape[-1]} for {site.name}; allowed is {site.width}"
        )
    if change.mode != "add" and bool((change.vector.norm(dim=-1) == 0).any()):
        raise ValueError(
            f"received a zero vector for mode={change.mode!r}; a direction is needed: pass a vector with a length"
        )


def stop_tokens(model: LensModel) -> tuple[int, ...]:
    """End-of-text and end-of-turn ids: the tokenizer's, the generation config's, and the usual turn markers it knows."""
    found: set[Any] = set()
    config = getattr(getattr(model, "original_model", None), "generation_config", None)
    for value in (model.tokenizer.eos_token_id, getattr(config, "eos_token_id", None)):
        found |= set(value if isinstance(value, list | tuple) else [value])
    known = model.tokenizer.get_vocab() if hasattr(model.tokenizer, "get_vocab") else {}
    found |= {known[t] for t in ("<|im_end|>", "<end_of_turn>", "<|eot_id|>", "<|endoftext|>") if t in known}
    return tuple(sorted(int(t) for t in found if t is not None))


def sample(
    logits: Float[Tensor, "row vocab"], uniform: Float[Tensor, " row"], *, temperature: float, top_p: float
) -> Int[Tensor, " row"]:
    """Nucleus sampling by inverse transform: one uniform number per row decides, so a row's draw is its own.

    Args:
        logits: of the next token.
        uniform: one number in [0, 1) per row.
        temperature: divides the logits.
        top_p: the smallest set of likeliest tokens with at least this probability (Holtzman et al., 2019, arXiv:1904.09751).
    """
    scaled = logits.float() / temperature
    log_total = scaled.logsumexp(-1, keepdim=True)
    found = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
    rows = torch.arange(len(logits), device=logits.device)
    # The likeliest tokens nearly always hold the nucleus; sorting the whole vocabulary costs more than the forward pass of a small model.
    for n_candidates in CANDIDATES:
        part = slice(None) if len(rows) == len(logits) else rows
        top, tokens = scaled[part].topk(min(n_candidates, logits.shape[-1]), dim=-1)
        probabilities = (top - log_total[part]).exp()
        cumulative = probabilities.cumsum(-1)
        # The ladder goes up the token numbers: going down the probabilities, a rounding error would swap near-ties and change the draw.
        tokens, by_number = tokens.sort(dim=-1)
        place = _draw((probabilities * (cumulative - probabilities < top_p)).gather(-1, by_number), uniform[part])
        found[part] = tokens.gather(-1, place[:, None])[:, 0]
        rows = rows[cumulative[:, -1] < top_p]
        if not len(rows) or top.shape[-1] == logits.shape[-1]:
            return found
    for part in rows.split(FLAT_ROWS):
        probabilities = (scaled[part] - log_total[part]).exp()
        found[part] = _draw(probabilities * (probabilities >= _nucleus(probabilities, top_p)), uniform[part])
    return found


def _draw(weights: Float[Tensor, "row place"], uniform: Float[Tensor, " row"]) -> Int[Tensor, " row"]:
    ladder = weights.cumsum(-1)
    total = ladder[:, -1:].contiguous()
    last = torch.searchsorted(ladder, total)  # of the places with a weight: a number just below 1 must not go beyond
    place = torch.searchsorted(ladder, uniform.to(ladder)[:, None] * total, right=True)
    return torch.minimum(place, last)[:, 0].clamp(max=weights.shape[-1] - 1)  # which NaN would exceed


def _nucleus(probabilities: Float[Tensor, "row vocab"], top_p: float) -> Float[Tensor, "row one"]:
    """Smallest probability in each row's nucleus. Positive numbers are ordered as their bits are: ten of these at a time, from the highest, say how much
    probability lies above (a radix selection, which reads a row three times and sorts nothing)."""
    bits = probabilities.view(torch.int32)
    found = torch.zeros(len(bits), 1, dtype=torch.int32, device=bits.device)
    above = torch.zeros(
        len(bits), 1, dtype=probabilities.dtype, device=bits.device
    )  # probability of what is larger than `found`
    for shift in (20, 10, 0):
        inside = probabilities if shift == 20 else probabilities * (bits >> shift + 10 == found >> shift + 10)
        mass = torch.zeros(len(bits), 1024, dtype=probabilities.dtype, device=bits.device)
        mass.scatter_add_(1, (bits >> shift & 1023).long(), inside)
        from_here = above + mass.flip(-1).cumsum(-1).flip(-1)
        digit = ((from_here >= top_p).sum(-1, keepdim=True) - 1).clamp(min=0)
        above = from_here.gather(1, digit) - mass.gather(1, digit)
        found += digit.int() << shift
    return found.view(torch.float32)


class _Batch:
    """Left-padded rows with their key-value cache."""

    def __init__(self, model: Any, heads: Sequence[tuple[int, ...]], *, use_cache: bool, share: bool) -> None:
        self.model, self.use_cache = model, use_cache
        tokens, mask = pad_left(heads, pad_token_id(model))
        self.history, self.history_mask = tokens.to(device_of(model)), mask.to(device_of(model))
        self.prompt_width = tokens.shape[1]
        self.active = list(range(len(heads)))
        prefix = read_prefix(model, heads) if use_cache and share else None
        self.cache = None if prefix is None else prefix.expanded()
        self.new = self.history if prefix is None else self.history[:, -1:]

    @property
    def response(self) -> Bool[Tensor, " position"]:
        """Which positions of the pass that is running predict a response token."""
        n_read = self.new.shape[1] if self.use_cache else self.history.shape[1]
        place = torch.arange(self.history.shape[1] - n_read, self.history.shape[1])
        return place >= self.prompt_width - 1

    @torch.no_grad()
    def next_logits(self) -> Float[Tensor, "row vocab"]:
        if not is_bridge(self.model):
            # HookedTransformer keeps its own kind of cache; reading the whole text again is slower and cannot differ.
            logits = self.model(self.history, attention_mask=self.history_mask, return_type="logits")
            return logits[:, -1].float()
        tokens = self.new if self.use_cache else self.history
        positions = (self.history_mask.cumsum(-1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        out = self.model.original_model(
            input_ids=tokens,
            attention_mask=self.history_mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=self.use_cache,
            logits_to_keep=1,
        )
        self.cache = out.past_key_values
        return out.logits[:, -1].float()

    def keep(self, rows: list[int]) -> None:
        """Go on with these rows only: finished ones cost nothing."""
        self.active = [self.active[i] for i in rows]
        index = torch.tensor(rows, device=self.history.device)
        self.history, self.history_mask = self.history[index], self.history_mask[index]
        if self.cache is not None:
            self.cache.batch_select_indices(index)

    def append(self, chosen: Int[Tensor, " row"]) -> None:
        self.new = chosen[:, None]
        self.history = torch.cat([self.history, self.new], dim=1)
        self.history_mask = torch.cat([self.history_mask, torch.ones_like(self.new)], dim=1)


def _hooks(model: LensModel, interventions: Sequence[Intervention], state: _Batch) -> list[Hook]:
    """Placed once for all tokens: placing hooks on a bridge costs a third of a single row's forward pass."""
    return [(resolve_site(model, c.site).at(c.layer), _edit(c, state)) for c in interventions]


@contextmanager
def telling_response(which: Which) -> Iterator[None]:
    """Inside the block hooks that were placed from outside, as by steering.steer, can ask where responses begin (told_response)."""
    before = _WHICH.set(which)
    try:
        yield
    finally:
        _WHICH.reset(before)


def told_response(n: int) -> Bool[Tensor, "*row position"] | None:
    """Which positions of a running pass over n of them predict a response token; None where nobody says."""
    which = _WHICH.get()
    found = None if which is None else which()
    return found if found is not None and found.shape[-1:] == (n,) else None


def in_scope(scope: Scope, response: Bool[Tensor, "*shape"]) -> Bool[Tensor, "*shape"]:
    """Which positions an intervention changes, by which ones predict a response token."""
    return torch.ones_like(response) if scope == "all" else response if scope == "response" else ~response


def measured_positions(
    scope: Scope, place: Int[Tensor, " position"], first: Int[Tensor, "row one"], real: Bool[Tensor, "row position"]
) -> Bool[Tensor, "row position"]:
    """Where the achieved change of the residual stream is taken: at response tokens.

    Steering of the prompt alone leaves the stream at response tokens as it was up to the last steered block, so there it is taken at the prompt's steered
    positions, without the first, which is the attention sink.

    Args:
        scope: of the intervention.
        place: numbers of the positions.
        first: of each row's first response token.
        real: which positions hold a token.
    """
    inside = (place >= 1) & (place < first - 1) if scope == "prompt" else place >= first
    return inside & real


def _edit(change: Intervention, state: _Batch) -> Callable[..., Tensor | None]:
    of_row = None if change.rows is None else {row: i for i, row in enumerate(change.rows)}
    seen: list[int] | None = None
    where, vectors = torch.empty(0, dtype=torch.long), change.vector

    def follow(value: Tensor) -> None:
        """Which rows of the batch are meant, and their vectors: looked up again only when rows have left the batch."""
        nonlocal seen, where, vectors
        if seen is state.active:
            return
        seen = state.active
        mine = [(i, r if of_row is None else of_row[r]) for i, r in enumerate(seen) if of_row is None or r in of_row]
        where = torch.tensor([i for i, _ in mine], dtype=torch.long, device=value.device)
        chosen = change.vector if change.vector.ndim == 1 else change.vector[[entry for _, entry in mine]][:, None, :]
        vectors = chosen.to(value)

    def hook(value: Tensor, hook: Any = None) -> Tensor | None:
        follow(value)
        if not len(where):
            return None
        flat = value.flatten(2)
        part = flat[where]
        direction = vectors * _mean_norm(part, state.history_mask[where]) if change.relative else vectors
        inside = in_scope(change.scope, state.response).to(value.device)[None, :, None]
        changed = flat.clone()
        changed[where] = torch.where(inside, change_along(part, direction, change.mode), part)
        return changed.view(value.shape)

    return hook


def _mean_norm(part: Float[Tensor, "row position width"], mask: Int[Tensor, "row history"]) -> Float[Tensor, "row 1 1"]:
    """Mean norm over the real positions of this pass."""
    real = mask[:, -part.shape[1] :].to(part)
    return ((part.norm(dim=-1) * real).sum(1) / real.sum(1))[:, None, None]


def change_along(
    value: Float[Tensor, "row position width"], vector: Float[Tensor, "*row_one width"], mode: Mode
) -> Float[Tensor, "row position width"]:
    """Activations with the vector added, with their component along it removed, or with that component set to the vector's norm."""
    if mode == "add":
        return value + vector
    norm = vector.norm(dim=-1, keepdim=True)
    unit = vector / norm
    along = (value * unit).sum(-1, keepdim=True)
    return value - along * unit if mode == "ablate" else value + (norm - along) * unit
