"""The six GRUE-style tasks: their splits, their judges (cases worked by hand), and their metrics against the libraries' own."""

from __future__ import annotations

import importlib
import json
import math
import random
import sys
from collections import Counter

import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st
from nltk.translate.meteor_score import meteor_score
from rouge_score.rouge_scorer import RougeScorer

from telos.core.errors import UsageError
from telos.environments.text.base import Item, Split, TextTestbed
from telos.environments.text.docstrings import chrf
from telos.environments.text.grue import TASKS, _metrics
from telos.environments.text.grue._task import DrawnTask, GrueTask
from telos.environments.text.grue.concepts import TESTBED as CONCEPTS
from telos.environments.text.grue.dialogue import TESTBED as DIALOGUE
from telos.environments.text.grue.dialogue import intent_of
from telos.environments.text.grue.qa import TESTBED as QA
from telos.environments.text.grue.sentiment import TESTBED as SENTIMENT
from telos.environments.text.grue.sentiment import opinions
from telos.environments.text.grue.translation import TESTBED as TRANSLATION
from telos.environments.text.grue.translation import english, nova
from telos.models.language import load_tokenizer

BEDS: dict[str, GrueTask] = {name: importlib.import_module(f"telos.environments.text.{name.replace('-', '.')}").TESTBED for name in TASKS}
DRAWN = [name for name, bed in BEDS.items() if isinstance(bed, DrawnTask)]
WORDS = ["The", "a", "is", "lamp", "not", "great", ",", ".", "?", "!", "sorry", "12", "we", "will"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
GARBAGE = (
    "",
    " ",
    "qwz xkv",
    ". . . .",
    "the the the the the the",
    "0 1 2 3",
    "\n\n",
    "def f(x):",
)


def mean_gold(bed: GrueTask, items: list[Item], answers: list[str]) -> float:
    return sum(bed.gold(item, answer) for item, answer in zip(items, answers, strict=True)) / len(items)


def mixed(text: str, rng: random.Random) -> str:
    parts = text.split()
    rng.shuffle(parts)
    return " ".join(parts)


# What all tasks have in common -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TASKS)
def test_module_of_a_task_is_found_by_its_name_and_keeps_the_interface(name):
    assert isinstance(BEDS[name], TextTestbed)
    assert BEDS[name].name == name


@pytest.mark.parametrize("name", TASKS)
def test_every_reference_scores_one_and_is_among_the_facts(name):
    for item in BEDS[name].items("test", 150, 3):
        assert item.reference == " " + item.facts["references"][0]
        for reference in item.facts["references"]:
            assert BEDS[name].gold(item, " " + reference) == pytest.approx(1.0), (item, reference)


@pytest.mark.parametrize("name", TASKS)
def test_answers_to_other_prompts_shuffled_words_and_garbage_score_low(name):
    bed = BEDS[name]
    items = bed.items("test", 200, 3)
    answers = [item.reference for item in items]
    # A positive continuation stays positive beside another product, as with GRUE's classifier; it only misses the topic.
    assert mean_gold(bed, items, answers[1:] + answers[:1]) < (0.75 if name == "grue-sentiment" else 0.2)
    if name != "grue-qa":  # token F1 does not look at the order
        assert mean_gold(bed, items, [mixed(answer, random.Random(i)) for i, answer in enumerate(answers)]) < 0.7
    for text in GARBAGE:
        assert mean_gold(bed, items, [text] * len(items)) < 0.1, text


@pytest.mark.parametrize("name", TASKS)
def test_splits_and_corpus_share_no_prompt_and_seeds_fix_everything(name):
    bed = BEDS[name]
    prompts = {split: {item.prompt for item in bed.items(split, 800, 1)} for split in SPLITS}
    assert all(len(rows) > 200 for rows in prompts.values())
    assert not prompts["train"] & prompts["validation"]
    assert not prompts["train"] & prompts["test"]
    assert not prompts["validation"] & prompts["test"]
    trained = {prompt for prompt, _ in bed.demonstrations(800, 2)}
    assert not trained & (prompts["validation"] | prompts["test"])
    assert bed.items("test", 20, 5) == bed.items("test", 40, 5)[:20]
    assert bed.items("test", 20, 5) != bed.items("test", 20, 6)
    assert list(bed.corpus(5, 5)) == [prompt + answer for prompt, answer in bed.demonstrations(5, 5)]
    assert list(bed.corpus(5, 5)) != list(bed.corpus(5, 6))


@pytest.mark.parametrize(
    ("name", "about"),
    [
        ("grue-concepts", lambda item: frozenset(item.facts["roles"].values())),
        ("grue-qa", lambda item: frozenset(item.prompt.split("\n")[0].removeprefix("Facts: ").split(". "))),
        ("grue-translation", lambda item: english(item.facts["meaning"])),
        ("grue-dialogue", lambda item: item.prompt.split("\n")[0]),
    ],
)
def test_splits_go_by_what_a_problem_is_about_whatever_its_wording(name, about):
    """The same words in another order, the same sentence in the other direction, another question on the same facts: all in one split."""
    keys = {split: {about(item) for item in BEDS[name].items(split, 600, 1)} for split in SPLITS}
    assert not keys["train"] & keys["test"]
    assert not keys["train"] & keys["validation"]
    assert not keys["validation"] & keys["test"]


@pytest.mark.parametrize("name", TASKS)
def test_prompts_and_answers_fit_the_bundled_models_lengths(name):
    tokenizer = load_tokenizer("tinylm")
    items = [item for split in SPLITS for item in BEDS[name].items(split, 250, 4)]
    answers = [" " + reference for item in items for reference in item.facts["references"]]
    answers += [answer for _, answer in BEDS[name].demonstrations(250, 4)]
    assert max(map(len, tokenizer([item.prompt for item in items])["input_ids"])) <= 90  # type: ignore[arg-type]
    # One token is left for the end.
    assert max(map(len, tokenizer(answers)["input_ids"])) < BEDS[name].max_new_tokens <= 40  # type: ignore[arg-type]
    assert all(answer[0] == " " != answer[1] and answer == answer.rstrip() for answer in answers)


@pytest.mark.parametrize("name", TASKS)
@given(text=st.text(max_size=60) | st.lists(st.sampled_from(WORDS)).map(" ".join))
@settings(max_examples=40, deadline=None)
def test_gold_and_parts_lie_between_zero_and_one_for_any_text_and_need_the_facts_alone(name, text):
    bed = BEDS[name]
    item = bed.items("test", 1, 8)[0]
    bare = Item("", "", json.loads(json.dumps(item.facts)))
    assert 0.0 <= bed.gold(item, text) <= 1.0
    assert all(0.0 <= value <= 1.0 for value in bed.attributes(item, text).values())
    assert bed.gold(bare, text) == bed.gold(item, text)


@pytest.mark.parametrize("name", DRAWN)
def test_demonstrations_are_good_and_bad(name):
    """A model of them must have something left to learn."""
    bed = BEDS[name]
    items, rng = bed.items("train", 400, 0), random.Random(0)
    assert mean_gold(bed, items, [bed._flawed(rng, item) for item in items]) < 0.75  # type: ignore[attr-defined]
    answers = [answer for _, answer in bed.demonstrations(300, 0)]
    assert len(set(answers)) > 25


@pytest.mark.parametrize("name", TASKS)
def test_requests_that_cannot_be_are_refused(name):
    bed = BEDS[name]
    with pytest.raises(UsageError, match=r"unknown split 'tset'.*did you mean 'test'"):
        bed.items("tset", 3)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="negative"):
        bed.items("test", -1)
    with pytest.raises(UsageError, match="negative"):
        list(bed.corpus(-1, 0))
    with pytest.raises(UsageError, match="1 items and 0 completions"):
        bed.metrics(bed.items("test", 1), [])
    if name in DRAWN:
        with pytest.raises(UsageError, match="how many"):
            bed.items("test")


