"""Base forms of nouns and verbs by spaCy's small English model, as the authors' evaluation of answers has them."""

from collections.abc import Callable
from functools import cache


SPACY_MODEL = "en_core_web_sm"


def load_lemmatizer() -> Callable[[str], str]:
    """A function from a text to the text in lower case, its nouns and verbs in base form.

    Raises:
        ImportError: spaCy is not installed.
        OSError: its model is not.
    """
    try:
        import spacy
    except ImportError as error:
        raise ImportError(f"--lemmatize needs spaCy: pip install spacy, then spacy download {SPACY_MODEL}") from error
    try:
        analyse = spacy.load(SPACY_MODEL)
    except OSError as error:
        raise OSError(f"--lemmatize needs spaCy's model: spacy download {SPACY_MODEL}") from error

    @cache
    def lemmatize(text: str) -> str:
        words = analyse(text.lower())
        return " ".join(word.lemma_ if word.pos_ in ("NOUN", "VERB") else word.text for word in words)

    return lemmatize
