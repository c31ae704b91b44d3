"""CIDEr-D, BLEU-1…4 and ROUGE-L of captions, as the official caption programs (pycocoevalcap) compute them.

No Java is needed; METEOR and SPICE are the official programs' own and need it ([`java_scores`]).
"""

import math
import shutil
from collections import Counter
from collections.abc import Hashable, Sequence

from .ptb import tokenize


Id = Hashable
SIGMA = 6.0  # of CIDEr-D's penalty on lengths
BETA = 1.2  # how much more recall counts than precision in ROUGE-L
JAVA_METRICS = ("METEOR", "SPICE")
ORDERS = 4  # n-grams of 1 to 4 words


def score_captions(
    predictions: dict[Id, str], references: dict[Id, Sequence[str]], java: Sequence[str] = ()
) -> tuple[dict[str, float], dict[Id, dict[str, float]]]:
    """Scores one caption an image against its references.

    CIDEr's document frequencies are those of these references: a part of a data set gives other numbers than all.

    Args:
        predictions: image id to caption.
        references: image id to captions; those of exactly the same ids are used.
        java: of `JAVA_METRICS`, those to compute too.

    Returns:
        scores of the whole by their official names (CIDEr from 0 to 10, the others from 0 to 1), and of each image.

    Raises:
        ValueError: there is nothing to score, or an image has no reference.
        ImportError: `java` without the package pycocoevalcap.
        OSError: `java` without Java, or SPICE without its models, which the package downloads.
    """
    if not predictions:
        raise ValueError("there are no captions to score")
    if without := [key for key in predictions if not references.get(key)]:
        raise ValueError(f"{len(without)} images have no reference captions, the first is {without[0]!r}")
    ids = list(predictions)
    all_references = [caption for key in ids for caption in references[key]]
    tokenized = iter(tokenize(all_references))
    reference_words = [[next(tokenized) for _ in references[key]] for key in ids]
    candidate_words = tokenize([predictions[key] for key in ids])

    columns = {"ROUGE_L": [rouge_l(*pair) for pair in zip(candidate_words, reference_words, strict=True)]}
    # the programs divide tokens of several words ("1 1/2"), but for ROUGE-L
    candidate_words = [_divided(words) for words in candidate_words]
    reference_words = [[_divided(words) for words in group] for group in reference_words]
    columns["CIDEr"] = cider(candidate_words, reference_words)
    totals = {name: sum(values) / len(values) for name, values in columns.items()}
    corpus, by_image = bleu(candidate_words, reference_words)
    for order in range(ORDERS):
        totals[f"Bleu_{order + 1}"] = corpus[order]
        columns[f"Bleu_{order + 1}"] = [scores[order] for scores in by_image]
    if java:
        for name, (total, values) in java_scores(java, candidate_words, reference_words).items():
            totals[name], columns[name] = total, values
    return totals, {key: {name: values[i] for name, values in columns.items()} for i, key in enumerate(ids)}


def _divided(words: list[str]) -> list[str]:
    return " ".join(words).split()


def ngrams(words: Sequence[str]) -> Counter:
    """How often each n-gram of 1 to 4 words occurs."""
    return Counter(tuple(words[i : i + n]) for n in range(1, ORDERS + 1) for i in range(len(words) - n + 1))


def cider(candidates: list[list[str]], references: list[list[list[str]]]) -> list[float]:
    """CIDEr-D of each image (Vedantam et al. 2015, section 5, with the clipping and the Gaussian of the program)."""
    counted = [[ngrams(words) for words in group] for group in references]
    frequency = Counter(ngram for group in counted for ngram in set().union(*group))
    log_images = math.log(len(references))

    def weighted(counts: Counter) -> tuple[list[dict], list[float], int]:
        """tf-idf vectors and their norms for each n, and how many bigrams: the length as the program takes it."""
        vectors: list[dict] = [{} for _ in range(ORDERS)]
        for ngram, count in counts.items():
            vectors[len(ngram) - 1][ngram] = count * (log_images - math.log(max(1, frequency[ngram])))
        norms = [math.sqrt(sum(value * value for value in vector.values())) for vector in vectors]
        return vectors, norms, sum(count for ngram, count in counts.items() if len(ngram) == 2)

    scores = []
    for words, group in zip(candidates, counted, strict=True):
        vectors, norms, length = weighted(ngrams(words))
        total = 0.0
        for other_vectors, other_norms, other_length in map(weighted, group):
            penalty = math.exp(-((length - other_length) ** 2) / (2 * SIGMA**2))
            for mine, theirs, norm, other_norm in zip(vectors, other_vectors, norms, other_norms, strict=True):
                shared = sum(min(mine[n], theirs[n]) * theirs[n] for n in mine.keys() & theirs.keys())
                if norm and other_norm:
                    shared /= norm * other_norm
                total += shared * penalty
        scores.append(10 * total / ORDERS / len(group))
    return scores


