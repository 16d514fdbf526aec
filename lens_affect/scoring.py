"""Scoring: texts read again, word for word, by the unsteered and the steered model.

Both are given the same text (teacher forcing). From the unsteered one comes the perplexity; from the two together how far steering moved the
next-word distributions (KL) and the residual stream (achieved change).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lens_affect.adapter import LensModel, add_hooks, context_window, device_of, pad_token_id, run_trunk
from lens_affect.generation import (
    Intervention,
    Scope,
    change_along,
    in_scope,
    measured_positions,
    telling_response,
)
from lens_affect.prefixes import is_hooked, read_prefix
from lens_affect.recording import BATCH_TOKENS, slices, unembed
from lens_affect.sites import resolve_site


@dataclass(frozen=True)
class TextScores:
    """Scores of responses given their prompts. NaN where a response has no token."""

    nll: Float[Tensor, " text"]
    """Mean negative log-likelihood per response token under the unsteered model, nats; its exponential is the perplexity."""
    kl: Float[Tensor, " text"]
    """KL divergence of the steered next-word distribution from the unsteered one, mean per response token, nats; 0 without interventions."""
    change: Float[Tensor, " text"]
    """|x' - x| / |x| at the output of the last steered layer, mean over response tokens (over the prompt's steered ones where only the prompt is steered:
    generation.measured_positions; NaN where there is none); 0 without interventions."""
    n_tokens: Int[Tensor, " text"]
    """Response tokens."""

    @property
    def perplexity(self) -> Float[Tensor, " text"]:
        """exp(nll)."""
        return self.nll.exp()


@torch.no_grad()
def score_texts(
    model: LensModel,
    heads: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    *,
    interventions: Sequence[Intervention] = (),
    batch_tokens: int = BATCH_TOKENS,
    progress: Callable[[int, int], None] | None = None,
) -> TextScores:
    """Score responses, all in a few batches.

    Args:
        model: a bridge or a HookedTransformer.
        heads: tokens of each prompt, special ones included.
        responses: tokens of each response.
        interventions: what the steered model does to each row (Intervention.rows are row numbers of these texts); none with relative=True. Hooks that
            are on the model already act in both passes.
        batch_tokens: padded tokens per pass.
        progress: called with (texts done, texts in all).

    Raises:
        ValueError: other numbers of heads and responses, an empty head, a text beyond the context window, a relative intervention, or a zero vector to
            ablate or clamp.
    """
    _check(model, heads, responses, interventions)
    n = len(heads)
    found = {name: torch.full((n,), math.nan) for name in ("nll", "kl", "change")}
    reader = _Reader(model, interventions)
    # Texts of one prompt stand together, so that a batch has few prompts to read.
    prompts = {head: i for i, head in enumerate(dict.fromkeys(map(tuple, heads)))}
    order = sorted(
        (i for i in range(n) if len(responses[i])), key=lambda i: (prompts[tuple(heads[i])], -len(responses[i]))
    )
    done = 0
    with telling_response(lambda: reader.response), reader:
        while order:
            at_once = _at_once(order, heads, responses, batch_tokens)
            rows, order = order[:at_once], order[at_once:]
            for name, values in reader.read(rows, heads, responses).items():
                found[name][rows] = values
            done += len(rows)
            if progress:
                progress(done, n)
    return TextScores(**found, n_tokens=torch.tensor([len(r) for r in responses]))


def _at_once(
    order: Sequence[int], heads: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], batch_tokens: int
) -> int:
    """How many of these texts make a batch of that many padded tokens, with the longest one's prompt counted for each."""
    width = 0
    for k, i in enumerate(order):
        width = max(width, len(heads[i]) + len(responses[i]))
        if k and (k + 1) * width > batch_tokens:
            return k
    return len(order)


def _check(
    model: LensModel,
    heads: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    interventions: Sequence[Intervention],
) -> None:
    if len(heads) != len(responses) or not heads or not all(len(h) for h in heads):
        raise ValueError(
            f"received {len(heads)} prompts and {len(responses)} responses; allowed is one response per prompt, and prompts with a token"
        )
    longest = max(len(h) + len(r) for h, r in zip(heads, responses, strict=True))
    if longest > context_window(model):
        raise ValueError(
            f"received a text of {longest} tokens; the context window holds {context_window(model)}: shorten it"
        )
    if any(change.mode != "add" and bool((change.vector.norm(dim=-1) == 0).any()) for change in interventions):
        raise ValueError(
            "received a zero vector to ablate or to clamp; a direction is needed: pass a vector with a length"
        )
    if any(change.relative for change in interventions):
        raise ValueError(
            "received a relative intervention, whose dose depends on how the text was written; scored are fixed doses only"
        )


