"""Every recorded reply decodes to the completion that is in it, or to the right error.

The expectation is read straight from the recorded JSON, by code that knows nothing of ours.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from eval_protocol_rft.sampling._endpoint import request_body
from eval_protocol_rft.sampling._exactness import decode_reply, decode_stream
from eval_protocol_rft.sampling._replies import status_error
from eval_protocol_rft.sampling._types import (
    Completion,
    ContractError,
    RefusedError,
    SamplingError,
    SamplingParams,
    TokenIds,
)

FIXTURES = Path(__file__).parent / "fixtures"
RAW, PROCESSED = "vllm", "vllm_processed"

COMPLETIONS = {
    RAW: "01_n1_t1 02_n4_t1 06_logprobs0 07_seed42_a 07_seed42_b 08_seed42_n4 09_tokens_as_ids "
    "10_stream_n1 11_stream_n4 15_max_tokens_1 16_prompt_logprobs 19_text_prompt "
    "21_no_model_field 50_generate 51_generate_n2 52_generate_stream 61_pause_keep "
    "81_llama3_completion e02b_prompt_plus_max_tokens e12_unknown_field "
    "53_generate_weight_version",
    PROCESSED: "01_n1_t1 02_n4_t1 03_n1_t07 04_n4_t07 10_stream_n1 11_stream_n4 12_eos_forced "
    "13_stop_string 20_top_p_top_k",
}
MAY_BE_RAW = "--logprobs-mode processed_logprobs"
ERRORS: dict[str, tuple[str, str]] = {
    **dict.fromkeys(("03_n1_t07", "04_n4_t07"), ("contract", "temperature=0.7.*" + MAY_BE_RAW)),
    "05_n1_greedy": ("contract", "temperature=0 .*" + MAY_BE_RAW),
    **dict.fromkeys(
        (
            "12_eos_forced",
            "12b_eos_forced_include_stop",
            "12c_eos_forced_no_skip_special",
            "12d_ignore_eos",
            "12e_eos_stream",
            "12f_eos_min_tokens",
            "13_stop_string",
            "13b_stop_string_included",
            "13c_stop_string_two_tokens",
            "14_stop_token_ids",
        ),
        ("contract", "logit_bias=.*" + MAY_BE_RAW),
    ),
    "20_top_p_top_k": ("contract", "top_p=0.5, top_k=20.*" + MAY_BE_RAW),
    **dict.fromkeys(
        ("17_echo_logprobs", "17b_echo_max0"), ("contract", "token_logprobs is null at index 0")
    ),
    "18_two_prompts": ("contract", r"indices \[0, 1, 2, 3\], expected \[0, 1\]"),
    **dict.fromkeys(
        (
            "30_chat_n1",
            "31_chat_n4",
            "32_chat_logprobs_only",
            "35_chat_eos",
            "34_chat_tokens_as_ids",
            "37_chat_template_kwargs",
            "38_chat_continue_final",
            "70_smollm2_chat_n4",
            "71_char_chat_n2",
            "80_qwen3_chat_tools",
        ),
        ("contract", "its object is 'chat.completion'"),
    ),
    "33_chat_stream": ("contract", "its object is 'chat.completion.chunk'"),
    "36_chat_tools": ("refused", "400.*enable-auto-tool-choice"),
    **dict.fromkeys(
        ("00_models", "00_version", "40_tokenize_chat", "41_tokenize_text", "42_detokenize"),
        ("contract", "missing required field `choices`"),
    ),
    "43_render_chat": ("contract", "missing required field `choices`"),
    "60_pause_abort": ("unavailable", "finish_reason 'abort'"),
    "62_engine_killed": ("unavailable", "500.*EngineCore"),
    "e01_unknown_model": ("refused", "404.*`nope` does not exist"),
    "e02_prompt_too_long": ("refused", "400.*2048 tokens"),
    "e02c_prompt_exact_limit": ("refused", "400.*max_tokens"),
    "e03_bad_temperature": ("refused", "400.*temperature"),
    "e03b_temperature_string": ("refused", "400.*temperature"),
    "e03c_temp_3": ("refused", "400.*temperature"),
    "e04_token_out_of_vocab": ("refused", "400.*out of vocabulary"),
    "e04b_token_negative": ("refused", "400.*greater than or equal to 0"),
    "e05_empty_prompt": ("refused", "400.*at least one prompt"),
    "e05b_empty_text": ("refused", "400.*non-empty"),
    "e06_logprobs_too_many": ("refused", "400.*logprobs of 50"),
    "e07_max_tokens_0": ("refused", "400.*max_tokens"),
    "e07b_max_tokens_neg": ("refused", "400.*max_tokens"),
    "e08_n0": ("refused", "400.*n must be at least 1"),
    "e09_bad_json": ("refused", "400.*JSON decode error"),
    "e10_missing_prompt": ("refused", "400.*prompt"),
    "e11_wrong_path": ("refused", "404.*Not Found.*base URL"),
    "e13_n_greedy": ("refused", "400.*greedy"),
    "e14_get_method": ("refused", "405.*Method Not Allowed"),
    "e20_overload_503": ("unavailable", "503.*currently busy"),
    "e21_overload_stream": ("unavailable", "currently busy"),
}


@dataclass(frozen=True)
class Recorded:
    """One recorded exchange."""

    name: str
    folder: str
    body: bytes
    status: int
    stream: bool
    request: dict[str, Any]

    @property
    def prompt(self) -> TokenIds:
        prompt = self.request.get("prompt") or self.request.get("token_ids")
        if isinstance(prompt, list) and prompt and isinstance(prompt[0], int):
            return TokenIds(prompt)
        # Text prompts, and exchanges whose request was not kept: what the server says it read, and
        # for the one that does not say, as many ids as it counted.
        reply = _json_events(self)[0]
        counted = reply.get("usage", {}).get("prompt_tokens", 1)
        echoed = reply.get("choices", [{}])[0].get("prompt_token_ids")
        return TokenIds(echoed or [0] * counted)

    @property
    def params(self) -> SamplingParams:
        known = {"model", "prompt", "n", "stream", "temperature", "top_p", "top_k", "max_tokens"}
        known |= {"stop", "logprobs", "return_token_ids"}
        temperature = self.request.get("temperature", 1.0)
        return SamplingParams(
            model="tiny",
            temperature=1.0 if isinstance(temperature, str) else temperature,
            top_p=self.request.get("top_p", 1.0),
            top_k=self.request.get("top_k", 0),
            max_tokens=self.request.get("max_tokens"),
            stop=tuple(self.request.get("stop", ())),
            extra={key: value for key, value in self.request.items() if key not in known},
            logprobs_mode="processed_logprobs" if self.folder == PROCESSED else None,
        )

    def decode(self) -> list[Completion]:
        if self.status != 200:
            raise status_error(self.status, self.body, {}, now=datetime.now(UTC))
        decode = decode_stream if self.stream else decode_reply
        return decode(self.body, self.prompt, self.params, n=self.request.get("n", 1))


def _recorded(path: Path) -> Recorded:
    stem = path.name.rsplit(".", 1)[0]
    body, status, request = path.read_bytes(), 200, {}
    if path.suffix == ".txt":  # body, blank, status
        text, _, code = body.decode().strip().rpartition(" ")
        body, status = text.encode(), int(code)
    if (meta := path.with_name(stem + ".meta")).exists():
        status = json.loads(meta.read_text())["status"]
    if (sent := path.with_name(stem + ".req.json")).exists():
        request = json.loads(sent.read_text())["body"]
    return Recorded(
        name=stem,
        folder=path.parent.name,
        body=body,
        status=status,
        stream=path.suffix == ".sse",
        request=_flat(request),
    )


def _flat(body: Any) -> dict[str, Any]:
    """The request's body, sampling parameters beside the rest as `/v1/completions` has them."""
    if not isinstance(body, dict):
        return {}
    inner = body.get("sampling_params", {})
    return {**{k: v for k, v in body.items() if k != "sampling_params"}, **inner}


