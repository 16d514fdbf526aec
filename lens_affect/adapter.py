"""The one place that knows the host library's model classes.

`TransformerBridge` (TransformerLens 4) and `HookedTransformer` (3.9) are both accepted as they are. Everything above this
module sees tokens with a mask, a forward pass without the unembedding, and hook names of the HookedTransformer vocabulary.
"""

import dataclasses
import hashlib
import logging
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lens_affect.results import Provenance, git_state, package_versions

log = logging.getLogger(__name__)

Hook = tuple[str, Callable[..., Any]]
CHANGED = "weights changed"
"""Key of Provenance.checks under which a model says that weights of it are replaced for the moment."""


@runtime_checkable
class LensModel(Protocol):
    """What a model must offer to be read: a bridge, a HookedTransformer, or anything alike."""

    cfg: Any
    tokenizer: Any

    @property
    def hook_dict(self) -> dict[str, Any]:
        """Hook points by name."""
        ...

    def hooks(self, fwd_hooks: list[Hook] = ...) -> AbstractContextManager[Any]:
        """Context manager that adds hooks and removes them again."""
        ...

    def to_tokens(self, input: Any) -> Tensor:
        """Token ids with BOS as the host library sets it."""
        ...


@dataclass
class ModelInfo:
    """What is known about a loaded model; kept beside it, never inside it."""

    provenance: Provenance
    """Name, source, hash, precision, numerics, dtype, and the outcome of every check."""
    precision_is_automatic: bool = False
    """True when `dtype="auto"` chose bfloat16: readers check that their own pooling survives it."""
    tokenizer_adds_bos: bool = False
    """What the tokenizer does by itself; a bridge holds a copy of it that always adds BOS."""
    restore_float32: Callable[[], None] | None = None
    """Puts the unrounded float32 weights back."""
    verified_poolings: set[str] = field(default_factory=set)
    """Poolings that were seen to survive the rounding to bfloat16."""
    reference_logits: dict[str, Tensor] = field(default_factory=dict)
    """Logits of the never-booted Hugging Face model for the check texts."""


_INFO: weakref.WeakKeyDictionary[Any, ModelInfo] = weakref.WeakKeyDictionary()


def model_info(model: LensModel) -> ModelInfo:
    """What is known about a model; for one that load_model did not make, what can be seen from outside."""
    if model not in _INFO:
        require_model(model)
        adds_bos = bool(getattr(model.cfg, "tokenizer_prepends_bos", False))
        _INFO[model] = ModelInfo(_foreign_provenance(model), tokenizer_adds_bos=adds_bos)
    return _INFO[model]


def set_model_info(model: LensModel, info: ModelInfo) -> None:
    """Remember what is known about a model."""
    _INFO[model] = info


def update_provenance(model: LensModel, **changes: Any) -> None:
    """Change some fields of what is known about a model."""
    info = model_info(model)
    info.provenance = dataclasses.replace(info.provenance, **changes)


def require_model(model: Any) -> None:
    """Refuse what is not a model, by naming what it lacks.

    Raises:
        TypeError: for example for a plain Hugging Face model.
    """
    missing = [name for name in ("cfg", "tokenizer", "hook_dict", "hooks", "to_tokens") if not hasattr(model, name)]
    if missing:
        raise TypeError(
            f"received {type(model).__name__}, which lacks {missing}; allowed are a TransformerBridge or a HookedTransformer: "
            "pass Hugging Face models through load_model(hf_model, tokenizer=...)"
        )
    if model.tokenizer is None:
        raise TypeError(
            "received a model without a tokenizer; texts cannot be read: set model.tokenizer or use load_model"
        )


def _foreign_provenance(model: Any) -> Provenance:
    commit, dirty = git_state()
    parameter = next(model.parameters())
    return Provenance(
        model=str(getattr(model.cfg, "model_name", None) or type(model).__name__),
        source=f"in memory ({type(model).__name__})",
        weights_sha256=parameter_fingerprint(model),
        dtype=dtype_name(parameter.dtype),
        numerics="compatibility" if _is_processed(model) else "hf",
        chat_template_hash=chat_template_hash(model.tokenizer),
        device=parameter.device.type,
        versions=package_versions(),
        git_commit=commit,
        git_dirty=dirty,
    )


