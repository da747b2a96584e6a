"""A chat template's habits are told before the first episode."""

from __future__ import annotations

import pytest

from eval_protocol_rft.episodes._template_report import TemplateReport, template_report
from eval_protocol_rft.local._tokenizer import LoadedTokenizer
from tests.episodes import templates

NAMES = (
    "plain turns",
    "tool calls, as text",
    "tool calls, as fields",
    "thinking, then a tool result",
    "thinking, then a question",
)


def verdicts(report: TemplateReport) -> list[bool | None]:
    assert tuple(case.name for case in report.cases) == NAMES
    return [case.append_only for case in report.cases]


def of(template: str) -> TemplateReport:
    return template_report(templates.merging_tokenizer(template))


def test_a_template_that_only_appends():
    report = of(templates.APPENDS)
    assert verdicts(report) == [True] * 5
    assert report.append_only
    assert report.training_template is None
    assert verdicts(template_report(templates.bundled())) == [True] * 5


def test_a_template_that_strips_thinking_shows_what_becomes_of_it():
    tools = "{%- if tools %}<tools>{{ tools | tojson }}</tools>{% endif -%}"
    calls = "{% for call in message.tool_calls or [] %}{{ call | tojson }}{% endfor %}<|im_end|>"
    report = of(tools + templates.STRIPS_THINKING.replace("<|im_end|>", calls, 1))
    assert verdicts(report) == [True, True, True, True, False]
    assert not report.append_only
    rewrite = report.cases[-1].rewrite
    assert "Two and eight" in rewrite.kept
    assert "Twenty." in rewrite.rendered


def test_a_template_without_tools_says_why_there_is_no_verdict():
    report = of(templates.MOVES_SYSTEM)
    assert verdicts(report) == [True, None, None, None, True]
    assert "does not render tools" in report.cases[1].problem
    assert report.append_only


def test_a_template_that_numbers_its_last_message_never_appends():
    report = of(
        "{% for m in messages %}<|im_start|>{{ m.role }} {{ loop.revindex }}\n{{ m.content }}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant 1\n{% endif %}"
    )
    assert [report.cases[0].append_only, report.cases[-1].append_only] == [False, False]


def test_a_template_that_fails_is_no_template_that_appends():
    report = of("{{ raise_exception('no') }}")
    assert verdicts(report) == [None] * 5
    assert not report.append_only


EXPECTED = {
    "qwen2_5": ([True] * 5, None),
    "qwen3": ([True, True, True, True, False], "qwen3_training.jinja"),
    "llama3_1": ([True, None, None, None, True], None),
}


@pytest.mark.real_tokenizers
@pytest.mark.parametrize("name", EXPECTED)
def test_real_templates(name):
    tokenizer = templates.real(name)
    if tokenizer is None:
        pytest.skip(f"EP_RFT_TOKENIZERS names no folder with {name}/ (CONTRIBUTING.md)")
    expected, training = EXPECTED[name]
    report = template_report(tokenizer)
    assert verdicts(report) == expected
    assert (training is None) == (report.training_template is None)
    assert (training or "") in (report.training_template or "")


@pytest.mark.real_tokenizers
def test_qwen3_told_not_to_think_rewrites_every_turn():
    tokenizer = templates.real("qwen3")
    if tokenizer is None:
        pytest.skip("EP_RFT_TOKENIZERS names no folder with qwen3/ (CONTRIBUTING.md)")
    report = template_report(tokenizer, {"enable_thinking": False})
    assert verdicts(report) == [False] * 5
    assert isinstance(tokenizer, LoadedTokenizer)