def _json_events(recorded: Recorded) -> list[dict[str, Any]]:
    if not recorded.stream:
        return [json.loads(recorded.body)]
    lines = recorded.body.decode().splitlines()
    return [json.loads(line[6:]) for line in lines if line.startswith("data: {")]


def _all_recorded() -> list[Recorded]:
    paths = [p for folder in (RAW, PROCESSED) for p in sorted((FIXTURES / folder).iterdir())]
    return [_recorded(p) for p in paths if p.suffix != ".meta" and ".req" not in p.name]


ALL = _all_recorded()


@pytest.mark.parametrize("recorded", ALL, ids=lambda r: f"{r.folder}/{r.name}")
def test_every_recorded_reply_is_its_completion_or_the_right_error(recorded: Recorded) -> None:
    if recorded.name in COMPLETIONS[recorded.folder].split():
        _assert_decodes_to_what_it_holds(recorded)
    else:
        kind, words = ERRORS[recorded.name]
        with pytest.raises(SamplingError, match=words) as caught:
            recorded.decode()
        assert caught.value.kind == kind
        own_class = {"contract": ContractError, "refused": RefusedError}.get(kind, SamplingError)
        assert type(caught.value) is own_class


def test_no_recorded_reply_is_left_out() -> None:
    assert len(ALL) == 88
    unknown = {r.name for r in ALL} - set(ERRORS) - set(" ".join(COMPLETIONS.values()).split())
    assert not unknown


