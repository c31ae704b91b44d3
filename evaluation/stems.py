"""Porter's stemmer (M. F. Porter, An algorithm for suffix stripping, 1980), for OK-VQA, whose `answer`s are stems."""

import re
from functools import cache

from .answer_tables import STEMS


STEP_2 = dict(
    pair.split("=")
    for pair in """
    ational=ate tional=tion enci=ence anci=ance izer=ize abli=able alli=al entli=ent eli=e ousli=ous ization=ize
    ation=ate ator=ate alism=al iveness=ive fulness=ful ousness=ous aliti=al iviti=ive biliti=ble
""".split()
)
STEP_3 = dict(pair.split("=") for pair in "icate=ic ative= alize=al iciti=ic ical=ic ful= ness=".split())
STEP_4 = "al ance ence er ic able ible ant ement ment ent ion ou ism ate iti ous ive ize".split()
KNOWN_STEMS = frozenset(STEMS.values())


def stem_answer(answer: str) -> str:
    """Each word to the stem that stands for it in OK-VQA's annotations, as far as is known; stems stay what they are.

    The table of exceptions of a common harness first, then Porter's rules. The annotations' own program is not public.
    """
    return " ".join(_stem_word(word) for word in answer.lower().split())


def _stem_word(word: str) -> str:
    return STEMS.get(word, word) if word in STEMS or word in KNOWN_STEMS else porter(word)


def _form(word: str) -> str:
    """`c` for each consonant and `v` for each vowel; y is one behind a consonant."""
    form = ""
    for i, letter in enumerate(word):
        vowel = letter in "aeiou" or (letter == "y" and i > 0 and form[-1] == "c")
        form += "v" if vowel else "c"
    return form


def _measure(stem: str) -> int:
    return len(re.findall("vc", re.sub(r"(.)\1+", r"\1", _form(stem))))


def _doubled(word: str) -> bool:
    return len(word) > 1 and word[-1] == word[-2] and _form(word)[-1] == "c"


def _short(word: str) -> bool:
    """Ends with consonant, vowel, consonant, the last of which is not w, x or y."""
    return _form(word)[-3:] == "cvc" and word[-1] not in "wxy"


@cache
def porter(word: str) -> str:
    """The stem of a word in lower case; words of one or two letters are their own."""
    if len(word) <= 2:
        return word
    word = _step_1(word)
    for endings in (STEP_2, STEP_3):
        ending = _longest_ending(word, endings)
        if ending and _measure(word.removesuffix(ending)) > 0:
            word = word.removesuffix(ending) + endings[ending]
    ending = _longest_ending(word, STEP_4)
    if ending:
        stem = word.removesuffix(ending)
        if _measure(stem) > 1 and (ending != "ion" or stem.endswith(("s", "t"))):
            word = stem
    if word.endswith("e"):
        stem = word[:-1]
        if _measure(stem) > 1 or (_measure(stem) == 1 and not _short(stem)):
            word = stem
    if word.endswith("ll") and _measure(word[:-1]) > 1:
        word = word[:-1]
    return word


def _longest_ending(word: str, endings) -> str | None:
    return max((ending for ending in endings if word.endswith(ending)), key=len, default=None)


def _step_1(word: str) -> str:
    """Plurals, past tenses and present participles, y to i."""
    if word.endswith(("sses", "ies")):
        word = word[:-2]
    elif word.endswith("s") and not word.endswith("ss"):
        word = word[:-1]
    if word.endswith("eed"):
        if _measure(word[:-3]) > 0:
            word = word[:-1]
    else:
        ending = next((ending for ending in ("ed", "ing") if word.endswith(ending)), None)
        if ending and "v" in _form(word.removesuffix(ending)):
            word = word.removesuffix(ending)
            if word.endswith(("at", "bl", "iz")):
                word += "e"
            elif _doubled(word) and word[-1] not in "lsz":
                word = word[:-1]
            elif _measure(word) == 1 and _short(word):
                word += "e"
    if word.endswith("y") and "v" in _form(word[:-1]):
        word = word[:-1] + "i"
    return word
