"""Scoring: perplexity is Hugging Face's loss, KL and change are what two plain passes show, for any batch."""

import math

import pytest
import torch

from lens_affect.adapter import add_hooks, run_logits
from lens_affect.generation import Intervention
from lens_affect.scoring import score_texts
from lens_affect.sites import resolve_site

HEADS = [(0, 5, 9, 30), (0, 7), (0, 11, 12, 13, 14, 15, 16), (0, 8, 8)]
RESPONSES = [(21, 22, 23, 24, 25), (40, 41, 42), (), (50,)]
FAMILIES = ["gpt2", "gemma2", "gemma3", "llama", "qwen2"]


def arrows(n=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*([] if n is None else [n]), 32, generator=generator)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_perplexity_is_that_of_hugging_faces_loss(tiny_model, family):
    model = tiny_model(family)
    found = score_texts(model, HEADS, RESPONSES, batch_tokens=16)
    for i, (head, response) in enumerate(zip(HEADS, RESPONSES, strict=True)):
        if not response:
            assert torch.isnan(found.nll[i])
            continue
        ids = torch.tensor([[*head, *response]])
        labels = ids.clone()
        labels[:, : len(head)] = -100
        with torch.no_grad():
            loss = model.original_model(input_ids=ids, labels=labels).loss
        assert float(found.nll[i]) == pytest.approx(float(loss), abs=1e-5)
        assert float(found.perplexity[i]) == pytest.approx(float(loss.exp()), rel=1e-4)
    assert found.n_tokens.tolist() == [5, 3, 0, 1]
    assert found.kl.nan_to_num(0).abs().max() == 0 == found.change.nan_to_num(0).abs().max()


@pytest.mark.parametrize("scope", ["response", "prompt", "all"])
@pytest.mark.parametrize("family", ["gemma3", "llama"])
def test_kl_and_change_are_those_of_two_plain_passes(tiny_model, family, scope):
    model = tiny_model(family)
    vectors = arrows(2)
    changes = [Intervention(1, "resid_post", vectors, "add", scope, rows=(3, 0))]
    found = score_texts(model, HEADS, RESPONSES, interventions=changes)
    for i, vector in ((0, vectors[1]), (3, vectors[0])):
        head, response = HEADS[i], RESPONSES[i]
        ids, n = torch.tensor([[*head, *response]]), len(head)
        span = {"response": slice(n - 1, None), "prompt": slice(0, n - 1), "all": slice(None)}[scope]
        streams = []

        def add(value, hook, span=span, vector=vector):
            changed = value.clone()
            changed[:, span] += vector
            return changed

        def keep(value, hook, streams=streams):
            streams.append(value[0].clone())

        name = resolve_site(model, "resid_post").at(1)
        logits = []
        for hooks in ([(name, keep)], [(name, add), (name, keep)]):
            with add_hooks(model, hooks):
                logits.append(run_logits(model, ids, torch.ones_like(ids))[0, n - 1 : -1].log_softmax(-1))
        kl = (logits[1].exp() * (logits[1] - logits[0])).sum(-1).mean()
        assert float(found.kl[i]) == pytest.approx(float(kl), rel=1e-3, abs=1e-6)
        change = (streams[1] - streams[0]).norm(dim=-1) / streams[0].norm(dim=-1)
        measured = slice(1, n - 1) if scope == "prompt" else slice(n, None)
        change = change[measured].mean()
        assert float(found.change[i]) == pytest.approx(float(change), rel=1e-4, abs=1e-7)
    assert float(found.kl[1]) == pytest.approx(0, abs=1e-6)  # a row without intervention
    if scope == "prompt":  # behind its first token that prompt has none that is steered
        assert math.isnan(float(found.change[1]))
    else:
        assert float(found.change[1]) == 0


def test_batches_change_nothing(tiny_model):
    model = tiny_model("gemma3")
    changes = [Intervention(0, "resid_post", arrows(), "add", "response")]
    one, many = (score_texts(model, HEADS, RESPONSES, interventions=changes, batch_tokens=b) for b in (1, 500))
    for name in ("nll", "kl", "change"):
        torch.testing.assert_close(getattr(one, name), getattr(many, name), rtol=1e-4, atol=1e-6, equal_nan=True)


def test_ablation_and_clamp_are_scored_too(tiny_model):
    model = tiny_model("llama")
    unit = arrows() / arrows().norm()
    for mode in ("ablate", "clamp"):
        found = score_texts(model, HEADS[:2], RESPONSES[:2], interventions=[Intervention(1, "resid_post", unit, mode)])
        assert (found.kl > 0).all()


def test_hooks_are_gone_after_an_error_and_before(tiny_model):
    model = tiny_model("llama")
    ids = torch.tensor([[0, 5, 9]])
    before = run_logits(model, ids, torch.ones_like(ids))
    score_texts(model, HEADS, RESPONSES, interventions=[Intervention(0, "resid_post", 9 * arrows())])
    with pytest.raises(RuntimeError, match="stop"):
        score_texts(model, HEADS, RESPONSES, progress=lambda *_: (_ for _ in ()).throw(RuntimeError("stop")))
    assert torch.equal(before, run_logits(model, ids, torch.ones_like(ids)))


@pytest.mark.parametrize(
    ("heads", "responses", "message"),
    [
        ([], [], "received 0 prompts and 0 responses"),
        ([(0,)], [(1,), (2,)], "received 1 prompts and 2 responses"),
        ([()], [(1,)], "prompts with a token"),
        ([(0,) * 500], [(1,) * 500], "received a text of 1000 tokens; the context window holds"),
    ],
)
def test_what_cannot_be_scored_is_refused(tiny_model, heads, responses, message):
    with pytest.raises(ValueError, match=message):
        score_texts(tiny_model("llama"), heads, responses)


def test_a_relative_dose_is_refused(tiny_model):
    with pytest.raises(ValueError, match="received a relative intervention"):
        score_texts(
            tiny_model("llama"),
            HEADS,
            RESPONSES,
            interventions=[Intervention(0, "resid_post", arrows(), relative=True)],
        )