def _assert_decodes_to_what_it_holds(recorded: Recorded) -> None:
    ids: dict[int, list[int]] = {}
    logprobs: dict[int, list[float]] = {}
    reasons: dict[int, str] = {}
    for event in _json_events(recorded):
        for choice in event["choices"]:
            at = choice["index"]
            ids.setdefault(at, []).extend(choice["token_ids"])
            logprobs.setdefault(at, []).extend(_plain_logprobs(choice["logprobs"]))
            reasons[at] = choice["finish_reason"] or reasons.get(at, "")
    completions = recorded.decode()
    assert len(completions) == len(ids) == recorded.request.get("n", 1)
    for at, completion in enumerate(completions):
        assert completion.token_ids == ids[at]
        assert completion.logprobs == logprobs[at]
        assert completion.finish_reason == reasons[at]
        assert completion.truncated == (reasons[at] == "length")
        assert len(completion.token_ids) == len(completion.logprobs) > 0


def _plain_logprobs(logprobs: dict[str, Any]) -> list[float]:
    if "content" in logprobs:
        return [entry["logprob"] for entry in logprobs["content"]]
    return list(logprobs["token_logprobs"])


def fireworks_reply() -> dict[str, Any]:
    """A whole reply in the shape of Fireworks' published schema."""
    ids, raw, sampling = (
        [19, 20, 19, 151645],
        [-0.5, -1.5, -0.25, -0.02],
        [-0.4, -1.75, -0.2, -0.01],
    )
    content = [
        {"token": f"<{i}>", "token_id": i, "logprob": r, "sampling_logprob": s, "bytes": [52],
         "text_offset": 4 * at, "top_logprobs": []}
        for at, (i, r, s) in enumerate(zip(ids, raw, sampling, strict=True))
    ]  # fmt: skip
    choice = {
        "index": 0, "text": "<19><20><19>", "finish_reason": "stop",
        "prompt_token_ids": [1, 2, 3], "token_ids": ids, "logprobs": {"content": content},
        "raw_output": {"completion": "x", "prompt_fragments": ["."], "completion_logprobs": None,
                       "prompt_token_ids": [1, 2, 3], "completion_token_ids": ids},
    }  # fmt: skip
    return {
        "id": "cmpl-1", "object": "text_completion", "created": 1760000000,
        "model": "accounts/a/models/m@snap-7", "choices": [choice], "perf_metrics": None,
        "usage": {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7},
    }  # fmt: skip


