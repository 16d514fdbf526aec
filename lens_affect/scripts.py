"""Unicode scripts of texts and of a tokenizer's tokens: what alphabet is a piece of text written in?

A script is no language (Latin letters write hundreds of them), but it needs no model, no dictionary and no guess.
"""

import functools
import weakref
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import regex

COMMON, PARTIAL, SPECIAL, OTHER = "Common", "partial", "special", "Other"
"""Classes beside the scripts: no letter at all; a piece of a character and no letter; a control token or a row of the
unembedding without a token; a letter of a script that is not in SCRIPTS."""

# fmt: off
SCRIPTS = (
    "Latin", "Han", "Hiragana", "Katakana", "Hangul", "Cyrillic", "Greek", "Arabic", "Hebrew", "Devanagari",
    "Bengali", "Gurmukhi", "Gujarati", "Oriya", "Tamil", "Telugu", "Kannada", "Malayalam", "Sinhala", "Thai", "Lao",
    "Khmer", "Myanmar", "Tibetan", "Georgian", "Armenian", "Ethiopic", "Mongolian", "Syriac", "Thaana", "Bopomofo",
    "Cherokee", "Yi",
)
# fmt: on
"""Scripts that are told apart."""
UNSPACED = frozenset({"Han", "Hiragana", "Katakana", "Thai", "Lao", "Khmer", "Myanmar", "Tibetan"})
"""Scripts that put no space between words."""

_LETTER = regex.compile(r"[\p{L}\p{M}]")
# One group per script; Common and Inherited marks (accents on their own) belong to none.
_SCRIPT = regex.compile(r"(?V1)" + "|".join(rf"(?P<{s}>[\p{{Script={s}}}&&[\p{{L}}\p{{M}}]])" for s in SCRIPTS))
_SHARED = regex.compile(r"[\p{Script=Common}\p{Script=Inherited}]")
_REPLACEMENT = "\ufffd"
_LITERAL_REPLACEMENT = (_REPLACEMENT, "ï¿½")
"""How a vocabulary spells the character U+FFFD itself: as it is, or as three bytes in the byte-level alphabet."""


@functools.lru_cache(maxsize=100_000)
def script_of_character(character: str) -> str | None:
    """Script of one letter or vowel sign; None for what no script owns (digits, punctuation, spaces, loose accents).

    Example:
        >>> script_of_character("愛"), script_of_character("é"), script_of_character("7")
        ('Han', 'Latin', None)
    """
    found = _SCRIPT.match(character)
    if found:
        return found.lastgroup
    return OTHER if _LETTER.match(character) and not _SHARED.match(character) else None


def count_scripts(text: str) -> Counter[str]:
    """Letters per script."""
    if text.isascii():
        n = sum(map(str.isalpha, text))
        return Counter({"Latin": n}) if n else Counter()
    return Counter(s for s in map(script_of_character, text) if s is not None)


def script_of(text: str) -> str:
    """Script of most letters of a text (of equally many, the one that comes first), or `Common` if it has none.

    Example:
        >>> script_of(" хорошо!"), script_of(" 2,5")
        ('Cyrillic', 'Common')
    """
    if text.isascii():
        return "Latin" if any(map(str.isalpha, text)) else COMMON
    counts = count_scripts(text)
    return max(counts, key=lambda s: counts[s]) if counts else COMMON  # dicts keep the order of first appearance


def is_unspaced(text: str) -> bool:
    """Whether a text is written in a script without spaces between words."""
    return script_of(text) in UNSPACED


def count_words(text: str) -> int:
    """Words between spaces; letters, where the script puts no spaces (Chinese, Japanese, Thai and others)."""
    return sum(count_scripts(text).values()) if is_unspaced(text) else len(text.split())


@dataclass(frozen=True)
class TokenScripts:
    """Text and script of every row of a model's unembedding."""

    texts: tuple[str, ...]
    """Token as text; bytes that are no whole character appear as U+FFFD."""
    scripts: tuple[str, ...]
    """A script, or `Common`, `partial`, `special` or `Other`."""

    @property
    def labels(self) -> tuple[str, ...]:
        """Scripts that occur, most frequent first."""
        return tuple(name for name, _ in Counter(self.scripts).most_common())


_KNOWN: weakref.WeakKeyDictionary[Any, TokenScripts] = weakref.WeakKeyDictionary()