# Judges by hand ---------------------------------------------------------------------------------------------------------------------------


def test_opinions_are_counted_by_aspect_and_in_general_and_turned_by_not():
    assert sorted(opinions("The lid is tight. I love it.")) == [True, True]
    assert sorted(opinions("The lid is not tight, and I would not buy it again.")) == [False, False]
    assert opinions("We came in the evening.") == []
    assert sorted(opinions("It is an awful kettle but the motor is quiet.")) == [False, True]


def test_sentiment_rewards_positive_sentences_on_the_product():
    item = Item("", "", {"product": "kettle", "opinion": ["lid", "loose", False], "references": []})
    good = "But the handle is firm, and the motor is quiet. I would buy it again."
    assert SENTIMENT.attributes(item, good) == {"positive": 1.0, "well_formed": 1.0, "on_topic": 1.0}
    assert SENTIMENT.attributes(item, "The handle is firm.")["positive"] == 0.5  # one opinion is little
    assert SENTIMENT.attributes(item, "The handle is firm, but the motor is noisy.")["positive"] == 0.5
    assert SENTIMENT.attributes(item, "The lid is tight. I love it.")["on_topic"] == 0.0  # takes back what was said
    assert SENTIMENT.attributes(item, "The plot is clever, and the handle is firm.")["on_topic"] == 0.5  # a kettle has no plot
    assert SENTIMENT.gold(item, "great great great great great great great great") < 0.2