PROMPT = TokenIds([1, 2, 3])
TEMPERED = SamplingParams(model="m", temperature=0.8)


def _decode(reply: dict[str, Any], params: SamplingParams = TEMPERED) -> Completion:
    return decode_reply(json.dumps(reply).encode(), PROMPT, params)[0]


def test_fireworks_gives_sampling_and_raw_logprobs_and_the_policy_version() -> None:
    completion = _decode(fireworks_reply())
    assert completion.token_ids == [19, 20, 19, 151645]
    assert completion.logprobs == [-0.4, -1.75, -0.2, -0.01]
    assert completion.raw_logprobs == [-0.5, -1.5, -0.25, -0.02]
    assert completion.policy_version == "snap-7"
    assert completion.request_id == "cmpl-1"


def test_routing_matrices_come_with_their_tokens_where_the_server_gives_some() -> None:
    reply = fireworks_reply()
    assert _decode(reply).routing_matrices is None
    for entry, matrix in zip(
        reply["choices"][0]["logprobs"]["content"], ("AQ==", None, "Ag==", ""), strict=True
    ):
        entry["routing_matrix"] = matrix
    assert _decode(reply).routing_matrices == ["AQ==", "", "Ag==", ""]
    with pytest.raises(ContractError, match="2 token ids but 1 routing matrices"):
        Completion(
            token_ids=[1, 2],
            logprobs=[-1.0, -1.0],
            routing_matrices=["AQ=="],
            finish_reason="stop",
        )


def test_null_sampling_logprobs_are_the_raw_ones_only_where_they_must_be_equal() -> None:
    reply = fireworks_reply()
    for entry in reply["choices"][0]["logprobs"]["content"]:
        entry["sampling_logprob"] = None
    with pytest.raises(ContractError, match=r"sampling_logprob is null and temperature=0\.8"):
        _decode(reply)
    untempered = SamplingParams(model="m")
    assert _decode(reply, untempered).logprobs == [-0.5, -1.5, -0.25, -0.02]
    reply["choices"][0]["logprobs"]["content"][2]["sampling_logprob"] = -0.2
    with pytest.raises(ContractError, match="sampling_logprob is null at index 0"):
        _decode(reply, untempered)


def _content(reply: dict[str, Any]) -> list[dict[str, Any]]:
    content: list[dict[str, Any]] = reply["choices"][0]["logprobs"]["content"]
    return content


def _everywhere(reply: dict[str, Any], token: int) -> None:
    """Every place that tells the second id tells this one."""
    choice = reply["choices"][0]
    _content(reply)[1]["token_id"] = token
    choice["token_ids"] = [*choice["token_ids"][:1], token, *choice["token_ids"][2:]]
    choice["raw_output"]["completion_token_ids"] = choice["token_ids"]


def _swap_same_ids(reply: dict[str, Any]) -> None:
    content = _content(reply)
    content[0], content[2] = content[2], content[0]