def token_scripts(tokenizer: Any, size: int) -> TokenScripts:
    """Text and script of every token.

    A byte-level token (or a SentencePiece byte such as `<0xE4>`) that holds only a piece of a character is `partial`, whatever
    script the character would have had; one that holds a whole letter beside a piece has the letter's script.

    Args:
        tokenizer: a Hugging Face tokenizer.
        size: rows of the unembedding, which can be more than there are tokens.
    """
    known = _KNOWN.get(tokenizer)
    if known is not None and len(known.texts) == size:
        return known
    n = min(len(tokenizer), size)
    texts = tokenizer.batch_decode([[i] for i in range(n)])
    pieces = tokenizer.convert_ids_to_tokens(list(range(n)))
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} | set(
        tokenizer.all_special_ids
    )
    scripts = [SPECIAL if i in special else _script_of_token(texts[i], str(pieces[i])) for i in range(n)]
    missing = size - n
    found = TokenScripts((*texts, *("",) * missing), (*scripts, *(SPECIAL,) * missing))
    _KNOWN[tokenizer] = found  # a quarter of a million tokens take seconds, and a sweep over layers asks at every layer
    return found


def _script_of_token(text: str, piece: str) -> str:
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        code = int(piece[3:5], 16)
        return PARTIAL if code >= 0x80 else script_of(chr(code))
    found = script_of(text)
    if found == COMMON and _REPLACEMENT in text and not any(spelling in piece for spelling in _LITERAL_REPLACEMENT):
        return PARTIAL
    return found


def script_shares(texts: Iterable[str]) -> pd.DataFrame:
    """Share of the letters of each text in each script.

    Args:
        texts: for example generated ones, at one strength after the other.

    Returns:
        One row per text: `n_letters`, then one column per script that occurs anywhere, the most frequent first. Shares of a text sum
        to 1; a text without letters has NaN. One foreign word in a long text is a small share: look at the maximum too.

    Raises:
        TypeError: a single string.

    Example:
        >>> script_shares(["calm 安宁", "42"])["Han"].tolist()[0]
        0.3333333333333333
    """
    if isinstance(texts, str):
        raise TypeError("received a single string; allowed is a list of texts: pass [text]")
    counts = [count_scripts(text) for text in texts]
    total: Counter[str] = Counter()
    for found in counts:
        total.update(found)
    names = [name for name, _ in total.most_common()]
    letters = [sum(found.values()) for found in counts]
    shares = [[found[s] / n if n else float("nan") for s in names] for found, n in zip(counts, letters, strict=True)]
    table = pd.DataFrame(shares, columns=names, dtype=float, index=range(len(counts)))
    table.insert(0, "n_letters", letters)
    return table


def text_languages(texts: Sequence[str], *, candidates: Sequence[str] | None = None) -> pd.DataFrame:
    """Most probable language of each text, by the n-gram models of lingua; scripts alone do not tell Latin languages apart.

    Args:
        texts: of a sentence or more; single words are guesses.
        candidates: English names of languages to choose between, all that lingua knows by default (needs about 1 GB).

    Returns:
        One row per text: `language` (lower case; missing where lingua does not decide) and `confidence` (0 to 1).

    Raises:
        ModuleNotFoundError: lingua is not installed.
        ValueError: fewer than two candidates, or one that lingua does not know.
    """
    try:
        from lingua import Language, LanguageDetectorBuilder  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "received a request for languages, but lingua is not installed; install it: pip install 'lens-affect[languages]'"
        ) from error
    if candidates is None:
        builder = LanguageDetectorBuilder.from_all_languages()
    else:
        known = {language.name.lower(): language for language in Language.all()}
        unknown = [name for name in candidates if name.lower() not in known]
        if unknown or len(set(candidates)) < 2:
            raise ValueError(
                f"received candidates {list(candidates)}; allowed are two or more of {', '.join(sorted(known))}"
            )
        builder = LanguageDetectorBuilder.from_languages(*(known[name.lower()] for name in candidates))
    detector = builder.build()
    rows = []
    for text in texts:
        best = detector.detect_language_of(text)
        confidence = detector.compute_language_confidence(text, best) if best is not None else float("nan")
        rows.append({"language": None if best is None else best.name.lower(), "confidence": confidence})
    return pd.DataFrame(rows, columns=["language", "confidence"])
