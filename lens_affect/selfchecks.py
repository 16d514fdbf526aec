"""Checks that a loaded model is read correctly, run once per model and recorded in every result's provenance.

Each of these is a bug that some tool of this field has shipped: padding that leaks into activations, two BOS tokens, a
hook that fires twice or never, a site that is not what its name says, logits that differ from Hugging Face's.
"""

import functools
import html
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from lens_affect.adapter import (
    CHANGED,
    Encoded,
    LensModel,
    ModelInfo,
    add_hooks,
    device_of,
    dtype_name,
    encode,
    encode_prompt,
    model_info,
    pad_right,
    pad_token_id,
    render_chat,
    require_model,
    run_logits,
    run_trunk,
    token_ids,
    update_provenance,
)
from lens_affect.sites import SITES, resolve_site
from lens_affect.unwrapping import CHECK, can_be_plain, plain_hooks, plain_trunk

CHECK_TEXTS = (
    "The bus was late again, and it had begun to rain.",
    "Nobody had told her. She read the note twice, folded it along the old crease, and put the kettle on as if it were any other evening.",
)
"""Two texts of different lengths; the shorter one gets the padding."""

PARITY = "logits equal Hugging Face's"
"""Name of the check that the host library computes what Hugging Face does."""
TOLERANCES = {
    "float32": {"log_probabilities": 1e-3, "activations": 1e-4},
    "bfloat16": {"log_probabilities": 0.5, "activations": 0.05},
    "float16": {"log_probabilities": 0.1, "activations": 0.01},
}
"""Per dtype: mean difference of log-probabilities over the next-word distribution, at the worst position, in nats; and largest difference of
activations as a share of their norm. The mean is weighted by probability: in bfloat16 the host's attention and Hugging Face's own differ by 0.4 to 1.7
nats somewhere in the vocabulary, at words below a probability of 1e-4, and by 0.06 to 0.21 on average (both embedded models, CHECK_TEXTS)."""


class SelfCheckError(RuntimeError):
    """A model is not read correctly; no number from it can be trusted."""

    def __init__(self, report: "CheckReport") -> None:
        first = report.failed[0]
        super().__init__(f"{report.model} failed the self-check {first.name!r} ({first.measured}). {first.advice}")
        self.report = report
        """All checks, those that passed too."""


@dataclass(frozen=True)
class Check:
    """Outcome of one check."""

    name: str
    """What was checked."""
    outcome: str
    """`passed`, `failed` or `not applicable`."""
    measured: str
    """What was seen."""
    advice: str
    """What a failure means and what to do."""


@dataclass(frozen=True)
class CheckReport:
    """All checks of one model."""

    model: str
    """Title of the model."""
    checks: tuple[Check, ...]
    """In the order they ran."""

    @property
    def failed(self) -> tuple[Check, ...]:
        """The checks that failed."""
        return tuple(c for c in self.checks if c.outcome == "failed")

    def to_frame(self) -> pd.DataFrame:
        """One row per check with columns check, outcome, measured."""
        return pd.DataFrame([{"check": c.name, "outcome": c.outcome, "measured": c.measured} for c in self.checks])

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(str(self))}</p>{self.to_frame().to_html(index=False, border=0, escape=True)}"

    def __str__(self) -> str:
        applicable = [c for c in self.checks if c.outcome != "not applicable"]
        return f"{self.model}: {len(applicable) - len(self.failed)} of {len(applicable)} self-checks passed"


def reference_logits(hf_model: Any, tokenizer: Any) -> dict[str, Tensor]:
    """Logits of a Hugging Face model for the check texts, to be taken before it is booted (which changes its attention)."""
    found = {}
    with torch.no_grad():
        for text in CHECK_TEXTS:
            ids = torch.tensor([token_ids(tokenizer, text)], device=hf_model.device)
            found[text] = hf_model(input_ids=ids, use_cache=False).logits[0].float().cpu()
    return found


def ensure_checked(model: LensModel) -> None:
    """Run the self-checks unless this model has passed them.

    Raises:
        SelfCheckError: what failed, and what to do.
    """
    known = model_info(model).provenance.checks
    if set(known) - {CHANGED}:
        return
    report = check_model(model)
    if report.failed:
        raise SelfCheckError(report)
    update_provenance(model, checks={**known, **{c.name: f"{c.outcome}: {c.measured}" for c in report.checks}})


def check_model(model: LensModel) -> CheckReport:
    """Run every self-check and report; nothing is raised and nothing is recorded.

    Args:
        model: a bridge or a HookedTransformer.

    Returns:
        The outcome of each check with what was measured.
    """
    require_model(model)
    info = model_info(model)
    dtype = dtype_name(next(model.parameters()).dtype)  # pyright: ignore[reportAttributeAccessIssue]
    tolerance = TOLERANCES.get(dtype, TOLERANCES["float32"])
    checks = [
        _check_parity(model, info, tolerance["log_probabilities"]),
        _check_padding(model, tolerance["activations"]),
        _check_plain(model, tolerance["activations"]),
        *_check_hooks(model, tolerance["activations"]),
        _check_bos(model),
        _check_chat_template(model),
    ]
    return CheckReport(info.provenance.title, tuple(checks))