def test_concepts_reward_one_sensible_sentence_with_all_words():
    item = Item("", "", {"roles": {"agent": "nurse", "verb": "read", "thing": "novel", "place": "hotel"}, "references": []})
    assert CONCEPTS.gold(item, "In the hotel, a nurse reads the old novel.") == 1.0
    assert CONCEPTS.attributes(item, "nurse read novel hotel")["coverage"] == 1.0
    assert CONCEPTS.gold(item, "nurse read novel hotel") < 0.4
    assert CONCEPTS.attributes(item, "The novel read the nurse in the hotel.")["sense"] == pytest.approx(1 / 3)
    assert CONCEPTS.attributes(item, "The nurse is reading the novel.") == pytest.approx(
        {"coverage": 0.75, "sentence": 1.0, "sense": 2 / 3}
    )
    assert CONCEPTS.attributes(item, "The nurse read. The novel is in the hotel.")["sentence"] == 0.0


def test_answers_are_compared_as_squad_compares_them():
    item = Item("", "", {"references": ["a red lamp"]})
    assert QA.attributes(item, " The red LAMP.") == {"exact": 1.0, "f1": 1.0}
    # Two of three words are right and both words of the answer are there: 2 * 2/3 * 1 / (2/3 + 1).
    assert QA.attributes(item, "a red old lamp") == pytest.approx({"exact": 0.0, "f1": 0.8})
    assert QA.gold(item, "the nurse") == 0.0


def test_nova_follows_its_rules():
    meaning = {
        "subject": ["nurse", "old", True, False],
        "object": ["lamp", "red", False, True],
        "verb": "see",
        "tense": "past",
        "denied": True,
        "timed": True,
    }
    assert english(meaning) == "Yesterday the old nurse did not see some red lamps."
    assert nova(meaning) == "Runa la bimo kemo mo sebolin fini ne rilor."
    meaning |= {"subject": ["farmer", None, False, True], "tense": "present", "denied": False, "timed": False}
    assert (english(meaning), nova(meaning)) == ("Some farmers see some red lamps.", "Mo dofali mo sebolin fini rilo.")


