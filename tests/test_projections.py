"""Projections by layer: what EmotionVectors.project says of a text, token by token."""

import pytest
import torch

from lens_affect.activations import extract_activations
from lens_affect.projections import LayerProjections, projection_by_layer
from lens_affect.vectors import fit_vectors
from tests.tiny import FAMILIES

TEXT = "Nobody had told her. She read the note twice, and put the kettle on."


@pytest.mark.parametrize("family", FAMILIES)
def test_their_mean_over_the_text_is_the_projection_of_pooled_activations(family, tiny_model, few_passages):
    model = tiny_model(family)
    activations = extract_activations(model, few_passages)
    vectors = fit_vectors(activations)
    found = projection_by_layer(model, few_passages.texts[3], vectors, "sad")
    assert found.layers == (0, 1, 2)
    pooled = vectors.project(activations)[3, vectors.emotions.index("sad")]
    torch.testing.assert_close(found.values[:, list(found.content)].mean(1), pooled, rtol=1e-4, atol=1e-4)


def test_a_prompt_is_read_but_does_not_count(tiny_model, few_passages, tmp_path):
    model = tiny_model("llama")
    vectors = fit_vectors(extract_activations(model, few_passages, layers=[0, 2]))
    bare, asked = (projection_by_layer(model, TEXT, vectors, "sad", prompt=p) for p in ("", "What then?"))
    assert asked.layers == (0, 2)
    assert len(asked.content) == len(bare.content)
    assert asked.content[0] > bare.content[0] == 1
    assert asked.provenance.bos == "template"
    assert not torch.allclose(asked.values[:, -1], bare.values[:, -1])
    asked.save(tmp_path / "p")
    assert torch.equal(LayerProjections.load(tmp_path / "p").values, asked.values)
    table = bare.to_frame()
    assert list(table.columns) == ["layer", "position", "token", "counted", "projection"]
    assert table["projection"].tolist() == bare.values.flatten().tolist()
    assert table.groupby("position")["counted"].first().tolist() == [i in bare.content for i in range(len(bare.tokens))]
    assert "'sad' at 2 layers" in str(bare)
    assert 'class="lav"' in bare._repr_html_()


def test_what_cannot_be_projected_is_refused(tiny_model, few_passages):
    model = tiny_model("llama")
    vectors = fit_vectors(extract_activations(model, few_passages))
    with pytest.raises(ValueError, match="received emotion 'awe'"):
        projection_by_layer(model, TEXT, vectors, "awe")
    with pytest.raises(ValueError, match="no token that counts"):
        projection_by_layer(model, "", vectors, "sad")
    with pytest.raises(ValueError, match="allowed are 512, the context window"):
        projection_by_layer(model, TEXT * 40, vectors, "sad")
    with pytest.raises(ValueError, match="these vectors were made with model"):
        projection_by_layer(tiny_model("qwen2"), TEXT, vectors, "sad")
    up = fit_vectors(extract_activations(model, few_passages, sites="attn_out"))
    with pytest.raises(ValueError, match="received vectors of site 'attn_out'; allowed are those of 'resid_post'"):
        projection_by_layer(model, TEXT, up, "sad")
