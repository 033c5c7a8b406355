from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_fixtures import CHATML, END, MARKED, REWRITING, WITH_TOOLS, assistant, ids_of, system, tiny_tokenizer, user
from telos.data.chat import encode_answers, encode_conversations, encode_prompts, encode_texts, until_end_token, use_template
from telos.data.formats import BadRow

DIALOGUE = [system("good"), user("hello"), assistant("The sky"), user("What?"), assistant("is blue.")]
DIALOGUE_TEXT = (
    "<|im_start|>system\ngood<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\nThe sky<|im_end|>\n"
    "<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\nis blue.<|im_end|>\n"
)


def learnt(found: Any, tokenizer: Any) -> list[str]:
    """The runs of tokens under the mask, as text."""
    ids, mask = found
    starts = np.flatnonzero(np.diff(np.concatenate([[False], mask])) & mask)
    stops = np.flatnonzero(np.diff(np.concatenate([mask, [False]])) & mask) + 1
    return [tokenizer.decode(ids[a:b].tolist()) for a, b in zip(starts, stops, strict=True)]


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_the_mask_covers_what_the_assistant_wrote_and_its_end_tokens(template: str) -> None:
    tokenizer = tiny_tokenizer(chat=template)
    (found,) = encode_conversations(tokenizer, [DIALOGUE], [None])
    assert not isinstance(found, BadRow)
    assert found[0].tolist() == ids_of(DIALOGUE_TEXT)
    assert learnt(found, tokenizer) == ["The sky<|im_end|>", "is blue.<|im_end|>"]


def test_markers_and_turns_give_the_same_mask() -> None:
    conversations = [DIALOGUE, DIALOGUE[1:3], [user("a"), assistant("b"), assistant("c")]]
    marked = encode_conversations(tiny_tokenizer(chat=MARKED), conversations, [None] * 3)
    by_turns = encode_conversations(tiny_tokenizer(chat=CHATML), conversations, [None] * 3)
    for first, second in zip(marked, by_turns, strict=True):
        assert not isinstance(first, BadRow)
        assert not isinstance(second, BadRow)
        assert first[0].tolist() == second[0].tolist()
        assert first[1].tolist() == second[1].tolist()


def test_a_template_that_rewrites_turns_is_found_out_on_the_row_where_it_does() -> None:
    found = encode_conversations(tiny_tokenizer(chat=REWRITING), [DIALOGUE[:3], DIALOGUE, DIALOGUE[1:3]], [None] * 3)
    assert [isinstance(row, BadRow) for row in found] == [False, True, False]
    assert isinstance(found[1], BadRow)
    assert found[1].reason == "no-boundary"


def test_a_template_with_markers_may_rewrite_turns() -> None:
    marked = REWRITING.replace("{% if message.role", "{% generation %}{% if message.role").replace(
        "{% endif %}<|im_end|>", "{% endif %}<|im_end|>{% endgeneration %}"
    )
    (found,) = encode_conversations(tiny_tokenizer(chat=marked), [DIALOGUE], [None])
    assert not isinstance(found, BadRow)
    assert found[1].any()


def test_a_row_that_a_marked_template_refuses_spoils_no_other_row() -> None:
    strict = "{% if messages[0].role != 'user' %}{{ raise_exception('the first message must be of the user') }}{% endif %}" + MARKED
    tokenizer = tiny_tokenizer(chat=strict)
    found = encode_conversations(tokenizer, [DIALOGUE[1:], DIALOGUE, DIALOGUE[1:3]], [None] * 3)
    assert learnt(found[0], tokenizer) == ["The sky<|im_end|>", "is blue.<|im_end|>"]
    assert isinstance(found[1], BadRow)
    assert learnt(found[2], tokenizer) == ["The sky<|im_end|>"]


def test_rows_with_and_without_tools_may_stand_together() -> None:
    tokenizer = tiny_tokenizer(chat=WITH_TOOLS.replace(CHATML, MARKED))
    found = encode_conversations(tokenizer, [DIALOGUE[1:3]] * 2, [None, [{"name": "search"}]])
    without, with_tools = (row for row in found if not isinstance(row, BadRow))
    assert with_tools[0].tolist() == ids_of("tools search\n") + without[0].tolist()
    assert learnt(with_tools, tokenizer) == learnt(without, tokenizer) == ["The sky<|im_end|>"]


def test_a_conversation_that_begins_with_the_assistant_needs_markers() -> None:
    conversation = [assistant("hello"), user("What?"), assistant("good")]
    (by_turns,) = encode_conversations(tiny_tokenizer(chat=CHATML), [conversation], [None])
    assert isinstance(by_turns, BadRow)
    assert by_turns.reason == "begins-with-answer"
    tokenizer = tiny_tokenizer(chat=MARKED)
    (marked,) = encode_conversations(tokenizer, [conversation], [None])
    assert learnt(marked, tokenizer) == ["hello<|im_end|>", "good<|im_end|>"]


