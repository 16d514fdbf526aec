"""Users' tables: CSV, TSV, Parquet and JSON lines, read as they are."""

import json
from pathlib import Path

import pandas as pd

FORMATS = ".csv, .tsv, .parquet and .jsonl"


def read_table(path: Path) -> pd.DataFrame:
    """A table from a file, text columns as text (no value is turned into a number or NaN).

    Raises:
        ValueError: another format, or a damaged file.
    """
    try:
        return _read(path)
    except (ValueError, KeyError) as error:
        raise ValueError(
            f"received {path}, which cannot be read ({error}); save it as UTF-8 .csv, .tsv, .jsonl or as .parquet"
        ) from error


def require_columns(frame: pd.DataFrame, needed: list[str], optional: list[str], name: str) -> None:
    """Refuse a table that lacks columns or rows.

    Raises:
        ValueError: what is missing.
    """
    missing = [column for column in needed if column not in frame.columns]
    if missing:
        raise ValueError(
            f"received a table {name!r} with columns {list(map(str, frame.columns))}; missing {missing}: rename yours to "
            f"{', '.join(needed)} and optionally {', '.join(optional)}"
        )
    if frame.empty:
        raise ValueError(f"received a table {name!r} without rows; allowed is at least one")


def _read(path: Path) -> pd.DataFrame:
    match path.suffix.lower():
        case ".csv":
            return pd.read_csv(path, dtype=str, keep_default_na=False)
        case ".tsv":
            return pd.read_csv(path, sep="\t", dtype=str, keep_default_na=False)
        case ".parquet":
            return pd.read_parquet(path)
        case ".jsonl" | ".ndjson":
            lines = path.read_text(encoding="utf-8").splitlines()
            return pd.DataFrame([json.loads(line) for line in lines if line.strip()])
        case other:
            raise ValueError(f"received a file of type {other!r}; allowed are {FORMATS}")
