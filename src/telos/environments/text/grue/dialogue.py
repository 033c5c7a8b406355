"""`grue-dialogue`: the next turn of a talk in a shop is to be written. After GRUE's DailyDialog task (Li et al. 2017).

    Shop: kettle 30, lamp 12, tent 45.
    User: Hello.
    Shop: Hello, how can I help you?
    User: How much is the lamp?
    Shop: The lamp costs 12.

What the next turn has to do (its intent) follows from the user's last one: inform, ask, direct, commit (DailyDialog's four acts), greet,
apologise or take leave. Rules on the turn's words stand where GRUE has a classifier.
"""

from __future__ import annotations

import random
import re

from telos.environments.text.base import Item
from telos.environments.text.grue._task import DrawnTask
from telos.environments.text.grue._words import a, form, words

_PRODUCTS = ("kettle", "lamp", "tent", "chair", "drum", "robot", "coat", "phone", "bike", "drill", "spade", "kite")
_LONGEST = 16  # words of a turn
# situation -> (intent, the user's last turns, replies, words that the reply should have); p: product, n: its price
_SITUATIONS = {
    "price": (
        "inform",
        ("How much is the {p}?", "What is the price of the {p}?"),
        ("The {p} costs {n}.", "The price of the {p} is {n}."),
        ("{p}", "{n}"),
    ),
    "there": ("inform", ("Do you have {a}?", "I need {a}. Is there one?"), ("Yes, we have {a}.", "Yes, there is {a}."), ("yes", "{p}")),
    "not there": (
        "inform",
        ("Do you have {a}?", "I need {a}. Is there one?"),
        ("No, we do not have {a}.", "No, there is no {p}."),
        ("no", "{p}"),
    ),
    "order": (
        "commit",
        ("I want the {p}.", "Can you send me the {p}?"),
        ("We will send you the {p}.", "I will send the {p} today."),
        ("{p}",),
    ),
    "fault": (
        "apologise",
        ("The {p} is broken.", "The {p} came late."),
        ("I am sorry about the {p}.", "We are sorry for the bad {p}."),
        ("{p}",),
    ),
    "use": (
        "direct",
        ("What should I do with the {p} now?", "How do I start the {p}?"),
        ("Please read the manual of the {p}.", "Please try the {p} again."),
        ("{p}",),
    ),
    "vague": ("ask", ("I want to buy something.", "I need your help."), ("What would you like to buy?", "Which one do you want?"), ()),
    "hello": ("greet", ("Hello.", "Good morning."), ("Hello, how can I help you?", "Good morning, how can we help?"), ()),
    "leave": ("leave", ("Thank you, that is all.", "Thanks for your help."), ("You are welcome.", "Thank you and have a good day."), ()),
}
_BEFORE = ("price", "there", "order", "hello", "vague")  # what may have been spoken of before
# The first rule that fits tells the intent.
_RULES = tuple(
    (intent, re.compile(pattern))
    for intent, pattern in (
        ("apologise", r"\b(?:sorry|apologi[sz]e|apologies)\b"),
        ("greet", r"^(?:hello|hi|good (?:morning|evening|day))\b"),
        ("leave", r"\byou are welcome\b|\bgoodbye\b|\bhave a (?:good|nice|great) day\b"),
        ("commit", r"\b(?:we|i)(?: will|'ll| shall)\b"),
        ("direct", r"^please\b|\bplease (?:try|read|bring|send|call|check|look|use)\b"),
        ("ask", r"\?$"),
        ("inform", r"\b(?:costs?|is|are|have|has)\b"),
    )
)


def intent_of(turn: str) -> str:
    """What a turn does; "" when no rule fits."""
    text = turn.strip().lower()
    return next((intent for intent, rule in _RULES if rule.search(text)), "")


class Dialogue(DrawnTask):
    """The testbed; see the module's docstring."""

    name = "grue-dialogue"
    max_new_tokens = 24
    lexical = ("bleu", "rougeL", "meteor")

    def attributes(self, item: Item, completion: str) -> dict[str, float]:
        """`intent`: 1 when the turn does what is due; `on_topic`: share of the wanted words (product, price, yes or no) that it has, halved
        when it names another product or number; `form`: share of what one plain sentence is. Each in [0, 1]."""
        text, facts = completion.strip(), item.facts
        found = set(words(text))
        wanted = facts["wanted"]
        stray = any((word in _PRODUCTS or word.isdigit()) and word not in wanted for word in found)
        present = sum(word in found for word in wanted) / len(wanted) if wanted else float(bool(found))
        return {
            "intent": float(intent_of(text) == facts["intent"]),
            "on_topic": present * (0.5 if stray else 1.0),
            "form": form(text, _LONGEST),
        }

    def gold(self, item: Item, completion: str) -> float:
        """intent × (1 + on_topic × form) / 2, in [0, 1]."""
        parts = self.attributes(item, completion)
        return parts["intent"] * (1 + parts["on_topic"] * parts["form"]) / 2

    def _draw(self, rng: random.Random) -> tuple[str, Item]:
        count = rng.choice((2, 3))
        products = rng.sample(_PRODUCTS, count + 1)
        offered, absent = products[:count], products[count]
        prices = {product: rng.randint(10, 99) for product in offered}

        def turns(situation: str) -> tuple[str, list[str], list[str]]:
            """The user's turn, all replies to it, and the wanted words."""
            _, asked, replies, wanted = _SITUATIONS[situation]
            product = absent if situation == "not there" else rng.choice(offered)
            fields = {"p": product, "a": a(product), "n": str(prices.get(product, ""))}
            answers = [reply.format(**fields) for reply in rng.sample(replies, len(replies))]
            return rng.choice(asked).format(**fields), answers, [word.format(**fields) for word in wanted]

        situation = rng.choice(tuple(_SITUATIONS))
        lines = ["Shop: " + ", ".join(f"{product} {prices[product]}" for product in offered) + "."]
        if situation != "hello" and rng.random() < 0.4:
            before = turns(rng.choice(_BEFORE))
            lines += [f"User: {before[0]}", f"Shop: {before[1][0]}"]
        asked, replies, wanted = turns(situation)
        facts = {"intent": _SITUATIONS[situation][0], "wanted": wanted, "offered": prices, "references": replies}
        return lines[0], Item("\n".join([*lines, f"User: {asked}", "Shop:"]), " " + replies[0], facts)

    def _flawed(self, rng: random.Random, item: Item) -> str:
        """A reply to something else, or one that is wrong about product or price."""
        product, price = rng.choice(tuple(item.facts["offered"].items()))
        _, _, replies, _ = _SITUATIONS[rng.choice(tuple(_SITUATIONS))]
        return " " + rng.choice(replies).format(p=product, a=a(product), n=price)


TESTBED = Dialogue()