def bleu(candidates: list[list[str]], references: list[list[list[str]]]) -> tuple[list[float], list[list[float]]]:
    """BLEU-1…4 of the whole and of each image; the reference closest in length counts, the shorter of two."""
    tiny, small = 1e-15, 1e-9  # the program's, against division by zero

    def score(correct: list[int], guessed: list[int], length: int, wanted: int) -> list[float]:
        scores, product = [], 1.0
        ratio = (length + tiny) / (wanted + small)
        brevity = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
        for n in range(ORDERS):
            product *= (correct[n] + tiny) / (guessed[n] + small)
            scores.append(product ** (1 / (n + 1)) * brevity)
        return scores

    by_image, totals = [], []
    for words, group in zip(candidates, references, strict=True):
        most = Counter()
        for reference in group:
            most |= ngrams(reference)
        correct = [0] * ORDERS
        for ngram, count in ngrams(words).items():
            correct[len(ngram) - 1] += min(count, most[ngram])
        guessed = [max(0, len(words) - n) for n in range(ORDERS)]
        wanted = min((abs(len(reference) - len(words)), len(reference)) for reference in group)[1]
        by_image.append(score(correct, guessed, len(words), wanted))
        totals.append([*correct, *guessed, len(words), wanted])
    sums = [sum(column) for column in zip(*totals, strict=True)]
    return score(sums[:ORDERS], sums[ORDERS : 2 * ORDERS], sums[-2], sums[-1]), by_image


def rouge_l(candidate: list[str], references: list[list[str]]) -> float:
    """ROUGE-L of one caption: precision and recall are the best of any reference."""
    candidate = candidate or [""]  # the program splits an empty line into one empty word
    common = [(longest_common(candidate, reference or [""]), len(reference) or 1) for reference in references]
    precision = max(length for length, _ in common) / len(candidate)
    recall = max(length / total for length, total in common)
    if not precision or not recall:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def longest_common(first: list[str], second: list[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(second) + 1)
    for word in first:
        diagonal = 0
        for i, other in enumerate(second, start=1):
            diagonal, row[i] = row[i], diagonal + 1 if word == other else max(row[i], row[i - 1])
    return row[-1]


def java_scores(
    metrics: Sequence[str], candidates: list[list[str]], references: list[list[list[str]]]
) -> dict[str, tuple[float, list[float]]]:
    """METEOR and SPICE of the whole and of each image, by pycocoevalcap and Java."""
    try:
        from pycocoevalcap.meteor.meteor import Meteor
        from pycocoevalcap.spice.spice import Spice
    except ImportError as error:
        raise ImportError("METEOR and SPICE need pycocoevalcap: pip install pycocoevalcap") from error
    if shutil.which("java") is None:
        raise OSError("METEOR and SPICE need Java: there is no command java")
    candidate_lines = {i: [" ".join(words)] for i, words in enumerate(candidates)}
    reference_lines = {i: [" ".join(words) for words in group] for i, group in enumerate(references)}
    scores = {}
    if "SPICE" in metrics:
        try:
            spice = Spice()
        except OSError as error:
            raise OSError(f"SPICE downloads its models when it is first used, and could not: {error}") from error
        total, details = spice.compute_score(reference_lines, candidate_lines)
        scores["SPICE"] = float(total), [float(detail["All"]["f"]) for detail in details]
    if "METEOR" in metrics:
        total, values = Meteor().compute_score(reference_lines, candidate_lines)
        scores["METEOR"] = float(total), [float(value) for value in values]
    return scores
