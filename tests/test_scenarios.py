"""Scenarios: columns stay together, our texts keep the rules of their cards, users' tables are checked."""

import json
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from lens_affect.scenarios import PULLS, SETS, Scenarios, load_scenarios
from lens_affect.stimuli import EMOTIONS, named_emotion

TARGETS = "happy sad afraid angry guilty hopeful enthusiastic loving grateful exasperated".split()
SYNONYMS = re.compile(
    r"\b(joy|delight|cheer|merr[yi]|glad|please[ds]\b|pleasure|content\b|smil|laugh|sorrow|grief|griev|mourn|miser|weep|wept|cry|cri(ed|es)|tears\b|unhapp|depress"
    r"|scare|frighten|fright|terr(or|if)|dread|panic|worr|alarm|fury|furious|rage\b|enrag|mad\b|outrag|resent|indign|irate|asham|shame|remorse|regret|sorry|apolog|blame"
    r"|optimis|pessimis|longing|wish|excit|eager|keen|thrill|passion|zeal|affection|ador|fond|tender|dear|darling|cherish|thank|apprecia|indebted"
    r"|annoy|irritat|frustrat|impatien|fed up|weary|bored|boring|upset|feel|felt|mood|emotion|relie[fv]|peaceful|seren)\w*",
    flags=re.IGNORECASE,
)


def small(**changes) -> Scenarios:
    columns = {
        "ids": ("a", "b", "c"),
        "emotions": ("happy", "sad", "happy"),
        "pulls": ("with", "against", "none"),
        "groups": ("kitchen", "train", "train"),
        "requests": ("Go on.\n\nHe cooked.", "Go on.\n\nHe left.", "Go on.\n\nHe sat."),
        "openings": ("He cooked. Then he", "He left. Then he", "He sat. Then he"),
    }
    return Scenarios(**(columns | changes))


def first_person(text: str) -> bool:
    return re.search(r"\b(I|my|me)\b", text) is not None


def words(texts) -> np.ndarray:
    return np.array([len(text.split()) for text in texts])


def test_prompts_are_requests_for_chat_models_and_openings_for_base_models():
    scenarios = small()
    assert scenarios.prompts("chat") == scenarios.requests
    assert scenarios.prompts("continue") == scenarios.openings
    with pytest.raises(ValueError, match=r"received form='essay'; allowed are \['chat', 'continue'\]"):
        scenarios.prompts("essay")


def test_selected_rows_keep_their_columns_together_and_the_order_asked_for():
    scenarios = small()
    assert scenarios.select(emotions=["happy"]).ids == ("a", "c")
    assert scenarios.select(pulls=["against"]).ids == ("b",)
    turned = scenarios.select(rows=[2, 0])
    assert (turned.ids, turned.groups, turned.openings[0]) == (("c", "a"), ("train", "kitchen"), "He sat. Then he")
    assert scenarios.select(emotions=["happy"], rows=[2, 1]).ids == ("c",)
    assert turned.select(rows=[1, 0]).hash == scenarios.select(rows=[0, 2]).hash != turned.hash
    assert scenarios.select().hash == scenarios.hash
    assert scenarios.select(rows=[0]).name == "scenarios"


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"emotions": ["angry"]}, r"no scenario has the emotion 'angry'; allowed are \['happy', 'sad'\]"),
        ({"pulls": ["up"]}, r"no scenario has the pull 'up'; allowed are \['with', 'against', 'none'\]"),
        ({"rows": [0, 3, -1]}, r"received row numbers \[3, -1\]; allowed are 0 to 2"),
        ({"rows": []}, "no scenario meets all conditions"),
        ({"emotions": ["sad"], "pulls": ["with"]}, "no scenario meets all conditions"),
    ],
)
def test_what_is_not_there_cannot_be_selected(asked, message):
    with pytest.raises(ValueError, match=message):
        small().select(**asked)


def test_a_list_of_emotions_is_meant_not_a_string():
    with pytest.raises(TypeError, match=r"emotions=\['happy'\]"):
        small().select(emotions="happy")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"groups": ("kitchen", "train")}, r"columns of unequal lengths \[2, 3\]"),
        ({"openings": ("He cooked.", " ", "")}, r"received empty openings in rows \[1, 2\] \(2 in all\)"),
        ({"emotions": ("happy", "", "sad")}, r"received empty emotions in rows \[1\]"),
        ({"pulls": ("with", "sideways", "none")}, r"received pulls \['sideways'\]; allowed are"),
        ({"ids": ("a", "b", "a")}, r"received ids twice: \['a'\]"),
    ],
)
def test_damaged_scenarios_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        small(**changes)
    with pytest.raises(ValueError, match="received no scenarios"):
        Scenarios(**dict.fromkeys(("ids", "emotions", "pulls", "groups", "requests", "openings"), ()))


def test_the_hash_follows_texts_and_labels_but_no_names():
    scenarios = small()
    assert replace(scenarios, name="other", ids=("x", "y", "z")).hash == scenarios.hash
    for column in ("emotions", "pulls", "groups", "requests", "openings"):
        first, *others = getattr(scenarios, column)
        assert replace(scenarios, **{column: (*others, first)}).hash != scenarios.hash


def test_a_table_and_a_sentence_tell_what_is_there():
    frame = small().to_frame()
    assert list(frame) == ["id", "emotion", "pull", "group", "request", "opening"]
    assert list(frame["pull"]) == ["with", "against", "none"]
    assert (
        str(small()) == "scenarios: 3 scenarios, 2 groups; targets: happy (2), sad (1)\npull: 1 with, 1 against, 1 none"
    )


