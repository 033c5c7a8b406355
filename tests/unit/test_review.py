"""The `review` testbed: its splits, its judge (examples worked by hand) and the quality of its corpus."""

from __future__ import annotations

import json
import math
import re
from itertools import chain, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from telos.core.errors import UsageError
from telos.environments.text import review
from telos.environments.text.base import Item, TextTestbed, load_testbed
from telos.environments.text.review import TESTBED, WEIGHTS, claims, split_of

PHONE = Item(
    "Review request: a phone. Facts: bright screen, weak battery. Reader: a student. Tone: plain.\nReply:",
    "",
    {"product": "phone", "facts": [["screen", "bright", True], ["battery", "weak", False]], "reader": "student", "tone": "plain"},
)
GOOD = "Thank you for asking. The phone has a bright screen, but the battery is weak. It suits a student. Kind regards."
DOCUMENT = re.compile(r"Review request: an? (\w+)\. Facts: ([\w, ]+)\.(?: Reader: an? (\w+)\.)? Tone: (\w+)\.\nReply:( .+)", re.DOTALL)


def part(name: str, completion: str, item: Item = PHONE) -> float:
    return TESTBED.attributes(item, completion)[name]


def with_tone(tone: str) -> Item:
    return Item(PHONE.prompt, "", {**PHONE.facts, "tone": tone})


def parsed(document: str) -> tuple[Item, str]:
    """The item and the completion of a corpus document, read from its text alone."""
    match = DOCUMENT.fullmatch(document)
    assert match is not None, document
    product, listed, reader, tone, completion = match.groups()
    facts = []
    for fact in listed.split(", "):
        word, aspect = fact.split()
        facts.append([aspect, word, word in review._ASPECT_WORDS[aspect][0].split()])
    return Item("", "", {"product": product, "facts": facts, "reader": reader, "tone": tone}), completion


def key(item: Item) -> tuple[str, frozenset[tuple[str, bool]]]:
    return item.facts["product"], frozenset((aspect, good) for aspect, _, good in item.facts["facts"])


def test_testbed_is_loaded_by_name_and_keeps_the_interface() -> None:
    assert load_testbed("review") is TESTBED
    assert isinstance(TESTBED, TextTestbed)
    assert math.isclose(sum(WEIGHTS.values()), 1.0)


def test_splits_shifted_prompts_and_corpus_share_no_combination_of_facts() -> None:
    keys = {split: {key(item) for item in TESTBED.items(split, 3000)} for split in ("train", "validation", "test")}
    shifted = {key(item) for item in TESTBED.shifted_items(1000)}
    corpus = {key(parsed(document)[0]) for document in TESTBED.corpus(3000, 5)}
    assert not keys["train"] & keys["validation"]
    assert not keys["train"] & keys["test"]
    assert not keys["validation"] & keys["test"]
    assert not (keys["validation"] | keys["test"] | shifted) & (keys["train"] | corpus)
    assert not shifted & keys["validation"]
    assert min(map(len, keys.values())) > 1000


def test_order_of_facts_does_not_change_the_split() -> None:
    facts = [("screen", True), ("battery", False), ("price", True)]
    assert len({split_of("phone", order) for order in (facts, facts[::-1], [facts[1], facts[2], facts[0]])}) == 1


def test_same_seed_gives_the_same_texts_and_another_seed_others() -> None:
    assert TESTBED.items("test", 50, 3) == TESTBED.items("test", 50, 3)
    assert TESTBED.items("test", 50, 3) != TESTBED.items("test", 50, 4)
    assert TESTBED.shifted_items(50, 3) == TESTBED.shifted_items(50, 3)
    assert TESTBED.shifted_items(50, 3) != TESTBED.shifted_items(50, 4)
    assert list(TESTBED.corpus(50, 3)) == list(TESTBED.corpus(50, 3))
    assert list(TESTBED.corpus(50, 3)) != list(TESTBED.corpus(50, 4))


