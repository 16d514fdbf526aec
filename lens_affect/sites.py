"""Sites: the places in a block that can be read, patched or steered, and the proof that a name means what it says.

A site is the output of the linear map of that name: q, k, v, o, gate, up, down. Beside them the residual stream
(resid_pre, resid_mid, resid_post), attn_out and mlp_out (what is added to the residual, after Gemma's post-norms), z
(head-wise, before o) and act = act_fn(gate) * up, the input of down.
"""

from dataclasses import dataclass
from typing import Any

from lens_affect.adapter import LensModel, is_bridge

SITES = (
    "resid_pre",
    "resid_mid",
    "resid_post",
    "attn_out",
    "mlp_out",
    "q",
    "k",
    "v",
    "z",
    "o",
    "gate",
    "up",
    "act",
    "down",
)
"""Every site name."""

_HOOKS = {
    "resid_pre": "hook_resid_pre",
    "resid_mid": "hook_resid_mid",
    "resid_post": "hook_resid_post",
    "attn_out": "hook_attn_out",
    "mlp_out": "hook_mlp_out",
    "q": "attn.hook_q",
    "k": "attn.hook_k",
    "v": "attn.hook_v",
    "z": "attn.hook_z",
    "o": "attn.o.hook_out",
    "gate": "mlp.hook_pre",
    "up": "mlp.hook_pre_linear",
    "act": "mlp.hook_post",
    "down": "mlp.out.hook_out",
}
# HookedTransformer has no hook after the bare linear map; without post-norms it is what is added to the residual.
_WITHOUT_BRIDGE = {"o": "attn_out", "down": "mlp_out"}


@dataclass(frozen=True)
class Site:
    """A proven site of one model."""

    name: str
    """One of `SITES`."""
    hook: str
    """Hook point below `blocks.{layer}.`."""
    width: int
    """Size of the activation per position, heads flattened."""

    def at(self, layer: int) -> str:
        """Full hook name, e.g. `blocks.3.mlp.hook_pre`."""
        return f"blocks.{layer}.{self.hook}"


def resolve_site(model: LensModel, site: str) -> Site:
    """Find a site's hook point in this model and prove it against the model's config.

    Args:
        model: a bridge or a HookedTransformer.
        site: one of `SITES`.

    Returns:
        The site, with the width that every read is checked against.

    Raises:
        ValueError: an unknown name, or a site this architecture does not have (GPT-2 has no gate; in a mixture of experts
            `mlp.gate` is the router).

    Example:
        >>> resolve_site(model, "gate").at(3)  # doctest: +SKIP
        'blocks.3.mlp.hook_pre'
    """
    if site not in SITES:
        raise ValueError(f"received site {site!r}; allowed are {list(SITES)}")
    _refuse_missing_module(model, site)
    name = site
    if not is_bridge(model) and site in _WITHOUT_BRIDGE:
        if _has_post_norms(model.cfg):
            raise ValueError(
                f"received site {site!r} for a HookedTransformer with post-norms, which has no hook before them; allowed is "
                f"{_WITHOUT_BRIDGE[site]!r}, or load the model as a TransformerBridge"
            )
        name = _WITHOUT_BRIDGE[site]
    found = Site(site, _HOOKS[name], site_width(model.cfg, site))
    known = model.hook_dict  # a bridge makes it anew each time it is asked for
    absent = [found.at(layer) for layer in range(model.cfg.n_layers) if found.at(layer) not in known]
    if absent:
        raise ValueError(
            f"site {site!r} has no hook point {absent[0]!r} in this architecture; nothing was guessed: choose another site"
        )
    return found


def _has_post_norms(cfg: Any) -> bool:
    """Whether a HookedTransformer normalizes what a block adds: with norms of their own (Gemma 2 and 3), or with ln1 and ln2 (OLMo 2 and 3)."""
    moved = str(getattr(cfg, "original_architecture", None)).startswith(("Olmo2For", "Olmo3For"))
    return moved or bool(getattr(cfg, "use_normalization_before_and_after", False))


def _refuse_missing_module(model: LensModel, site: str) -> None:
    cfg: Any = model.cfg
    name = (
        getattr(cfg, "architecture", None)
        or getattr(cfg, "original_architecture", None)
        or getattr(cfg, "model_name", "this model")
    )
    if site in ("gate", "up", "act", "down") and (getattr(cfg, "num_experts", None) or 0) > 1:
        raise ValueError(
            f"{name} is a mixture of experts: its mlp.gate is the router and its mlp hooks see d_model-wide inputs, so there is no "
            f"single {site!r}; allowed are the attention and residual sites, or mlp_out"
        )
    if site in ("mlp_out", "gate", "up", "act", "down") and getattr(cfg, "attn_only", False):
        raise ValueError(f"{name} has no MLP, so there is no {site!r}; allowed are the attention and residual sites")
    if site in ("gate", "up") and not getattr(cfg, "gated_mlp", False):
        raise ValueError(
            f"{name} has no gated MLP: its hook_pre is the first MLP matrix, not a gate; allowed are 'act', 'down' and the other sites"
        )


def site_width(cfg: Any, site: str) -> int:
    """Width per position that the config promises, heads flattened: q is n_heads x d_head, k and v n_kv_heads x d_head."""
    kv_heads = getattr(cfg, "n_key_value_heads", None) or cfg.n_heads
    if getattr(cfg, "ungroup_grouped_query_attention", False):  # HookedTransformer then repeats k and v for every head
        kv_heads = cfg.n_heads
    if site in ("q", "z"):
        return cfg.n_heads * cfg.d_head
    if site in ("k", "v"):
        return kv_heads * cfg.d_head
    if site in ("gate", "up", "act"):
        return cfg.d_mlp
    return cfg.d_model