def test_every_sentence_has_one_translation_in_either_direction():
    meanings = [item.facts["meaning"] for item in TRANSLATION.items("train", 3000, 0)]
    pairs = {(english(meaning), nova(meaning)) for meaning in meanings}
    assert len({left for left, _ in pairs}) == len({right for _, right in pairs}) == len(pairs)
    assert Counter(item.facts["into"] for item in TRANSLATION.items("test", 400)).keys() == {"Nova", "English"}


@pytest.mark.parametrize(
    ("turn", "intent"),
    [
        ("The lamp costs 12.", "inform"),
        ("Sorry, we will fix it.", "apologise"),
        ("Good morning, what would you like?", "greet"),
        ("You are welcome.", "leave"),
        ("I'll send it today.", "commit"),
        ("Please read the manual.", "direct"),
        ("Which one do you want?", "ask"),
        ("Lamp lamp", ""),
    ],
)
def test_intents_are_told_by_the_words_of_a_turn(turn, intent):
    assert intent_of(turn) == intent


def test_dialogue_rewards_the_right_act_about_the_right_thing():
    item = Item("", "", {"intent": "inform", "wanted": ["lamp", "12"], "offered": {"lamp": 12, "tent": 45}, "references": []})
    assert DIALOGUE.gold(item, "The lamp costs 12.") == 1.0
    assert DIALOGUE.gold(item, "The lamp costs 45.") == pytest.approx((1 + 0.5 * 0.5) / 2)
    assert DIALOGUE.gold(item, "I am sorry about the lamp, it costs 12.") == 0.0


# Metrics ----------------------------------------------------------------------------------------------------------------------------------

ANSWERS = ["the nurse reads a novel in the hotel", "a lamp is red"]
REFERENCES = [["The nurse read the novel in the hotel.", "A nurse is reading a novel."], ["The lamp is old."]]


def test_bleu_and_chrf_are_sacrebleus_with_missing_references_left_out():
    streams = [["The nurse read the novel in the hotel.", "The lamp is old."], ["A nurse is reading a novel.", ""]]
    assert _metrics.bleu(ANSWERS, REFERENCES) == sacrebleu.corpus_bleu(ANSWERS, streams).score / 100
    assert _metrics.chrf(ANSWERS, REFERENCES) == sacrebleu.corpus_chrf(ANSWERS, streams).score / 100
    # By hand: 3 of 4 words, 1 of 3 pairs, no triple is right, where sacrebleu halves 1/2 and then 1/1 ... of a missing match (exp smoothing).
    by_hand = (3 / 4 * 1 / 3 * 1 / (2 * 2) * 1 / (4 * 1)) ** 0.25
    assert _metrics.bleu(["a red lamp here"], [["a red house lamp"]]) == pytest.approx(by_hand)


def test_rouge_is_rouge_scores_best_over_references():
    scorer = RougeScorer(["rouge1", "rougeL"], use_stemmer=True)
    for kind in ("rouge1", "rougeL"):
        best = [max(scorer.score(r, answer)[kind].fmeasure for r in row) for answer, row in zip(ANSWERS, REFERENCES, strict=True)]
        assert _metrics.LEXICAL[kind](ANSWERS, REFERENCES) == pytest.approx(sum(best) / 2)
    assert _metrics.rouge("rougeL")(["a b d c"], [["a b c d"]]) == pytest.approx(3 / 4)


def test_meteor_is_nltks_without_synonyms():
    class NoWordNet:
        def synsets(self, word):
            return []

    split = [text.lower().replace(".", " .").split() for text in (ANSWERS[0], *REFERENCES[0])]
    theirs = meteor_score(split[1:], split[0], wordnet=NoWordNet())  # type: ignore[arg-type]
    assert _metrics.meteor(ANSWERS[:1], REFERENCES[:1]) == pytest.approx(theirs)
    # Three words in one chunk: F = 1, penalty 0.5 * (1 / 3) ** 3.
    assert _metrics.meteor(["the red lamp"], [["The red lamps"]]) == pytest.approx(1 - 0.5 / 27)


