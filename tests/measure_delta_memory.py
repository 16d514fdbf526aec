"""Run by test_deltas: how much memory comparing a sharded pair takes beyond what the libraries have, against the plan's bound."""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

HIDDEN, INNER, LAYERS, VOCABULARY = 512, 1536, 8, 12000
CONFIG = {
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 8,
    "vocab_size": VOCABULARY,
}
SHAPES = {f"self_attn.{m}_proj": (HIDDEN, HIDDEN) for m in "qkvo"}
SHAPES |= {"mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN), "mlp.down_proj": (HIDDEN, INNER)}


def write_model(folder: Path, change: float) -> int:
    """One shard per block, and one for the embedding; the same numbers each time but for the change."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    where, size = {}, 0
    for shard in range(LAYERS + 1):
        generator = torch.Generator().manual_seed(shard)
        shapes = (
            {f"model.layers.{shard}.{name}.weight": s for name, s in SHAPES.items()}
            if shard < LAYERS
            else {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
        )
        tensors = {n: (1 + change) * torch.randn(s, generator=generator) for n, s in shapes.items()}
        save_file(tensors, folder / f"part-{shard}.safetensors")
        where |= dict.fromkeys(tensors, f"part-{shard}.safetensors")
        size += sum(t.numel() * 4 for t in tensors.values())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return size


def write_adapter(folder: Path, names: tuple[str, ...] = tuple(SHAPES)) -> None:
    folder.mkdir()
    settings = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "base_model_name_or_path": "base"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    tensors = {}
    for layer in range(LAYERS):
        for name in names:
            outputs, inputs = SHAPES[name]
            path = f"base_model.model.model.layers.{layer}.{name}"
            tensors |= {
                f"{path}.lora_A.weight": torch.randn(8, inputs),
                f"{path}.lora_B.weight": torch.randn(outputs, 8),
            }
    save_file(tensors, folder / "adapter_model.safetensors")


def status(name: str) -> float:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name))
    return float(line.split()[1]) * 1024


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    size = write_model(folder / "base", 0.0)
    write_model(folder / "tuned", 0.01)
    write_adapter(folder / "adapter")
    write_adapter(folder / "of-one-module", ("self_attn.q_proj",))
    from lens_affect.delta_plans import plan_delta
    from lens_affect.deltas import compare_modules

    for tuned in ("tuned", "adapter", "of-one-module"):
        plan = plan_delta(folder / "base", folder / tuned)  # loads every library that comparing needs
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
        before = status("VmRSS")
        table = compare_modules(folder / "base", folder / tuned).to_frame()
        assert len(table) == 7 * LAYERS
        print(status("VmHWM") - before, plan.peak_bytes, size)


if __name__ == "__main__":
    main()
