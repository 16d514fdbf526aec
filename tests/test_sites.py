"""Sites: every one is what plain hooks on a never-booted Hugging Face model give, and what is not there is refused."""

import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from lens_affect.activations import extract_activations
from lens_affect.adapter import add_hooks, encode, pad_right, pad_token_id, run_trunk
from lens_affect.models import load_model
from lens_affect.sites import SITES, resolve_site
from tests.tiny import DENSE, FAMILIES, make_hf_model, make_tokenizer

TEXTS = (
    "The bus was late.",
    "Nobody had told her. She read the note twice, folded it, and put the kettle on as if it were any other evening.",
)
N_LAYERS = 3
EXPERT_SITES = ("gate", "up", "act", "down")


def make_vivid_model(family):
    """Norm weights and biases away from their initial 1 and 0, so that a site before a norm or without a bias is told apart."""
    model = make_hf_model(family)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


@pytest.fixture(scope="module", params=tuple(FAMILIES))
def pair(request):
    """A family, its bridge, and an independent Hugging Face model with the same weights that is never booted."""
    family = request.param
    return family, load_model(make_vivid_model(family), tokenizer=make_tokenizer()), make_vivid_model(family)


def first(value):
    return value[0] if isinstance(value, tuple) else value


def hf_sites(family, model, ids):
    """{(site, layer): [position, width]} by plain forward hooks on Hugging Face's own modules."""
    seen, handles = {}, []

    def output(site, layer, module):
        handles.append(module.register_forward_hook(lambda m, a, out: seen.update({(site, layer): first(out)[0]})))

    def input_of(site, layer, module):
        def hook(m, args, kwargs):
            seen[site, layer] = (args[0] if args else kwargs["hidden_states"])[0]

        handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    for layer, block in enumerate(model.transformer.h if family == "gpt2" else model.model.layers):
        attention = block.attn if family == "gpt2" else block.self_attn
        input_of("resid_pre", layer, block)
        output("resid_post", layer, block)
        input_of("z", layer, attention.c_proj if family == "gpt2" else attention.o_proj)
        output("o", layer, attention.c_proj if family == "gpt2" else attention.o_proj)
        if family == "gpt2":
            output("qkv", layer, attention.c_attn)
            input_of("resid_mid", layer, block.ln_2)
            input_of("act", layer, block.mlp.c_proj)
            output("down", layer, block.mlp.c_proj)
        else:
            for name in ("q", "k", "v"):
                output(name, layer, getattr(attention, f"{name}_proj"))
        if family.startswith("gemma"):
            input_of("resid_mid", layer, block.pre_feedforward_layernorm)
            output("attn_out", layer, block.post_attention_layernorm)
            output("mlp_out", layer, block.post_feedforward_layernorm)
        else:
            output("attn_out", layer, attention)
            output("mlp_out", layer, block.mlp)
        if family in ("llama", "mistral", "qwen2", "mixtral"):
            input_of("resid_mid", layer, block.post_attention_layernorm)
        if family not in ("gpt2", "mixtral"):
            output("gate", layer, block.mlp.gate_proj)
            output("up", layer, block.mlp.up_proj)
            input_of("act", layer, block.mlp.down_proj)
            output("down", layer, block.mlp.down_proj)
    with torch.no_grad():
        states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
    for handle in handles:
        handle.remove()
    for layer in range(N_LAYERS):
        if ("qkv", layer) in seen:
            seen |= {(s, layer): x for s, x in zip("qkv", seen.pop(("qkv", layer)).chunk(3, -1), strict=True)}
    return seen, [state[0] for state in states]


def our_sites(model, batch):
    """{(site, layer): [row, position, width]} of a padded batch, for every site the resolver grants."""
    seen, hooks = {}, []
    for name in SITES:
        try:
            site = resolve_site(model, name)
        except ValueError:
            continue
        for layer in range(N_LAYERS):
            hooks.append((site.at(layer), lambda v, hook, at=(name, layer): seen.update({at: v.flatten(2).clone()})))
    with add_hooks(model, hooks):
        run_trunk(model, *pad_right(batch, pad_token_id(model), torch.device("cpu")))
    return seen