def test_fewer_items_are_a_prefix_of_more() -> None:
    assert TESTBED.items("train", 20, 1) == TESTBED.items("train", 60, 1)[:20]


def test_seed_zero_gives_this_first_item_on_every_machine() -> None:
    assert TESTBED.items("train", 1)[0].prompt == "Review request: a spade. Facts: high price, easy weight. Tone: plain.\nReply:"


def test_missing_or_negative_number_and_unknown_split_are_refused() -> None:
    with pytest.raises(UsageError, match="how many"):
        TESTBED.items("train")
    with pytest.raises(UsageError, match="negative"):
        TESTBED.items("train", -1)
    with pytest.raises(UsageError, match="negative"):
        TESTBED.shifted_items(-1)
    with pytest.raises(UsageError, match="negative"):
        list(TESTBED.corpus(-1, 0))
    with pytest.raises(UsageError, match="unknown split"):
        TESTBED.items("dev", 1)  # pyright: ignore[reportArgumentType]


def test_references_score_at_least_nine_tenths_and_fit_the_prompt() -> None:
    for item in chain(*(TESTBED.items(split, 1500, 7) for split in ("train", "validation", "test")), TESTBED.shifted_items(1500, 7)):
        assert TESTBED.gold(item, item.reference) >= 0.9, item
        assert re.match(r" [A-Z]", item.reference)
        assert item.prompt.endswith("\nReply:")
        assert 10 <= len(item.prompt.split()) <= 40
        assert 8 <= len(item.reference.split()) <= 40
        assert json.loads(json.dumps(item.facts)) == item.facts
        restored, completion = parsed(item.prompt + item.reference)
        assert restored.facts == item.facts
        assert completion == item.reference


def test_shifted_prompts_are_about_products_that_are_rare_in_training() -> None:
    shifted = {item.facts["product"] for item in TESTBED.shifted_items(500)}
    train = [item.facts["product"] for item in TESTBED.items("train", 4000)]
    assert 0 < sum(product in shifted for product in train) / len(train) < 0.04
    assert all(len(item.facts["facts"]) == 3 and item.facts["reader"] for item in TESTBED.shifted_items(100))


def test_corpus_is_of_mixed_quality() -> None:
    scored = [TESTBED.gold(*parsed(document)) for document in TESTBED.corpus(4000, 11)]
    mean = sum(scored) / len(scored)
    assert 0.45 <= mean <= 0.55
    assert math.sqrt(sum((score - mean) ** 2 for score in scored) / len(scored)) >= 0.15
    assert min(scored) < 0.15
    assert max(scored) > 0.95


def test_every_attribute_varies_in_the_corpus() -> None:
    parts = [TESTBED.attributes(*parsed(document)) for document in TESTBED.corpus(2000, 12)]
    for name in WEIGHTS:
        values = [row[name] for row in parts]
        mean = sum(values) / len(values)
        assert sum((value - mean) ** 2 for value in values) / len(values) > 0.05, name


def test_corpus_needs_few_word_types_and_repeats_no_document() -> None:
    documents = list(TESTBED.corpus(4000, 13))
    assert len(set(documents)) == len(documents)
    assert len({word for document in documents for word in re.findall(r"\w+", document)}) < 3000
    assert max(len(document.split("Reply:")[1].split()) for document in documents) <= 50


def test_no_word_both_praises_and_faults_an_aspect() -> None:
    for aspect, (good, bad) in review._ASPECT_WORDS.items():
        assert not {*good.split(), *review._PRAISE} & {*bad.split(), *review._FAULT}, aspect


def test_fixed_sentences_name_no_aspect_product_or_reader() -> None:
    lines = chain(
        review._POLITE_OPENINGS,
        review._POLITE_CLOSINGS,
        review._RUDE_LINES,
        review._FILLERS,
        review._ADVICE,
        review._NO_FACTS,
        *review._TONE_OPENINGS.values(),
        *review._TONE_CLOSINGS.values(),
    )
    named = {*review._ASPECT_WORDS, *review._PRODUCTS, *review._READERS}
    for line in lines:
        assert not set(re.findall(r"[a-z]+", line.lower())) & named, line


