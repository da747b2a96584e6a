"""Tool calls are what the model wrote, or a problem that says what is wrong."""

from __future__ import annotations

import json
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval_protocol_rft.rollout._answers import parse_tool_calls, tool_format
from eval_protocol_rft.rollout._json_calls import ParseProblem
from eval_protocol_rft.rollout._prompts import PromptError
from eval_protocol_rft.rollout._tagged_calls import ToolFormat
from tests.episodes import templates

TOKENIZER = templates.bundled()
LLAMA = templates.merging_tokenizer("<|start_header_id|>{{ messages[0].content }}")


def hermes(text: str):
    return parse_tool_calls(text, TOKENIZER)


def llama(text: str):
    return parse_tool_calls(text, LLAMA)


def functions(calls) -> list[tuple[str, str]]:
    return [(call["function"]["name"], call["function"]["arguments"]) for call in calls]


def test_text_without_calls_is_all_content():
    for text in ("20", "", "  a < b\n", '{"name": "add"}', "</tool_call>"):
        assert hermes(text) == (text, [])


def test_a_call_keeps_the_spelling_of_its_arguments():
    content, calls = hermes(
        'I add.\n<tool_call>\n{"name": "add", "arguments": {"a":1,  "b": 2.50}}\n</tool_call>'
    )
    assert content == "I add."
    assert calls == [
        {
            "id": "call_0",
            "type": "function",
            "function": {"name": "add", "arguments": '{"a":1,  "b": 2.50}'},
        }
    ]


def test_several_calls_keep_their_order_and_get_ids_of_their_own():
    text = "".join(
        f'<tool_call>{{"arguments": {{}}, "name": "f{i}"}}</tool_call>\n' for i in range(3)
    )
    content, calls = parse_tool_calls(text, TOKENIZER, id_prefix="turn3")
    assert content == ""
    assert functions(calls) == [("f0", "{}"), ("f1", "{}"), ("f2", "{}")]
    assert [call["id"] for call in calls] == ["turn3_0", "turn3_1", "turn3_2"]


def test_a_closing_tag_inside_a_string_closes_nothing():
    arguments = '{"text": "a </tool_call> b"}'
    _, calls = hermes(f'<tool_call>{{"name": "say", "arguments": {arguments}}}</tool_call>')
    assert functions(calls) == [("say", arguments)]


def test_a_think_tag_inside_a_string_closes_no_thought():
    arguments = '{"text": "</think>"}'
    call = f'<tool_call>{{"name": "say", "arguments": {arguments}}}</tool_call>'
    assert functions(hermes(call)[1]) == [("say", arguments)]
    assert functions(hermes(f"hm</think>{call}")[1]) == [("say", arguments)]
    assert functions(hermes(f"{call}{call}")[1]) == [("say", arguments)] * 2


def test_what_is_thought_about_is_not_called():
    call = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    assert hermes(f"<think>perhaps {call}") == (f"<think>perhaps {call}", [])
    content, calls = hermes(f"<think>perhaps {call}</think>\n\n{call}")
    assert functions(calls) == [("f", "{}")]
    assert content == f"<think>perhaps {call}</think>"
    # The prompt may have opened the block.
    assert functions(hermes(f"perhaps {call}</think>{call}")[1]) == [("f", "{}")]


@pytest.mark.parametrize(
    ("inside", "kind", "message"),
    [
        ('{"name": "f", "arguments": {"a": 1}', "json", "Tool call 1 is not JSON"),
        ("{'name': 'f'}", "json", "not JSON: .*double quotes"),
        ("f(1)", "json", "not JSON"),
        ('{"name": "f", "arguments": {"a": NaN}}', "json", "NaN is no JSON number"),
        ('{"name": "f", "arguments": {"a": -Infinity}}', "json", "Infinity"),
        ('{"name": "f", "arguments": {"a": "\ud800"}}', "json", "not JSON"),
        ('{"name": "f", "arguments": ' + "[" * 100_000, "json", "not JSON"),
        ("", "json", "not JSON"),
        ('{"name": "f"}', "shape", "no call: .*`arguments`"),
        ('{"arguments": {}}', "shape", "no call: .*`name`"),
        ('{"name": 3, "arguments": {}}', "shape", "no call: Expected `str`, got `int`"),
        ('["f", {}]', "shape", "no call: Expected `object`, got `array`"),
        ('{"name": "f", "arguments": "{}"}', "shape", "arguments must be a JSON object"),
        ('{"name": "f", "arguments": null}', "shape", "arguments must be a JSON object, not null"),
        ('{"name": "f", "arguments": {}} really', "stray", "must end with </tool_call>"),
        ('{"name": "f", "arguments": {}}}', "stray", "not with '}</tool_call>'"),
    ],
)
def test_a_malformed_call_is_a_problem_in_words_for_the_model(inside, kind, message):
    text = f"so: <tool_call>{inside}</tool_call>"
    content, problem = hermes(text)
    assert content == text
    assert isinstance(problem, ParseProblem)
    assert problem.kind == kind
    assert len(problem.message) < 500
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(problem.message)