def far(ours, theirs):
    """Largest difference as a share of the largest value."""
    assert ours.shape == theirs.shape
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def test_every_site_in_a_padded_batch_equals_plain_hooks_on_hugging_faces_modules(pair):
    family, model, hf = pair
    batch = [encode(model, text) for text in TEXTS]
    ours = our_sites(model, batch)
    for row, encoded in enumerate(batch):
        theirs, _ = hf_sites(family, hf, encoded.ids)
        assert set(ours) == set(theirs)  # the resolver grants exactly the sites this architecture has
        for key, value in theirs.items():
            assert far(ours[key][row, : len(encoded.ids)], value) <= 1e-5, key


def test_resid_post_of_layer_l_is_hugging_faces_hidden_state_l_plus_1_and_the_last_one_is_before_the_final_norm(pair):
    family, model, hf = pair
    encoded = encode(model, TEXTS[1])
    ours = our_sites(model, [encode(model, TEXTS[0]), encoded])
    hooked, states = hf_sites(family, hf, encoded.ids)
    n = len(encoded.ids)
    assert far(ours["resid_pre", 0][1, :n], states[0]) <= 1e-5
    for layer in range(N_LAYERS - 1):
        assert far(ours["resid_post", layer][1, :n], states[layer + 1]) <= 1e-5
    last = ours["resid_post", N_LAYERS - 1][1, :n]
    assert far(last, hooked["resid_post", N_LAYERS - 1]) <= 1e-5
    assert far(last, states[N_LAYERS]) > 1e-2  # Hugging Face's last state is after the final norm
    norm = hf.transformer.ln_f if family == "gpt2" else hf.model.norm
    assert far(norm(last), states[N_LAYERS]) <= 1e-5


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
def test_in_gemma_what_is_added_to_the_residual_is_not_the_output_of_the_linear_map(tiny_model, family):
    model = tiny_model(family)
    seen = our_sites(model, [encode(model, TEXTS[1])])
    for layer in range(N_LAYERS):
        assert far(seen["attn_out", layer], seen["o", layer]) > 0.1
        assert far(seen["mlp_out", layer], seen["down", layer]) > 0.1


@pytest.mark.parametrize(("site", "width"), [("q", 64), ("z", 64), ("k", 32), ("v", 32), ("o", 32), ("gate", 48)])
def test_widths_come_from_heads_and_not_from_d_model(tiny_model, site, width):
    assert resolve_site(tiny_model("gemma3"), site).width == width  # 4 heads x 16, 2 key-value heads x 16, d_model 32


@pytest.mark.parametrize("site", ["gate", "up"])
def test_gpt2_has_no_gate(tiny_model, site):
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel has no gated MLP.*not a gate; allowed are 'act', 'down'"):
        resolve_site(tiny_model("gpt2"), site)


@pytest.mark.parametrize("site", EXPERT_SITES)
def test_a_router_is_not_a_gate(tiny_model, site):
    with pytest.raises(ValueError, match=rf"mixture of experts.*router.*no single '{site}'; allowed are .*mlp_out"):
        resolve_site(tiny_model("mixtral"), site)


@pytest.mark.parametrize("family", DENSE)
def test_an_unknown_site_is_refused_with_the_list_of_sites(tiny_model, family):
    with pytest.raises(ValueError, match=r"received site 'gate_proj'; allowed are \['resid_pre'.*'down'\]"):
        resolve_site(tiny_model(family), "gate_proj")


def test_a_site_that_is_not_as_wide_as_its_config_promises_is_refused(tiny_model, few_passages, monkeypatch):
    model = tiny_model("llama")
    monkeypatch.setattr(model.cfg, "d_mlp", 47)
    with pytest.raises(RuntimeError, match=r"mlp.* is 48 wide; its config promises 47"):
        extract_activations(model, few_passages.select(rows=[0]), sites="gate")


def test_parallel_attention_and_mlp_leave_no_resid_mid_and_the_resolver_guesses_none():
    config = GPTNeoXConfig(
        vocab_size=480,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        use_parallel_residual=True,
    )
    torch.manual_seed(0)
    model = load_model(GPTNeoXForCausalLM(config).eval(), tokenizer=make_tokenizer())
    with pytest.raises(
        ValueError, match=r"'resid_mid' has no hook point 'blocks.0.hook_resid_mid'.*nothing was guessed"
    ):
        resolve_site(model, "resid_mid")
    with pytest.raises(ValueError, match="no gated MLP"):
        resolve_site(model, "gate")
    assert resolve_site(model, "resid_post").at(1) == "blocks.1.hook_resid_post"