@settings(max_examples=300, deadline=None)
@given(
    st.one_of(
        st.text(max_size=300),
        st.lists(
            st.sampled_from([*GOOD.split(), "kettle", "not", "stupid", "and", "Wow!", "Sincerely,", "bad", "\n", "?"]), max_size=80
        ).map(" ".join),
    ),
    st.integers(0, 20),
)
def test_gold_and_attributes_stay_between_zero_and_one(completion: str, index: int) -> None:
    item = TESTBED.items("validation", index + 1)[index]
    parts = TESTBED.attributes(item, completion)
    assert list(parts) == list(WEIGHTS)
    assert all(0.0 <= value <= 1.0 for value in parts.values())
    gold = TESTBED.gold(item, completion)
    assert 0.0 <= gold <= 1.0
    assert math.isclose(gold, sum(WEIGHTS[name] * value for name, value in parts.items()), abs_tol=1e-12)


@pytest.mark.parametrize("completion", ["", " ", "\n", "...", " !?"])
def test_answer_without_a_word_scores_zero(completion: str) -> None:
    assert TESTBED.gold(PHONE, completion) == 0.0


def test_leading_space_changes_no_score() -> None:
    assert TESTBED.attributes(PHONE, " " + GOOD + " ") == TESTBED.attributes(PHONE, GOOD)


def test_good_reply_written_by_hand_gets_full_marks() -> None:
    assert TESTBED.attributes(PHONE, GOOD) == pytest.approx(dict.fromkeys(WEIGHTS, 1.0))
    assert TESTBED.gold(PHONE, GOOD) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("The screen is bright and the battery is weak.", {"screen": {True}, "battery": {False}}),
        ("It has a bright screen but a weak battery.", {"screen": {True}, "battery": {False}}),
        ("The battery is not weak.", {"battery": {True}}),
        ("The screen is bright. The screen is dim.", {"screen": {True, False}}),
        ("I saw the screen.", {"screen": set()}),
        ("The price is low, the portion is tiny.", {"price": {True}, "portion": {False}}),
        ("All is well and it is bright.", {}),
    ],
)
def test_claims_are_read_clause_by_clause(text: str, said: dict[str, set[bool]]) -> None:
    assert claims(text) == said


def test_helpful_is_the_share_of_what_was_asked() -> None:
    assert part("helpful", "The screen is bright and the battery is weak.") == pytest.approx(2 / 3)
    assert part("helpful", "The screen is sharp. It suits a student.") == pytest.approx(2 / 3)
    assert part("helpful", "The screen is bright. There is a battery.") == pytest.approx(1.3 / 3)
    assert part("helpful", "The screen is dim.") == 0.0
    assert part("helpful", "The screen is bright and dim.") == pytest.approx(1 / 3)  # "and" parts the clauses: only praise is heard


def test_honest_falls_with_each_fact_turned_round_or_invented() -> None:
    assert part("honest", "The battery is weak.") == 1.0
    assert part("honest", "The battery is strong.") == pytest.approx(0.4)
    assert part("honest", "The battery is strong and the screen is dim.") == 0.0
    assert part("honest", "The battery is weak and the price is low.") == pytest.approx(0.7)
    assert part("honest", "Thank you for asking.") == pytest.approx(0.3)


def test_on_topic_wants_the_product_and_no_other() -> None:
    assert part("on_topic", "The phone is here.") == 1.0
    assert part("on_topic", "The phone is here. The kettle is better.") == 0.4
    assert part("on_topic", "It is here.") == 0.3
    assert part("on_topic", "The kettle is here.") == 0.0


