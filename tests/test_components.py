"""Writers: weights seen along a direction are those of the module, whatever way it stores them."""

import pytest
import torch

from lens_affect.components import attention_sites, gate_site, make_writer, mlp_sites
from lens_affect.models import load_model
from tests.test_sites import make_vivid_model
from tests.tiny import DENSE, make_tokenizer


@pytest.fixture(scope="module", params=DENSE)
def pair(request):
    """A family, its bridge, and a never-booted Hugging Face model with the same weights."""
    family = request.param
    return family, load_model(make_vivid_model(family), tokenizer=make_tokenizer()), make_vivid_model(family)


def matrix_and_bias(family, hf, layer, part):
    """`[input, d_model]` and `[d_model]` of the last linear map, with the post-norm's weight on both."""
    if family == "gpt2":
        block = hf.transformer.h[layer]
        module = block.attn.c_proj if part == "attention" else block.mlp.c_proj
        return module.weight.double(), module.bias.double()
    block = hf.model.layers[layer]
    module = block.self_attn.o_proj if part == "attention" else block.mlp.down_proj
    matrix = module.weight.double().T
    if family.startswith("gemma"):
        norm = block.post_attention_layernorm if part == "attention" else block.post_feedforward_layernorm
        matrix = matrix * (1 + norm.weight.double())
    return matrix, torch.zeros(matrix.shape[1], dtype=torch.float64)


@pytest.mark.parametrize("part", ["attention", "mlp"])
def test_weights_along_directions_biases_and_rows_are_hugging_faces(pair, part):
    family, model, hf = pair
    matrix, bias = matrix_and_bias(family, hf, 1, part)
    directions = torch.randn(3, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    writer = make_writer(model, 1, part)
    assert writer.width == matrix.shape[0]
    assert writer.has_norm == family.startswith("gemma")
    torch.testing.assert_close(writer.onto(directions), directions @ matrix.T, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(writer.rows([5, 0]), matrix[[5, 0]], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(writer.bias(), bias, rtol=1e-5, atol=1e-6)


def test_measuring_leaves_no_gradient_on_the_model(tiny_model):
    model = tiny_model("gemma3")
    make_writer(model, 0, "mlp").onto(torch.ones(1, 32, dtype=torch.float64))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_fixed_scale_of_a_post_norm_is_one_over_the_root_mean_square(pair):
    _, model, _ = pair
    writer = make_writer(model, 0, "mlp")
    before = torch.randn(4, 32, generator=torch.Generator().manual_seed(1))
    scale = before.double().square().mean(-1).rsqrt()
    after = before * writer.gain * scale[:, None] if writer.has_norm else before
    expected = scale if writer.has_norm else torch.ones(4, dtype=torch.float64)
    torch.testing.assert_close(writer.scale(before, after), expected)
    if writer.has_norm:
        assert writer.scale(torch.zeros(1, 32), torch.zeros(1, 32)).item() == 0


def test_sites_are_named_by_what_they_are(tiny_model):
    found = attention_sites(tiny_model("llama"))
    assert (found.input.name, found.raw.name, found.written.name) == ("z", "o", "attn_out")
    assert gate_site(tiny_model("gpt2")) is None
    assert gate_site(tiny_model("llama")).at(2) == "blocks.2.mlp.hook_pre"
    with pytest.raises(ValueError, match="mixture of experts"):
        mlp_sites(tiny_model("mixtral"))
