"""What a model makes of given answers: likelihood of each of a few answers, of one answer, of a whole text; and a loss to train on.

Prompts are padded on the left behind a mask, with positions of their own, so a prompt gives the same numbers alone and in any batch.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lens_affect.adapter import (
    Form,
    LensModel,
    device_of,
    encode,
    encode_prompt,
    is_bridge,
    pad_right,
    pad_token_id,
    run_logits,
    token_ids,
)

IGNORED = -100
"""Target of a position that does not count."""


@dataclass(frozen=True)
class AnswerBatch:
    """Prompts with their answers, padded on the left, so that answers end together."""

    tokens: Int[Tensor, "row position"]
    """Prompt and answer without the answer's last token, which is only predicted."""
    mask: Int[Tensor, "row position"]
    """1 where a token is real."""
    targets: Int[Tensor, "row answer_position"]
    """Token that each of the last positions should predict; IGNORED in front of shorter answers."""


def require_bridge(model: Any, what: str) -> None:
    """Refuse a HookedTransformer, which has neither a cache that can be shared nor Hugging Face's modules.

    Raises:
        TypeError: for anything but a TransformerBridge.
    """
    if not is_bridge(model):
        raise TypeError(f"received {type(model).__name__} for {what}; allowed is a TransformerBridge: use load_model")


