"""Train the bundled model `eval_protocol_rft/local/models/arithmetic` anew, from nothing.

    python scripts/train_arithmetic.py [--output FOLDER]

It needs the extra `local` and takes about six minutes on one CPU thread. The user message is a sum
of two two-digit numbers ("17+25="), the answer its digits ("42"). Training stops early on purpose,
once a sampled answer is right about a quarter of the time: often enough that completions are
rewarded, seldom enough that there is much to learn. One seed, one thread: the same machine and
versions write the same weights.

Accuracies are expectations, not estimates: the probability of the one right token sequence (digits
and end of turn) is read off a teacher-forced forward, so that no answer has to be sampled.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    get_cosine_schedule_with_warmup,
)

OUTPUT = Path(__file__).parents[1] / "eval_protocol_rft" / "models" / "arithmetic"
SEED = 20
TARGET_ACCURACY = 0.24
"""Mean probability of the right answer to held-out sums at which training stops."""
CONTEXT_LENGTH = 2048
"""Far more than a sum has, so that programs which send it other texts run."""
BATCH = 256
LEARNING_RATE = 3e-3
"""High, so that bytes which are no digits become improbable before the sums become easy."""
WEIGHT_DECAY = 1.0
"""Strong, and on matrices only: small attention logits keep the model's own float32 noise in a
logprob near 1e-6, while decaying embeddings would keep nonsense bytes probable."""
WARMUP_STEPS = 50
MAX_STEPS = 4000
LONGEST_SYSTEM_TEXT = 24
"""Random characters before every other batch: the model learns to read past what is no sum, and
bytes that are no digits get embeddings that mean something."""
STEPS_BETWEEN_CHECKS = 4
"""A check costs about as much as a step, and accuracy moves by some 0.02 from one to the next."""
LONGEST_ANSWER = len("198") + 1

PRINTABLE = "".join(map(chr, range(32, 127)))
START, END, PAD = "<|im_start|>", "<|im_end|>", "<|endoftext|>"

CHAT_TEMPLATE = """\
{%- macro turn(message) -%}
    {%- if message.content is string -%}
        {{- message.content -}}
    {%- elif message.content -%}
        {{- raise_exception('this model reads text only: content must be a string') -}}
    {%- endif -%}
    {%- if message.tool_calls -%}
        {{- ('\\n' if message.content else '') + {'tool_calls': message.tool_calls} | tojson -}}
    {%- endif -%}
{%- endmacro -%}
{%- if tools -%}
    {{- '<|im_start|>system\\n' -}}
    {%- if messages and messages[0].role == 'system' -%}
        {{- turn(messages[0]) + '\\n' -}}
    {%- endif -%}
    {{- {'tools': tools} | tojson + '<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {%- set content = message.content -%}
    {%- if not (tools and loop.first and message.role == 'system') -%}
        {{- '<|im_start|>' + message.role + '\\n' -}}
        {{- content if content is string and not message.tool_calls else turn(message) -}}
        {{- '<|im_end|>\\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


class Problems(NamedTuple):
    """N sums as token ids. P prompt tokens and T positions, the same for all."""

    ids_NT: Tensor
    """Prompt, answer, end of turn, padding."""
    answer_NT: Tensor
    """True on the tokens of the answer and its end of turn."""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, so per character in ASCII, and three control tokens. Lossless."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in (PAD, START, END)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT_LENGTH,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Llama, 3 layers of 96; heads of 32 because vLLM serves nothing smaller on a CPU."""
    end = tokenizer.convert_tokens_to_ids(END)
    pad = tokenizer.convert_tokens_to_ids(PAD)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=3,
        num_key_value_heads=3,
        head_dim=32,
        max_position_embeddings=CONTEXT_LENGTH,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=pad,
        dtype="float32",
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=pad)
    return model


def encode(sums: list[tuple[int, int]], tokenizer: PreTrainedTokenizerFast) -> Problems:
    pad = tokenizer.convert_tokens_to_ids(PAD)
    rows, answers = [], []
    for a, b in sums:
        question = [{"role": "user", "content": f"{a}+{b}="}]
        prompt = tokenizer.apply_chat_template(
            question, add_generation_prompt=True, return_dict=False
        )
        answer = tokenizer.encode(f"{a + b}{END}")
        padding = LONGEST_ANSWER - len(answer)
        rows.append([*prompt, *answer, *[pad] * padding])
        answers.append([False] * len(prompt) + [True] * len(answer) + [False] * padding)
    return Problems(torch.tensor(rows), torch.tensor(answers))


def after_system_turn(problems: Problems, tokenizer: PreTrainedTokenizerFast) -> Problems:
    """The same problems, each after a system turn of its own random text, all of one length."""
    rows = len(problems.ids_NT)
    length = int(torch.randint(1, LONGEST_SYSTEM_TEXT + 1, ()))
    characters = torch.tensor(tokenizer.encode(PRINTABLE))
    head, tail = (
        torch.tensor(tokenizer.encode(text)).expand(rows, -1)
        for text in (f"{START}system\n", f"{END}\n")
    )
    text_NS = characters[torch.randint(len(characters), (rows, length))]
    turn_NS = torch.cat([head, text_NS, tail], dim=1)
    nothing_NS = torch.zeros_like(turn_NS, dtype=torch.bool)
    return Problems(
        torch.cat([turn_NS, problems.ids_NT], dim=1),
        torch.cat([nothing_NS, problems.answer_NT], dim=1),
    )


def answer_logprobs(model: LlamaForCausalLM, problems: Problems) -> Tensor:
    """[N, T-1] logprob of each answer token, 0 elsewhere."""
    logits = model(problems.ids_NT[:, :-1], use_cache=False).logits
    logprobs = logits.log_softmax(-1).gather(-1, problems.ids_NT[:, 1:, None]).squeeze(-1)
    return logprobs.masked_fill(~problems.answer_NT[:, 1:], 0)


@torch.no_grad()
def right_answer_probability(model: LlamaForCausalLM, problems: Problems) -> Tensor:
    """[N] probability that an answer sampled at temperature 1 is right."""
    parts = zip(problems.ids_NT.split(BATCH), problems.answer_NT.split(BATCH), strict=True)
    return torch.cat([answer_logprobs(model, Problems(*p)).sum(-1) for p in parts]).exp()


def train(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    training: Problems,
    held_out: Problems,
) -> int:
    """Run AdamW on the answers until the target is met; return the number of steps."""
    matrices = [p for name, p in model.named_parameters() if name.endswith("proj.weight")]
    others = [p for name, p in model.named_parameters() if not name.endswith("proj.weight")]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": others}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0)
    schedule = get_cosine_schedule_with_warmup(optimizer, WARMUP_STEPS, MAX_STEPS)
    started = time.monotonic()
    for step in range(1, MAX_STEPS + 1):
        rows = torch.randint(len(training.ids_NT), (BATCH,))
        batch = Problems(training.ids_NT[rows], training.answer_NT[rows])
        if step % 2:
            batch = after_system_turn(batch, tokenizer)
        loss = -answer_logprobs(model, batch).sum() / batch.answer_NT.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % STEPS_BETWEEN_CHECKS == 0:
            accuracy = right_answer_probability(model, held_out).mean().item()
            seconds = time.monotonic() - started
            print(
                f"step {step:4}  loss {loss.item():.3f}  held out {accuracy:.3f}  {seconds:3.0f} s",
                flush=True,
            )
            if accuracy >= TARGET_ACCURACY:
                return step
    raise RuntimeError(f"below {TARGET_ACCURACY:.0%} after {MAX_STEPS} steps: change the recipe")


def measure(model: LlamaForCausalLM, problems: Problems) -> tuple[float, float, float]:
    """pass@1, pass@8 (both at temperature 1, expected) and greedy accuracy."""
    right_N = right_answer_probability(model, problems)
    answers_NT = problems.ids_NT.masked_fill(~problems.answer_NT, 0)
    with torch.no_grad():
        best_NT = model(problems.ids_NT, use_cache=False).logits.argmax(-1)
    # Greedy is right where each right token is the best after the right ones before it.
    greedy_N = (best_NT[:, :-1].eq(answers_NT[:, 1:]) | ~problems.answer_NT[:, 1:]).all(-1)
    pass_at_8 = 1 - (1 - right_N) ** 8
    return right_N.mean().item(), pass_at_8.mean().item(), greedy_N.float().mean().item()


def card(model: LlamaForCausalLM, steps: int, rows: dict[str, Problems]) -> str:
    """The model card, with what was measured."""
    parameters = sum(p.numel() for p in model.parameters())
    lines = "\n".join(
        f"| {name} | {len(problems.ids_NT)} | "
        + " | ".join(f"{value:.3f}" for value in measure(model, problems))
        + " |"
        for name, problems in rows.items()
    )
    return f"""\
# arithmetic

A Llama-style model of {parameters:,} parameters ({model.config.num_hidden_layers} layers of \
{model.config.hidden_size}, heads of {model.config.head_dim}, float32, tied embeddings, context \
{CONTEXT_LENGTH}) that adds two-digit numbers, badly on purpose: something small to sample from \
and to improve, anywhere.

- Ask it `17+25=` as one user message; it answers `42` and ends its turn with `{END}`.
- One token per byte, so per character in ASCII; the chat template is ChatML and renders `tools`.
- A system message does not disturb it. It knows nothing else, and has not seen \
more than one sum at a time: longer texts are read, so that programs which send them run, and what \
it answers is noise.

Written by `scripts/train_arithmetic.py`, which stopped after {steps} steps. Measured at the end; \
sampling is at temperature 1, numbers are expectations:

| sums of 10..99 | count | pass@1 | pass@8 | greedy |
|---|---|---|---|---|
{lines}

Held out from training: `a+b=` with `(3 * a + 5 * b) % 11 == 0`.
"""


def save(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, text: str, output: Path
) -> None:
    """Write the folder anew."""
    shutil.rmtree(output, ignore_errors=True)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    (output / "README.md").write_text(text)
    # Readable by whoever the package is installed for; safetensors writes for its owner only.
    (output / "model.safetensors").chmod(0o644)
    # The one class name that every transformers release knows, those inside vLLM included.
    config = output / "tokenizer_config.json"
    values = json.loads(config.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    config.write_text(json.dumps(values, indent=2) + "\n")


def is_held_out(a: int, b: int) -> bool:
    return (3 * a + 5 * b) % 11 == 0


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the bundled arithmetic model anew.")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder to write")
    output: Path = parser.parse_args().output
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    sums = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    held_out = encode([s for s in sums if is_held_out(*s)], tokenizer)
    training = encode([s for s in sums if not is_held_out(*s)], tokenizer)
    steps = train(model, tokenizer, training, held_out)
    measured = {
        "training": training,
        "held out": held_out,
        "held out, after a random system turn": after_system_turn(held_out, tokenizer),
    }
    text = card(model, steps, measured)
    save(model, tokenizer, text, output)
    print(text)


if __name__ == "__main__":
    main()
