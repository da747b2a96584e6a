"""Turn by turn: what is sent, what is kept, and what cannot go on."""

from __future__ import annotations

import time
from typing import Any

import pytest

from eval_protocol_rft.episodes._conversation import Conversation
from eval_protocol_rft.episodes._rendering import ConversationError, HistoryRewrittenError
from eval_protocol_rft.local._tokenizer import LoadedTokenizer
from eval_protocol_rft.rollout._prompts import PromptError
from eval_protocol_rft.sampling._types import Completion, TokenIds
from tests.episodes import templates
from tests.rollouts import TOOLS

QUESTION = {"role": "user", "content": "12 + 8?"}
FEEDBACK = {"role": "user", "content": "No. Again."}
MERGING = templates.merging_tokenizer(templates.APPENDS)
END = MERGING.tokenizer.convert_tokens_to_ids(templates.END)
HEADER = "<|im_start|>assistant\n"


def ids(text: str, tokenizer=MERGING) -> list[int]:
    return templates.ids_of(tokenizer, text)


def said(what: str | list[int], *end: int, finish_reason: Any = "stop", **fields: Any):
    """A completion of these ids, or of those that the tokenizer would choose for the text."""
    tokens = [*(ids(what) if isinstance(what, str) else what), *end]
    logprobs = [-0.5 - i for i in range(len(tokens))]
    return Completion(token_ids=tokens, logprobs=logprobs, finish_reason=finish_reason, **fields)


def begun(template: str = templates.APPENDS, **options: Any) -> Conversation:
    tokenizer = templates.merging_tokenizer(template)
    return Conversation.start([QUESTION], None, tokenizer, **options)


def test_the_next_prompt_is_the_last_one_the_answer_and_what_stands_between():
    talk = begun()
    first = talk.prompt_ids
    assert list(first) == ids(f"<|im_start|>user\n12 + 8?<|im_end|>\n{HEADER}")
    talk.sampled(said("21", END))
    second = talk.append([FEEDBACK])
    between = f"\n<|im_start|>user\nNo. Again.<|im_end|>\n{HEADER}"
    assert list(second) == [*first, *ids("21"), END, *ids(between)]
    assert second == talk.prompt_ids
    assert isinstance(second, TokenIds)


def test_sampled_ids_that_spell_a_text_in_an_unusual_way_are_kept():
    usual, unusual = ids("total"), [token for letter in "total" for token in ids(letter)]
    assert len(usual) < len(unusual)
    talk = begun()
    first = list(talk.prompt_ids)
    talk.sampled(said(unusual, END))
    assert list(talk.append([FEEDBACK]))[len(first) :][: len(unusual)] == unusual


def test_one_segment_holds_each_id_once_and_marks_what_was_sampled():
    talk = begun()
    first = list(talk.prompt_ids)
    talk.sampled(said([7, 8], END))
    second = list(talk.append([FEEDBACK]))
    talk.sampled(said([9], END))
    (segment,) = talk.segments()
    assert segment.tokens.tolist() == [*second, 9, END]
    context = len(second) - len(first) - 3
    mask = [0] * len(first) + [1, 1, 1] + [0] * context + [1, 1]
    assert segment.loss_mask.tolist() == mask
    at = [i for i, sampled in enumerate(mask) if sampled]
    assert segment.logprobs[at].tolist() == [-0.5, -1.5, -2.5, -0.5, -1.5]
    assert not segment.logprobs[[i for i in range(len(mask)) if i not in at]].any()


def test_turns_are_the_requests_and_their_answers():
    talk = begun()
    first = list(talk.prompt_ids)
    talk.sampled(said([7], END))
    second = list(talk.append([FEEDBACK]))
    talk.sampled(said([9, 9], finish_reason="length"))
    one, two = talk.turns()
    assert (one["prompt_ids"], one["completion_ids"]) == (first, [7, END])
    assert (two["prompt_ids"], two["completion_ids"]) == (second, [9, 9])
    assert (one["finish_reason"], two["finish_reason"]) == ("stop", "length")
    assert two["completion_logprobs"] == [-0.5, -1.5]


def test_what_was_appended_and_never_answered_is_nothing_to_train_on():
    talk = begun()
    assert talk.segments() == []
    talk.sampled(said([7], END))
    (before,) = talk.segments()
    talk.append([FEEDBACK])
    (after,) = talk.segments()
    assert after.tokens.tolist() == before.tokens.tolist()
    assert len(talk.turns()) == 1