def test_diversity_by_hand():
    found = _metrics.diversity(["The cat saw the dog.", "the cat"])
    # the ×3, cat ×2, saw, dog, full stop; pairs: the-cat ×2, cat-saw, saw-the, the-dog, dog-stop
    assert found["distinct-1"] == pytest.approx(5 / 8)
    assert found["distinct-2"] == pytest.approx(5 / 6)
    assert found["entropy-1"] == pytest.approx(3 / 8 * math.log2(8 / 3) + 2 / 8 * 2 + 3 * (1 / 8 * 3))
    assert found["entropy-2"] == pytest.approx(2 / 6 * math.log2(3) + 4 / 6 * math.log2(6))
    assert found["length"] == 4
    assert math.isnan(found["msttr-100"])
    # 100 tokens of 4 kinds, 100 of 100 kinds, and a rest that does not count.
    texts = ["a b c d " * 25, " ".join(f"w{i}" for i in range(100)), "a a a"]
    assert _metrics.diversity(texts)["msttr-100"] == pytest.approx((4 / 100 + 1) / 2)


texts = st.lists(st.sampled_from(["the", "a", "nurse", "read", "reads", "novel", "in", "hotel", "lamp", "."]), max_size=12).map(" ".join)


@given(texts, texts)
@settings(max_examples=60, deadline=None)
def test_the_judges_similarities_are_the_libraries_on_single_pairs(ours, theirs):
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    assert _metrics.rouge_l(ours, theirs) == pytest.approx(scorer.score(theirs, ours)["rougeL"].fmeasure)
    if theirs.strip():
        assert chrf(ours, theirs) == pytest.approx(sacrebleu.sentence_chrf(ours, [theirs]).score / 100, abs=1e-6)


@pytest.mark.parametrize("name", TASKS)
def test_metrics_of_references_are_perfect_and_those_of_silence_zero(name):
    bed = BEDS[name]
    items = bed.items("test", 40, 2)
    best = bed.metrics(items, [item.reference for item in items], perplexity=12.5)
    assert best["gold"] == pytest.approx(1.0)
    assert all(value == pytest.approx(1.0) for metric, value in best.items() if metric.startswith("lexical/") and "meteor" not in metric)
    assert best.get("lexical/meteor", 1.0) > 0.9  # its penalty for the first chunk never is quite zero
    assert best["fluency/perplexity"] == 12.5
    assert {metric.partition("/")[2] for metric in best if metric.startswith("task/")} == set(bed.attributes(items[0], "a"))
    worst = bed.metrics(items, [""] * len(items))
    assert all(value == 0.0 for metric, value in worst.items() if metric != "diversity/msttr-100")
    assert "fluency/perplexity" not in worst


def test_naturalness_sees_a_policy_that_repeats_one_good_answer():
    items = SENTIMENT.items("test", 60, 2)
    lively = SENTIMENT.metrics(items, [item.reference for item in items])
    dull = SENTIMENT.metrics(items, ["It has a fair price, and the size is handy. I love it."] * len(items))
    assert dull["task/positive"] == lively["task/positive"] == 1.0
    assert dull["diversity/distinct-2"] < lively["diversity/distinct-2"] / 3
    assert dull["diversity/entropy-1"] < lively["diversity/entropy-1"]


@pytest.mark.parametrize(("module", "package", "name"), [("sacrebleu", "sacrebleu", "bleu"), ("rouge_score", "rouge-score", "rougeL")])
def test_a_missing_library_is_named_with_the_way_to_install_it(monkeypatch, module, package, name):
    for loaded in [loaded for loaded in sys.modules if loaded.partition(".")[0] == module]:
        monkeypatch.setitem(sys.modules, loaded, None)
    with pytest.raises(UsageError, match=rf"needs {package}, which is not installed; pip install 'telos\[metrics\]'"):
        _metrics.LEXICAL[name](["a"], [["a"]])
