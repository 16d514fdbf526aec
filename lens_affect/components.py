"""What attention heads and MLP neurons write into the residual stream, seen along directions.

A head writes z W_O and a neuron writes act(gate) * up * W_down; in Gemma 2 and 3 a norm stands between them and the residual stream. That
norm is linear once its scale per token is held fixed, so everything becomes: fixed scale * value * (a weight row, times the norm's
weight, projected on the direction). Weight rows are projected first, so no `[token, neuron, d_model]` array is ever made.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from lens_affect.adapter import LensModel, is_bridge
from lens_affect.sites import Site, resolve_site, site_width


@dataclass(frozen=True)
class Writer:
    """The last linear map of one attention or MLP, with the post-norm that follows it, if any."""

    linear: Callable[[Float[Tensor, "row width"]], Float[Tensor, "row d_model"]]
    """The map W_O or W_down with its bias, without hooks."""
    width: int
    """Size of its input: heads x d_head, or neurons."""
    gain: Float[Tensor, " d_model"]
    """Weight of the post-norm as it acts (1 + w in Gemma); 1 without one."""
    has_norm: bool
    """Whether there is a post-norm."""
    like: Tensor
    """A parameter; inputs get its dtype and device."""

    def onto(self, directions: Float[Tensor, "direction d_model"]) -> Float[Tensor, "direction width"]:
        """What one unit of each input adds along each direction, before the fixed scale; float64.

        Measured as a derivative, not looked up: Linear and Conv1D store their weights transposed, and adapters may lie on top of them.
        """
        goal = (directions.double().to(self.gain.device) * self.gain).to(self.like.dtype)
        with torch.enable_grad():
            x = torch.zeros(len(directions), self.width, dtype=self.like.dtype, device=self.like.device)
            x.requires_grad_(True)
            (found,) = torch.autograd.grad((self.linear(x) * goal).sum(), x)
        return found.double()

    @torch.no_grad()
    def bias(self) -> Float[Tensor, " d_model"]:
        """The map's bias times the post-norm's weight: what is written when every input is 0; float64."""
        zero = torch.zeros(1, self.width, dtype=self.like.dtype, device=self.like.device)
        return self.linear(zero)[0].double() * self.gain

    @torch.no_grad()
    def rows(self, indices: list[int]) -> Float[Tensor, "index d_model"]:
        """The vectors that single inputs write, before the fixed scale; float64."""
        x = torch.zeros(len(indices), self.width, dtype=self.like.dtype, device=self.like.device)
        x[range(len(indices)), indices] = 1
        return self.linear(x).double() * self.gain - self.bias()

    def scale(
        self, before: Float[Tensor, "*row d_model"], after: Float[Tensor, "*row d_model"]
    ) -> Float[Tensor, "*row"]:
        """The factor per token that the post-norm applied beside its weight; 1 without a norm; float64.

        Read off the model's own numbers by least squares: no epsilon to know. A token that writes nothing gets 0.
        """
        if not self.has_norm:
            return torch.ones(before.shape[:-1], dtype=torch.float64, device=before.device)
        weighted = before.double() * self.gain
        return (weighted * after.double()).sum(-1) / weighted.square().sum(-1).clamp_min(1e-300)


@dataclass(frozen=True)
class WriterSites:
    """Where a kind of sub-layer is read: its input, its output, and what is added to the residual stream."""

    input: Site
    """`z` or `act`."""
    raw: Site
    """`o` or `down`: before the post-norm."""
    written: Site
    """`attn_out` or `mlp_out`: after it."""


def attention_sites(model: LensModel) -> WriterSites:
    """Sites of the attention, each proven by resolve_site."""
    return WriterSites(resolve_site(model, "z"), resolve_site(model, "o"), resolve_site(model, "attn_out"))


def mlp_sites(model: LensModel) -> WriterSites:
    """Sites of the MLP.

    Raises:
        ValueError: a mixture of experts, or a model without MLPs: it has no neurons in this sense.
    """
    return WriterSites(resolve_site(model, "act"), resolve_site(model, "down"), resolve_site(model, "mlp_out"))


def gate_site(model: LensModel) -> Site | None:
    """The MLP's gate, or None in a model whose MLP has none (GPT-2)."""
    return resolve_site(model, "gate") if getattr(model.cfg, "gated_mlp", False) else None


def make_writer(model: Any, layer: int, part: Literal["attention", "mlp"]) -> Writer:
    """The writer of one layer's attention or MLP, with the weights as they are now (raw or folded).

    Args:
        model: a bridge, or a HookedTransformer without post-norms.
        layer: 0-based block.
        part: which of the two.
    """
    block = model.blocks[layer]
    width = site_width(model.cfg, "z" if part == "attention" else "act")
    if not is_bridge(model):
        # resolve_site has refused a HookedTransformer with post-norms: it has no hook before them
        weight, bias = (block.attn.W_O, block.attn.b_O) if part == "attention" else (block.mlp.W_out, block.mlp.b_out)
        gain = torch.ones(model.cfg.d_model, dtype=torch.float64, device=weight.device)
        return Writer(lambda x: x @ weight.reshape(width, -1) + bias, width, gain, False, weight)
    linear = (block.attn.o if part == "attention" else block.mlp.out).original_component
    like = next(linear.parameters())
    norm = getattr(block, "ln1_post" if part == "attention" else "ln2_post", None)
    gain = torch.ones(model.cfg.d_model, dtype=torch.float64, device=like.device)
    if norm is not None:
        gain = _norm_weight(norm.original_component, gain)
    return Writer(linear, width, gain, norm is not None, like)


@torch.no_grad()
def _norm_weight(norm: Any, ones: Float[Tensor, " d_model"]) -> Float[Tensor, " d_model"]:
    """An RMS norm's weight as it acts: an input of ones has root mean square 1 (as in adapter.final_norm_scale)."""
    parameter = next(norm.parameters(), ones)
    return norm(ones.to(parameter.dtype).view(1, 1, -1)).view(-1).double()
