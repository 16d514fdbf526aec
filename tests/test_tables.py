"""Tables: every format gives the same rows, text stays text, and damage is named with the repair."""

import pandas as pd
import pytest

from lens_affect.tables import read_table, require_columns

ROWS = pd.DataFrame({"text": ["1.50", "NA", "naïve"], "emotion": ["a", "b", "a"]})


def write(frame, path):
    match path.suffix:
        case ".csv":
            frame.to_csv(path, index=False)
        case ".tsv":
            frame.to_csv(path, index=False, sep="\t")
        case ".parquet":
            frame.to_parquet(path)
        case _:
            frame.to_json(path, orient="records", lines=True)
    return path


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet", ".jsonl"])
def test_every_format_gives_the_same_rows_and_numbers_stay_text(tmp_path, suffix):
    pd.testing.assert_frame_equal(read_table(write(ROWS, tmp_path / f"table{suffix}")), ROWS, check_dtype=False)


def test_blank_lines_of_json_lines_are_skipped(tmp_path):
    path = tmp_path / "table.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": "b"}\n')
    assert read_table(path)["text"].tolist() == ["a", "b"]


@pytest.mark.parametrize(("name", "content"), [("table.xlsx", b"x"), ("table.jsonl", b"{"), ("table.csv", b"\xff\xfe")])
def test_what_cannot_be_read_is_named_with_the_repair(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name}, which cannot be read \(.*save it as UTF-8 .csv"):
        read_table(tmp_path / name)


def test_missing_columns_and_empty_tables_are_refused():
    require_columns(ROWS, ["text"], ["group"], "mine")
    with pytest.raises(
        ValueError,
        match=r"columns \['text', 'emotion'\]; missing \['label'\]: rename yours to text, label and optionally group",
    ):
        require_columns(ROWS, ["text", "label"], ["group"], "mine")
    with pytest.raises(ValueError, match="table 'mine' without rows"):
        require_columns(ROWS.iloc[:0], ["text"], ["group"], "mine")