def _verdict(name: str, good: bool, measured: str, advice: str) -> Check:
    return Check(name, "passed" if good else "failed", measured, advice)


def _check_parity(model: LensModel, info: ModelInfo, tolerance: float) -> Check:
    name, reference = PARITY, info.reference_logits
    if not reference:
        recorded = info.provenance.checks.get(name, "")
        if recorded.startswith("passed: "):  # before the weights were rounded
            return Check(name, "passed", recorded.removeprefix("passed: "), "")
        return Check(name, "not applicable", "no Hugging Face model at hand to compare with", "")
    differences = []
    for text, expected in reference.items():
        ids = token_ids(model.tokenizer, text)
        tokens, mask = pad_right([Encoded(ids, (), 0, "none")], pad_token_id(model), device_of(model))
        seen = run_logits(model, tokens, mask)[0].cpu()
        log_p, log_q = expected.log_softmax(-1), seen.log_softmax(-1)
        differences.append((log_p.exp() * (log_p - log_q).abs()).sum(-1).max())
    worst = torch.stack(differences).max().item()  # NaN stays NaN, and fails
    return _verdict(
        name,
        worst <= tolerance,
        f"mean difference of log-probabilities {worst:.1e} nats at the worst position, allowed {tolerance:.0e}",
        "The host library's version of this architecture differs from Hugging Face's: try compatibility=False, float32, or another release.",
    )


def _read(model: LensModel, batch: list[Encoded], names: list[str]) -> tuple[dict[str, Tensor], Counter[str]]:
    seen: dict[str, Tensor] = {}
    fired: Counter[str] = Counter()

    def keep(name: str) -> Callable[..., None]:
        def hook(value: Tensor, hook: Any = None) -> None:
            fired[name] += 1
            seen[name] = value.detach().float()

        return hook

    tokens, mask = pad_right(batch, pad_token_id(model), device_of(model))
    with add_hooks(model, [(name, keep(name)) for name in names]):
        run_trunk(model, tokens, mask)
    return seen, fired


def _check_padding(model: LensModel, tolerance: float) -> Check:
    site = resolve_site(model, "resid_post")
    names = [site.at(layer) for layer in range(model.cfg.n_layers)]
    batch = [encode(model, text) for text in CHECK_TEXTS]
    together, _ = _read(model, batch, names)
    differences = []
    for row, encoded in enumerate(batch):
        alone, _ = _read(model, [encoded], names)
        for name in names:
            a, b = alone[name][0][list(encoded.content)], together[name][row][list(encoded.content)]
            differences.append(((a - b).norm(dim=-1) / a.norm(dim=-1).clamp_min(1e-12)).max())
    worst = torch.stack(differences).max().item()
    return _verdict(
        "a text reads the same alone and in a padded batch",
        worst <= tolerance,
        f"largest relative difference {worst:.1e}, allowed {tolerance:.0e}",
        "Padding leaks into the activations: the attention mask is ignored. Do not use this model with batches.",
    )


def _check_plain(model: LensModel, tolerance: float) -> Check:
    """What makes reading faster where it holds; where it does not, the wrappers stay on, and nothing has failed."""
    if not can_be_plain(model):
        return Check(CHECK, "not applicable", "it is read through its hook points", "")
    site, layers = resolve_site(model, "resid_post"), range(model.cfg.n_layers)
    batch = [encode(model, text) for text in CHECK_TEXTS]
    first = resolve_site(model, "resid_pre").at(0)
    wrapped, _ = _read(model, batch, [first, *(site.at(layer) for layer in layers)])
    seen: dict[int, Tensor] = {}
    tokens, mask = pad_right(batch, pad_token_id(model), device_of(model))
    keep = {layer: functools.partial(seen.__setitem__, layer) for layer in layers}
    with plain_trunk(model) as blocks, plain_hooks(blocks, {0: functools.partial(seen.__setitem__, -1)}, keep):
        run_trunk(model, tokens, mask)
    differences = []
    for layer in (-1, *layers):
        for row, encoded in enumerate(batch):
            places = list(encoded.content)
            expected = wrapped[first if layer < 0 else site.at(layer)]
            a, b = expected[row][places], seen[layer][row].float()[places]
            differences.append(((a - b).norm(dim=-1) / a.norm(dim=-1).clamp_min(1e-12)).max())
    worst = torch.stack(differences).max().item()
    outcome = "passed" if worst <= tolerance else "not applicable"
    return Check(CHECK, outcome, f"largest relative difference {worst:.1e}, allowed {tolerance:.0e}", "")