def test_nothing_can_be_said_after_a_turn_that_was_cut_off():
    talk = begun()
    talk.sampled(said([7], finish_reason="length"))
    with pytest.raises(ConversationError, match="turn 1 was cut off at its token limit"):
        talk.append([FEEDBACK])
    assert talk.segments()[0].tokens.tolist()[-1] == 7


def test_a_stop_string_ends_a_turn_whose_end_the_template_writes_as_context():
    talk = begun()
    first = list(talk.prompt_ids)
    talk.sampled(said("</think", stop_reason="think"))
    then = list(talk.append([FEEDBACK]))
    assert then[: len(first)] == first
    assert then[len(first) :][: len(ids("</think")) + 1] == [*ids("</think"), END]
    talk.sampled(said([7], END))
    (segment,) = talk.segments()
    assert segment.tokens[segment.loss_mask == 1].tolist() == [*ids("</think"), 7, END]


def test_blanks_that_a_control_token_swallows_are_swallowed_as_in_the_whole_text():
    tokenizer = templates.merging_tokenizer(templates.APPENDS, ender_eats_blanks=True)
    talk = Conversation.start([QUESTION], None, tokenizer)
    talk.sampled(said("21", END))
    then = talk.append([FEEDBACK])
    assert list(then) == templates.whole(tokenizer, talk.messages)
    start = tokenizer.tokenizer.convert_tokens_to_ids(templates.START)
    assert then[then.index(END, then.index(END) + 1) + 1] == start  # no newline between the two


def test_another_end_than_the_templates_is_a_rewrite():
    other = MERGING.tokenizer.convert_tokens_to_ids("<|endoftext|>")
    talk = begun()
    talk.sampled(said("21", other))
    talk.append([FEEDBACK])
    assert "<|endoftext|>" in talk.rewrites[0].kept
    talk.sampled(said("20", END))
    first, second = talk.segments()
    assert first.tokens.tolist()[-1] == other
    assert other not in second.tokens


THOUGHT = "<think>\nten and ten\n</think>\n\n20"


def test_thinking_that_a_template_strips_begins_a_new_segment():
    talk = begun(templates.STRIPS_THINKING)
    talk.sampled(said(THOUGHT, END))
    second = talk.append([FEEDBACK])
    assert "ten and ten" not in MERGING.decode(list(second))
    talk.sampled(said(THOUGHT, END))
    first_segment, second_segment = talk.segments()
    assert first_segment.tokens.tolist()[-1] == END
    assert second_segment.tokens.tolist() == [*second, *ids(THOUGHT), END]
    (rewrite,) = talk.rewrites
    assert rewrite.turn == 1
    assert "ten and ten" in rewrite.kept
    assert "assistant\n\n\n20<|im_end|>" in rewrite.rendered
    assert rewrite.index == len(f"<|im_start|>user\n12 + 8?<|im_end|>\n{HEADER}")
    assert len(rewrite.kept) <= 60


def test_under_reject_a_rewrite_shows_where_and_leaves_the_conversation_as_it_was():
    talk = begun(templates.STRIPS_THINKING, on_rewrite="reject")
    talk.sampled(said(THOUGHT, END))
    with pytest.raises(HistoryRewrittenError, match=r"at character 57, .*ten and ten.*became"):
        talk.append([FEEDBACK])
    assert talk.rewrites == ()
    # A tool's result strips nothing, so the episode may still go that way.
    talk.append([{"role": "tool", "content": "20"}])
    talk.sampled(said("20", END))
    assert len(talk.segments()) == 1


def test_a_think_tag_that_the_prompt_opened_belongs_to_the_answer():
    opens = templates.APPENDS.replace("assistant\n{%", "assistant\n<think>\n{%")
    talk = begun(opens)
    given = talk.sampled(said("ten\n</think>\n\n20", END))
    assert given["content"] == "<think>\nten\n</think>\n\n20"
    talk.append([FEEDBACK])
    assert talk.rewrites == ()


def test_a_template_that_reads_thinking_as_a_field_is_given_it_so():
    fielded = templates.APPENDS.replace(
        "{{ message.content }}",
        "{% if message.reasoning_content %}<think>\n{{ message.reasoning_content }}\n</think>\n\n"
        "{% endif %}{{ message.content }}",
    )
    talk = begun(fielded)
    given = talk.sampled(said(THOUGHT, END))
    assert given == {"role": "assistant", "content": "20", "reasoning_content": "ten and ten"}
    talk.append([FEEDBACK])
    assert talk.rewrites == ()
    talk = begun("{# no reasoning_content here #}" + templates.APPENDS)
    assert talk.sampled(said(THOUGHT, END))["content"] == THOUGHT