BREAKS = {
    "an id that differs from token_ids": (
        lambda r: r["choices"][0]["token_ids"].__setitem__(2, 7),
        r"choices\[0\]: .*token_ids.*differs.*at index 2: 7 against 19",
    ),
    "a dropped entry": (lambda r: _content(r).pop(), "differs.*at index 3: 151645 against nothing"),
    "two entries with the same id swapped": (
        _swap_same_ids,
        "text_offset goes back",
    ),
    "a prompt that is not ours": (
        lambda r: r["choices"][0].update(prompt_token_ids=[0, 1, 2, 3]),
        "prompt_token_ids.*at index 0: 0 against 1",
    ),
    "a raw_output prompt that is not ours": (
        lambda r: r["choices"][0]["raw_output"].update(prompt_token_ids=[1, 2]),
        "raw_output.prompt_token_ids.*at index 2: nothing against 3",
    ),
    "a stand-in for a logprob of -inf": (
        lambda r: _content(r)[1].update(sampling_logprob=-9999.0),
        r"logprobs\[1\] is -9999\.0: .*it stands for -inf",
    ),
    "a positive logprob": (
        lambda r: _content(r)[1].update(sampling_logprob=0.5),
        r"logprobs\[1\] is 0\.5",
    ),
    "a missing raw logprob": (
        lambda r: _content(r)[3].pop("logprob"),
        "logprob is null at index 3",
    ),
    "no finish reason": (
        lambda r: r["choices"][0].update(finish_reason=None),
        "finish_reason is None",
    ),
    "an unknown finish reason": (
        lambda r: r["choices"][0].update(finish_reason="tired"),
        "finish_reason is 'tired'",
    ),
    "an id that is text": (
        lambda r: _content(r)[1].update(token_id="20"),
        r"Expected `int`, got `str` - at `\$\.choices\[0\]\.logprobs\.content\[1\]\.token_id`",
    ),
    "an id beyond 32 bits": (
        lambda r: _everywhere(r, 2**31),
        r"token_ids\[1\] is 2147483648: not a token id",
    ),
    "no choices": (lambda r: r.update(choices=[]), r"indices \[\], expected \[0\]"),
    "two choices": (lambda r: r["choices"].append(dict(r["choices"][0])), r"indices \[0, 0\]"),
    "no logprobs": (lambda r: r["choices"][0].update(logprobs=None), "no logprobs"),
    "another object": (lambda r: r.update(object="chat.completion"), "object is 'chat.completion'"),
}  # fmt: skip


@pytest.mark.parametrize("name", BREAKS)
def test_a_reply_that_contradicts_itself_is_refused_by_place(name: str) -> None:
    breaks, words = BREAKS[name]
    reply = fireworks_reply()
    breaks(reply)
    with pytest.raises(ContractError, match=words):
        _decode(reply)


def _content_only() -> dict[str, Any]:
    """The least that Fireworks' clients read: each thing once, and usage."""
    reply = fireworks_reply()
    for key in ("token_ids", "raw_output", "prompt_token_ids"):
        del reply["choices"][0][key]
    return reply


@pytest.mark.parametrize(
    ("usage", "words"),
    [
        ({"completion_tokens": 5}, "usage.completion_tokens is 5, but 4 ids"),
        ({"prompt_tokens": 4}, "usage.prompt_tokens is 4, but 3"),
    ],
)
def test_usage_bears_witness_where_nothing_else_does(usage: dict[str, int], words: str) -> None:
    reply = _content_only()
    assert _decode(reply).token_ids == [19, 20, 19, 151645]
    reply["usage"].update(usage)
    with pytest.raises(ContractError, match=words):
        _decode(reply)


def test_raw_logprobs_may_be_left_out_but_not_in_part() -> None:
    reply = fireworks_reply()
    for entry in _content(reply):
        del entry["logprob"]
    assert _decode(reply).logprobs == [-0.4, -1.75, -0.2, -0.01]
    assert _decode(reply).raw_logprobs is None
    for entry in _content(reply):
        entry["sampling_logprob"] = None
    with pytest.raises(ContractError, match="sampling_logprob is null at index 0"):
        _decode(reply)


def test_more_tokens_than_asked_for_is_a_contract_error() -> None:
    with pytest.raises(ContractError, match="4 tokens, more than max_tokens=3"):
        _decode(fireworks_reply(), SamplingParams(model="m", temperature=0.8, max_tokens=3))


def test_no_ids_at_all_names_what_the_server_must_do() -> None:
    reply = fireworks_reply()
    choice = reply["choices"][0]
    choice.update(token_ids=None, raw_output=None, logprobs={"token_logprobs": [-0.1] * 4})
    with pytest.raises(ContractError, match=r"no token ids.*return_token_ids"):
        _decode(reply)


@pytest.mark.parametrize("cut", [0, 1, 40, 300])
def test_a_body_that_is_cut_off_is_a_connection_failure(cut: int) -> None:
    body = json.dumps(fireworks_reply()).encode()
    with pytest.raises(SamplingError, match=f"cut off after {cut} bytes") as caught:
        decode_reply(body[:cut], PROMPT, TEMPERED)
    assert caught.value.kind == "connection"


