"""Stories: slots crossed with topics, an honest account of every draw, and no near-copies."""

import re
from collections import Counter

import pytest

from lens_affect.stimuli import EMOTIONS, NEUTRAL, PromptSet, load_prompts
from lens_affect.stories import MAXIMUM_OVERLAP, Stories, _slots, _trigrams, _verdict, write_stories

QUICK = {"minimum_tokens": 6, "max_new_tokens": 16, "temperature": 1.0}
TWO_REQUESTS = PromptSet(
    ("Tell me about {emotion}.", "Why would anybody be {emotion} today?"), ("Tell me about it.",), {}
)
ONE_REQUEST = PromptSet(("Tell me about {emotion}.",), ("Tell me about it.",), {})


@pytest.fixture(scope="module")
def stories(tiny_model):
    return write_stories(tiny_model("llama"), ["happy", "sad", "calm"], n_stories=7, seed=1, batch_rows=10, **QUICK)


def test_every_emotion_meets_the_same_topics_once_in_the_same_order(stories):
    topics = list(load_prompts("ours").topics)[:7]
    for emotion in ("happy", "sad", "calm", NEUTRAL):
        assert list(stories.stimuli.select(emotions=[emotion]).groups) == topics
    assert stories.stimuli.design == "crossed"


def test_each_story_carries_the_request_that_its_slot_asks(stories):
    asked, stimuli = load_prompts("ours"), stories.stimuli
    for i, (emotion, group, prompt) in enumerate(zip(stimuli.emotions, stimuli.groups, stimuli.prompts, strict=True)):
        templates = asked.neutral if emotion == NEUTRAL else asked.templates
        sentence = templates[i % 7 % 5].replace("{emotion}", emotion)
        assert prompt == f"{sentence} The story takes place {asked.topics[group]}."


@pytest.mark.parametrize("name", ["ours", "jeong2026"])
def test_requests_are_grammatical_for_every_emotion(name):
    for (emotion, _), (prompt, _) in _slots(load_prompts(name), [*EMOTIONS, NEUTRAL], 12).items():
        assert "{" not in prompt
        assert "  " not in prompt
        assert prompt.endswith(".")
        if emotion == NEUTRAL:
            assert not any(re.search(rf"\b{e}\b", prompt) for e in EMOTIONS)
        else:
            assert prompt.count(emotion) == 1
            # an adjective after "feeling" or "feels"; an article before it would need a noun behind it (and a or an)
            assert re.search(rf"\b(feel|feels|feeling)( \w+ly)? {emotion}\b", prompt)


def test_counts_add_up(stories):
    table, counts = stories.table, dict(stories.counts)
    naming = counts.pop("accepted, naming the emotion")
    assert sum(counts.values()) == len(table)
    assert counts["accepted"] == len(stories.stimuli) == 4 * 7
    assert naming == int(table[table.verdict == "accepted"].names_emotion.sum())
    accepted = Counter(
        zip(table[table.verdict == "accepted"].emotion, table[table.verdict == "accepted"].slot, strict=True)
    )
    assert set(accepted.values()) == {1}
    assert (table[table.verdict == "accepted"].tokens >= 6).all()
    per_slot = table.groupby(["emotion", "slot"])["round"].apply(list)
    assert all(rounds == list(range(len(rounds))) for rounds in per_slot)  # drawn again until accepted, never after


def test_the_same_seed_gives_the_same_stories_and_draws_and_another_seed_others(tiny_model, stories):
    again = write_stories(tiny_model("llama"), ["happy", "sad", "calm"], n_stories=7, seed=1, batch_rows=10, **QUICK)
    other = write_stories(tiny_model("llama"), ["happy"], n_stories=2, seed=2, neutral=False, **QUICK)
    assert again.stimuli == stories.stimuli
    assert again.table.equals(stories.table)
    assert not set(other.stimuli.texts) & set(stories.stimuli.texts)
    assert set(other.stimuli.emotions) == {"happy"}


def test_a_tokenizer_without_chat_template_gets_plain_prompts_and_says_so(tiny_model, stories, caplog):
    write_stories(tiny_model("llama"), ["happy"], n_stories=2, neutral=False, **QUICK)
    assert "chat template" not in caplog.text
    plain = write_stories(tiny_model("llama", chat=False), ["happy"], n_stories=2, neutral=False, **QUICK)
    assert caplog.text.count("LlamaForCausalLM has no chat template: it gets each request as plain text") == 1
    assert (plain.form, stories.form) == ("plain", "chat")
    assert "plain prompts" in str(plain)
    assert "28 stories" in str(stories)
    assert f"{len(stories.table)} draws" in str(stories)


def test_saved_stories_come_back(tmp_path, stories):
    back = Stories.load(stories.save(tmp_path / "stories"))
    assert back.stimuli == stories.stimuli
    assert back.counts == stories.counts
    assert back.provenance == stories.provenance


DISTINCT = tuple(range(20))