def test_tools_stay_in_the_prompt_of_every_turn():
    talk = Conversation.start([QUESTION], TOOLS, MERGING)
    talk.sampled(said("20", END))
    assert list(talk.append([FEEDBACK])) == templates.whole(MERGING, talk.messages, TOOLS)


def test_template_arguments_hold_for_every_turn():
    template = templates.APPENDS.replace("assistant\n{%", "assistant{{ mood }}\n{%")
    tokenizer = templates.merging_tokenizer(template)
    talk = Conversation.start([QUESTION], None, tokenizer, {"mood": "!"}, on_rewrite="split")
    assert MERGING.decode(list(talk.prompt_ids)).endswith("assistant!\n")
    talk.sampled(said("20", END))
    assert MERGING.decode(list(talk.append([FEEDBACK]))).endswith("assistant!\n")
    assert "assistant!" in talk.rewrites[0].kept


ONLY_USERS = (
    "{% for m in messages %}{% if m.role in ['user', 'assistant'] %}<|im_start|>{{ m.role }}\n"
    "{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_result_that_the_template_drops_is_an_error():
    talk = begun(ONLY_USERS)
    talk.sampled(said("20", END))
    with pytest.raises(PromptError, match="does not render the role 'tool'"):
        talk.append([{"role": "tool", "content": "20"}])
    talk.append([FEEDBACK])


def test_calls_that_the_template_drops_are_an_error():
    talk = begun(ONLY_USERS)
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": "{}"}}
    talk.sampled(said("add", END), {"role": "assistant", "content": "", "tool_calls": [call]})
    with pytest.raises(PromptError, match="does not render tool calls"):
        talk.append([FEEDBACK])


def test_a_template_that_fails_on_a_later_turn_says_so_and_changes_nothing():
    strict = "{% if messages | length > 2 %}{{ raise_exception('too long') }}{% endif %}"
    talk = begun(strict + templates.APPENDS)
    talk.sampled(said("20", END))
    with pytest.raises(PromptError, match="failed on 3 messages: TemplateError: too long"):
        talk.append([FEEDBACK])
    assert len(talk.messages) == 2


def test_turns_are_taken_in_turn():
    talk = begun()
    with pytest.raises(ConversationError, match="call sampled first"):
        talk.append([FEEDBACK])
    talk.sampled(said("20", END))
    with pytest.raises(ConversationError, match="two turns in a row"):
        talk.sampled(said("20", END))
    with pytest.raises(ConversationError, match="no messages to append"):
        talk.append([])
    with pytest.raises(PromptError, match="neither content nor tool calls"):
        talk.append([{"role": "user"}])
    talk.append([FEEDBACK])
    with pytest.raises(ConversationError, match="an answer is the assistant's, not 'user'"):
        talk.sampled(said("20", END), {"role": "user", "content": "20"})


def test_an_unknown_policy_is_refused():
    with pytest.raises(ValueError, match="must be 'split' or 'reject', not 'align'"):
        begun(on_rewrite="align")


def test_a_control_token_that_its_own_text_does_not_spell_is_an_error():
    talk = begun()
    tokenizer = talk._prompt.chat.tokenizer
    talk.sampled(said("20", END))
    tokenizer.tokenizer.split_special_tokens = True
    with pytest.raises(PromptError, match=r"reads '<\|im_end\|>'.* cannot be joined"):
        talk.append([FEEDBACK])


def test_a_turn_costs_ids_only_for_what_is_new(monkeypatch):
    talk = begun()
    read: list[int] = []
    whole = LoadedTokenizer.encode

    def counting(self, text):
        read.append(len(text))
        return whole(self, text)

    monkeypatch.setattr(LoadedTokenizer, "encode", counting)
    for _ in range(50):
        talk.sampled(said([1, 2], END))
        talk.append([FEEDBACK])
    assert len(read) == 50
    assert set(read) == {len(f"<|im_end|>\n<|im_start|>user\nNo. Again.<|im_end|>\n{HEADER}")}


def test_a_hundred_turns_take_a_moment():
    talk = begun()
    started = time.process_time()
    for _ in range(100):
        talk.sampled(said("20", END))
        talk.append([FEEDBACK])
    assert time.process_time() - started < 5
    assert len(talk.turns()) == 100
