"""Prefixes: a prompt that is read once for several rows gives what reading it for each of them gives."""

import pytest
import torch

from lens_affect import generation
from lens_affect.adapter import add_hooks, run_trunk
from lens_affect.generation import Intervention, generate
from lens_affect.prefixes import pad_left, read_prefix
from lens_affect.scoring import score_texts
from lens_affect.sites import resolve_site
from tests.tiny import DENSE

HEADS = [(0, 5, 9, 30), (0, 7), (0, 5, 9, 30), (0, 11, 12, 13, 14, 15, 16), (0, 7)]
BODIES = [(21, 22, 23, 24, 25), (40, 41, 42), (50,), (33, 34, 35, 36), (60, 61)]


def stream(model, layer, run):
    kept = []
    with add_hooks(model, [(resolve_site(model, "resid_post").at(layer), lambda x, hook=None: kept.append(x.clone()))]):
        run()
    return kept[-1]


@pytest.mark.parametrize("family", DENSE)
def test_rows_behind_a_prefix_have_the_stream_of_whole_texts(tiny_model, family):
    model = tiny_model(family)
    prefix = read_prefix(model, HEADS)
    assert prefix is not None
    assert prefix.which.tolist() == [0, 1, 0, 2, 1]
    width = max(map(len, BODIES)) + 1
    tokens, mask = torch.full((5, width), 2), torch.zeros(5, width, dtype=torch.long)
    for i, (head, body) in enumerate(zip(HEADS, BODIES, strict=True)):
        tokens[i, : len(body) + 1] = torch.tensor([head[-1], *body])
        mask[i, : len(body) + 1] = 1
    last = int(model.cfg.n_layers) - 1
    for _ in range(2):  # a pass adds to its own copy of keys and values
        found = stream(
            model, last, lambda: run_trunk(model, tokens, torch.cat([prefix.mask, mask], 1), past=prefix.expanded())
        )
        for i, (head, body) in enumerate(zip(HEADS, BODIES, strict=True)):
            ids = torch.tensor([[*head, *body]])
            whole = stream(model, last, lambda ids=ids: run_trunk(model, ids, torch.ones_like(ids)))
            torch.testing.assert_close(found[i, : len(body) + 1], whole[0, len(head) - 1 :], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", DENSE)
def test_steered_text_is_the_same_without_a_cache_and_one_by_one(tiny_model, family, monkeypatch):
    """Three prompts, each twice: together they share prefixes; alone, and without a cache, nothing is shared."""
    model, prompts = tiny_model(family), ["red sun", "the blue cup is", "one"] * 2
    vectors = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    asked = {"max_new_tokens": 12, "stop": [], "row_seeds": list("abcdef")}
    reads = []
    monkeypatch.setattr(generation, "read_prefix", lambda *given: reads.append(read_prefix(*given)) or reads[-1])
    together = generate(model, prompts, interventions=[Intervention(1, "resid_post", vectors)], **asked)
    assert reads[0] is not None
    slow = generate(model, prompts, interventions=[Intervention(1, "resid_post", vectors)], use_cache=False, **asked)
    assert together.tokens == slow.tokens
    for i, prompt in enumerate(prompts):
        alone = generate(
            model,
            [prompt],
            interventions=[Intervention(1, "resid_post", vectors[i])],
            **(asked | {"row_seeds": ["abcdef"[i]]}),
        )
        assert alone.tokens[0] == together.tokens[i]


@pytest.mark.parametrize("scope", ["prompt", "all"])
def test_a_prompt_that_is_changed_itself_is_not_shared(tiny_model, scope, monkeypatch):
    model = tiny_model("llama")
    monkeypatch.setattr(generation, "read_prefix", lambda *given: pytest.fail("read without the change"))
    change = Intervention(0, "resid_post", torch.ones(32), scope=scope)
    generate(model, ["red sun"] * 2, interventions=[change], max_new_tokens=2)


@pytest.mark.parametrize("family", DENSE)
def test_scores_behind_shared_prompts_are_those_of_texts_alone(tiny_model, family):
    model = tiny_model(family)
    vectors = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
    found = score_texts(
        model, HEADS, BODIES, interventions=[Intervention(1, "resid_post", vectors, rows=(4, 0, 2))], batch_tokens=32
    )
    for i, (head, body) in enumerate(zip(HEADS, BODIES, strict=True)):
        mine = [Intervention(1, "resid_post", vectors[(4, 0, 2).index(i)])] if i in (4, 0, 2) else []
        alone = score_texts(model, [head], [body], interventions=mine)
        for name in ("nll", "kl", "change"):
            torch.testing.assert_close(
                getattr(found, name)[i], getattr(alone, name)[0], atol=1e-5, rtol=1e-4, msg=f"{name} of row {i}"
            )


def test_nothing_is_shared_where_nothing_is_saved(tiny_model):
    model = tiny_model("llama")
    assert read_prefix(model, [(0, 1), (0, 2)]) is None
    assert read_prefix(model, [(0,), (0,)]) is None


def test_padding_on_the_left():
    tokens, mask = pad_left([(5, 6, 7), (8,)], 0)
    assert tokens.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]
