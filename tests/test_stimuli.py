"""The passages keep their promises; a user's table is read or refused with the reason; splits keep topics together."""

import json
import re
from collections import Counter
from importlib.resources import files

import numpy as np
import pandas as pd
import pytest

from lens_affect.stimuli import EMOTIONS, NEUTRAL, PromptSet, Stimuli, load_prompts, load_stimuli, named_emotion

TOPICS = 12


@pytest.fixture(scope="module")
def rows():
    text = files("lens_affect.data").joinpath("passages.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


# The 20 emotions


def test_emotions_are_the_papers_in_its_order():
    assert (
        list(EMOTIONS)
        == (
            "happy sad calm desperate afraid angry proud guilty nervous hopeful brooding gloomy reflective "
            "enthusiastic hostile loving exasperated blissful anxious grateful"
        ).split()
    )
    assert all(name == emotion.name for name, emotion in EMOTIONS.items())


def test_emotions_lie_in_the_quadrants_of_the_papers_author():
    paper = {
        "positive, high": {"enthusiastic", "happy", "proud", "blissful"},
        "negative, high": {"afraid", "angry", "anxious", "hostile", "desperate"},
        "positive, low": {"calm", "loving", "grateful", "hopeful", "reflective"},
        "negative, low": {"sad", "gloomy", "guilty", "brooding"},
    }
    for quadrant, names in paper.items():
        assert {e.name for e in EMOTIONS.values() if e.quadrant == quadrant and e.placed_by == "jeong2026"} == names
    assert {e.name: e.quadrant for e in EMOTIONS.values() if e.placed_by == "ours"} == {
        "nervous": "negative, high",
        "exasperated": "negative, high",
    }


# Words that give an emotion away


@pytest.mark.parametrize(
    ("word", "emotion"),
    [
        *[(name, name) for name in EMOTIONS],
        ("hope", "hopeful"),
        ("hoping", "hopeful"),
        ("hopelessly", "hopeful"),
        ("Love", "loving"),
        ("beloved", "loving"),
        ("lovely", "loving"),
        ("lovers", "loving"),
        ("sadness", "sad"),
        ("saddened", "sad"),
        ("sadder", "sad"),
        ("proudly", "proud"),
        ("PRIDE", "proud"),
        ("unhappy", "happy"),
        ("happiest", "happy"),
        ("anger", "angry"),
        ("angrily", "angry"),
        ("fear", "afraid"),
        ("fearful", "afraid"),
        ("despair", "desperate"),
        ("desperation", "desperate"),
        ("guilt", "guilty"),
        ("anxiety", "anxious"),
        ("gratitude", "grateful"),
        ("ungrateful", "grateful"),
        ("enthusiasm", "enthusiastic"),
        ("hostility", "hostile"),
        ("exasperation", "exasperated"),
        ("bliss", "blissful"),
        ("gloom", "gloomy"),
        ("calmed", "calm"),
        ("reflected", "reflective"),
        ("nervously", "nervous"),
        ("brooded", "brooding"),
    ],
)
def test_a_name_and_its_derived_forms_are_found(word, emotion):
    assert named_emotion(f'He said: "{word}," and left.', emotion) == word


@pytest.mark.parametrize(
    ("word", "emotion"),
    [
        ("ingratitude", "grateful"),
        ("prides", "proud"),
        ("prideful", "proud"),
        ("angers", "angry"),
        ("angering", "angry"),
        ("loveless", "loving"),
        ("lovelier", "loving"),
        ("unloved", "loving"),
        ("unafraid", "afraid"),
        ("becalmed", "calm"),
    ],
)
def test_rarer_derived_forms_are_found_too(word, emotion):
    assert named_emotion(f"It was {word}.", emotion) == word


@pytest.mark.parametrize(
    ("text", "emotion"),
    [
        ("a glove and clover for the slovenly plover", "loving"),
        ("a saddle, a saddler, the crusade and a sadhu", "sad"),
        ("it happened perhaps by mishap", "happy"),
        ("an angle, a stranger, a hanger, the angel in danger", "angry"),
        ("he hopped and chopped; hops in the shop", "hopeful"),
        ("the bride provided a proud-looking", "guilty"),
        ("he rebuilt and gilded it", "guilty"),
        ("the ambliss of Amblissia", "blissful"),
        ("a grate, grated cheese, a great migration", "grateful"),
        ("a broad bridge with brocade", "brooding"),
        ("deflected and inflected", "reflective"),
        ("the hostel's host", "hostile"),
        ("", "happy"),
    ],
)
def test_words_that_only_look_alike_are_not_found(text, emotion):
    assert named_emotion(text, emotion) is None


def test_a_label_of_the_users_own_is_looked_for_as_it_stands():
    assert named_emotion("She stood in awe; awestruck.", "awe") == "awe"
    assert named_emotion("It was awful? No: awed.", "awe") == "awed"
    assert named_emotion("a raw egg", "awe") is None
    assert named_emotion("c+ and more", "c++") is None  # no pattern, a word


# The passages


def test_passages_are_twenty_emotions_crossed_with_twelve_topics_and_thirty_six_neutral_texts(passages):
    assert len(passages) == 276
    assert passages.labels == (*EMOTIONS, NEUTRAL)
    cells = Counter(zip(passages.emotions, passages.groups, strict=True))
    topics = set(passages.groups)
    assert len(topics) == TOPICS
    assert all(cells[emotion, topic] == 1 for emotion in EMOTIONS for topic in topics)
    assert all(cells[NEUTRAL, topic] == 3 for topic in topics)
    assert passages.design == "crossed"


def test_no_passage_is_there_twice(passages):
    assert len(set(passages.texts)) == len(passages)
    starts = Counter(" ".join(text.split()[:4]) for text in passages.texts)
    assert starts.most_common(1)[0][1] <= 2  # written, not filled into a template


def test_no_passage_names_any_of_the_emotions(passages):
    named = [(named_emotion(t, e), t) for t in passages.texts for e in EMOTIONS if named_emotion(t, e)]
    assert named == []


def test_no_passage_has_a_word_that_starts_like_an_emotion(passages):
    """The same by another rule: prefixes, with the innocent words listed."""
    prefixes = (
        "happ|unhapp|sad|calm|desper|despair|afraid|fear|anger|angr|proud|prid|guilt|nervous|hope|hopi|brood|gloom|"
        "reflect|enthus|hostil|lov|belov|exasp|bliss|anxi|grate|gratit|ungrat"
    )
    words = re.findall(r"[a-z]+", " ".join(passages.texts).lower())
    assert {w for w in words if re.match(prefixes, w)} <= {
        "happen",
        "happened",
        "happens",
        "happening",
        "grate",
        "grated",
    }


def test_passages_are_equally_long_for_every_emotion(passages):
    words = pd.Series([len(t.split()) for t in passages.texts]).groupby(list(passages.emotions)).mean()
    assert words.max() / words.min() < 1.10
    everyone = [len(t.split()) for t in passages.texts]
    assert min(everyone) >= 25
    assert max(everyone) <= 80


def test_passages_have_two_to_four_sentences(passages):
    end = re.compile(r"""[.!?]["')]*(?=\s+["'(]*[A-Z]|$)""")
    for text in passages.texts:
        assert 2 <= len(end.findall(text)) <= 4, text


def test_every_emotion_is_told_in_both_persons(rows):
    for emotion in (*EMOTIONS, NEUTRAL):
        persons = Counter(row["person"] for row in rows if row["emotion"] == emotion)
        assert min(persons["first"], persons["third"]) >= 4, emotion


def test_the_person_of_a_passage_is_the_one_it_is_told_in(rows):
    for row in rows:
        told = re.sub(r'"[^"]*"', "", row["text"])
        first = re.search(r"\b(I|me|my|mine|we|us|our|ours|I'd|I'll|I'm)\b", told) is not None
        assert first == (row["person"] == "first"), row["text"]


# A user's own table

TABLE = pd.DataFrame(
    {
        "text": ['She said, "no".', "Zwei\nZeilen, ü", "NA", "2020-01-01"],
        "emotion": ["awe", "fear", " awe ", "joy"],
        "group": ["1", "1", "02", "2"],
        "source": ["me", "you", "me", "you"],
        "other": [1, 2, 3, 4],
    }
)


def write(table: pd.DataFrame, path, ending: str):
    path = path / f"mine{ending}"
    match ending.lower():
        case ".csv":
            table.to_csv(path, index=False)
        case ".tsv":
            table.to_csv(path, index=False, sep="\t")
        case ".parquet":
            table.to_parquet(path)
        case _:
            table.to_json(path, orient="records", lines=True)
    return path


ENDINGS = [".csv", ".tsv", ".parquet", ".jsonl", ".ndjson", ".CSV"]


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_table_reads_the_same_from_every_format(tmp_path, ending):
    found = load_stimuli(write(TABLE, tmp_path, ending))
    assert found.texts == tuple(TABLE["text"])  # also the text "NA", and the one that looks like a date
    assert found.emotions == ("awe", "fear", "awe", "joy")
    assert found.groups == ("1", "1", "02", "2")
    assert found.sources == ("me", "you", "me", "you")
    assert found.prompts == ("",) * 4
    assert found.name == "mine"
    assert found.labels == ("awe", "fear", "joy")


@pytest.mark.parametrize("ending", ENDINGS[:4])
def test_without_groups_every_text_is_its_own_and_the_source_is_the_file(tmp_path, ending):
    found = load_stimuli(str(write(TABLE[["text", "emotion"]], tmp_path, ending)))
    assert len(set(found.groups)) == 4
    assert set(found.sources) == {"mine"}
    assert found.design == "nested"


def test_a_spreadsheets_byte_order_mark_is_no_part_of_the_first_column(tmp_path):
    TABLE.to_csv(tmp_path / "excel.csv", index=False, encoding="utf-8-sig")
    assert load_stimuli(tmp_path / "excel.csv").texts == tuple(TABLE["text"])


def test_categorical_columns_read_like_texts(tmp_path):
    path = write(TABLE.astype({"emotion": "category", "group": "category"}), tmp_path, ".parquet")
    assert load_stimuli(path).emotions == ("awe", "fear", "awe", "joy")


@pytest.mark.parametrize("ending", ENDINGS[:4])
@pytest.mark.parametrize(
    ("table", "message"),
    [
        (
            TABLE.drop(columns="emotion"),
            r"columns \['text', 'group', .*missing \['emotion'\]: rename yours to text, emo",
        ),
        (TABLE.rename(columns={"text": "Text"}), r"missing \['text'\]"),
        (TABLE.assign(text=["a", "", "  ", "d"]), r"empty texts in rows \[1, 2\] \(2 in all\); remove or fill"),
        (TABLE.assign(text=["a", "b", "c", None]), r"empty texts in rows \[3\]"),
        (TABLE.assign(emotion=["a", "b", "", " "]), r"rows without an emotion: \[2, 3\] \(2 in all\); label or remove"),
        (TABLE.assign(emotion=["a", None, "b", "b"]), r"rows without an emotion: \[1\]"),
        (TABLE.assign(emotion="awe"), r"one emotion only \('awe'\); allowed are two or more"),
    ],
    ids=["no emotions", "no texts", "blank texts", "null text", "blank labels", "null label", "one emotion"],
)
def test_a_bad_table_is_refused_with_the_reason_and_the_rows(tmp_path, ending, table, message):
    with pytest.raises(ValueError, match=message):
        load_stimuli(write(table, tmp_path, ending))


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".parquet"])
def test_a_table_without_rows_is_refused(tmp_path, ending):
    with pytest.raises(ValueError, match=r"table 'mine' without rows; allowed is at least one"):
        load_stimuli(write(TABLE[:0], tmp_path, ending))