def test_json_nested_without_end_is_a_contract_error() -> None:
    with pytest.raises(ContractError, match="nested too deeply"):
        decode_reply(b'{"perf_metrics": ' + b"[" * 100_000, PROMPT, TEMPERED)


def test_html_is_told_from_json() -> None:
    with pytest.raises(ContractError, match=r"not JSON.*begins b'<html>"):
        decode_reply(b"<html>Bad gateway</html>", PROMPT, TEMPERED)


def test_a_stream_cut_anywhere_is_never_a_completion() -> None:
    recorded = next(r for r in ALL if r.name == "10_stream_n1" and r.folder == RAW)
    whole = len(recorded.body.rstrip())
    for cut in range(0, whole, 97):
        with pytest.raises(SamplingError, match=r"without \[DONE\]") as caught:
            decode_stream(recorded.body[:cut], recorded.prompt, recorded.params)
        assert caught.value.kind == "connection"


def test_the_request_asks_for_exact_data_and_full_support() -> None:
    body = json.loads(request_body(PROMPT, SamplingParams(model="m", max_tokens=9), seed=5))
    assert body == {
        "model": "m", "prompt": [1, 2, 3], "temperature": 1.0, "top_p": 1.0, "top_k": 0,
        "max_tokens": 9, "seed": 5, "logprobs": True, "return_token_ids": True,
        "raw_output": True, "context_length_exceeded_behavior": "error",
    }  # fmt: skip


def test_a_stream_is_asked_for_counts_and_for_few_events_but_not_where_that_is_refused() -> None:
    params = SamplingParams(model="m", max_tokens=9)
    plain = json.loads(request_body(PROMPT, params, seed=None))
    asked = json.loads(request_body(PROMPT, params, seed=None, stream=True))
    assert {key: asked[key] for key in asked.keys() - plain.keys()} == {
        "stream": True,
        "stream_options": {"include_usage": True},
        "stream_interval": 32,
    }
    of_fireworks = request_body(PROMPT, params, seed=None, stream=True, is_fireworks=True)
    assert json.loads(of_fireworks) == {**plain, "stream": True}
    own = SamplingParams(model="m", max_tokens=9, extra={"stream_interval": 1})
    assert json.loads(request_body(PROMPT, own, seed=None, stream=True))["stream_interval"] == 1


def test_what_the_user_adds_travels_and_wins() -> None:
    params = SamplingParams(
        model="m",
        top_p=0.5,
        top_k=3,
        stop=("a", "b"),
        extra={"min_p": 0.1, "context_length_exceeded_behavior": "truncate"},
        logprobs_mode="processed_logprobs",
    )
    body = json.loads(request_body(PROMPT, params, seed=None))
    assert (body["top_p"], body["top_k"], body["stop"], body["min_p"]) == (0.5, 3, ["a", "b"], 0.1)
    assert body["context_length_exceeded_behavior"] == "truncate"
    assert body["return_tokens_as_token_ids"] is True
    assert "seed" not in body


@pytest.mark.parametrize(
    ("escaped", "text"),
    [
        (r"a\ud800b", "a\ufffdb"),
        (r"\udc00", "\ufffd"),
        (r"\ud83d\ude00 \ud83d", "\U0001f600 \ufffd"),
        (r"\\ud800 \ud800", r"\ud800" + " \ufffd"),
    ],
)
def test_half_of_a_surrogate_pair_costs_its_character(escaped: str, text: str) -> None:
    reply = fireworks_reply()
    reply["choices"][0]["text"] = "TEXT"
    body = json.dumps(reply).replace("TEXT", escaped).encode()
    [completion] = decode_reply(body, TokenIds([1, 2, 3]), SamplingParams(model="m"))
    assert completion.text == text
    assert completion.token_ids == [19, 20, 19, 151645]
    with pytest.raises(SamplingError, match="cut off") as caught:
        decode_reply(body[:-20], TokenIds([1, 2, 3]), SamplingParams(model="m"))
    assert caught.value.kind == "connection"
