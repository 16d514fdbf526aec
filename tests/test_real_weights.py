"""The two models that packages ship: they load, pass their self-checks, and give curves with finite intervals."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import lens_affect as la
from lens_affect.adapter import encode, model_info, token_ids
from lens_affect.catalogue import CATALOGUE, fetch
from lens_affect.matching import match_pairs
from lens_affect.task_data import EKMAN

pytestmark = pytest.mark.weights
MODELS = ("smollm2-135m-instruct", "gemma-3-270m")
EMOTIONS = ("happy", "afraid", "angry", "grateful")  # in the order of the paper


@pytest.fixture(scope="module")
def some_passages(passages):
    six = passages.select(emotions=[*EMOTIONS, "neutral"], groups=list(dict.fromkeys(passages.groups))[:6])
    seen: dict[tuple[str, str], int] = {}  # one neutral passage of a topic's three is enough for a baseline
    return six.select(
        rows=[i for i, cell in enumerate(zip(six.emotions, six.groups, strict=True)) if seen.setdefault(cell, i) == i]
    )


@pytest.fixture(scope="module")
def read(real_model, some_passages):
    found = {}

    def activations(name):
        if name not in found:
            found[name] = la.extract_activations(real_model(name), some_passages, pooling="mean_without_sinks")
        return found[name]

    return activations


@pytest.mark.parametrize("name", MODELS)
def test_self_checks_pass_and_are_recorded(name, real_model):
    model = real_model(name)
    report = la.check_model(model)
    assert not report.failed, report.to_frame().to_string()
    recorded = model_info(model).provenance
    assert set(recorded.checks) == {c.name for c in report.checks}
    entry = CATALOGUE[name]
    assert (recorded.weights_sha256, recorded.source_precision) == (entry.sha256, entry.precision)
    assert (model.cfg.n_layers, model.cfg.d_model) == (entry.n_layers, entry.d_model)
    assert recorded.title == f"{entry.title} ({entry.precision}, dequantized)"


@pytest.mark.parametrize("name", MODELS)
def test_residuals_equal_a_never_booted_hugging_face_model(name, real_model, passages):
    model = real_model(name)
    bare = AutoModelForCausalLM.from_pretrained(fetch(CATALOGUE[name]), dtype=torch.float32).eval()
    three = passages.select(rows=[0, 100, 200])
    ours = la.extract_activations(model, three, pooling="mean")
    for row, text in enumerate(three.texts):
        encoded = encode(model, text)
        with torch.no_grad():
            states = bare(torch.tensor([encoded.ids]), output_hidden_states=True).hidden_states
        for layer in (
            0,
            model.cfg.n_layers // 2,
            model.cfg.n_layers - 2,
        ):  # HF returns the last one after the final norm
            expected = states[layer + 1][0, list(encoded.content)].mean(0)
            difference = (ours.values[row, layer] - expected).norm() / expected.norm()
            assert difference < 1e-4


@pytest.mark.parametrize("name", MODELS)
def test_our_pairs_have_equal_length_under_its_tokenizer(name, real_model):
    for pairs in map(la.load_pairs, ("affect", "number", "tense")):
        matched = match_pairs(real_model(name), pairs)
        assert (len(matched), matched.dropped, matched.words_left_out) == (len(pairs), {}, 0)


@pytest.mark.parametrize("name", MODELS)
def test_curves_have_finite_intervals_and_beat_shuffled_labels(name, read):
    for score in ("nearest_mean", "dprime", "valence", "mean_cosine_neutral"):
        curve = la.localize(read(name), score=score, n_permutations=100, seed=0)
        table = curve.to_frame()
        assert np.isfinite(table.drop(columns="row").to_numpy(float)).all()
        assert (table["low"] <= table["score"]).all()
        assert (table["score"] <= table["high"]).all()
        if score == "nearest_mean":
            assert curve.p_family[curve.row(curve.best_layer)] <= 0.05
            gap = la.lexical_bar(read(name).stimuli).compare(curve)
            assert -1 <= gap.low < gap.estimate < gap.high <= 1
    assert CATALOGUE[name].precision in str(curve)


def test_happy_and_angry_are_further_apart_than_halves_of_one_emotion(read):
    activations = read("smollm2-135m-instruct")
    layer = la.localize(activations, n_permutations=0).best_layer
    vectors = la.fit_vectors(activations)
    assert vectors.similarity(layer).loc["happy", "angry"] < vectors.reliability[:, layer].mean()


def test_the_logit_lens_reads_words(read, real_model):
    table = la.fit_vectors(read("smollm2-135m-instruct")).top_tokens(real_model("smollm2-135m-instruct"), 20, k=5)
    assert list(table.index) == list(EMOTIONS)
    assert all(len(set(tokens)) == 5 for tokens in table["top"])


def test_a_model_without_chat_template_writes_stories_from_plain_prompts(real_model):
    out = la.generate(real_model("gemma-3-270m"), ["Write one sentence about a garden."], max_new_tokens=8)
    assert out.form == "plain"
    assert out.texts[0].strip()


def test_sampled_text_is_english_and_its_own_whatever_shares_the_batch(real_model):
    model = real_model("smollm2-135m-instruct")
    prompts = ["Write a short story about a train.", "Name three colours.", "Describe a garden in the rain."]
    together = la.generate(model, prompts, max_new_tokens=12, seed=3)
    alone = la.generate(model, prompts[1:2], max_new_tokens=12, seed=3, row_seeds=[1])
    assert alone.texts[0] == together.texts[1]
    assert all(text.isascii() and " " in text for text in together.texts)


@pytest.mark.parametrize("name", MODELS)
def test_heads_and_neurons_add_up_to_the_projection(name, read, real_model):
    model, vectors = real_model(name), la.fit_vectors(read(name))
    layer = model.cfg.n_layers // 2
    text = "She heard the footsteps behind her and her hands began to shake."
    found = la.attribute_direction(model, text, vectors, "afraid", layer, n_neurons=(layer + 1) * model.cfg.d_mlp)
    parts = found.embedding + found.heads.sum((1, 2)) + (found.attention_other + found.mlps + found.mlp_other).sum(1)
    assert ((parts - found.total).abs() / found.total.abs()).max() < 1e-4
    for k in range(layer + 1):
        own = found.neurons[:, [i for i, at in enumerate(found.neuron_layers) if at == k]].sum(1)
        assert (own - found.mlps[:, k]).abs().max() < 1e-4 * found.mlps[:, k].abs().max()
    by_layer = la.projection_by_layer(model, text, vectors, "afraid")
    assert ((by_layer.values[layer] - found.total + found.reference).abs() < 1e-4 * found.total.abs().max()).all()
    content = found.total[list(found.content)]
    assert found.tokens[found.content[int(content.argmax())]].strip() in ("footsteps", "behind", "hands", "shake")


def test_the_27_labels_start_with_different_tokens_in_smollm2(real_model):
    """So the first token tells them apart (`scoring="first_token"`), in one forward pass."""
    tokenizer = real_model("smollm2-135m-instruct").tokenizer
    labels = [label for members in EKMAN.values() for label in members]
    first = {token_ids(tokenizer, f" {label}")[0] for label in labels}
    assert len(first) == len(labels) == 27