@pytest.mark.parametrize("ending", ENDINGS[:4])
@pytest.mark.parametrize("lacking", ["", None])
def test_texts_without_a_group_are_not_thrown_into_one(tmp_path, ending, lacking):
    """Refused, or a group each: never one group named after nothing."""
    path = write(TABLE.assign(group=["1", "1", lacking, lacking]), tmp_path, ending)
    try:
        found = load_stimuli(path)
    except ValueError as error:
        assert re.search(r"rows without a group: \[2, 3\]", str(error))  # noqa: PT017 - one of two good ends
    else:
        assert len(set(found.groups)) == 3
        assert all(isinstance(group, str) for group in found.groups)


@pytest.mark.parametrize("ending", [".parquet", *(pytest.param(e) for e in (".csv", ".jsonl"))])
def test_a_file_that_cannot_be_read_is_named_with_what_is_wrong(tmp_path, ending):
    path = tmp_path / f"mine{ending}"
    path.write_bytes(b'\xff\xfe{"text": \xe9')
    with pytest.raises(ValueError, match=rf"mine{ending}"):
        load_stimuli(path)


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "mine.csv").write_text("")
    with pytest.raises(ValueError, match="mine"):
        load_stimuli(tmp_path / "mine.csv")


def test_unknown_names_and_formats_are_refused_with_what_is_allowed(tmp_path):
    with pytest.raises(
        ValueError,
        match=r"received stimuli 'passage'; allowed are 'passages', 'passages_es', 'passages_zh' or a \.csv, \.tsv, \.parq",
    ):
        load_stimuli("passage")
    (tmp_path / "mine.xlsx").write_text("x")
    with pytest.raises(ValueError, match=r"file of type '\.xlsx'; allowed are \.csv, \.tsv, \.parquet and \.jsonl"):
        load_stimuli(tmp_path / "mine.xlsx")


