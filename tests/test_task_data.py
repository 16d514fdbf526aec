"""What must be true: no text and no group on two sides of a split, labels as published, clear words where data are missing."""

import pandas as pd
import pytest

from lens_affect.stimuli import NEUTRAL, load_stimuli
from lens_affect.task_data import (
    EKMAN,
    SOLVED,
    SPLITS,
    Example,
    arithmetic,
    data_folder,
    goemotions,
    meld,
    neutral_text,
    passages,
    table_examples,
    topics,
)
from tests.affect_data import LABELS, WORDS, write_goemotions, write_meld


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setenv("LENS_AFFECT_DATA", str(tmp_path))
    return tmp_path


def groups(rows):
    return {row.group for row in rows}


def test_missing_data_are_named_with_the_way_out(tmp_path, monkeypatch):
    monkeypatch.delenv("LENS_AFFECT_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="LENS_AFFECT_DATA is not set"):
        data_folder("goemotions")
    monkeypatch.setenv("LENS_AFFECT_DATA", "/nowhere")
    with pytest.raises(FileNotFoundError, match="LENS_AFFECT_DATA is '/nowhere'"):
        goemotions()


def test_goemotions_keeps_comments_with_one_emotion_and_no_text_twice(data):
    write_goemotions(data)
    test = data / "goemotions" / "test.tsv"
    seen = (data / "goemotions" / "train.tsv").read_text().split("\n")[0]
    test.write_text(test.read_text() + seen + "\n")  # a training comment again
    found = goemotions()
    assert {label for rows in found.values() for e in rows for label in e.labels} == set(WORDS)
    texts = {split: {e.text.lower() for e in found[split]} for split in SPLITS}
    assert not texts["train"] & texts["test"]
    assert not texts["train"] & texts["validation"]
    assert len(found["train"]) + len(found["validation"]) == 48
    assert len(found["test"]) == 96  # the published test and development splits
    assert found == goemotions()


def test_goemotions_of_the_hub_are_those_of_the_folder(tmp_path, monkeypatch):
    """The hub's files hold the same rows with the same label numbers, in lists."""
    write_goemotions(tmp_path / "data")
    hub = tmp_path / "hub" / "simplified"
    hub.mkdir(parents=True)
    for split, name in (("train", "train"), ("dev", "validation"), ("test", "test")):
        lines = (tmp_path / "data" / "goemotions" / f"{split}.tsv").read_text().splitlines()
        rows = [
            (text, [int(i) for i in ids.split(",")], row) for text, ids, row in (line.split("\t") for line in lines)
        ]
        pd.DataFrame(rows, columns=["text", "labels", "id"]).to_parquet(hub / f"{name}-00000-of-00001.parquet")
    monkeypatch.setenv("LENS_AFFECT_DATA", str(tmp_path / "data"))
    expected = goemotions()
    monkeypatch.delenv("LENS_AFFECT_DATA")
    monkeypatch.chdir(tmp_path / "hub")
    asked = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda name, **k: asked.append(name) or str(tmp_path / "hub")
    )
    assert goemotions() == expected
    assert asked == ["google-research-datasets/go_emotions"]


def test_labels_of_the_hub_are_numbered_as_published():
    assert sorted(label for members in EKMAN.values() for label in members) == LABELS[:-1]


def test_without_a_folder_and_without_a_hub_both_are_named(tmp_path, monkeypatch):
    monkeypatch.delenv("LENS_AFFECT_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"LENS_AFFECT_DATA is not set.*The Hugging Face hub did not help"):
        goemotions()


def test_goemotions_in_ekmans_six_and_short_comments_only(data):
    write_goemotions(data)
    assert {e.labels[0] for e in goemotions(ekman=True)["test"]} <= set(EKMAN)
    assert all(len(e.text.split()) <= 6 for rows in goemotions(max_words=6).values() for e in rows)


def test_ekmans_groups_hold_every_goemotions_label_once():
    members = [label for found in EKMAN.values() for label in found]
    assert sorted(members) == sorted(set(LABELS) - {NEUTRAL})


def test_meld_keeps_its_splits_and_reads_damaged_characters(data):
    write_meld(data)
    found = meld("Sentiment")
    assert [len(found[split]) for split in SPLITS] == [5, 5, 5]
    assert {e.labels[0] for e in found["test"]} == {"positive", "negative", "neutral"}
    assert not groups(found["train"]) & groups(found["test"])
    assert {e.labels[0] for e in meld("Emotion", max_words=4)["train"]} == {"joy", "anger", "surprise", "neutral"}


@pytest.mark.parametrize("make", [passages, topics])
def test_groups_of_our_passages_are_on_one_side(make):
    found = make()
    assert all(found[split] for split in SPLITS)
    assert not groups(found["train"]) & groups(found["test"])
    assert not groups(found["train"]) & groups(found["validation"])
    assert not groups(found["validation"]) & groups(found["test"])
    labels = {e.labels[0] for e in found["train"]}
    assert labels == {e.labels[0] for e in found["test"]}
    assert len(labels) == {passages: 20, topics: 12}[make]


def test_topics_are_sentences_of_the_passages():
    texts = load_stimuli("passages").texts
    assert all(any(e.text in text for text in texts) for e in topics()["test"][:20])


def test_arithmetic_is_right_and_each_question_is_there_once():
    rows = [e for split in SPLITS for e in arithmetic()[split]]
    assert len({e.text for e in rows}) == len(rows) == 400
    for e in rows:
        assert eval(e.text.removesuffix(" =")) == int(e.labels[0]) > 0
        assert e.text not in SOLVED
    assert all(eval(line.replace("=", "==")) for line in SOLVED.splitlines())


def test_neutral_texts_are_for_testing_only():
    found = neutral_text()
    assert len(found["test"]) == 60
    assert not found["train"]


def test_a_users_table(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text("text,label,split,group\nGood,joy,train,a\nBad,sadness|anger,test,b\nSo,joy,validation,c\n")
    found = table_examples(path)
    assert found["test"] == (Example("Bad", ("sadness", "anger"), "b"),)
    path.write_text("text,label\n" + "".join(f"Text {i},{'joy' if i % 2 else 'anger'}\n" for i in range(16)))
    found = table_examples(path)
    assert [len(found[split]) for split in SPLITS] == [10, 2, 4]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text,label\n,joy\n", "empty text or label in row 0"),
        ("text,label\nGood,|\n", "empty text or label in row 0"),
        ("words,label\nGood,joy\n", "missing"),
        ("text,label,split\nGood,joy,dev\n", "received the splits \\['dev'\\]"),
        ("text,label,split\nGood,joy,\n", "in every row"),
    ],
)
def test_a_bad_table_is_refused(tmp_path, content, message):
    (tmp_path / "mine.csv").write_text(content)
    with pytest.raises(ValueError, match=message):
        table_examples(tmp_path / "mine.csv")