@pytest.mark.parametrize("text", ["<tool_call>", '<tool_call>{"name": "f", "arguments": {}}\n'])
def test_a_call_that_was_cut_off_is_not_closed_for_the_model(text):
    _, problem = hermes(text)
    assert isinstance(problem, ParseProblem)
    assert problem.kind == "unclosed"


def test_a_good_call_beside_a_bad_one_is_not_run_alone():
    good = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    _, problem = hermes(f"{good}<tool_call>{{}}</tool_call>{good}")
    assert isinstance(problem, ParseProblem)
    assert problem.message.startswith("Tool call 2 ")


def test_llama_calls_are_the_whole_answer():
    call = '{"name": "add", "parameters": {"a": 1, "b":2}}'
    assert functions(llama(call)[1]) == [("add", '{"a": 1, "b":2}')]
    assert functions(llama(f"<|python_tag|>{call}\n")[1]) == [("add", '{"a": 1, "b":2}')]
    content, calls = llama(f"{call}; {call}")
    assert content == ""
    assert [name for name, _ in functions(calls)] == ["add", "add"]


@pytest.mark.parametrize(
    "text",
    [
        "20", '{"answer": 20}', "{x | x > 0}", 'Use {"name": "f"}.', "", "[1, 2]", "[f(x)]", "[",
        '[{"name": "Bob"}]', 'He is {"name": "Bob", "age": }', '{"a": {"b": ', "{" * 2_000,
        '{"a": ' * 2_000, '{"type": "circle", "parameters": {"r": 1}}',
    ],
)  # fmt: skip
def test_what_is_no_llama_call_is_an_answer(text):
    assert llama(text) == (text, [])


@pytest.mark.parametrize(
    "call",
    [
        '{"type": "function", "name": "add", "parameters": {"a": 1}}',
        '{"parameters": {"a": 1}, "name": "add"}',
        '{"name": "add", "parameters": {"a": 1}, "type": "function"}',
        '[{"name": "add", "parameters": {"a": 1}}]',
        '[ {"type": "function", "name": "add", "parameters": {"a": 1}} ]',
    ],
)
def test_llama_calls_in_any_order_of_keys_and_as_a_list_and_after_text(call):
    for before in ("", "\n", "<|python_tag|>"):
        assert llama(f"{before}{call}") == ("", llama(call)[1])
    content, calls = llama(f"The set {{1}} is small.\n\n{call}")
    assert content == "The set {1} is small."
    assert functions(calls) == [("add", '{"a": 1}')]


def test_several_llama_calls_in_a_list():
    call = '{"parameters": {"a": 1}, "name": "add"}'
    content, calls = llama(f"I add. [{call}, {call}]; {call}")
    assert (content, functions(calls)) == ("I add. ", [("add", '{"a": 1}')] * 3)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ('{"type": "function", "function": {"name": "f", "parameters": {}}}', "shape"),
        ('{"function": "f", "parameters": {}}', "shape"),
        ('[{"name": "f", "arguments": {}}]', "shape"),
        ('[{"name": "f", "parameters": {}}, {"name": "f", "parameters": []}]', "shape"),
        ('[{"name": "f", "parameters": {}}; {"name": "f", "parameters": {}}', "stray"),
        ('[{"name": "f", "parameters": {}}, {"name": "f", "param', "json"),
        ('So: {"type": "function", "name": "f", "parameters": {"a": }}', "json"),
        ('So: {"name": "f", "parameters": {}} was called', "stray"),
        ("<function=f>{}</function>", "shape"),
        ('I call <function=f>{"a": 1}</function>', "shape"),
        ("[f()]", "shape"),
        ("[f(a=1), f(a=2)]", "shape"),
    ],
)
def test_what_plainly_means_a_llama_call_is_no_answer(text, kind):
    content, problem = llama(text)
    assert content == text
    assert isinstance(problem, ParseProblem)
    assert problem.kind == kind
    assert kind == "stray" or '{"name": "...", "parameters": {...}}' in problem.message


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ('{"name": "f", "parameters": {', "json"),
        ('{"name": "f", "arguments": {}}', "shape"),
        ('{"name": "f", "parameters": {}} I called f', "stray"),
        ('{"name": "f", "parameters": {}};', "unclosed"),
        ('<|python_tag|>search.call(query="x")', "json"),
    ],
)
def test_malformed_llama_calls(text, kind):
    content, problem = llama(text)
    assert content == text
    assert isinstance(problem, ParseProblem)
    assert problem.kind == kind