# Stimuli


def make(emotions: str, groups: str) -> Stimuli:
    n = len(emotions)
    return Stimuli(tuple(f"text {i}" for i in range(n)), tuple(emotions), tuple(groups), ("me",) * n, ("",) * n)


def test_columns_of_unequal_lengths_no_texts_and_empty_texts_are_refused():
    with pytest.raises(ValueError, match=r"unequal lengths \[1, 2\]; allowed is one entry per text"):
        Stimuli(("a", "b"), ("x", "y"), ("g",), ("s", "s"), ("", ""))
    with pytest.raises(ValueError, match="received no texts; allowed is at least one"):
        Stimuli((), (), (), (), ())
    with pytest.raises(ValueError, match=r"empty texts in rows \[1\] \(1 in all\)"):
        Stimuli(("a", " \n"), ("x", "y"), ("g", "g"), ("s", "s"), ("", ""))


def test_a_group_with_several_emotions_makes_a_design_crossed_and_neutral_texts_do_not():
    assert make("abab", "xxyy").design == "crossed"
    assert make("aabb", "wxyz").design == "nested"
    texts = Stimuli(("a", "b", "c"), ("happy", NEUTRAL, "sad"), ("x", "x", "y"), ("",) * 3, ("",) * 3)
    assert texts.design == "nested"