@pytest.mark.parametrize(
    ("text", "tokens", "verdict"),
    [
        (" \n ", DISTINCT, "empty"),
        ("I'm sorry, but I cannot write that.", DISTINCT, "refusal"),
        ("As an AI, I have no feelings.", DISTINCT, "refusal"),
        ("She waited. " * 30 + "I cannot go on, he said.", DISTINCT, "accepted"),
        ("A story.", DISTINCT[:9], "short"),
        ("A story.", DISTINCT[:10], "accepted"),
        ("A story.", (1, 2, 3) * 4, "repetitive"),
        ("A story.", (*range(10, 22), *range(10, 19)), "accepted"),
        ("A story.", (7,) * 20, "repetitive"),
    ],
)
def test_the_verdict_knows(text, tokens, verdict):
    assert _verdict(text, tokens, 10, []) == verdict


def test_a_copy_is_what_shares_half_of_all_its_three_grams():
    # a = 0..19 has 18 3-grams; a text with the first k + 2 tokens of it shares k of them: overlap k / (36 - k)
    def variant(shared):
        return (*range(shared + 2), *range(100, 118 - shared))

    others = [_trigrams(DISTINCT)]
    assert MAXIMUM_OVERLAP == 12 / (36 - 12)
    assert _verdict("A story.", variant(12), 10, others) == "copy"
    assert _verdict("A story.", variant(11), 10, others) == "accepted"
    assert _verdict("A story.", DISTINCT, 10, [_trigrams(variant(0)), *others]) == "copy"


def test_the_error_says_why_stories_could_not_be_had_and_what_to_change(tiny_model):
    with pytest.raises(
        ValueError,
        match=r"could not get 2 of 2 stories and 'sad' has 0, fewer than 2; .*\{'short': 4\}.*minimum_tokens",
    ):
        write_stories(
            tiny_model("llama"), ["sad"], n_stories=2, neutral=False, minimum_tokens=50, max_new_tokens=8, max_rounds=2
        )


def test_the_same_text_twice_is_refused_as_a_copy(tiny_model):
    with pytest.raises(ValueError, match=r"could not get 1 of 2 stories.*'copy': 3"):
        write_stories(
            tiny_model("llama"), ["sad"], n_stories=2, prompts=ONE_REQUEST, neutral=False, temperature=1e-4, max_rounds=3,
            minimum_tokens=6, max_new_tokens=16,
        )  # fmt: skip


def naming_word(model) -> str:
    """A label that the model's (nearly greedy) answer to ONE_REQUEST happens to contain."""
    for word in "etaoinshrdlucmfwypvbgkjqxz":
        try:
            found = write_stories(
                model, [word], n_stories=1, prompts=ONE_REQUEST, neutral=False, temperature=1e-4, max_rounds=1,
                minimum_tokens=6, max_new_tokens=24,
            )  # fmt: skip
        except ValueError:
            continue
        if found.table.names_emotion.all():
            return word
    raise AssertionError("no label found; take another tiny model")


def test_a_story_that_names_its_emotion_is_drawn_again_and_kept_only_when_every_round_named_it(tiny_model):
    model = tiny_model("gemma3")
    found = write_stories(
        model, [naming_word(model)], n_stories=1, prompts=ONE_REQUEST, neutral=False, temperature=1e-4, max_rounds=3,
        minimum_tokens=6, max_new_tokens=24,
    )  # fmt: skip
    assert list(found.table.verdict) == ["names emotion", "names emotion", "accepted"]
    assert found.counts["accepted, naming the emotion"] == 1


def test_two_stories_that_name_their_emotion_are_not_both_kept_when_they_are_copies(tiny_model):
    model = tiny_model("gemma3")
    with pytest.raises(ValueError, match="could not get 1 of 2 stories"):
        write_stories(
            model, [naming_word(model)], n_stories=2, prompts=ONE_REQUEST, neutral=False, temperature=1e-4, max_rounds=2,
            minimum_tokens=6, max_new_tokens=24,
        )  # fmt: skip


def test_stories_that_cannot_be_had_are_left_out_with_a_warning(tiny_model, caplog):
    found = write_stories(
        tiny_model("llama"), ["sad"], n_stories=3, prompts=TWO_REQUESTS, neutral=False, temperature=1e-4, max_rounds=2,
        minimum_tokens=6, max_new_tokens=16,
    )  # fmt: skip
    assert len(found.stimuli) == 2  # the third story answers the first request again: a copy
    assert found.n_wanted == 3
    assert len(found.stimuli.prompts) == len(set(found.stimuli.prompts)) == 2
    assert str(found).startswith("2 of 3 stories by")
    assert "1 of 3 stories could not be had and are left out (their draws: {'copy': 2})" in caplog.text


def test_progress_ends_with_all_stories(tiny_model):
    calls = []
    write_stories(
        tiny_model("llama"), ["sad"], n_stories=2, neutral=False, progress=lambda a, b: calls.append((a, b)), **QUICK
    )
    assert calls[-1] == (2, 2)
