"""Direct attribution: parts sum to the whole in every dense family, equal a computation by hand, and find what was planted."""

from dataclasses import replace

import pytest
import torch

from lens_affect import attribution
from lens_affect.activations import extract_activations
from lens_affect.adapter import encode, model_info
from lens_affect.attribution import DirectAttribution, attribute_direction, write_explanation
from lens_affect.models import load_model
from lens_affect.projections import projection_by_layer
from lens_affect.vectors import EmotionVectors, fit_vectors
from tests.test_components import matrix_and_bias
from tests.test_sites import hf_sites, make_vivid_model
from tests.tiny import DENSE, make_hf_model, make_tokenizer

TEXT = "Nobody had told her. She read the note twice, and put the kettle on."
EVERY = 10_000


def make_vectors(model, directions, *, emotions=("sad", "happy")):
    """EmotionVectors with given directions `[emotion, d_model]`, the same at every layer."""
    n_layers = model.cfg.n_layers
    unit = directions / directions.norm(dim=-1, keepdim=True)
    return EmotionVectors(
        directions=unit[:, None].repeat(1, n_layers, 1),
        raw_norms=torch.ones(len(emotions), n_layers),
        reference=torch.full((n_layers, unit.shape[1]), 0.1),
        reliability=torch.ones(len(emotions), n_layers),
        emotions=emotions,
        layers=tuple(range(n_layers)),
        site="resid_post",
        n_layers=n_layers,
        n_texts=2,
        baseline="grand_mean",
        pooling="mean",
        source="by hand",
        provenance=model_info(model).provenance,
    )


def random_vectors(model):
    generator = torch.Generator().manual_seed(5)
    return make_vectors(model, torch.randn(2, model.cfg.d_model, generator=generator))


BOTH = pytest.mark.parametrize("attributed", [(f, c) for f in DENSE for c in (False, True)], indirect=True)
RAW = pytest.mark.parametrize("attributed", [(f, False) for f in DENSE], indirect=True)
"""Folded weights are no Hugging Face model's, so comparisons with one are made in raw numerics."""


@pytest.fixture(scope="module")
def attributed(request):
    """Family, model, vectors and the attribution at the last layer with every neuron listed."""
    family, compatibility = request.param
    model = load_model(make_vivid_model(family), tokenizer=make_tokenizer(), compatibility=compatibility)
    vectors = random_vectors(model)
    return family, model, vectors, attribute_direction(model, TEXT, vectors, "sad", 2, n_neurons=EVERY)


def relative(difference, whole):
    return (difference.abs().max() / whole.abs().max()).item()


def neurons_by_layer(found):
    summed = torch.zeros_like(found.mlps)
    for k, layer in enumerate(found.neuron_layers):
        summed[:, layer] += found.neurons[:, k]
    return summed


@BOTH
def test_all_parts_sum_to_the_projection_and_neurons_to_their_mlp(attributed):
    *_, found = attributed
    summed = found.embedding + found.positional + found.heads.sum((1, 2))
    summed = summed + (found.attention_other + found.mlps + found.mlp_other).sum(1)
    error = relative(summed - found.total, found.total)
    assert error < 1e-5
    assert relative(neurons_by_layer(found) - found.mlps, found.mlps) < 1e-5
    assert found.largest_error < 1e-5


@BOTH
def test_the_wholes_are_what_a_reader_of_the_sites_sees(attributed):
    _, model, vectors, found = attributed
    unit = vectors.vector("sad", 2)
    seen = {}
    names = [f"blocks.{layer}.hook_{kind}" for layer in range(3) for kind in ("attn_out", "mlp_out", "resid_post")]
    with model.hooks(fwd_hooks=[(n, lambda v, hook, n=n: seen.update({n: v[0].clone() @ unit})) for n in names]):
        model.original_model.base_model(input_ids=torch.tensor([encode(model, TEXT).ids]))
    for layer in range(3):
        heads = found.heads[:, layer].sum(-1) + found.attention_other[:, layer]
        mlp = found.mlps[:, layer] + found.mlp_other[:, layer]
        assert relative(heads - seen[f"blocks.{layer}.hook_attn_out"], heads) < 1e-5
        assert relative(mlp - seen[f"blocks.{layer}.hook_mlp_out"], mlp) < 1e-5
    assert relative(found.total - seen["blocks.2.hook_resid_post"], found.total) < 1e-5


