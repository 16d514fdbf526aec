"""What learns in a model, and how the model gets back: an arm's maps made trainable, or a tuned arm put in, and everything restored afterwards."""

import contextlib
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lens_affect.adapter import LensModel, model_info
from lens_affect.answers import require_bridge
from lens_affect.arms import Arm
from lens_affect.sizes import MODULES
from lens_affect.statistics import derive_seed
from lens_affect.tuned import SCALE, Tuned, weight_changes


def linear_maps(model: Any) -> dict[str, tuple[str, torch.nn.Linear]]:
    """Linear maps of a bridge by place (`layers.3.gate`): Hugging Face's name of the map, and the map itself.

    Raises:
        ValueError: a model whose maps have other names (GPT-2, Phi-3 with its fused maps, mixtures of experts).
    """
    require_bridge(model, "tuning")
    found = {}
    for name, part in model.original_model.named_modules():
        plain = name.replace("._original_component", "")
        place = re.search(r"layers\.(\d+)\.(?:self_attn|mlp)\.(\w+)_proj$", plain)
        if isinstance(part, torch.nn.Linear) and place and place[2] in MODULES:
            found[f"layers.{place[1]}.{place[2]}"] = (plain, part)
    if not found:
        raise ValueError(
            f"received {type(model.original_model).__name__}, which has no linear maps named q_proj to down_proj; allowed are models of the "
            "Llama, Qwen, Mistral and Gemma types"
        )
    return found


@contextlib.contextmanager
def trainable(model: Any, arm: Arm, seed: int) -> Iterator[dict[str, torch.nn.Parameter]]:
    """Only the arm's parameters learn inside; afterwards, also after an exception, the model is as it was."""
    flags = {name: p.requires_grad for name, p in model.original_model.named_parameters()}
    for parameter in model.original_model.parameters():
        parameter.requires_grad_(False)
    try:
        with (_lora if arm.method == "lora" else _whole)(model, arm, seed) as parameters:
            yield parameters
    finally:
        for name, parameter in model.original_model.named_parameters():
            parameter.requires_grad_(flags[name])
            parameter.grad = None


@contextlib.contextmanager
def _lora(model: Any, arm: Arm, seed: int) -> Iterator[dict[str, torch.nn.Parameter]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft asks transformers by a name that is about to change
        from peft import LoraConfig, get_peft_model

        maps = linear_maps(model)
        inner = {id(part): name for name, part in model.original_model.named_modules()}
        ranks = {inner[id(maps[place][1])]: rank for place, rank in arm.ranks.items()}
        # A bridge's wrappers answer for what they hold, so peft's own unload would take them out too.
        parents = [(model.original_model.get_submodule(n.rpartition(".")[0]), n.rpartition(".")[2]) for n in ranks]
        kept = [(parent, name, parent._modules[name]) for parent, name in parents]
        config = LoraConfig(
            target_modules=list(ranks),
            rank_pattern={re.escape(name): rank for name, rank in ranks.items()},
            alpha_pattern={re.escape(name): SCALE * rank for name, rank in ranks.items()},
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(seed, "LoRA"))
            get_peft_model(model.original_model, config)
    try:
        parameters = {}
        for name, parameter in model.original_model.named_parameters():
            if ".lora_" in name:
                plain = name.replace("._original_component", "").replace(".default", "")
                parameters[plain] = parameter.requires_grad_(True)
        trained = sum(parameter.numel() for parameter in parameters.values())
        if trained != arm.n_parameters:
            raise RuntimeError(
                f"peft trains {trained} weights and the plan was {arm.n_parameters}; report this with the versions"
            )
        yield parameters
    finally:
        for parent, name, original in kept:
            parent._modules[name] = original
        # peft notes on the model that it was there
        for left in ("peft_config", "_hf_peft_config_loaded"):
            if left in model.original_model.__dict__:
                delattr(model.original_model, left)


@contextlib.contextmanager
def _whole(model: Any, arm: Arm, seed: int) -> Iterator[dict[str, torch.nn.Parameter]]:
    maps = linear_maps(model)
    parameters: dict[str, Any] = {f"{maps[place][0]}.weight": maps[place][1].weight for place in arm.ranks}
    kept = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    try:
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        yield parameters
    finally:
        _copy_back(parameters, kept)


@torch.no_grad()
def _copy_back(parameters: Mapping[str, Any], kept: Mapping[str, Tensor]) -> None:
    for name, value in kept.items():
        parameters[name].copy_(value)


@contextlib.contextmanager
def tuned_weights(model: LensModel, tuned: Tuned) -> Iterator[LensModel]:
    """The model with an arm's weights in place; afterwards, also after an exception, bit for bit as before.

    Args:
        model: the bridge that was tuned.
        tuned: the arm.

    Raises:
        ValueError: an arm of another model.
    """
    if tuned.provenance.weights_sha256 != model_info(model).provenance.weights_sha256:
        raise ValueError(
            f"received an arm of {tuned.provenance.title} for {model_info(model).provenance.title} (weights differ); load the model it was "
            "tuned from"
        )
    maps = linear_maps(model)
    kept = {place: maps[place][1].weight.detach().clone() for place in tuned.arm.ranks}
    try:
        with torch.no_grad():
            for place, change in weight_changes(tuned).items():
                weight = maps[place][1].weight
                weight.add_(change) if tuned.arm.method == "lora" else weight.copy_(change)
        yield model
    finally:
        with torch.no_grad():
            for place, value in kept.items():
                maps[place][1].weight.copy_(value)