def test_labels_come_in_the_papers_order_with_strangers_behind_and_neutral_last():
    emotions = (NEUTRAL, "awe", "sad", "happy", "ennui")
    texts = Stimuli(tuple("abcde"), emotions, tuple("vwxyz"), ("",) * 5, ("",) * 5)
    assert texts.labels == ("happy", "sad", "awe", "ennui", NEUTRAL)


def test_selection_holds_every_condition_and_keeps_columns_together(passages):
    found = passages.select(emotions=["sad", "happy"], groups=["train", "garden"])
    expected = [
        (t, e, g)
        for t, e, g in zip(passages.texts, passages.emotions, passages.groups, strict=True)
        if e in ("sad", "happy") and g in ("train", "garden")
    ]
    assert list(zip(found.texts, found.emotions, found.groups, strict=True)) == expected
    assert len(found) == 4


def test_rows_are_taken_in_the_order_asked_for(passages):
    found = passages.select(rows=[5, 0])
    assert found.texts == (passages.texts[5], passages.texts[0])
    assert found.emotions == (passages.emotions[5], passages.emotions[0])


@pytest.mark.parametrize(
    ("conditions", "message"),
    [
        ({"emotions": ["happy", "hapy"]}, r"received 'hapy'; allowed labels are \['happy', 'sad'"),
        ({"groups": ["beach"]}, r"received 'beach'; allowed groups are \['kitchen'"),
        ({"rows": [0, 276]}, r"row numbers up to 276; allowed are 0 to 275"),
        ({"rows": [-1]}, r"allowed are 0 to 275"),
        ({"emotions": []}, "no stimulus meets all conditions"),
        ({"rows": [0], "emotions": ["sad"]}, "no stimulus meets all conditions"),
    ],
)
def test_a_selection_of_what_is_not_there_is_refused(passages, conditions, message):
    with pytest.raises(ValueError, match=message):
        passages.select(**conditions)