@RAW
def test_each_head_and_neuron_is_what_a_computation_by_hand_on_hugging_faces_weights_gives(attributed):
    family, model, vectors, found = attributed
    hf, unit = make_vivid_model(family), vectors.vector("sad", 2).double()
    seen, _ = hf_sites(family, hf, encode(model, TEXT).ids)
    for layer in range(3):
        for part, site, raw in (("attention", "z", "o"), ("mlp", "act", "down")):
            matrix, bias = matrix_and_bias(family, hf, layer, part)
            scale = seen[raw, layer].double().square().mean(-1).add(1e-6).rsqrt() if family.startswith("gemma") else 1.0
            scale = torch.as_tensor(scale, dtype=torch.float64).expand(len(found.tokens))
            written = seen[site, layer].double() * (matrix @ unit) * scale[:, None]
            other = scale * (bias @ unit)
            if part == "attention":
                assert relative(found.heads[:, layer] - written.unflatten(1, (4, -1)).sum(-1), written) < 1e-4
                assert torch.allclose(found.attention_other[:, layer], other.float(), atol=1e-5)
                continue
            assert torch.allclose(found.mlp_other[:, layer], other.float(), atol=1e-5)
            for k, (at, j) in enumerate(zip(found.neuron_layers, found.neuron_indices, strict=True)):
                if at != layer:
                    continue
                assert relative(found.neurons[:, k] - written[:, j], written) < 1e-5
                assert torch.allclose(found.activations[:, k], seen["act", layer][:, j], atol=1e-4)
                cosine = torch.cosine_similarity(matrix[j], unit, dim=0).item()
                assert found.alignment[k].item() == pytest.approx(cosine, abs=1e-5)
                if family == "gpt2":
                    assert found.gates[:, k].isnan().all()
                else:
                    assert torch.allclose(found.gates[:, k], seen["gate", layer][:, j], atol=1e-4)


@RAW
def test_the_embedding_has_gemmas_scale_and_gpt2s_positions_stand_alone(attributed):
    family, model, vectors, found = attributed
    hf, ids, unit = make_vivid_model(family), list(encode(model, TEXT).ids), vectors.vector("sad", 2)
    expected = hf.get_input_embeddings()(torch.tensor(ids)).detach() @ unit
    if family == "gpt2":
        assert (
            relative(found.positional - hf.transformer.wpe.weight[: len(ids)].detach() @ unit, found.positional) < 1e-5
        )
    else:
        assert found.positional.abs().max() == 0
    assert relative(found.embedding - expected, expected) < 1e-5
    if family.startswith("gemma"):
        bare = hf.get_input_embeddings().weight[ids].detach() @ unit
        assert torch.allclose(expected, bare * 32**0.5, rtol=1e-4, atol=1e-5)


@RAW
def test_the_listed_neurons_are_those_with_the_largest_mean_over_the_text(attributed):
    _, model, vectors, every = attributed
    few = attribute_direction(model, TEXT, vectors, "sad", 1, n_neurons=7)
    kept = [k for k, layer in enumerate(every.neuron_layers) if layer <= 1]
    means = every.neurons[:, kept][list(every.content)].mean(0).abs()
    order = means.argsort(descending=True)[:7].tolist()
    expected = {(every.neuron_layers[kept[i]], every.neuron_indices[kept[i]]) for i in order}
    assert set(zip(few.neuron_layers, few.neuron_indices, strict=True)) == expected
    assert few.neurons.shape[1] == 7
    assert few.heads.shape == (len(few.tokens), 2, 4)


@pytest.fixture(scope="module")
def llama_case(few_passages):
    model = load_model(make_hf_model("llama"), tokenizer=make_tokenizer())
    vectors = fit_vectors(extract_activations(model, few_passages))
    return model, vectors, attribute_direction(model, TEXT, vectors, "sad", 1)


def test_a_tables_rows_sum_to_each_tokens_total_and_projections_agree(llama_case, tmp_path):
    model, vectors, found = llama_case
    table = found.to_frame()
    assert list(table.columns) == ["position", "token", "counted", "part", "layer", "head", "contribution"]
    sums = torch.tensor(table.groupby("position")["contribution"].sum().to_numpy())
    assert relative(sums - found.total, found.total) < 1e-5
    row = table[(table["part"] == "head") & (table["position"] == 5) & (table["layer"] == 1) & (table["head"] == 2)]
    assert row["contribution"].item() == found.heads[5, 1, 2].item()
    row = table[(table["part"] == "mlp") & (table["position"] == 5) & (table["layer"] == 1)]
    assert row["contribution"].item() == found.mlps[5, 1].item()
    by_layer = projection_by_layer(model, TEXT, vectors, "sad")
    assert relative(by_layer.values[1] - (found.total - found.reference), found.total) < 1e-5
    found.save(tmp_path / "a")
    loaded = DirectAttribution.load(tmp_path / "a")
    assert torch.equal(loaded.heads, found.heads)
    assert (loaded.tokens, loaded.neuron_indices) == (found.tokens, found.neuron_indices)


def test_it_reads_like_a_sentence_and_shows_itself_escaped(llama_case):
    _, _, found = llama_case
    assert len(str(found).splitlines()) <= 5
    assert "'sad' at layer 1" in str(found)
    assert found.largest_parts(3)["contribution"].abs().is_monotonic_decreasing
    evil = replace(found, tokens=("<script>x</script>", *found.tokens[1:-1], "<img src=x>"))
    shown = evil._repr_html_()
    assert "<script" not in shown
    assert "<img" not in shown


