"""Each way in which a server can lie is found by the check made for it, and an honest one is fit:
real HTTP on loopback, the bundled model behind it."""

from __future__ import annotations

import asyncio
from contextlib import contextmanager
from dataclasses import replace

import pytest

from eval_protocol_rft.doctor._examination import aexamine, examine
from eval_protocol_rft.doctor._findings import Diagnosis, Finding, unfit
from eval_protocol_rft.doctor._probe import Setup
from eval_protocol_rft.local.models import bundled_model_path
from eval_protocol_rft.local.server._app import create_app
from eval_protocol_rft.rollout._params import parse_completion_params
from eval_protocol_rft.sampling._types import RefusedError
from tests.doctor.liars import Liar, bundled, drop_end, raw_as_sampling, shifted, vllm_app
from tests.serving import running
from tests.waiting import PATIENCE

FOLDER = str(bundled_model_path("arithmetic"))


def setup_of(
    url: str | None, *, requests: int = 100, weights: str | None = None, **params
) -> Setup:
    model = {"model": "m", "base_url": url, "tokenizer": FOLDER} if url else {}
    asked = {"model": "local/arithmetic", "max_tokens": 32, "timeout": 30, **model, **params}
    return Setup(request=parse_completion_params(asked), weights=weights, requests=requests)


@contextmanager
def fireworks_shaped(sampler):
    app = create_app(sampler, bundled().tokenizer, model_name="m", context_length=256)
    with running(app) as url:
        yield url


@contextmanager
def vllm_shaped(sampler, *, processed: bool = False, echo=lambda ids: ids):
    with running(vllm_app(sampler, processed=processed, echo=echo)) as url:
        yield url


def by_name(diagnosis: Diagnosis) -> dict[str, Finding]:
    names = [finding.name for finding in diagnosis.findings]
    assert len(set(names)) == len(names)
    return {finding.name: finding for finding in diagnosis.findings}


def verdicts(diagnosis: Diagnosis, kind: str) -> set[str]:
    return {finding.name for finding in diagnosis.findings if finding.verdict == kind}


# What is fit


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.4])
def test_the_bundled_model_in_this_process_is_fit(temperature):
    diagnosis = examine(setup_of(None, temperature=temperature))
    assert verdicts(diagnosis, "fail") | verdicts(diagnosis, "warn") == set()
    assert verdicts(diagnosis, "skipped") == {"prompt echo"}
    found = by_name(diagnosis)
    assert found["trainer: mean k3"].numbers["value"] < 1e-5
    assert found["trainer: max |dlogp|"].numbers["value"] < 1e-4
    assert found["token frequency"].numbers["temperature"] == temperature


def test_the_bundled_model_behind_a_server_is_fit():
    with fireworks_shaped(Liar()) as url:
        diagnosis = examine(setup_of(url, temperature=0.7, weights=FOLDER))
    assert {finding.verdict for finding in diagnosis.findings} == {"pass"}
    assert diagnosis.base_url == f"{url}/v1"
    found = by_name(diagnosis)
    assert found["logprob kind"].measured.startswith("sampling, named as such")
    assert found["trainer: mean k3"].numbers["value"] < 1e-5


def test_the_same_setup_gives_the_same_findings():
    assert examine(setup_of(None)) == examine(setup_of(None))


def test_without_weights_sampler_against_trainer_is_skipped():
    with fireworks_shaped(Liar()) as url:
        found = by_name(examine(setup_of(url)))
    assert found["sampler against trainer"].verdict == "skipped"
    assert "--weights" in found["sampler against trainer"].advice


# Which logprobs


def test_unnamed_processed_logprobs_are_told_with_the_setting_to_pass():
    with vllm_shaped(Liar(), processed=True) as url:
        unsaid = examine(setup_of(url, temperature=0.7))
        said = examine(setup_of(url, temperature=0.7, logprobs_mode="processed_logprobs"))
        wrong = examine(setup_of(url, temperature=0.7, logprobs_mode="raw_logprobs"))
    kind = by_name(unsaid)["logprob kind"]
    assert kind.verdict == "warn"
    assert kind.measured.startswith("sampling, unnamed")
    assert "--logprobs-mode processed_logprobs" in kind.advice
    assert by_name(unsaid)["token frequency"].numbers["temperature"] == 0.7
    assert not unfit(unsaid.findings)
    assert by_name(said)["logprob kind"].verdict == "pass"
    assert verdicts(wrong, "fail") == {"logprob kind"}


def test_unnamed_raw_logprobs_are_fit_at_temperature_1_alone():
    with vllm_shaped(Liar()) as url:
        at_one = examine(setup_of(url))
        lower = examine(setup_of(url, temperature=0.7))
        said = examine(setup_of(url, logprobs_mode="processed_logprobs"))
    assert by_name(at_one)["logprob kind"].measured.startswith("raw, unnamed")
    assert not unfit(at_one.findings)
    assert verdicts(lower, "fail") == {"logprob kind"}
    assert "vllm serve MODEL --logprobs-mode processed_logprobs" in (
        by_name(lower)["logprob kind"].advice
    )
    # What can be checked all the same is, where raw logprobs are right.
    assert by_name(lower)["token frequency"].numbers["temperature"] == 1.0
    assert by_name(lower)["token frequency"].verdict == "pass"
    assert verdicts(said, "fail") == {"logprob kind"}


