"""Small stand-ins for the published data sets, in their file formats."""

from pathlib import Path

LABELS = (
    "admiration amusement anger annoyance approval caring confusion curiosity desire disappointment disapproval disgust embarrassment "
    "excitement fear gratitude grief joy love nervousness optimism pride realization relief remorse sadness surprise neutral"
).split()
WORDS = {"anger": "How dare they", "joy": "What a lovely day", "fear": "I dare not look", "sadness": "I miss her"}


def write_goemotions(root: Path, *, per_label: int = 12) -> Path:
    """Comments of four emotions, some neutral and some with two labels."""
    place = root / "goemotions"
    place.mkdir(parents=True)
    (place / "labels.txt").write_text("\n".join(LABELS))
    for split in ("train", "dev", "test"):
        rows = []
        for label, words in WORDS.items():
            for i in range(per_label):
                rows.append(f"{words}, {split} number {i}\t{LABELS.index(label)}\t{split}{label}{i}")
        rows.append(f"It is a chair\t27\t{split}n")
        rows.append(f"Both at once {split}\t2,17\t{split}b")
        (place / f"{split}.tsv").write_text("\n".join(rows) + "\n")
    return root


def write_meld(root: Path) -> Path:
    """Two dialogues per split."""
    place = root / "meld"
    place.mkdir(parents=True)
    for split in ("train", "dev", "test"):
        rows = ["Sr No.,Utterance,Speaker,Emotion,Sentiment,Dialogue_ID,Utterance_ID"]
        rows += [f'{i},"Oh my {split} {i}",Ross,{e},{s},{i // 2},{i % 2}' for i, (e, s) in enumerate(TALK)]
        (place / f"{split}_sent_emo.csv").write_bytes(
            "\n".join(rows).encode() + b'\n9,"It\x92s late",Ross,neutral,neutral,3,0\n'
        )
    return root


TALK = (("joy", "positive"), ("anger", "negative"), ("surprise", "positive"), ("neutral", "neutral"))