@given(st.lists(st.sampled_from(["<tool_call>", "</tool_call>", "<think>", "</think>", "{", "}",
    '{"name": "f", "arguments": {}}', '{"name": "f", "parameters": {}}', "<|python_tag|>", ";",
    '"', "\\", "\n", "[", "1e999", "\ud800", "é"])).map("".join))  # fmt: skip
def test_no_text_raises(text):
    for tokenizer in (TOKENIZER, LLAMA):
        content, calls = parse_tool_calls(text, tokenizer)
        if isinstance(calls, ParseProblem):
            assert content == text
        else:
            assert all(isinstance(json.loads(a), dict) for _, a in functions(calls))


PIECES = [
    "<tool_call>", "</tool_call>", "<function=f>", "</function>", "<parameter=a>", "</parameter>",
    "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "[TOOL_CALLS]", "[ARGS]", "[", "]",
    "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "function<｜tool▁sep｜>", "f\n```json\n",
    "```", "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>", "<|start|>assistant", "<|end|>",
    "<|channel|>analysis", "<|channel|>final", "<|message|>",
    "<|channel|>commentary to=functions.f",
    '{"name": "f", "arguments": {}}', '{"name": "f", "parameters": {}}', "{}", "f", "\n", "1e999",
    ",", ";", "\ud800", "é", "null",
]  # fmt: skip


@pytest.mark.parametrize("form", get_args(ToolFormat))
@settings(max_examples=60)
@given(text=st.lists(st.sampled_from(PIECES), max_size=14).map("".join))
def test_no_text_of_any_format_raises(form, text):
    content, calls = parse_tool_calls(text, TOKENIZER, format=form)
    if isinstance(calls, ParseProblem) or not calls:
        assert content == text
    else:
        assert all(isinstance(json.loads(a), dict) for _, a in functions(calls))


NESTED = {
    "type": "function",
    "function": {
        "name": "f",
        "parameters": {
            "properties": {
                "text": {"type": "string"},
                "maybe": {"anyOf": [{"type": "string"}, {"type": "null"}]},
                "whole": {"type": "integer"},
                "flag": {"type": ["boolean", "null"]},
                "items": {"type": "array", "items": {"type": "integer"}},
            }
        },
    },
}


@pytest.mark.parametrize(
    ("values", "arguments"),
    [
        ({"text": "42", "whole": "42"}, {"text": "42", "whole": 42}),
        ({"text": "null", "maybe": "None"}, {"text": "null", "maybe": None}),
        ({"flag": "True", "items": "[1, 2]"}, {"flag": True, "items": [1, 2]}),
        ({"whole": "forty", "items": "[1,"}, {"whole": "forty", "items": "[1,"}),
        ({"text": 'a\n</b> "c"'}, {"text": 'a\n</b> "c"'}),
        ({}, {}),
    ],
)
def test_arguments_in_tags_have_the_types_of_the_schema(values, arguments):
    xml = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items())
    glm = "".join(
        f"<arg_key>{key}</arg_key>\n<arg_value>{value}</arg_value>\n"
        for key, value in values.items()
    )
    for form, text in (
        ("qwen3_coder", f"<tool_call>\n<function=f>\n{xml}</function>\n</tool_call>"),
        ("qwen3_coder", f"<function=f>\n{xml}</function>"),
        ("glm", f"<tool_call>f\n{glm}</tool_call>"),
    ):
        content, calls = parse_tool_calls(f"So.\n{text}", TOKENIZER, format=form, tools=[NESTED])
        assert content == "So."
        [(name, got)] = functions(calls)
        assert (name, json.loads(got)) == ("f", arguments)


