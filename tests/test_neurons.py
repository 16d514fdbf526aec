"""Neurons over texts: sums equal pooled activations, pairs stay within topics, and a planted neuron is found."""

import numpy as np
import pytest
import torch
from scipy import stats

from lens_affect import neurons as module
from lens_affect.activations import extract_activations
from lens_affect.adapter import encode
from lens_affect.attribution import attribute_direction
from lens_affect.models import load_model
from lens_affect.neurons import NeuronTable, top_neurons
from lens_affect.statistics import adjust_p, derive_generator
from lens_affect.stimuli import Stimuli
from tests.test_attribution import EVERY, make_planted_model, random_vectors
from tests.test_components import matrix_and_bias
from tests.test_sites import make_vivid_model
from tests.tiny import make_tokenizer

COLUMNS = "emotion layer neuron contribution difference low high p p_holm gate_own gate_other alignment".split()


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "gpt2"])
def test_contributions_are_the_means_of_direct_attribution_text_by_text(family, few_passages):
    model = load_model(make_vivid_model(family), tokenizer=make_tokenizer())
    stimuli = few_passages.select(emotions=["sad", "happy"], groups=["kitchen", "train"])
    vectors = random_vectors(model)
    table = top_neurons(model, stimuli, vectors, 1, emotions=["sad"], n=EVERY).to_frame()
    assert list(table.columns) == COLUMNS
    width = model.cfg.d_mlp
    assert len(table) == width
    by_text = np.zeros((len(stimuli), width))
    for row, text in enumerate(stimuli.texts):
        found = attribute_direction(model, text, vectors, "sad", 1, n_neurons=EVERY)
        means = found.neurons[list(found.content)].mean(0)
        for k, (layer, j) in enumerate(zip(found.neuron_layers, found.neuron_indices, strict=True)):
            if layer == 1:
                by_text[row, j] = means[k]
    own, other, pairs = [], [], []
    for group in ("kitchen", "train"):
        rows = [
            [
                i
                for i, (e, g) in enumerate(zip(stimuli.emotions, stimuli.groups, strict=True))
                if g == group and (e == "sad") == is_own
            ]
            for is_own in (True, False)
        ]
        own.append(by_text[rows[0]].mean(0))
        other.append(by_text[rows[1]].mean(0))
        pairs.append(own[-1] - other[-1])
    at = table.set_index("neuron").sort_index()
    scale = np.abs(by_text).max()
    assert np.abs(at["contribution"] - np.mean(own, 0)).max() < 1e-5 * scale
    assert np.abs(at["difference"] - np.mean(pairs, 0)).max() < 1e-5 * scale
    assert table["difference"].abs().is_monotonic_decreasing


def test_interval_p_and_gates_are_those_of_a_paired_t_test_on_pooled_activations(few_passages):
    model = load_model(make_vivid_model("mistral"), tokenizer=make_tokenizer())
    vectors = random_vectors(model)
    result = top_neurons(model, few_passages, vectors, 1, n=EVERY)
    assert result.n_tests == 2 * 48  # the vectors' two emotions
    assert result.n_groups == {"happy": 4, "sad": 4}
    table = result.to_frame()
    assert adjust_p(table["p"].to_numpy()) == pytest.approx(table["p_holm"].to_numpy())
    pooled = extract_activations(model, few_passages, sites=["act", "gate"], layers=[1])
    labels, groups = np.array(few_passages.emotions), np.array(few_passages.groups)
    row = table[table["emotion"] == "happy"].iloc[0]
    j = row["neuron"]
    weight = matrix_and_bias("mistral", make_vivid_model("mistral"), 1, "mlp")[0][j]
    along = (weight @ vectors.vector("happy", 1).double()).item()

    def sides(site):
        values = pooled.arrays[site][:, 0, j].double().numpy()
        return [
            np.array([values[(groups == g) & ((labels == "happy") == own)].mean() for g in dict.fromkeys(groups)])
            for own in (True, False)
        ]

    own, other = sides("act")
    paired = stats.ttest_rel(own * along, other * along)
    limits = paired.confidence_interval()
    assert row["difference"] == pytest.approx(((own - other) * along).mean(), rel=1e-4)
    assert (row["low"], row["high"]) == pytest.approx((limits.low, limits.high), rel=1e-3)
    assert row["p"] == pytest.approx(paired.pvalue, rel=1e-3)
    gate_own, gate_other = sides("gate")
    assert (row["gate_own"], row["gate_other"]) == pytest.approx((gate_own.mean(), gate_other.mean()), rel=1e-4)
    assert row["alignment"] == pytest.approx(along / weight.norm().item(), abs=1e-5)