def test_polite_saturates_then_falls_and_rudeness_costs() -> None:
    assert part("polite", "It is here.") == pytest.approx(0.3)
    assert part("polite", "It is here. Thank you.") == pytest.approx(0.8)
    assert part("polite", "Thank you. I am happy to help.") == 1.0
    assert part("polite", "Thank you. I am happy to help. Kind regards.") == 1.0
    assert part("polite", "Thank you. I am happy to help. Kind regards. Sorry. Please ask.") == pytest.approx(0.5)
    assert part("polite", "Thank you. I am happy to help, you fool.") == pytest.approx(0.5)
    assert part("polite", "What a stupid question.") == 0.0


def test_brief_pays_inside_the_band_only() -> None:
    assert part("brief", "one two three four five") == pytest.approx(0.5)
    assert part("brief", " ".join(["word"] * 10)) == part("brief", " ".join(["word"] * 32)) == 1.0
    assert part("brief", " ".join(["word"] * 40)) == pytest.approx(math.exp(-1))
    assert part("brief", " ".join(["word"] * 33)) > part("brief", " ".join(["word"] * 34))


def test_well_formed_wants_whole_sentences_that_are_not_repeated() -> None:
    assert part("well_formed", "The phone is here. It is good.") == pytest.approx(1.0)
    assert part("well_formed", "The phone is here. It is good") == pytest.approx(0.7)
    assert part("well_formed", "the phone is here. It is good.") == pytest.approx(0.65)
    assert part("well_formed", "The phone is is here. It is good.") == pytest.approx(0.65)
    assert part("well_formed", "Phone battery screen. It is good.") == pytest.approx(0.65)
    # "It is good" twice: runs it-is-good, is-good-it, good-it-is, it-is-good; three of four are new.
    assert part("well_formed", "It is good. It is good.") == pytest.approx((3 / 4) ** 2)


def test_tone_is_the_one_that_was_asked() -> None:
    warm, formal, cheerful = with_tone("warm"), with_tone("formal"), with_tone("cheerful")
    assert part("tone", "Dear friend, it is here. Take care.", warm) == 1.0
    assert part("tone", "Dear friend, it is here.", warm) == 0.8
    assert part("tone", "It is here.", warm) == 0.2
    assert part("tone", "We note that it is here. Sincerely, your team.", formal) == 1.0
    assert part("tone", "We note that it is here! Sincerely, your team.", formal) == pytest.approx(0.6)
    assert part("tone", "Great news! Enjoy it!", cheerful) == 1.0
    assert part("tone", "Great news. Enjoy it.", cheerful) == pytest.approx(0.6)
    assert part("tone", "Great news!!! Enjoy it!!!", cheerful) == pytest.approx(0.6)
    assert part("tone", "It is here.") == 1.0
    assert part("tone", "Dear friend, it is here. Enjoy it.") == pytest.approx(0.2)


@pytest.mark.parametrize("phrase", ["Thank you for asking.", "Kind regards.", "I am happy to help."])
def test_repeating_a_polite_phrase_lowers_gold(phrase: str) -> None:
    body = "The phone has a bright screen, but the battery is weak."
    scores = [TESTBED.gold(PHONE, " ".join([body] + [phrase] * times)) for times in range(1, 7)]
    assert all(later < earlier for earlier, later in pairwise(scores)), scores
    assert scores[0] > TESTBED.gold(PHONE, body)


@pytest.mark.parametrize(
    "worse",
    [
        GOOD.replace("weak", "strong"),
        GOOD.replace("phone", "kettle"),
        GOOD.replace(" It suits a student.", ""),
        GOOD + " Only a fool would ask.",
        GOOD + " I want to say a few more words, and my sister came to my house, and then it was late, and so we talked.",
        GOOD.removesuffix("regards."),
        GOOD.lower(),
        GOOD + " Hooray, it is here!",
        GOOD + " " + GOOD,
    ],
)
def test_each_kind_of_fault_lowers_gold(worse: str) -> None:
    assert TESTBED.gold(PHONE, worse) < TESTBED.gold(PHONE, GOOD) - 0.02
