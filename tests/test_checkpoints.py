"""Checkpoints: every tensor has its place, whatever the family, the files or the wrapper; what cannot be read is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from lens_affect.catalogue import FetchError
from lens_affect.checkpoints import dequantize, locate_weights, open_checkpoint
from lens_affect.models import load_model
from lens_affect.sizes import MODULES, module_shapes
from tests.tiny import DENSE, make_hf_model, make_tokenizer

FUSED = ("gpt2", "phi3")


@pytest.mark.parametrize("family", [*DENSE, "phi3"])
def test_every_tensor_of_a_family_has_its_place(family, tmp_path):
    model = make_hf_model(family)
    model.save_pretrained(tmp_path / "m")
    found = open_checkpoint(tmp_path / "m")
    shapes = module_shapes(model.config)
    assert found.modules == tuple(shapes)
    assert found.n_layers == 3
    for part in found.parts.values():
        if part.is_linear:
            assert part.shape == shapes[part.module], part
            assert found.read(part.key).shape == part.shape
            assert torch.equal(found.read(part.key, slice(2, 5)), found.read(part.key)[2:5])
    assert sum(part.size for part in found.parts.values()) == sum(p.numel() for p in model.parameters())
    kinds = {part.module for part in found.parts.values()}
    assert {"embed", "unembed", "norm"} <= kinds <= {*MODULES, "embed", "unembed", "norm", "bias"}
    assert found.parts["embed"].shape == (480, 32)


@pytest.mark.parametrize("family", [*DENSE, "phi3"])
def test_what_is_read_is_what_the_model_computes_with(family):
    """Feeding a vector through each projection gives the weight that was read, whether it lies transposed or fused."""
    model = make_hf_model(family)
    found = open_checkpoint(model)
    block = (model.transformer.h if family == "gpt2" else model.model.layers)[1]
    x = torch.randn(1, 32, generator=torch.Generator().manual_seed(0))
    if family == "gpt2":
        q, k, v = block.attn.c_attn(x).split(32, -1)
        wanted = {"q": q, "k": k, "v": v, "up": block.mlp.c_fc(x), "o": block.attn.c_proj(x)}
    elif family == "phi3":
        q, k, v = block.self_attn.qkv_proj(x).split([32, 16, 16], -1)
        gate, up = block.mlp.gate_up_proj(x).chunk(2, -1)
        wanted = {"q": q, "k": k, "v": v, "gate": gate, "up": up, "o": block.self_attn.o_proj(x)}
    else:
        wanted = {m: getattr(block.self_attn, f"{m}_proj")(x) for m in ("q", "k", "v")}
        wanted |= {m: getattr(block.mlp, f"{m}_proj")(x) for m in ("gate", "up")}
    for name, expected in wanted.items():
        weight = found.read(f"layers.1.{name}")
        bias = found.read(f"layers.1.{name}.bias") if f"layers.1.{name}.bias" in found.parts else 0
        torch.testing.assert_close(x @ weight.T + bias, expected)


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen2", *FUSED])
def test_a_bridge_has_the_places_of_its_model(family):
    plain = open_checkpoint(make_hf_model(family))
    bridge = load_model(make_hf_model(family), tokenizer=make_tokenizer())
    found = open_checkpoint(bridge)
    assert set(found.parts) == set(plain.parts)
    assert all(torch.equal(found.read(key), plain.read(key)) for key in plain.parts)
    assert found.vocabulary == make_tokenizer().get_vocab()


def test_shards_one_file_and_memory_agree(tmp_path):
    model = make_hf_model("llama")
    model.save_pretrained(tmp_path / "shards", max_shard_size="30KB")
    model.save_pretrained(tmp_path / "one")
    make_tokenizer().save_pretrained(tmp_path / "one")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    sharded, one, memory = (
        open_checkpoint(tmp_path / "shards"),
        open_checkpoint(str(tmp_path / "one")),
        open_checkpoint(model),
    )
    assert list(sharded.parts)
    assert set(sharded.parts) == set(one.parts) == set(memory.parts)
    for key in one.parts:
        assert torch.equal(sharded.read(key), one.read(key))
        assert torch.equal(memory.read(key), one.read(key))
    assert one.vocabulary == make_tokenizer().get_vocab()
    assert sharded.vocabulary is None
    assert one.names[0] == one.source == str(tmp_path / "one")
    assert open_checkpoint(one) is one


def test_tied_outputs_are_one_tensor(tmp_path):
    model = make_hf_model("llama")
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tmp_path / "tied")
    assert "unembed" not in open_checkpoint(tmp_path / "tied").parts
    assert "unembed" not in open_checkpoint(model).parts


def test_a_router_is_no_gate():
    found = open_checkpoint(make_hf_model("mixtral"))
    assert found.modules == ("q", "k", "v", "o")
    assert found.parts["layers.0.mlp.gate.weight"].module == "other"


def test_other_towers_and_old_buffers_are_left_alone(tmp_path):
    model = make_hf_model("gpt2")
    model.save_pretrained(tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    tensors = {name.removeprefix("transformer."): t for name, t in tensors.items()}  # as the hub's gpt2 has it
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 8, 8)
    tensors["vision_tower.encoder.layers.0.self_attn.q_proj.weight"] = torch.ones(4, 4)
    save_file(tensors, tmp_path / "m" / "model.safetensors")
    found = open_checkpoint(tmp_path / "m")
    assert set(open_checkpoint(model).parts) - {"unembed"} <= set(found.parts)
    assert found.parts["vision_tower.encoder.layers.0.self_attn.q_proj.weight"].module == "other"
    assert not any(part.shape == (1, 1, 8, 8) for part in found.parts.values())
    save_file(
        tensors | {"encoder.layers.0.attn.c_proj.weight": torch.ones(32, 32)}, tmp_path / "m" / "model.safetensors"
    )
    with pytest.raises(ValueError, match=r"two tensors for layers\.0\.o"):
        open_checkpoint(tmp_path / "m")


def test_simple_quantizations_are_dequantized_and_packed_ones_refused(tmp_path):
    model = make_hf_model("llama")
    model.save_pretrained(tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.gate_proj.weight"
    exact = tensors[name]
    scale = exact.abs().amax(1)
    int8 = tensors | {name: (exact / scale[:, None] * 127).round().to(torch.int8), name.replace("weight", "SCB"): scale}
    save_file(int8, file)
    found = open_checkpoint(tmp_path / "m")
    assert (found.read("layers.1.gate") - exact).abs().max() < 0.005
    assert torch.equal(found.read("layers.1.gate", slice(3, 6)), found.read("layers.1.gate")[3:6])
    assert set(found.parts) == set(open_checkpoint(model).parts)
    blocks = exact.abs().amax().reshape(1, 1) / 400
    save_file(tensors | {name: (exact / blocks).to(torch.float8_e4m3fn), f"{name}_scale_inv": blocks}, file)
    assert (open_checkpoint(tmp_path / "m").read("layers.1.gate") - exact).abs().max() < 0.05
    save_file(tensors | {name: torch.zeros(768, 1, dtype=torch.uint8)}, file)
    with pytest.raises(ValueError, match=r"quantized weights .*gate_proj.weight is U8.*model.dequantize\(\)"):
        open_checkpoint(tmp_path / "m")
    save_file(tensors | {name: int8[name]}, file)
    with pytest.raises(ValueError, match="is I8"):
        open_checkpoint(tmp_path / "m")
    spread = dequantize(torch.ones(130, 200), torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "w_scale_inv")
    assert (spread[0, 0], spread[0, 199], spread[129, 0], spread[129, 199]) == (1, 2, 3, 4)
    with pytest.raises(ValueError, match="allowed are scales for the tensor"):
        dequantize(torch.ones(4, 4), torch.ones(3), "w_scale")


@pytest.mark.parametrize("file", ["model.safetensors", "model-00002", "index", "config.json", "bin"])
def test_damaged_folders_say_what_is_wrong(file, tmp_path):
    model = make_hf_model("llama")
    folder = tmp_path / "m"
    model.save_pretrained(folder, **({} if file in ("model.safetensors", "bin") else {"max_shard_size": "30KB"}))
    index = folder / "model.safetensors.index.json"
    if file == "model.safetensors":
        (folder / file).write_bytes((folder / file).read_bytes()[:500])
        message = "damaged or missing file .*model.safetensors"
    elif file == "model-00002":
        next(folder.glob("model-00002*")).unlink()
        message = "damaged or missing file .*model-00002"
    elif file == "index":
        index.write_text(json.dumps({"weight_map": {"a": "../../elsewhere.safetensors"}}))
        message = "allowed are files beside it"
    elif file == "config.json":
        (folder / file).unlink()
        message = "holds no readable config"
    else:
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
        message = "only pytorch_model.bin, which would have to be unpickled"
    with pytest.raises(ValueError, match=message):
        open_checkpoint(folder)
    if file == "index":
        index.write_text("{")
        with pytest.raises(ValueError, match="damaged index"):
            open_checkpoint(folder)


def test_names_lead_to_folders_or_say_what_is_allowed(tmp_path):
    with pytest.raises(ValueError, match="did you mean 'smollm2-135m-instruct'"):
        locate_weights("smollm3")
    with pytest.raises(ValueError, match=r"mine\.gguf', which is not there"):
        locate_weights(tmp_path / "mine.gguf")
    with pytest.raises(
        FetchError, match=r"could not fetch nobody/nothing-here from the Hugging Face hub .*name a folder"
    ):
        locate_weights("nobody/nothing-here")
    assert locate_weights(tmp_path) == tmp_path
    with pytest.raises(ValueError, match="holds no weights"):
        (tmp_path / "config.json").write_text("{}")
        open_checkpoint(tmp_path)


def test_models_whose_weights_are_not_raw_are_refused():
    bridge = load_model(make_hf_model("llama"), tokenizer=make_tokenizer(), compatibility=True)
    with pytest.raises(ValueError, match="compatibility mode"):
        open_checkpoint(bridge)
    with pytest.raises(TypeError, match="received list; allowed are a folder"):
        open_checkpoint([1])
    with torch.device("meta"):
        empty = type(make_hf_model("llama"))(make_hf_model("llama").config)
    with pytest.raises(ValueError, match="is not in memory"):
        open_checkpoint(empty)
