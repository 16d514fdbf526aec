"""Donors: other texts are what they claim to be, random directions are as long as the difference, ranks are what they say."""

import pytest
import torch

from lens_affect.adapter import add_hooks, run_trunk
from lens_affect.contrasts import ContrastPairs
from lens_affect.donors import _principal, make_donors
from lens_affect.matching import match_pairs
from lens_affect.recording import record
from lens_affect.sites import resolve_site

TOPICS = ("train", "garden", "school", "market")
CONTRASTS = (("happy", "sad"), ("calm", "afraid"), ("happy", "angry"))


def make_pairs(*, tails: bool = False) -> ContrastPairs:
    """Three contrasts in each of four topics; the texts differ in one letter, and lengths differ between pairs.

    With tails the texts go on for 1 to 3 words behind that letter, so that several positions can be patched.
    """
    rows = [
        (*(f"{'so ' * (k + i)}the {topic} was {x}{' so' * (k + 1) * tails}" for x in "ab"), a, b, topic)
        for i, topic in enumerate(TOPICS)
        for k, (a, b) in enumerate(CONTRASTS)
    ]
    clean, corrupted, a, b, groups = (tuple(x) for x in zip(*rows, strict=True))
    return ContrastPairs(clean, corrupted, (("x",),) * 12, (("y",),) * 12, a, b, groups, "mine")


@pytest.fixture(scope="module")
def setup(tiny_model):
    model = tiny_model("llama")
    matched = match_pairs(model, make_pairs())
    recording = record(model, torch.cat([matched.clean, matched.corrupted]), matched.mask.repeat(2, 1))
    return model, matched, recording


def donor(setup, name, direction="denoise", positions="all", seed=0, sites=("gate",), layers=(1,)):
    return make_donors(*setup, sites, layers, (name,) if name != "counterpart" else (), direction, positions, seed)[-1]


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_the_counterpart_is_the_other_text_and_self_the_text_itself(setup, direction):
    clean_first = direction == "denoise"
    assert donor(setup, "counterpart", direction).sources == tuple(range(12) if clean_first else range(12, 24))
    assert donor(setup, "self", direction).sources == tuple(range(12, 24) if clean_first else range(12))


def test_a_topic_donor_shares_topic_and_emotion_of_the_text_that_runs(setup):
    pairs = setup[1].pairs
    emotions = (*pairs.clean_emotions, *pairs.corrupted_emotions)
    found = donor(setup, "topic", "noise").sources  # clean texts run: happy, calm, happy
    for pair, source in enumerate(found):
        assert source is not None
        assert source % 12 != pair
        assert pairs.groups[source % 12] == pairs.groups[pair]
        wanted = {"happy": {"happy"}, "calm": {"happy"}}[
            emotions[pair]
        ]  # nobody else is calm: a pleasant text stands in
        assert emotions[source] in wanted
    assert donor(setup, "topic", "noise").sources == found


def test_another_emotion_is_neither_of_the_two_and_from_the_same_topic_where_it_can_be(setup):
    pairs = setup[1].pairs
    emotions = (*pairs.clean_emotions, *pairs.corrupted_emotions)
    for pair, source in enumerate(donor(setup, "other_emotion").sources):
        assert source is not None
        assert emotions[source] not in (pairs.clean_emotions[pair], pairs.corrupted_emotions[pair])
        assert pairs.groups[source % 12] == pairs.groups[pair]


def test_where_no_text_qualifies_there_is_none(tiny_model):
    model = tiny_model("llama")
    matched = match_pairs(model, make_pairs().select([0, 3, 6]))  # happy against sad only, one pair per topic
    recording = record(model, torch.cat([matched.clean, matched.corrupted]), matched.mask.repeat(2, 1))
    for name in ("topic", "other_emotion"):
        assert donor((model, matched, recording), name).sources == (None, None, None)


def test_a_random_donor_moves_as_far_as_the_counterpart_in_a_direction_of_its_own(setup):
    edit = donor(setup, "random").edit
    generator = torch.Generator().manual_seed(0)
    own, source = (torch.randn(24, 5, 48, generator=generator) for _ in range(2))
    texts, from_end = torch.arange(24), torch.arange(5, 0, -1).expand(24, -1)
    moved = edit(own, source, "gate", 1, texts, from_end) - own
    torch.testing.assert_close(moved.norm(dim=-1), (source - own).norm(dim=-1))
    cosine = torch.cosine_similarity(moved, source - own, dim=-1)
    assert cosine.abs().mean() < 0.25
    # the direction belongs to pair, site, layer and place, whatever shares the batch
    part = edit(own[3:5, 2:], source[3:5, 2:], "gate", 1, texts[3:5], from_end[3:5, 2:]) - own[3:5, 2:]
    torch.testing.assert_close(part, moved[3:5, 2:])
    for site, layer in (("up", 1), ("gate", 2)):
        other = edit(own, source, site, layer, texts, from_end) - own
        assert torch.cosine_similarity(other, moved, dim=-1).abs().mean() < 0.25


@pytest.mark.parametrize("shape", [(40, 12), (12, 40)])
def test_principal_directions_are_the_right_singular_vectors(shape):
    x = torch.randn(*shape, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    basis = _principal(x, 3)
    torch.testing.assert_close(basis @ basis.T, torch.eye(3, dtype=torch.double))
    expected = torch.linalg.svd(x, full_matrices=False).Vh[:3]
    torch.testing.assert_close(basis.T @ basis, expected.T @ expected)


def test_fewer_differences_than_ranks_give_no_garbage():
    x = torch.zeros(6, 20, dtype=torch.double)
    x[:, 3] = torch.arange(6.0)
    basis = _principal(x, 4)
    expected = torch.zeros(20, 20, dtype=torch.double)
    expected[3, 3] = 1
    torch.testing.assert_close(basis.T @ basis, expected)


def test_a_rank_donor_keeps_what_lies_in_the_directions_of_other_topics(setup, monkeypatch):
    monkeypatch.setitem(__import__("lens_affect.donors", fromlist=["DONORS"]).DONORS, "rank2", "two directions")
    model, matched, _ = setup
    edit = donor(setup, "rank2", positions="last").edit
    # the differences at the last position, read with plain hooks
    kept = []
    with add_hooks(model, [(resolve_site(model, "gate").at(1), lambda x, hook: kept.append(x.clone()))]):
        run_trunk(model, matched.clean, matched.mask)
        run_trunk(model, matched.corrupted, matched.mask)
    rows = torch.arange(12)
    differences = (kept[0] - kept[1])[rows, matched.last].double()
    for pair in (0, 4, 11):
        others = torch.tensor([g != matched.pairs.groups[pair] for g in matched.pairs.groups])
        directions = torch.linalg.svd(differences[others], full_matrices=False).Vh[:2].float()
        own, source = torch.randn(2, 1, 3, 48, generator=torch.Generator().manual_seed(pair)).unbind(0)
        moved = edit(own, source, "gate", 1, torch.tensor([pair + 12]), torch.tensor([[3, 2, 1]]))
        torch.testing.assert_close(moved, own + (source - own) @ directions.T @ directions, rtol=1e-4, atol=1e-4)


def test_a_rank_beyond_the_differences_is_refused(setup):
    with pytest.raises(
        ValueError, match=r"the control rank32 with 9 differences outside one topic; allowed are ranks up to 9"
    ):
        donor(setup, "rank32", positions="last")