def _is_processed(model: Any) -> bool:
    if is_bridge(model):
        return bool(getattr(model, "compatibility_mode", False))
    # HookedTransformer.from_pretrained folds norms and centres what is written to the residual stream, unless told not to.
    folded = str(getattr(model.cfg, "normalization_type", None)).endswith("Pre")
    embedding = model.W_E.detach().float()
    return folded or bool(embedding.mean(-1).abs().max() < 1e-3 * embedding.abs().mean())


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` for torch.float32."""
    return str(dtype).removeprefix("torch.")


def parameter_fingerprint(model: torch.nn.Module) -> str:
    """Hash over every parameter's shape and first 16,384 values, in bfloat16: tells two checkpoints apart without reading gigabytes.

    The same weights in float32 and in bfloat16 have one fingerprint. In float16 they have it too where they were stored in bfloat16 or
    float16: values below 2^-16, for which float16 has fewer digits, count as 0. Of weights stored in float32 it is another one, for
    rounding twice is not rounding once; load_model therefore takes it from a reading in bfloat16.
    """
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(str(tuple(parameter.shape)).encode())
        values = parameter.detach().flatten()[:16384].to(torch.bfloat16).float().cpu()
        values = torch.where(values.abs() < 2.0**-16, 0.0, values)
        digest.update(values.numpy().tobytes())
    return "sampled:" + digest.hexdigest()


def chat_template_hash(tokenizer: Any) -> str | None:
    """First 16 hex digits of the SHA-256 of the chat template, or None where there is none."""
    template = getattr(tokenizer, "chat_template", None)
    return hashlib.sha256(str(template).encode()).hexdigest()[:16] if template else None


def cast_parameters(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Round the weights and nothing else: rotary frequencies and embedding scales stay as Hugging Face keeps them, in float32.

    A bridge gives an unembedding without a bias one of zeros that is a buffer, not a parameter; a linear map needs both in one precision.
    """
    for parameter in model.parameters():
        if parameter.dtype.is_floating_point:
            parameter.data = parameter.data.to(dtype)
    for module in model.modules():
        bias = dict(module.named_buffers(recurse=False)).get("bias")
        if isinstance(module, torch.nn.Linear) and bias is not None:
            bias.data = bias.data.to(dtype)


def is_bridge(model: Any) -> bool:
    """True for a TransformerBridge, which wraps a Hugging Face model."""
    return hasattr(model, "original_model")


def device_of(model: Any) -> torch.device:
    """Device of the first parameter."""
    return next(model.parameters()).device


def context_window(model: LensModel) -> int:
    """Most tokens the model can read at once."""
    return int(model.cfg.n_ctx)


@dataclass(frozen=True)
class Encoded:
    """One text as tokens, with the part that counts."""

    ids: tuple[int, ...]
    """All token ids: BOS or chat prompt, then the text."""
    content: tuple[int, ...]
    """Positions of the text's own tokens: no special token, no prompt, never position 0."""
    start: int
    """Length of what stands before the text (prompt or BOS)."""
    bos: Literal["prepended", "template", "none"]
    """How the first position came about."""

    @property
    def n_text(self) -> int:
        """Number of tokens after the prompt."""
        return len(self.ids) - self.start


def bos_policy(model: LensModel) -> Literal["prepended", "none"]:
    """Whether plain texts get a BOS: once, as TransformerLens prepends it."""
    prepends = bool(getattr(model.cfg, "default_prepend_bos", True)) and model.tokenizer.bos_token_id is not None
    return "prepended" if prepends else "none"


def encode(
    model: LensModel, text: str, prompt: str = "", *, own_bos: bool = False, tokens: Sequence[int] | None = None
) -> Encoded:
    """Tokens of a text, read bare or after the request that it answers.

    Args:
        model: its tokenizer and BOS policy are used.
        text: what is read.
        prompt: a user request; it goes through the chat template where the model has one, else it stands before the text
            with an empty line between.
        own_bos: keep the tokenizer's own default instead of TransformerLens's BOS (protocol jeong2026).
        tokens: of the text, where they are known: a tokenizer may cut a text that a model wrote in other places than the model did.
    """
    tokenizer = model.tokenizer
    body = token_ids(tokenizer, text) if tokens is None else tuple(tokens)
    if prompt:
        head, bos = encode_prompt(model, prompt, own_bos=own_bos)
    else:
        head, bos = _bos_ids(model, own_bos=own_bos)
    ids = (*head, *body)
    special = set(tokenizer.all_special_ids)
    content = tuple(i for i in range(max(len(head), 1), len(ids)) if ids[i] not in special)
    return Encoded(ids, content, len(head), bos)


Form = Literal["chat", "plain", "continue"]
"""How a prompt stands before what is generated: in the chat template; bare with an empty line behind it; or bare, to be gone on with."""


def form_of(model: LensModel) -> Form:
    """`chat` where the model has a chat template, else `plain`."""
    return "chat" if getattr(model.tokenizer, "chat_template", None) else "plain"


def encode_prompt(
    model: LensModel, prompt: str, *, own_bos: bool = False, form: Form | None = None
) -> tuple[tuple[int, ...], Literal["prepended", "template", "none"]]:
    """Tokens of a request up to where the answer starts, and where its BOS comes from.

    A chat template brings its own start; a BOS is never put in front of it.

    Raises:
        ValueError: form="chat" without a chat template.
    """
    form = form or form_of(model)
    if form == "chat":
        if form_of(model) != "chat":
            raise ValueError(
                "received form='chat' for a tokenizer without a chat template; allowed are 'plain' and 'continue': leave form out, or set "
                "model.tokenizer.chat_template"
            )
        return token_ids(model.tokenizer, render_chat(model.tokenizer, prompt)), "template"
    head, bos = _bos_ids(model, own_bos=own_bos)
    return (*head, *token_ids(model.tokenizer, prompt + ("\n\n" if form == "plain" else ""))), bos


def render_chat(tokenizer: Any, prompt: str) -> str:
    """One user turn as the chat template writes it, up to where the assistant's answer starts."""
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )


def token_ids(tokenizer: Any, text: str) -> tuple[int, ...]:
    """Ids of a text with no special token added."""
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def _bos_ids(model: LensModel, *, own_bos: bool) -> tuple[tuple[int, ...], Literal["prepended", "none"]]:
    wanted = model_info(model).tokenizer_adds_bos if own_bos else bos_policy(model) == "prepended"
    return ((int(model.tokenizer.bos_token_id),), "prepended") if wanted else ((), "none")


def pad_right(
    batch: Sequence[Encoded], pad_id: int, device: torch.device
) -> tuple[Int[Tensor, "row position"], Int[Tensor, "row position"]]:
    """Token ids and attention mask (1 = real) of a batch, padded on the right so that positions are those of single runs."""
    width = max(len(e.ids) for e in batch)
    tokens = torch.full((len(batch), width), pad_id, dtype=torch.long)
    mask = torch.zeros((len(batch), width), dtype=torch.long)
    for row, encoded in enumerate(batch):
        tokens[row, : len(encoded.ids)] = torch.tensor(encoded.ids)
        mask[row, : len(encoded.ids)] = 1
    return tokens.to(device), mask.to(device)


def pad_token_id(model: LensModel) -> int:
    """The tokenizer's padding id, or its end-of-text id, or 0: masked positions never count, so any id will do."""
    tokenizer = model.tokenizer
    for found in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if found is not None:
            return int(found)
    return 0


@torch.no_grad()
def run_trunk(
    model: Any,
    tokens: Int[Tensor, "row position"],
    mask: Int[Tensor, "row history"],
    *,
    past: Any = None,
) -> None:
    """Forward pass up to the last block, for its hooks; the unembedding is never computed.

    Args:
        model: a bridge, or a HookedTransformer (without `past`).
        tokens: what is read.
        mask: 1 where a token is real, over what was read before and now.
        past: keys and values of what was read before; it grows by what is read now.
    """
    if past is not None:
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        model.original_model.base_model(
            input_ids=tokens, attention_mask=mask, position_ids=positions, past_key_values=past, use_cache=True
        )
    elif is_bridge(model):
        model.original_model.base_model(input_ids=tokens, attention_mask=mask, use_cache=False)
    else:
        model(tokens, attention_mask=mask, return_type=None)


@torch.no_grad()
def run_logits(
    model: Any, tokens: Int[Tensor, "row position"], mask: Int[Tensor, "row position"]
) -> Float[Tensor, "row position vocab"]:
    """Logits at every position, float32, without a graph."""
    return logits_of(model, tokens, mask)


def logits_of(
    model: Any, tokens: Int[Tensor, "row position"], mask: Int[Tensor, "row position"]
) -> Float[Tensor, "row position vocab"]:
    """Logits at every position, float32, with a graph where gradients are on."""
    if is_bridge(model):
        return model.original_model(input_ids=tokens, attention_mask=mask, use_cache=False).logits.float()
    return model(tokens, attention_mask=mask, return_type="logits").float()


def add_hooks(model: Any, hooks: list[Hook]) -> AbstractContextManager[Any]:
    """The model's own context manager; hooks are gone after the block and after an exception."""
    return model.hooks(fwd_hooks=hooks)


def special_mask(model: LensModel, tokens: Int[Tensor, "*shape"]) -> Bool[Tensor, "*shape"]:
    """True where a token is special."""
    special = torch.tensor(sorted(model.tokenizer.all_special_ids), device=tokens.device)
    return torch.isin(tokens, special)


@torch.no_grad()
def final_norm_scale(model: Any) -> Float[Tensor, " d_model"]:
    """Weight of the final norm as it acts, 1 + w in Gemma and 1 where it is folded into the unembedding.

    Measured, not looked up: an input of +1 and -1 in turn has mean 0 and root mean square 1, so the norm returns the weight
    with those signs; subtracting the output for the negated input removes a bias.
    """
    width = int(model.cfg.d_model)
    parameter = next(model.parameters())
    if not hasattr(model, "ln_final"):  # a HookedTransformer with normalization_type=None
        return torch.ones(width, device=parameter.device)
    signs = torch.ones(width, dtype=parameter.dtype, device=parameter.device)
    signs[1::2] = -1
    positive, negative = (model.ln_final(x.view(1, 1, -1)).view(-1).float() for x in (signs, -signs))
    return (positive - negative) / 2 * signs.float()


@torch.no_grad()
def final_norm_centres(model: Any) -> bool:
    """Whether the final norm takes the mean out (LayerNorm does, RMSNorm does not). Measured: a constant then changes nothing."""
    if not hasattr(model, "ln_final"):
        return False
    parameter = next(model.parameters())
    x = torch.linspace(-1, 1, int(model.cfg.d_model), dtype=parameter.dtype, device=parameter.device).view(1, 1, -1)
    plain, shifted = model.ln_final(x).float(), model.ln_final(x + 1).float()
    return bool((plain - shifted).abs().max() < 0.05 * plain.abs().max())


def unembedding(model: Any) -> Float[Tensor, "d_model vocab"]:
    """W_U in float32."""
    return model.W_U.detach().float()


def soft_cap(model: Any) -> float | None:
    """Limit of the logits' size (Gemma 2), or None."""
    if is_bridge(model):
        return getattr(model.original_model.config.get_text_config(), "final_logit_softcapping", None)
    cap = float(getattr(model.cfg, "output_logits_soft_cap", -1.0))
    return cap if cap > 0 else None


def text_of_token(model: LensModel, token: int) -> str:
    """A single token as text."""
    return str(model.tokenizer.decode([token]))