def _check_hooks(model: LensModel, tolerance: float) -> list[Check]:
    sites = []
    for name in SITES:
        try:
            sites.append(resolve_site(model, name))
        except ValueError:
            continue  # a site that this architecture does not have; resolve_site says so to whoever asks for it
    layers = range(model.cfg.n_layers)
    encoded = encode(model, CHECK_TEXTS[0])
    names = dict.fromkeys(s.at(layer) for s in sites for layer in layers)  # two sites may share a hook point
    seen, fired = _read(model, [encoded], list(names))

    odd = [
        f"{s.at(layer)} fired {fired[s.at(layer)]} times" for s in sites for layer in layers if fired[s.at(layer)] != 1
    ]
    widths = [
        f"{s.at(layer)} is {math.prod(seen[s.at(layer)].shape[2:])} wide, the config says {s.width}"
        for s in sites
        for layer in layers
        if s.at(layer) in seen and math.prod(seen[s.at(layer)].shape[2:]) != s.width
    ]
    broken = [name for name, value in seen.items() if not value.isfinite().all()]
    return [
        _verdict(
            "each hook fires once",
            not odd,
            "; ".join(odd[:2]) or f"{len(fired)} hooks, {len(sites)} sites",
            "A hook that fires never or twice gives wrong averages: this architecture's hooks differ from what we know; please report it.",
        ),
        _verdict(
            "each site has the width its config promises",
            not widths,
            "; ".join(widths[:2]) or ", ".join(f"{s.name} {s.width}" for s in sites),
            "A site is not what its name says: do not use it.",
        ),
        _residual_sums(seen, layers, tolerance),
        _verdict(
            "activations are finite",
            not broken,
            f"first non-finite at {broken[0]}" if broken else "all finite",
            "Use dtype=torch.float32 or bfloat16: Gemma overflows in float16.",
        ),
    ]


def _residual_sums(seen: dict[str, Tensor], layers: range, tolerance: float) -> Check:
    name = "attn_out and mlp_out are what is added to the residual"
    worst, at = 0.0, "none"
    for layer in layers:
        parts = [
            seen.get(f"blocks.{layer}.hook_{p}")
            for p in ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
        ]
        if any(p is None for p in parts):
            return Check(
                name,
                "not applicable",
                f"layer {layer} has no separate resid_mid (parallel attention and MLP)",
                "",
            )
        before, attention, middle, mlp, after = (p for p in parts if p is not None)
        for difference, whole in ((before + attention - middle, middle), (middle + mlp - after, after)):
            share = (difference.norm(dim=-1) / whole.norm(dim=-1).clamp_min(1e-12)).max().item()
            if not share <= worst:
                worst, at = share, f"layer {layer}"
    return _verdict(
        name,
        worst <= tolerance,
        f"largest relative difference {worst:.1e} ({at}), allowed {tolerance:.0e}",
        "The host library hooks these outputs before a post-norm: patching mlp_out or attn_out would mean something else here.",
    )


def _check_bos(model: LensModel) -> Check:
    bos = model.tokenizer.bos_token_id
    text = CHECK_TEXTS[0]
    ours = list(encode(model, text).ids)
    host = model.to_tokens(text)[0].tolist()
    chat = list(encode_prompt(model, text)[0])
    # Where the BOS doubles as a turn marker (SmolLM2) it stands in a chat several times, but never twice in a row at the start.
    doubled = bos is not None and (ours[:2] == [bos, bos] or chat[:2] == [bos, bos])
    count = ours.count(bos) if bos is not None else 0
    return _verdict(
        "BOS stands at the start exactly once",
        ours == host and count <= 1 and not doubled,
        f"{count} in a plain text; {'same' if ours == host else 'other'} tokens as the host library; chat starts with {chat[:2]}",
        "The tokenizer adds its own BOS to ours: check tokenizer.add_bos_token and the chat template.",
    )


def _check_chat_template(model: LensModel) -> Check:
    name = "the chat template round-trips"
    if not getattr(model.tokenizer, "chat_template", None):
        return Check(name, "not applicable", "no chat template: prompts are written plainly", "")
    text = render_chat(model.tokenizer, CHECK_TEXTS[0])
    back = model.tokenizer.decode(
        token_ids(model.tokenizer, text), skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    return _verdict(
        name,
        back == text and text.count(CHECK_TEXTS[0]) == 1,
        f"the prompt stands {text.count(CHECK_TEXTS[0])} times in the rendered chat; "
        + ("decoding its tokens gives it back" if back == text else f"decoding its tokens gives {back[:60]!r}"),
        "The tokenizer changes the rendered chat: the model would see another prompt than the one that is shown.",
    )