def test_a_hash_follows_texts_labels_groups_and_prompts():
    base = make("abab", "wxyz")
    others = [make("abba", "wxyz"), make("abab", "wxzy"), base.select(rows=[1, 0, 2, 3]), base.select(rows=[0, 1])]
    prompted = Stimuli(base.texts, base.emotions, base.groups, base.sources, ("", "", "", "Write."))
    assert len({s.hash for s in (base, *others, prompted)}) == 6
    assert base.hash == make("abab", "wxyz").hash


@pytest.mark.parametrize("fraction", [0.01, 0.25, 0.5, 0.99])
def test_a_split_keeps_groups_together_and_loses_nothing(passages, fraction):
    first, second = passages.split(fraction, seed=3)
    assert not set(first.groups) & set(second.groups)
    assert Counter(first.texts + second.texts) == Counter(passages.texts)
    assert len(set(first.groups)) == min(max(round(fraction * TOPICS), 1), TOPICS - 1)


def test_a_split_repeats_with_its_seed_and_over_seeds_takes_every_topic(passages):
    assert passages.split(seed=1) == passages.split(seed=1)
    firsts = [frozenset(passages.split(0.25, seed=seed)[0].groups) for seed in range(60)]
    taken = Counter(group for groups in firsts for group in groups)
    assert len(set(firsts)) > 40
    assert len(taken) == TOPICS
    assert max(taken.values()) < 35  # 15 expected of 60


def test_a_split_that_cannot_be_is_refused(passages):
    with pytest.raises(ValueError, match=r"received 1 group; a split .* needs at least 2"):
        passages.select(groups=["train"]).split()
    for fraction in (0.0, 1.0, -0.5, float("nan")):
        with pytest.raises(ValueError, match=f"received fraction={fraction}; allowed is a number between 0 and 1"):
            passages.split(fraction)


def test_contrast_pairs_share_their_topic(passages):
    pairs = passages.contrast_pairs("happy", "sad")
    where = {t: (e, g) for t, e, g in zip(passages.texts, passages.emotions, passages.groups, strict=True)}
    assert len(pairs) == TOPICS
    assert len(set(pairs.groups)) == TOPICS
    for clean, corrupted, group in zip(pairs.clean, pairs.corrupted, pairs.groups, strict=True):
        assert where[clean] == ("happy", group)
        assert where[corrupted] == ("sad", group)


def test_texts_without_a_partner_in_their_group_are_left_out():
    pairs = make("aabbba", "xxxyyz").contrast_pairs("a", "b")
    assert (pairs.clean, pairs.corrupted, pairs.groups) == (("text 0",), ("text 2",), ("x",))


def test_pairs_that_cannot_be_made_are_refused(passages):
    with pytest.raises(ValueError, match=r"no group holds both 'a' and 'b'; pairs need texts that share a topic"):
        make("ab", "xy").contrast_pairs("a", "b")
    with pytest.raises(ValueError, match="received 'awe'; allowed labels are"):
        passages.contrast_pairs("awe", "sad")


def test_an_emotion_is_no_contrast_to_itself(passages):
    with pytest.raises(ValueError, match="'happy'"):
        passages.contrast_pairs("happy", "happy")


def test_a_frame_and_a_saved_folder_hold_every_column(passages, tmp_path):
    some = passages.select(groups=["train"])
    frame = some.to_frame()
    assert frame["text"].tolist() == list(some.texts)
    assert frame["emotion"].tolist() == list(some.emotions)
    assert list(frame.columns) == ["text", "emotion", "group", "source", "prompt"]
    some.save(tmp_path / "s")
    assert Stimuli.load(tmp_path / "s") == some
    frame.to_parquet(tmp_path / "again.parquet")
    assert load_stimuli(tmp_path / "again.parquet").texts == some.texts


def test_a_printed_set_counts_what_it_holds_and_shows_texts_escaped(passages):
    assert str(passages).startswith("passages: 276 texts, 21 labels, 12 groups (crossed)\n12-36 texts per label")
    risky = Stimuli(("<script>x</script>", "b"), ("a", "b"), ("g", "g"), ("", ""), ("", ""))
    assert "<script>" not in risky._repr_html_()


def test_the_name_of_a_set_is_shown_escaped():
    risky = Stimuli(("a", "b"), ("a", "b"), ("g", "g"), ("", ""), ("", ""), name="<img src=x>")
    assert "<img" not in risky._repr_html_()