def test_a_prompt_ends_where_the_answer_begins() -> None:
    (ids,) = encode_prompts(tiny_tokenizer(chat=CHATML), [[user("hello")]], [None])
    assert not isinstance(ids, BadRow)
    assert ids.tolist() == ids_of("<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n")


def test_answers_are_what_the_whole_conversation_adds_to_the_prompt() -> None:
    tokenizer = tiny_tokenizer(chat=CHATML)
    (found,) = encode_answers(tokenizer, [[user("hello")]], [([assistant("good")], [assistant("The sky is blue.")])], [None])
    assert not isinstance(found, BadRow)
    assert found.prompt.tolist() == ids_of("<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n")
    assert [answer.tolist() for answer in found.answers] == [ids_of("good" + END), ids_of("The sky is blue." + END)]
    assert found.notes == ()


def test_a_merge_across_the_boundary_leaves_the_prompt_as_it_is_and_is_counted() -> None:
    template = "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}<|im_end|>{% endif %}{% endfor %}"
    tokenizer = tiny_tokenizer(chat=template)
    assert ids_of("gre") + ids_of("en") != ids_of("green")  # the words are one merge in this vocabulary
    (found,) = encode_answers(tokenizer, [[user("The gre")]], [([assistant("en")],)], [None])
    assert not isinstance(found, BadRow)
    assert found.prompt.tolist() == ids_of("The gre")
    assert found.answers[0].tolist() == ids_of("en" + END)
    assert found.notes == ("boundary-encoded-apart",)


def test_a_prompt_that_changes_when_the_answer_follows_has_no_boundary() -> None:
    prompt = [user("a"), assistant("b"), user("c")]
    template = "{% if messages[-1].role == 'assistant' %}final {% endif %}" + CHATML
    (found,) = encode_answers(tiny_tokenizer(chat=template), [prompt], [([assistant("d")],)], [None])
    assert isinstance(found, BadRow)
    assert found.reason == "no-boundary"


def test_an_answer_of_which_the_template_writes_nothing_is_bad() -> None:
    template = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    (found,) = encode_answers(tiny_tokenizer(chat=template), [[user("hello")]], [([assistant("good")],)], [None])
    assert isinstance(found, BadRow)
    assert found.reason == "empty-answer"


def test_a_template_without_end_token_and_turns_of_others_are_counted() -> None:
    template = "{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    answer = [assistant("good"), user("What?"), assistant("bad")]
    (found,) = encode_answers(tiny_tokenizer(chat=template), [[user("hello")]], [(answer,)], [None])
    assert not isinstance(found, BadRow)
    assert set(found.notes) == {"answer-has-other-turns", "template-writes-no-end-token"}


def test_an_answer_of_several_turns_keeps_all_of_them() -> None:
    tokenizer = tiny_tokenizer(chat=CHATML)
    answer = [assistant("good"), user("What?"), assistant("bad")]
    (found,) = encode_answers(tokenizer, [[user("hello")]], [(answer,)], [None])
    assert not isinstance(found, BadRow)
    text = "good<|im_end|>\n<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\nbad<|im_end|>"
    assert found.answers[0].tolist() == ids_of(text)


def test_only_white_space_after_the_end_token_is_cut() -> None:
    tokenizer = tiny_tokenizer()
    for text, kept in ((f"a{END}\n", f"a{END}"), (f"a{END}b", f"a{END}b"), ("a\n", "a\n"), (f"a{END}b{END} \n", f"a{END}b{END}")):
        assert until_end_token(tokenizer, np.array(ids_of(text))).tolist() == ids_of(kept)


def test_tools_reach_the_template() -> None:
    tools = [{"name": "search"}]
    tokenizer = tiny_tokenizer(chat=WITH_TOOLS)
    with_tools, without = encode_prompts(tokenizer, [[user("hello")]] * 2, [tools, None])
    assert not isinstance(with_tools, BadRow)
    assert not isinstance(without, BadRow)
    assert with_tools.tolist() == ids_of("tools search\n") + without.tolist()


def test_a_template_from_a_file_is_used(tmp_path: Path) -> None:
    (tmp_path / "chat.jinja").write_text(MARKED)
    tokenizer = tiny_tokenizer()
    use_template(tokenizer, tmp_path / "chat.jinja")
    assert tokenizer.chat_template == MARKED


def test_encoding_in_chunks_is_encoding_one_by_one() -> None:
    texts = [f"The sky is {i}" for i in range(2100)]
    found = encode_texts(tiny_tokenizer(), texts + texts)
    assert [row.tolist() for row in found[:2100]] == [row.tolist() for row in found[2100:]]
    assert all(found[i].tolist() == ids_of(texts[i]) for i in (0, 1023, 1024, 2047, 2048, 2099))