def test_a_users_table_needs_a_prompt_and_an_emotion(tmp_path):
    frame = pd.DataFrame({"prompt": ["He left. ", "She came."], "emotion": ["sad ", "awe"]})
    frame.to_csv(tmp_path / "mine.csv", index=False)
    mine = load_scenarios(tmp_path / "mine.csv")
    assert (mine.name, mine.emotions, mine.pulls) == ("mine", ("sad", "awe"), ("none", "none"))
    assert mine.prompts("chat") == mine.prompts("continue") == ("He left. ", "She came.")
    assert mine.groups == mine.ids == ("scenario 0", "scenario 1")
    frame.assign(group=[1, 2], pull=["with", "against"]).to_parquet(tmp_path / "mine.parquet")
    more = load_scenarios(str(tmp_path / "mine.parquet"))
    assert (more.groups, more.pulls) == (("1", "2"), ("with", "against"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"text": "x", "emotion": "sad"}, r"missing \['prompt'\]"),
        ({"prompt": None, "emotion": "sad"}, r"received empty requests in rows \[0\]"),
        ({"prompt": "x", "emotion": " "}, r"received empty emotions in rows \[0\]"),
        ({"prompt": "x", "emotion": "sad", "pull": "up"}, r"received pulls \['up'\]"),
        ({"prompt": "x", "emotion": "sad", "group": ""}, r"received empty groups in rows \[0\]"),
    ],
)
def test_a_users_table_with_gaps_is_refused(tmp_path, line, message):
    (tmp_path / "mine.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(ValueError, match=message):
        load_scenarios(tmp_path / "mine.jsonl")


def test_an_unknown_set_says_which_there_are():
    with pytest.raises(ValueError, match=re.escape(f"received scenarios 'joy'; allowed are {list(SETS)} or a file")):
        load_scenarios("joy")


def test_our_sets_have_the_sizes_of_their_card_and_share_no_text():
    sets = [load_scenarios(name) for name in SETS]
    assert [len(s) for s in sets] == [40, 24, 2]
    assert [s.name for s in sets] == list(SETS)
    for column in ("ids", "requests", "openings"):
        every = [text for s in sets for text in getattr(s, column)]
        assert len(set(every)) == len(every)


def test_each_target_has_two_scenarios_with_it_and_two_against_on_four_topics(passages):
    ours = load_scenarios()
    assert list(dict.fromkeys(ours.emotions)) == TARGETS
    assert set(ours.emotions) <= set(EMOTIONS)
    for emotion in TARGETS:
        mine = ours.select(emotions=[emotion])
        persons = [first_person(text) for text in mine.openings]
        assert sorted(zip(mine.pulls, persons, strict=True)) == [
            (p, f) for p in ("against", "with") for f in (False, True)
        ]
        assert len(set(mine.groups)) == 4
    assert set(ours.groups) == set(passages.groups)
    assert set(Counter(ours.groups).values()) == {3, 4}
    assert len(set(zip(ours.groups, ours.pulls, strict=True))) == 24


def test_our_scenarios_are_alike_in_length_whatever_their_target_pull_and_person():
    ours = load_scenarios()
    lengths = words(ours.openings)
    assert (lengths.min(), lengths.max()) == (39, 45)
    persons = [str(first_person(text)) for text in ours.openings]
    for column in (ours.emotions, ours.pulls, persons):
        for value in set(column):
            mean = lengths[[v == value for v in column]].mean()
            assert abs(mean / lengths.mean() - 1) < 0.06
    neutral = words(load_scenarios("neutral").openings)
    assert (neutral.min(), neutral.max()) == (20, 28)


@pytest.mark.parametrize("name", SETS)
def test_our_texts_name_no_emotion_and_no_close_synonym(name):
    ours = load_scenarios(name)
    for text in (*ours.requests, *ours.openings):
        assert not [e for e in EMOTIONS if named_emotion(text, e)]
        assert SYNONYMS.search(text) is None, SYNONYMS.search(text)


@pytest.mark.parametrize("name", ["scenarios", "neutral"])
def test_a_request_is_one_instruction_and_the_situation_that_the_opening_goes_on_from(name):
    ours = load_scenarios(name)
    instructions = []
    for request, opening in zip(ours.requests, ours.openings, strict=True):
        instruction, situation = request.split("\n\n")
        instructions.append(instruction)
        assert re.fullmatch(r"[^.?!]+\.", instruction)
        assert opening.startswith(situation + " ")
        assert situation.endswith(".")
        start = opening.removeprefix(situation)
        assert start.startswith(" ")
        assert re.fullmatch(r"[^.?!]+[\w)]", start), "the sentence is left unfinished, without a blank at its end"
    assert len(set(instructions)) == len(instructions)


def test_the_neutral_set_has_two_openings_per_topic_and_no_target(passages):
    neutral = load_scenarios("neutral")
    assert set(neutral.emotions) == {"neutral"}
    assert set(neutral.pulls) == {"none"}
    assert set(neutral.groups) == set(passages.groups)
    assert set(Counter(neutral.groups).values()) == {2}


def test_the_papers_scenarios_are_a_threat_to_calm_and_the_weather_to_hostile():
    paper = load_scenarios("jeong2026")
    assert paper.emotions == ("calm", "hostile")
    assert paper.pulls == ("against", "none")
    assert set(paper.pulls) <= set(PULLS)
    assert paper.requests == paper.openings
    threat, weather = paper.openings
    assert "destroy" in threat
    assert "partly cloudy" in weather
    assert all(text.count(".") == 1 for text in paper.openings)