# Prompts

ARTICLES = r"(?:\ban?|\bthe|\bof|\bdeep|\bby|\bwith|\bthis|\bin)\s+\{emotion\}"


@pytest.mark.parametrize("name", ["ours", "jeong2026"])
def test_an_adjective_fits_the_slot_of_every_template(name):
    prompts = load_prompts(name)
    assert prompts.name == name
    assert len(set(prompts.templates)) == 5
    for template in prompts.templates:
        assert template.count("{emotion}") == 1
        assert not re.search(ARTICLES, template)  # no noun's place: "of happy", "a angry"
        assert re.search(r"\bfeel(?:s|ing)?(?: (?:deeply|intensely|overwhelmingly))? \{emotion\}", template)
        assert template.format(emotion="angry").count("angry") == 1


@pytest.mark.parametrize("name", ["ours", "jeong2026"])
def test_no_request_names_an_emotion(name):
    prompts = load_prompts(name)
    for request in (*prompts.templates, *prompts.neutral, *prompts.topics.values()):
        assert [e for e in EMOTIONS if named_emotion(request.replace("{emotion}", ""), e)] == []
    assert all("{" not in request for request in prompts.neutral)


def test_our_requests_are_crossed_with_the_passages_topics_and_the_papers_are_not(passages):
    ours, paper = load_prompts("ours"), load_prompts("jeong2026")
    assert set(ours.topics) == set(passages.groups)
    assert len(ours.neutral) == len(ours.templates)  # the same format, template by template
    assert paper.topics == {}
    assert len(paper.neutral) == 10


def test_prompts_come_from_a_file(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(
        json.dumps({"templates": ["Feel {emotion}."], "neutral": ["Nothing."], "topics": {"sea": "at sea"}})
    )
    assert load_prompts(path) == PromptSet(("Feel {emotion}.",), ("Nothing.",), {"sea": "at sea"}, "mine")
    path.write_text(json.dumps({"templates": ["Feel {emotion}."], "neutral": ["Nothing."]}))
    assert load_prompts(str(path)).topics == {}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"templates": ["{emotion}"]}, r"received keys \['templates'\] in .*mine.json; allowed is a JSON object"),
        ({"templates": ["{emotion}"], "neutral": ["x"], "topic": {}}, r"keys \['neutral', 'templates', 'topic'\]"),
        ({"templates": [], "neutral": ["x"]}, "without templates or without neutral requests"),
        ({"templates": ["{emotion}"], "neutral": []}, "without templates or without neutral requests"),
        ({"templates": ["Feel it.", "{emotion}"], "neutral": ["x"]}, r"without the slot \{emotion\}: \['Feel it\.'\]"),
    ],
)
def test_a_bad_prompt_file_is_refused_with_what_is_allowed(tmp_path, content, message):
    (tmp_path / "mine.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        load_prompts(tmp_path / "mine.json")


@pytest.mark.parametrize(
    "content",
    [
        pytest.param('{"templates": ["{emotion}"], "neutral": "Nothing happens."}', id="a text where a list belongs"),
        pytest.param('[{"templates": ["{emotion}"]}]', id="a list of objects"),
        pytest.param('{"templates": ', id="no JSON"),
    ],
)
def test_a_prompt_file_of_another_shape_is_refused_by_name(tmp_path, content):
    (tmp_path / "mine.json").write_text(content)
    with pytest.raises(ValueError, match=r"mine\.json"):
        load_prompts(tmp_path / "mine.json")


def test_unknown_prompts_are_refused_with_the_names_there_are():
    with pytest.raises(
        ValueError, match=r"received prompts 'theirs'; allowed are \['jeong2026', 'ours'\] or a JSON file"
    ):
        load_prompts("theirs")


def test_word_counts_tell_nothing_about_valence(passages):
    """A trivial control: text length does not separate pleasant from unpleasant passages."""
    some = passages.select(emotions=list(EMOTIONS))
    words = np.array([len(t.split()) for t in some.texts])
    pleasant = np.array([EMOTIONS[e].valence == "positive" for e in some.emotions])
    assert abs(words[pleasant].mean() - words[~pleasant].mean()) < 0.25 * words.std()