def test_raw_logprobs_that_are_called_sampling_ones_fail():
    with fireworks_shaped(Liar(raw_as_sampling)) as url:
        diagnosis = examine(setup_of(url, temperature=0.7))
    assert verdicts(diagnosis, "fail") == {"logprob kind"}
    assert by_name(diagnosis)["logprob kind"].measured.startswith("raw, named as such")


# Lies


def test_a_dropped_end_of_turn_fails():
    with fireworks_shaped(Liar(drop_end)) as url:
        diagnosis = examine(setup_of(url))
    assert verdicts(diagnosis, "fail") == {"end of turn"}
    numbers = by_name(diagnosis)["end of turn"].numbers
    assert numbers["without_end"] > numbers["stopped"] / 2


@pytest.mark.parametrize("by", [-0.4, 0.4])
def test_shifted_logprobs_fail(by):
    with fireworks_shaped(Liar(shifted(by))) as url:
        diagnosis = examine(setup_of(url, weights=FOLDER))
    failed = verdicts(diagnosis, "fail")
    assert {"token frequency", "trainer: mean k1", "trainer: mean k3"} <= failed
    assert "end of turn" not in failed
    # A shift of every logprob is seen to the digit; too high ones are cut off at 0.
    if by < 0:
        k1 = by_name(diagnosis)["trainer: mean k1"]
        assert k1.numbers["value"] == pytest.approx(-by, abs=1e-3)


def test_sampling_from_another_temperature_than_asked_for_fails():
    hotter = Liar(params=lambda params: replace(params, temperature=1.5 * params.temperature))
    told_as_asked = raw_as_sampling  # at temperature 1 the model's own are what was asked for
    hotter.lie = told_as_asked
    with fireworks_shaped(hotter) as url:
        diagnosis = examine(setup_of(url, requests=600))
    assert "token frequency" in verdicts(diagnosis, "fail")


def test_a_vocabulary_that_is_cut_in_silence_fails():
    def full(completion, params):
        return replace(completion, logprobs=completion.raw_logprobs)

    cut = Liar(full, params=lambda params: replace(params, top_k=2))
    with fireworks_shaped(cut) as url:
        diagnosis = examine(setup_of(url, requests=600))
    assert "token frequency" in verdicts(diagnosis, "fail")


def test_the_same_completion_for_every_seed_fails():
    with fireworks_shaped(Liar(seed=lambda seed: 7)) as url:
        diagnosis = examine(setup_of(url))
    assert {"different seeds", "token frequency"} <= verdicts(diagnosis, "fail")
    assert by_name(diagnosis)["equal seeds"].verdict == "pass"


def test_seeds_that_are_ignored_warn_and_do_not_fail():
    with fireworks_shaped(Liar(seed=lambda seed: None)) as url:
        diagnosis = examine(setup_of(url))
    assert verdicts(diagnosis, "warn") == {"equal seeds"}
    assert verdicts(diagnosis, "fail") == set()


def test_a_server_without_seeds_is_examined_without_them():
    def none_or_refuse(seed):
        if seed is not None:
            raise RefusedError("seed is not supported")

    with fireworks_shaped(Liar(seed=none_or_refuse)) as url:
        diagnosis = examine(setup_of(url))
    found = by_name(diagnosis)
    assert found["equal seeds"].verdict == "skipped"
    assert "seed is not supported" in found["equal seeds"].measured
    assert "(no seeds)" in found["different seeds"].measured
    assert verdicts(diagnosis, "fail") == set()


@pytest.mark.parametrize("echo", [lambda ids: [5, *ids], lambda ids: ids[:-1]])
def test_another_prompt_than_was_sent_fails_and_nothing_else_is_asked(echo):
    with vllm_shaped(Liar(), echo=echo) as url:
        diagnosis = examine(setup_of(url))
    assert verdicts(diagnosis, "fail") == {"exact replies", "prompt echo"}
    found = by_name(diagnosis)
    assert "index" in found["prompt echo"].measured
    assert found["all other checks"].verdict == "skipped"


def test_a_prompt_that_is_not_echoed_warns():
    with vllm_shaped(Liar(), echo=lambda ids: None) as url:
        diagnosis = examine(setup_of(url))
    assert verdicts(diagnosis, "warn") == {"prompt echo"}
    assert "counted as many" in by_name(diagnosis)["prompt echo"].measured


def test_a_reply_now_and_then_that_is_not_exact_fails():
    asked = 0

    def echo(ids):
        nonlocal asked
        asked += 1
        return [5, *ids] if asked % 20 == 0 else ids

    with vllm_shaped(Liar(), echo=echo) as url:
        diagnosis = examine(setup_of(url))
    assert "exact replies" in verdicts(diagnosis, "fail")
    assert "contract" in by_name(diagnosis)["exact replies"].measured