class _Reader:
    """Two passes over a batch, with and without the interventions."""

    def __init__(self, model: LensModel, interventions: Sequence[Intervention]) -> None:
        self.model: Any = model
        self.steered = False
        self._interventions = interventions
        self._last = max((c.layer for c in interventions), default=None)
        n_layers, post = int(self.model.cfg.n_layers), resolve_site(model, "resid_post")
        hooks: list[Any] = [(resolve_site(model, c.site).at(c.layer), self._edit(c)) for c in interventions]
        if self._last is not None:
            hooks.append((post.at(self._last), self._keep("changed")))
        hooks.append((post.at(n_layers - 1), self._keep("final")))
        self._hooks = hooks
        self._shares = all(c.scope == "response" for c in interventions) and not is_hooked(model)
        prompts_only = bool(interventions) and all(c.scope == "prompt" for c in interventions)
        self._measured_scope: Scope = "prompt" if prompts_only else "response"
        self._rows: list[int] = []
        self.response = torch.empty(0)
        self._real = torch.empty(0)
        self._taken: dict[str, Tensor] = {}
        self._seen: dict[tuple[str, bool], Tensor] = {}

    def __enter__(self) -> "_Reader":
        self._placed = add_hooks(self.model, self._hooks)
        self._placed.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._placed.__exit__(*error)

    def _keep(self, name: str) -> Callable[..., None]:
        def hook(value: Tensor, hook: Any = None) -> None:
            if self._taken:  # not while a prefix is read
                self._seen[name, self.steered] = value[self._taken[name]]

        return hook

    def _edit(self, change: Intervention) -> Callable[..., Tensor | None]:
        of_row = None if change.rows is None else {row: i for i, row in enumerate(change.rows)}

        def hook(value: Tensor, hook: Any = None) -> Tensor | None:
            mine = [(i, row) for i, row in enumerate(self._rows) if of_row is None or row in of_row]
            if not self.steered or not mine:
                return None
            where = [i for i, _ in mine]
            vector = change.vector
            if vector.ndim == 2:
                vector = vector[[row if of_row is None else of_row[row] for _, row in mine]][:, None, :]
            flat = value.flatten(2)
            part, changed = flat[where], flat.clone()
            inside = (self._real[where] & in_scope(change.scope, self.response[where]))[:, :, None]
            changed[where] = torch.where(inside, change_along(part, vector.to(part), change.mode), part)
            return changed.view(value.shape)

        return hook

    def read(
        self, rows: list[int], heads: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]
    ) -> dict[str, Float[Tensor, " row"]]:
        """nll, kl and change of these rows."""
        device = device_of(self.model)
        chosen = [heads[i] for i in rows]
        prefix = read_prefix(self.model, chosen) if self._shares else None
        # Behind a prefix that was read already, a row starts with the last token of its prompt.
        bodies = [(*head[0 if prefix is None else -1 :], *responses[i]) for i, head in zip(rows, chosen, strict=True)]
        first = torch.tensor([len(head) if prefix is None else 1 for head in chosen])[:, None]
        lengths = torch.tensor([len(body) for body in bodies])[:, None]
        tokens = torch.full((len(rows), int(lengths.max())), pad_token_id(self.model), dtype=torch.long)
        for k, body in enumerate(bodies):
            tokens[k, : len(body)] = torch.tensor(body)
        place = torch.arange(tokens.shape[1])
        real = place < lengths
        predicting = (place >= first - 1) & (place < lengths - 1)
        measured = measured_positions(self._measured_scope, place, first, real)
        self._rows, self.response, self._real = rows, (place >= first - 1).to(device), real.to(device)
        self._taken = {"final": predicting.to(device), "changed": measured.to(device)}
        mask = real.long().to(device)
        for steered in (False, True) if self._interventions else (False,):
            self.steered = steered
            if prefix is None:
                run_trunk(self.model, tokens.to(device), mask)
            else:
                run_trunk(self.model, tokens.to(device), torch.cat([prefix.mask, mask], dim=1), past=prefix.expanded())
        self.steered, self._taken = False, {}
        owner = torch.arange(len(rows))[:, None].expand_as(predicting)[predicting]
        following = tokens[:, 1:][predicting[:, :-1]].to(device)
        nll, kl = self._compare(following)
        if self._last is None:
            changed = torch.zeros(len(rows))
        else:
            plain, steered = (self._seen["changed", s].float() for s in (False, True))
            change = ((steered - plain).norm(dim=-1) / plain.norm(dim=-1)).cpu()
            changed = _mean_by(torch.arange(len(rows))[:, None].expand_as(measured)[measured], change, len(rows))
        self._seen.clear()
        return {"nll": _mean_by(owner, nll, len(rows)), "kl": _mean_by(owner, kl, len(rows)), "change": changed}

    def _compare(self, following: Int[Tensor, " token"]) -> tuple[Float[Tensor, " token"], Float[Tensor, " token"]]:
        """nll of each following token, and KL of the two distributions it comes from; a part of the vocabulary's rows at a time."""
        plain = self._seen["final", False]
        steered = self._seen.get(("final", True))
        nll, kl = torch.empty(len(plain)), torch.zeros(len(plain))
        for part in slices(len(plain), 4096):
            offset = part.start
            pieces = [unembed(self.model, plain[part])] + (
                [unembed(self.model, steered[part])] if steered is not None else []
            )
            for start_and_logits in zip(*pieces, strict=True):
                start, logits = start_and_logits[0]
                at = slice(offset + start, offset + start + len(logits))
                log_p = logits.log_softmax(-1)
                nll[at] = -log_p.gather(1, following[at][:, None])[:, 0].cpu()
                if steered is not None:
                    log_q = start_and_logits[1][1].log_softmax(-1)
                    kl[at] = (log_q.exp() * (log_q - log_p)).sum(-1).cpu()
        return nll, kl


def _mean_by(owner: Int[Tensor, " token"], values: Float[Tensor, " token"], n: int) -> Float[Tensor, " row"]:
    sums = torch.zeros(n, dtype=torch.float64).index_add_(0, owner, values.double())
    return (sums / torch.bincount(owner, minlength=n)).float()