def test_a_page_of_one_text_holds_both_views_and_loads_nothing(llama_case, tmp_path):
    model, vectors, found = llama_case
    page = write_explanation(
        tmp_path / "x.html", found, projection_by_layer(model, TEXT, vectors, "sad"), "Vectors: <here>"
    ).read_text()
    assert "Vectors: &lt;here&gt;" in page
    assert "<input" in page
    assert "<script" not in page
    assert "http" not in page
    top = found.top_neurons()
    assert f"<td>{top['neuron'].iloc[0]}</td>" in page


def test_a_prompt_is_read_and_does_not_count(llama_case):
    model, vectors, bare = llama_case
    asked = attribute_direction(model, TEXT, vectors, "sad", 1, prompt="What then?")
    assert len(asked.content) == len(bare.content)
    assert asked.content[0] > 1
    assert asked.provenance.bos == "template"


def test_models_without_neurons_of_this_kind_and_wrong_input_are_refused(tiny_model, llama_case):
    mixtral = tiny_model("mixtral")
    with pytest.raises(ValueError, match=r"mixture of experts.*no single 'act'"):
        attribute_direction(mixtral, TEXT, random_vectors(mixtral), "sad", 1)
    model, vectors, _ = llama_case
    with pytest.raises(ValueError, match="received layer 3; there are vectors for 0 to 2"):
        attribute_direction(model, TEXT, vectors, "sad", 3)
    with pytest.raises(ValueError, match="received emotion 'awe'"):
        attribute_direction(model, TEXT, vectors, "awe", 1)
    with pytest.raises(ValueError, match="received n_neurons=0; allowed is 1 or more"):
        attribute_direction(model, TEXT, vectors, "sad", 1, n_neurons=0)
    with pytest.raises(ValueError, match="these vectors were made with model"):
        attribute_direction(tiny_model("qwen2"), TEXT, vectors, "sad", 1)


@pytest.mark.parametrize(("kind", "what"), [("attention", "attention"), ("mlp", "MLP")])
def test_an_architecture_that_writes_otherwise_is_refused_instead_of_split_wrongly(llama_case, monkeypatch, kind, what):
    model, vectors, _ = llama_case
    honest = attribution.make_writer

    def halved(model, layer, part):
        writer = honest(model, layer, part)
        return replace(writer, gain=writer.gain / 2) if part == kind and layer == 1 else writer

    monkeypatch.setattr(attribution, "make_writer", halved)
    with pytest.raises(RuntimeError, match=f"the parts of the {what} of layer 1 miss the whole by .* please report it"):
        attribute_direction(model, TEXT, vectors, "sad", 1)


def make_planted_model(*, word=" storm", layer=1, neuron=11):
    """A tiny Llama in which one neuron writes 20 times a direction at one token and next to nothing elsewhere.

    Dimension 0 of the residual stream is the token's flag: its embedding alone has it, and no sub-layer writes it.
    """
    hf, tokenizer = make_hf_model("llama"), make_tokenizer()
    direction = torch.randn(32, generator=torch.Generator().manual_seed(7))
    direction[0] = 0
    direction /= direction.norm()
    token = tokenizer(word, add_special_tokens=False)["input_ids"][-1]
    with torch.no_grad():
        hf.model.embed_tokens.weight[:, 0] = 0
        hf.model.embed_tokens.weight[token, 0] = 20
        for block in hf.model.layers:
            block.self_attn.o_proj.weight[0] = 0
            block.mlp.down_proj.weight[0] = 0
        mlp = hf.model.layers[layer].mlp
        for matrix in (mlp.gate_proj, mlp.up_proj):
            matrix.weight[neuron] = 0
            matrix.weight[neuron, 0] = 1
        mlp.down_proj.weight[:, neuron] = 20 * direction
    model = load_model(hf, tokenizer=tokenizer)
    other = torch.randn(32, generator=torch.Generator().manual_seed(8))
    return model, make_vectors(model, torch.stack([direction, other])), token


def test_a_planted_neuron_is_found_at_its_token_with_its_gate_and_alignment():
    model, vectors, token = make_planted_model()
    text = "The bus was late because of the storm and the kettle was on."
    found = attribute_direction(model, text, vectors, "sad", 2)
    first = found.top_neurons().iloc[0]
    assert (first["layer"], first["neuron"]) == (1, 11)
    at = int(found.neurons[:, 0].argmax())
    assert encode(model, text).ids[at] == token
    assert first["at"] == found.tokens[at]
    assert first["alignment"] == pytest.approx(1, abs=1e-5)
    assert first["gate"] > 3
    assert first["peak"] == pytest.approx(20 * first["activation"], rel=1e-3)
    others = [i for i, t in enumerate(encode(model, text).ids) if t != token]
    assert found.neurons[others, 0].abs().max() < 1e-3 * first["peak"]
    assert "1.11 +" in str(found).splitlines()[2]