REWRITING = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.role == 'assistant' and not loop.last -%}
(said)
{%- else %}{{ message.content }}{% endif -%}
<|im_end|>
{% endfor -%}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif -%}"""

FORGETS_THINKING = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.role == 'assistant' -%}
{{ message.content.split('</think>')[-1].lstrip() }}
{%- else %}{{ message.content }}{% endif -%}
<|im_end|>
{% endfor -%}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif -%}"""


@pytest.fixture
def tokenizer_with(tmp_path):
    def save(template: str | None) -> str:
        tokenizer = type(bundled().tokenizer).from_pretrained(FOLDER)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(tmp_path)
        return str(tmp_path)

    return save


def test_a_template_that_rewrites_history_fails(tokenizer_with):
    diagnosis = examine(setup_of(None, tokenizer=tokenizer_with(REWRITING)))
    assert verdicts(diagnosis, "fail") == {"chat template: history"}
    assert "(said)" in by_name(diagnosis)["chat template: history"].measured


def test_a_template_that_forgets_thinking_warns(tokenizer_with):
    diagnosis = examine(setup_of(None, tokenizer=tokenizer_with(FORGETS_THINKING)))
    assert verdicts(diagnosis, "fail") == set()
    assert verdicts(diagnosis, "warn") == {"chat template: next turn"}


def test_without_a_template_the_rest_is_checked_all_the_same(tokenizer_with):
    diagnosis = examine(setup_of(None, tokenizer=tokenizer_with(None)))
    assert verdicts(diagnosis, "fail") == {"chat template: history"}
    assert "no chat template" in by_name(diagnosis)["chat template: history"].measured
    assert by_name(diagnosis)["token frequency"].verdict == "pass"


def test_the_tokenizer_of_another_model_fails(tokenizer_folder):
    diagnosis = examine(setup_of(None, tokenizer=str(tokenizer_folder)))
    [failed] = [f for f in diagnosis.findings if f.verdict == "fail"]
    assert f"tokenizer {str(tokenizer_folder)!r} is not the one of the model" in failed.measured


# Nothing comes back


def test_a_server_that_is_not_there_is_one_message():
    diagnosis = examine(setup_of("http://127.0.0.1:9"))
    after = [f for f in diagnosis.findings if not f.name.startswith(("tokenizer", "chat"))]
    assert [(f.name, f.verdict) for f in after] == [
        ("exact replies", "fail"),
        ("all other checks", "skipped"),
    ]
    assert "--base-url" in after[0].advice


def test_a_model_that_is_not_there_is_one_message():
    diagnosis = examine(setup_of(None, model="local/no-such-folder"))
    assert [(f.name, f.verdict) for f in diagnosis.findings] == [("setup", "fail")]
    assert "no-such-folder" in diagnosis.findings[0].measured


def test_a_wrong_model_name_is_one_message_and_no_secret():
    with fireworks_shaped(Liar()) as url:
        diagnosis = examine(setup_of(url, model="other", api_key="sk-very-secret-key"))
    [failed] = [f for f in diagnosis.findings if f.verdict == "fail"]
    assert failed.name == "exact replies"
    assert "'other'" in failed.measured
    assert "secret" not in repr(diagnosis)


def test_a_server_that_dies_half_way_is_reported_with_what_was_found():
    lived = 0

    def die(completion, params):
        nonlocal lived
        lived += 1
        if lived > 60:
            raise RefusedError("the account is suspended", status=412)
        return completion

    with vllm_shaped(Liar(die)) as url:
        diagnosis = examine(setup_of(url))
    found = by_name(diagnosis)
    assert found["exact replies"].verdict in ("warn", "fail")
    assert "suspended" in found["exact replies"].measured


async def test_weights_of_another_vocabulary_are_named(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    tiny = LlamaConfig(
        vocab_size=20,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
    )
    LlamaForCausalLM(tiny).save_pretrained(tmp_path)
    diagnosis = await aexamine(setup_of(None, weights=str(tmp_path)))
    skipped = by_name(diagnosis)["sampler against trainer"]
    assert skipped.verdict == "skipped"
    assert "outside the vocabulary" in skipped.measured


async def test_other_weights_than_those_that_sampled_fail(tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise, alpha=0.3 * float(parameter.std(correction=0)))
    model.save_pretrained(tmp_path)
    diagnosis = await aexamine(setup_of(None, weights=str(tmp_path)))
    assert "trainer: mean k3" in verdicts(diagnosis, "fail")
    assert "same weights" in by_name(diagnosis)["trainer: mean k3"].advice


async def test_a_cancelled_examination_ends():
    waiting = asyncio.Event()

    class Hanging(Liar):
        tokenizer = bundled().tokenizer

        async def sample(self, prompt_ids, params, *, seed=None):
            waiting.set()
            await asyncio.Event().wait()

    task = asyncio.ensure_future(aexamine(setup_of(None), sampler=Hanging()))
    await asyncio.wait_for(waiting.wait(), PATIENCE)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, PATIENCE)