def make_batch(model: LensModel, rows: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> AnswerBatch:
    """Pad (prompt tokens, answer tokens) of each row."""
    width = max(len(head) + len(answer) - 1 for head, answer in rows)
    longest = max(len(answer) for _, answer in rows)
    tokens = torch.full((len(rows), width), pad_token_id(model), dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    targets = torch.full((len(rows), longest), IGNORED, dtype=torch.long)
    for row, (head, answer) in enumerate(rows):
        ids = (*head, *answer[:-1])
        tokens[row, width - len(ids) :] = torch.tensor(ids)
        mask[row, width - len(ids) :] = 1
        targets[row, longest - len(answer) :] = torch.tensor(answer)
    device = device_of(model)
    return AnswerBatch(tokens.to(device), mask.to(device), targets.to(device))


def last_logits(model: Any, batch: AnswerBatch) -> Float[Tensor, "row answer_position vocab"]:
    """Logits at the positions that predict answers, float32, with a graph where gradients are on. Others are never unembedded."""
    positions = (batch.mask.cumsum(-1) - 1).clamp(min=0)
    out = model.original_model(
        input_ids=batch.tokens,
        attention_mask=batch.mask,
        position_ids=positions,
        use_cache=False,
        logits_to_keep=batch.targets.shape[1],
    )
    return out.logits.float()


def answer_loss(model: Any, batch: AnswerBatch) -> Float[Tensor, ""]:
    """Mean cross-entropy over the answers' tokens, over the whole vocabulary, in nats."""
    logits = last_logits(model, batch)
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORED)


def encode_rows(
    model: LensModel, prompts: Sequence[str], answers: Sequence[str], *, form: Form = "continue"
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Tokens of prompts and of what should follow them.

    Raises:
        ValueError: an empty prompt or answer.
    """
    rows = []
    for prompt, answer in zip(prompts, answers, strict=True):
        head, body = encode_prompt(model, prompt, form=form)[0], token_ids(model.tokenizer, answer)
        if not head or not body:
            raise ValueError(f"received the prompt {prompt!r} with the answer {answer!r}; both need at least one token")
        rows.append((head, body))
    return rows


def _bucketed(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Row numbers in batches of alike lengths."""
    order = sorted(range(len(lengths)), key=lambda row: lengths[row])
    return [order[first : first + batch_size] for first in range(0, len(order), batch_size)]


@torch.no_grad()
def choice_log_probabilities(
    model: Any,
    prompts: Sequence[str],
    answers: Sequence[str],
    *,
    scoring: str = "likelihood",
    form: Form = "continue",
    batch_size: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> Float[Tensor, "prompt answer"]:
    """Log-likelihood of every answer after every prompt, in nats, summed over its tokens.

    Each prompt is read once; its keys and values serve all answers, and answers of one token need nothing more.

    Args:
        model: a bridge.
        prompts: what stands before the answer.
        answers: as they would follow, with their leading blank where there is one.
        scoring: `likelihood` of the whole answer, or of its `first_token` only (cheaper; refused where two answers start alike).
        form: how a prompt is read (generation.generate).
        batch_size: prompts in one forward pass.
        progress: called with (prompts done, prompts).

    Raises:
        ValueError: fewer than two answers, two that are the same tokens, or for `first_token` two with the same start.
        TypeError: no bridge.
    """
    require_bridge(model, "the likelihood of answers")
    bodies = [token_ids(model.tokenizer, answer) for answer in answers]
    if scoring == "first_token":
        bodies = [body[:1] for body in bodies]
    if len(bodies) < 2 or len(set(bodies)) < len(bodies) or not all(bodies):
        alike = sorted(a for a, b in zip(answers, bodies, strict=True) if bodies.count(b) > 1 or not b)
        raise ValueError(
            f"received answers {list(answers)[:8]}, of which {alike} cannot be told apart by {scoring}; allowed are at least two with "
            "different tokens: use scoring='likelihood', or other words"
        )
    heads = [encode_prompt(model, prompt, form=form)[0] for prompt in prompts]
    found = torch.zeros(len(heads), len(bodies))
    done = 0
    for rows in _bucketed([len(h) for h in heads], batch_size):
        found[rows] = _choices(model, [heads[row] for row in rows], bodies)
        done += len(rows)
        if progress:
            progress(done, len(heads))
    return found


def _choices(model: Any, heads: list[tuple[int, ...]], bodies: list[tuple[int, ...]]) -> Float[Tensor, "row answer"]:
    batch = make_batch(model, [(head, (0,)) for head in heads])
    longer = [i for i, body in enumerate(bodies) if len(body) > 1]
    positions = (batch.mask.cumsum(-1) - 1).clamp(min=0)
    out = model.original_model(
        input_ids=batch.tokens,
        attention_mask=batch.mask,
        position_ids=positions,
        use_cache=bool(longer),
        logits_to_keep=1,
    )
    first = out.logits[:, -1].float().log_softmax(-1)[:, [body[0] for body in bodies]]
    if not longer:
        return first.cpu()
    # The rest of the longer answers goes through once more, on the prompts' keys and values: every row once per such answer.
    rest = [bodies[i] for i in longer]
    width = max(map(len, rest)) - 1
    tokens = torch.full((len(rest), width), pad_token_id(model), dtype=torch.long)
    targets = torch.full((len(rest), width), IGNORED, dtype=torch.long)
    for row, body in enumerate(rest):
        tokens[row, : len(body) - 1] = torch.tensor(body[:-1])
        targets[row, : len(body) - 1] = torch.tensor(body[1:])
    repeat = torch.arange(len(heads)).repeat_interleave(len(rest)).to(batch.tokens.device)
    out.past_key_values.batch_select_indices(repeat)
    tokens, targets = (t.to(batch.tokens.device).repeat(len(heads), 1) for t in (tokens, targets))
    mask = torch.cat([batch.mask[repeat], (targets != IGNORED).long()], dim=1)
    logits = model.original_model(
        input_ids=tokens,
        attention_mask=mask,
        position_ids=(mask.cumsum(-1) - 1).clamp(min=0)[:, -width:],
        past_key_values=out.past_key_values,
        use_cache=True,
    ).logits
    loss = torch.nn.functional.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none"
    )
    first[:, longer] -= loss.view(len(heads), len(rest), width).sum(-1)
    return first.cpu()


@torch.no_grad()
def answer_scores(
    model: Any,
    prompts: Sequence[str],
    answers: Sequence[str],
    *,
    form: Form = "continue",
    batch_size: int = 16,
) -> tuple[Float[Tensor, " prompt"], Float[Tensor, " prompt"]]:
    """How each prompt's own answer fares: mean loss per token in nats, and 1 where every token of it is the likeliest one, else 0.

    Raises:
        ValueError: an empty prompt or answer.
        TypeError: no bridge.
    """
    require_bridge(model, "the likelihood of answers")
    rows = encode_rows(model, prompts, answers, form=form)
    loss, exact = torch.zeros(len(rows)), torch.zeros(len(rows))
    for chosen in _bucketed([len(h) + len(a) for h, a in rows], batch_size):
        batch = make_batch(model, [rows[row] for row in chosen])
        logits = last_logits(model, batch)
        each = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), batch.targets, ignore_index=IGNORED, reduction="none"
        )
        counts = batch.targets != IGNORED
        loss[chosen] = (each.sum(-1) / counts.sum(-1)).cpu()
        exact[chosen] = ((logits.argmax(-1) == batch.targets) | ~counts).all(-1).float().cpu()
    return loss, exact


@torch.no_grad()
def text_losses(model: LensModel, texts: Sequence[str], *, batch_size: int = 16) -> Float[Tensor, " text"]:
    """Mean next-token loss of each text in nats per token, from its second token on; NaN for a text of one token."""
    encoded = [encode(model, text) for text in texts]
    found = torch.full((len(texts),), math.nan)
    for chosen in _bucketed([len(e.ids) for e in encoded], batch_size):
        tokens, mask = pad_right([encoded[row] for row in chosen], pad_token_id(model), device_of(model))
        logits = run_logits(model, tokens, mask)[:, :-1]
        each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
        counts = mask[:, 1:].float()
        counts[:, 0] = 0  # a BOS predicts no text; where there is none the first token is left out all the same
        found[chosen] = ((each * counts).sum(-1) / counts.sum(-1)).cpu()
    return found
