"""Corpus-level metrics by their standard libraries, diversity, and the two similarities that gold judges need on every machine.

All lexical metrics are in [0, 1] (sacrebleu's 0 to 100 is divided by 100, as RL4LMs does). The libraries are sacrebleu (BLEU with its
13a tokenizer, chrF with 6 characters and beta 2), rouge-score (with its Porter stemmer; best F over the references, then the mean) and
nltk (METEOR, which here matches exact words and stems but no synonyms, because WordNet would be a download). They are imported when a
metric is asked for.

Diversity is defined as in GEM-metrics, which RL4LMs uses: over lower-case tokens with punctuation; distinct-n is distinct n-grams over
n-grams, entropy-n the Shannon entropy of their frequencies in bits, MSTTR-100 the mean share of distinct tokens in the consecutive
segments of 100 tokens of all texts joined, the last incomplete one left out (Johnson 1944). Tokens are runs of word characters and single
marks, where GEM-metrics asks nltk's tokenizer, whose data would be a download.
"""

from __future__ import annotations

import importlib
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from telos.core.errors import UsageError

Metric = Callable[[Sequence[str], Sequence[Sequence[str]]], float]

SEGMENT = 100  # tokens
_TOKEN = re.compile(r"\w+(?:'\w+)?|[^\w\s]")
_LONGEST = 400  # tokens of an answer that the gold similarities read, so that no answer is slow to judge


def library(module: str) -> Any:
    """An optional library. Raises `UsageError` that says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = {"rouge_score": "rouge-score"}.get(module.partition(".")[0], module.partition(".")[0])
        raise UsageError(f"this metric needs {package}, which is not installed; pip install 'telos[metrics]'") from error


def _streams(references: Sequence[Sequence[str]]) -> list[list[str]]:
    """References by their place, as sacrebleu reads them; an empty text where an answer has fewer than others."""
    return [[texts[i] if i < len(texts) else "" for texts in references] for i in range(max(map(len, references)))]


def bleu(completions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU of sacrebleu over 100."""
    return library("sacrebleu").corpus_bleu(list(completions), _streams(references), force=True).score / 100


def chrf(completions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus chrF of sacrebleu over 100."""
    return library("sacrebleu").corpus_chrf(list(completions), _streams(references)).score / 100


def rouge(kind: str) -> Metric:
    """Mean F of rouge-score's `kind` ("rouge1", "rouge2", "rougeL")."""

    def measure(completions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
        scorer = library("rouge_score.rouge_scorer").RougeScorer([kind], use_stemmer=True)
        best = [scorer.score_multi(texts, completion)[kind].fmeasure for texts, completion in zip(references, completions, strict=True)]
        return sum(best) / len(best)

    return measure


class _NoSynonyms:
    """Stands where nltk expects WordNet."""

    def synsets(self, word: str) -> list[Any]:
        return []


def meteor(completions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Mean METEOR of nltk (alpha 0.9, beta 3, gamma 0.5), without synonyms."""
    score = library("nltk.translate.meteor_score").meteor_score
    none: Any = _NoSynonyms()
    pairs = zip(references, completions, strict=True)
    found = [score([tokens(text) for text in texts], tokens(completion), wordnet=none) for texts, completion in pairs]
    return sum(found) / len(found)


LEXICAL: Mapping[str, Metric] = {
    "bleu": bleu,
    "chrf": chrf,
    "rouge1": rouge("rouge1"),
    "rouge2": rouge("rouge2"),
    "rougeL": rouge("rougeL"),
    "meteor": meteor,
}


def tokens(text: str) -> list[str]:
    """Lower-case words and marks."""
    return _TOKEN.findall(text.lower())


def diversity(texts: Sequence[str]) -> dict[str, float]:
    """distinct-1, distinct-2, entropy-1, entropy-2 (bits), msttr-100 (NaN below 100 tokens in all) and the mean length in tokens."""
    rows = [tokens(text) for text in texts]
    found: dict[str, float] = {}
    for n in (1, 2):
        counts = Counter(gram for row in rows for gram in zip(*(row[i:] for i in range(n))))
        total = counts.total()
        found[f"distinct-{n}"] = len(counts) / total if total else 0.0
        found[f"entropy-{n}"] = sum(k / total * math.log2(total / k) for k in counts.values())
    joined = [token for row in rows for token in row]
    segments = [joined[i : i + SEGMENT] for i in range(0, len(joined) - SEGMENT + 1, SEGMENT)]
    found[f"msttr-{SEGMENT}"] = sum(len(set(segment)) / SEGMENT for segment in segments) / len(segments) if segments else math.nan
    found["length"] = len(joined) / len(rows)
    return found


# Similarities for gold judges -------------------------------------------------------------------------------------------------------------


def rouge_l(completion: str, reference: str) -> float:
    """ROUGE-L of a pair in [0, 1]: F of the longest common subsequence of words (Lin 2004), as rouge-score gives it without its stemmer."""
    ours, theirs = (re.findall(r"[a-z0-9]+", text.lower())[:_LONGEST] for text in (completion, reference))
    row = [0] * (len(theirs) + 1)
    for word in ours:
        diagonal = 0
        for j, other in enumerate(theirs, 1):
            diagonal, row[j] = row[j], diagonal + 1 if word == other else max(row[j], row[j - 1])
    return 2 * row[-1] / (len(ours) + len(theirs)) if row[-1] else 0.0


def answer_words(text: str) -> list[str]:
    """An answer as SQuAD compares it: lower-case words without marks and articles."""
    plain = re.sub(r"[^\w\s]", "", text.lower())
    return [word for word in plain.split() if word not in ("a", "an", "the")]


def token_f1(completion: str, reference: str) -> float:
    """F of the words that two answers share, in [0, 1] (Rajpurkar et al. 2016)."""
    ours, theirs = answer_words(completion), answer_words(reference)
    shared = (Counter(ours) & Counter(theirs)).total()
    return 2 * shared / (len(ours) + len(theirs)) if shared else 0.0