def storms(*, shuffled=False):
    """Texts on six topics, two with the planted word and two without; the label says so, or (shuffled) says nothing."""
    places = ("kitchen", "train", "school", "garden", "office", "harbour")
    texts, emotions, groups = [], [], []
    for place in places:
        order = derive_generator(3, place).permutation(4)
        for k, (word, label) in enumerate(
            [("storm", "sad"), ("kettle", "happy"), ("storm", "sad"), ("letter", "neutral")]
        ):
            texts.append(f"In the {place} they spoke of the {word} again, {'once' if k < 2 else 'twice'} more.")
            emotions.append(("sad", "happy", "sad", "neutral")[order[k]] if shuffled else label)
            groups.append(place)
    n = len(texts)
    return Stimuli(tuple(texts), tuple(emotions), tuple(groups), ("test",) * n, ("",) * n, name="storms")


def test_a_planted_neuron_comes_first_and_is_significant_and_shuffled_labels_find_nothing():
    model, vectors, _ = make_planted_model()
    result = top_neurons(model, storms(), vectors, 1, n=5)
    sad = result.to_frame().query("emotion == 'sad'").iloc[0]
    assert sad["neuron"] == 11
    assert 0 < sad["low"] <= sad["difference"] <= sad["high"]
    assert sad["p_holm"] < 0.01
    assert sad["gate_own"] > sad["gate_other"]
    assert sad["alignment"] == pytest.approx(1, abs=1e-5)
    assert "neuron 11 writes along 'sad'" in str(result)
    null = top_neurons(model, storms(shuffled=True), vectors, 1, emotions=["sad"], n=48).to_frame()
    assert null[null["neuron"] == 11]["p_holm"].item() > 0.05


def test_batches_do_not_matter_and_texts_are_streamed(few_passages, monkeypatch):
    model, vectors, _ = make_planted_model()
    done = []
    whole = top_neurons(model, few_passages, vectors, 1, n=6, progress=lambda a, b: done.append((a, b))).to_frame()
    assert done[-1] == (len(few_passages), len(few_passages))
    monkeypatch.setattr(module, "DEFAULT_BATCH_TOKENS", 1)
    single = top_neurons(model, few_passages, vectors, 1, n=6).to_frame()
    assert whole["neuron"].tolist() == single["neuron"].tolist()
    assert np.allclose(whole.select_dtypes("float"), single.select_dtypes("float"), rtol=1e-3, atol=1e-5)
    cells = module._Cells(model, few_passages, 1)
    cells.read(None)
    assert cells._sums.shape == (len(set(zip(few_passages.emotions, few_passages.groups, strict=True))), 2, 48)
    assert not cells._seen  # no batch is kept
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


def test_position_0_never_enters_even_without_a_bos(monkeypatch):
    model, vectors, token = make_planted_model()
    monkeypatch.setattr(model.cfg, "default_prepend_bos", False)
    piece = model.tokenizer.decode([token])
    texts = (f"{piece}! The bus was late.", f"{piece}! The bus came.") * 2
    assert all(encode(model, text).ids.index(token) == 0 for text in texts)
    stimuli = Stimuli(texts, ("sad", "happy") * 2, ("a", "a", "b", "b"), ("test",) * 4, ("",) * 4)
    table = top_neurons(model, stimuli, vectors, 1, emotions=["sad"], n=48).to_frame()
    assert abs(table[table["neuron"] == 11]["contribution"].item()) < 1e-3


def test_gates_are_missing_in_gpt2_and_results_are_saved(few_passages, tmp_path):
    model = load_model(make_vivid_model("gpt2"), tokenizer=make_tokenizer())
    result = top_neurons(model, few_passages, random_vectors(model), 0, n=3)
    assert result.to_frame()[["gate_own", "gate_other"]].isna().all(axis=None)
    assert result.to_frame()["p"].notna().all()
    result.save(tmp_path / "n")
    assert NeuronTable.load(tmp_path / "n").to_frame().equals(result.to_frame())
    assert "Holm p" in str(result)
    assert "<table" in result._repr_html_()


def test_what_cannot_be_compared_is_refused(tiny_model, few_passages):
    model = tiny_model("llama")
    vectors = random_vectors(model)
    with pytest.raises(ValueError, match=r"received emotion 'angry'; allowed are those of both .*\['happy', 'sad'\]"):
        top_neurons(model, few_passages, vectors, 1, emotions=["angry"])
    with pytest.raises(TypeError, match="allowed is a list of emotions"):
        top_neurons(model, few_passages, vectors, 1, emotions="sad")
    with pytest.raises(
        ValueError, match="1 groups hold both 'happy' and another label; a paired comparison needs at least 2"
    ):
        top_neurons(model, few_passages.select(groups=["kitchen"]), vectors, 1)
    with pytest.raises(ValueError, match="received layer 9"):
        top_neurons(model, few_passages, vectors, 9)
    with pytest.raises(ValueError, match="received n=0"):
        top_neurons(model, few_passages, vectors, 1, n=0)
    with pytest.raises(ValueError, match="no emotion that stimuli"):
        top_neurons(model, few_passages.select(emotions=["angry", "calm"]), vectors, 1)
    mixtral = tiny_model("mixtral")
    with pytest.raises(ValueError, match="mixture of experts"):
        top_neurons(mixtral, few_passages, random_vectors(mixtral), 1)
    assert torch.is_grad_enabled()