def test_what_no_schema_knows_is_a_string_in_one_form_and_json_in_the_other():
    xml = "<tool_call><function=f><parameter=a>1</parameter></function></tool_call>"
    glm = "<tool_call>f<arg_key>a</arg_key><arg_value>1</arg_value></tool_call>"
    assert functions(parse_tool_calls(xml, TOKENIZER, format="qwen3_coder")[1]) == [
        ("f", '{"a": "1"}')
    ]
    assert functions(parse_tool_calls(glm, TOKENIZER, format="glm")[1]) == [("f", '{"a": 1}')]


MISTRAL = [("f", '{"a": 1}'), ("g", "{}")]


@pytest.mark.parametrize(
    "text",
    [
        '[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {}}]',
        '[TOOL_CALLS]f{"a": 1}[TOOL_CALLS]g{}',
        '[TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]g[ARGS]{}',
        '[TOOL_CALLS]f[CALL_ID]abcdef123[ARGS]{"a": 1}[TOOL_CALLS]g[CALL_ID]abcdef124[ARGS]{}',
    ],
)
def test_all_generations_of_mistral_are_read(text):
    content, calls = parse_tool_calls(text, TOKENIZER, format="mistral")
    assert (content, functions(calls)) == ("", MISTRAL)
    assert all(len(call["id"]) == 9 and call["id"].isalnum() for call in calls)


def test_both_generations_of_deepseek_are_read():
    old = 'function<｜tool▁sep｜>f\n```json\n{"a": 1}\n```'
    for inside in (old, 'f<｜tool▁sep｜>{"a": 1}'):
        call = f"<｜tool▁call▁begin｜>{inside}<｜tool▁call▁end｜>"
        text = f"So.<｜tool▁calls▁begin｜>{call}{call}<｜tool▁calls▁end｜>"
        content, calls = parse_tool_calls(text, TOKENIZER, format="deepseek")
        assert (content, functions(calls)) == ("So.", [("f", '{"a": 1}')] * 2)


def json_values():
    leaf = (
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text()
    )
    return st.recursive(leaf, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner))


@given(
    name=st.text(),
    arguments=st.dictionaries(st.text(), json_values(), max_size=4),
    indent=st.sampled_from([None, 2]),
    escaped=st.booleans(),
)
def test_any_call_comes_back(name, arguments, indent, escaped):
    for tokenizer, key, form in (
        (TOKENIZER, "arguments", "<tool_call>\n{}\n</tool_call>"),
        (LLAMA, "parameters", "<|python_tag|>{}"),
    ):
        written = json.dumps({"name": name, key: arguments}, indent=indent, ensure_ascii=escaped)
        _, calls = parse_tool_calls(form.format(written), tokenizer)
        assert not isinstance(calls, ParseProblem)
        ((got, text),) = functions(calls)
        assert (got, json.loads(text)) == (name, arguments)
        assert text in written


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("<tool_call>", "hermes"),
        ("<|im_start|>", "hermes"),
        ("<|start_header_id|>", "llama3_json"),
        ("<|im_start|><tool_call><function=name>", None),
        ("<|im_start|>{{ '<|tool_call_start|>[' + calls + ']<|tool_call_end|>' }}", None),
        ("<|im_start|>system<|plugin|><|im_end|><|action_start|>", None),
        ("<|start_header_id|><function_calls>", None),
        ("<|im_start|><tools>{{ tools }}</tools><tool_response>", "hermes"),
        ("<|im_start|><tool_call><function=name><parameter=key>", "qwen3_coder"),
        ("<tool_call>name<arg_key>", "glm"),
        ("[INST] [TOOL_CALLS]", "mistral"),
        ("<｜tool▁call▁begin｜>", "deepseek"),
        ("<|start|>assistant<|channel|>", "harmony"),
        ("[INST]", None),
    ],
)
def test_the_template_tells_the_format(template, expected):
    tokenizer = templates.merging_tokenizer(template)
    assert tool_format(tokenizer) == expected
    if expected is None:
        with pytest.raises(PromptError, match="writes tool calls from its chat"):
            parse_tool_calls("20", tokenizer)
        assert parse_tool_calls("20", tokenizer, format="hermes") == ("20", [])
