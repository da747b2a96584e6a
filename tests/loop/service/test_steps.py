"""Fine-tuning steps: what they train on, what they make, and what becomes of those that cannot."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import fireworks
import httpx
import pytest
import torch
from torch import Tensor

from tests.loop.service.text_rows import sums_row, sums_rows, to_jsonl
from tests.service import BASE, KEY, RunningService, arithmetic_base, fireworks_service
from tests.waiting import PATIENCE

ROWS = sums_rows(6)
ENDED = ("COMPLETED", "FAILED", "CANCELLED")


class Account:
    """What tests ask of a server, in short."""

    def __init__(self, server: RunningService) -> None:
        self.server = server
        self.client: Any = fireworks.Fireworks(
            api_key=KEY, account_id="acc", base_url=server.url, max_retries=0
        )
        self._made = 0

    def dataset(self, rows: Sequence[dict[str, Any]] = ROWS) -> str:
        self._made += 1
        name = f"ds-{self._made}"
        self.client.datasets.create(dataset_id=name, dataset={})
        self.client.datasets.upload(name, file=("a.jsonl", to_jsonl(rows)))
        return f"accounts/acc/datasets/{name}"

    def start(self, key: str, rows: Sequence[dict[str, Any]] = ROWS, **options: Any) -> Any:
        """Makes the job `key`, whose model is `key` as well."""
        loss = options.pop("loss_config", {"method": "GRPO", "kl_beta": 0.0})
        weights = options.pop("reward_weights", ["score=1.0"])
        config = {"output_model": f"accounts/acc/models/{key}", "learning_rate": 1e-3, **options}
        if "warm_start_from" not in config:
            config["base_model"] = config.get("base_model", BASE)
        return self.client.reinforcement_fine_tuning_steps.create(
            rlor_trainer_job_id=key,
            dataset=self.dataset(rows),
            reward_weights=weights,
            loss_config=loss,
            training_config=config,
        )

    def wait(self, key: str, *states: str) -> Any:
        """The job, once it is in one of these states, or has ended."""
        pause = threading.Event()
        deadline = PATIENCE / 0.02
        while deadline > 0:
            job = self.client.reinforcement_fine_tuning_steps.get(key)
            if job.state.removeprefix("JOB_STATE_") in (states or ENDED):
                return job
            pause.wait(0.02)
            deadline -= 1
        raise AssertionError(f"{key} is still {job.state}")

    def train(self, key: str, rows: Sequence[dict[str, Any]] = ROWS, **options: Any) -> Any:
        self.start(key, rows, **options)
        return self.wait(key)

    def weights(self, key: str) -> dict[str, Tensor]:
        service = self.server.service
        row = service.store.get("models", f"accounts/acc/models/{key}")
        assert row is not None
        return service.weights.state_dict(row["_weights"])


@pytest.fixture(scope="module")
def account(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Account]:
    with fireworks_service(tmp_path_factory.mktemp("service")) as server:
        yield Account(server)


def sampled(row: dict[str, Any]) -> list[tuple[list[int], list[int], float]]:
    """(prompt ids, answer ids, score) of each sample, by the tokenizer alone."""
    tokenizer: Any = arithmetic_base().tokenizer
    parts = []
    for sample in row["samples"]:
        *messages, answer = sample["messages"]
        prompt = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False
        )
        ids = tokenizer.encode(answer["content"] + tokenizer.eos_token)
        parts.append((prompt, ids, sample["evals"]["score"]))
    return parts


def model_of(weights: dict[str, Tensor]) -> Any:
    """The bundled model, with these in the place of its own weights."""
    module: Any = copy.deepcopy(arithmetic_base().module)
    module.load_state_dict(weights, strict=False)
    return module.requires_grad_(True)


def answer_logprobs(module: Any, prompt: list[int], answer: list[int]) -> Tensor:
    logits = module(input_ids=torch.tensor([[*prompt, *answer[:-1]]])).logits[0]
    targets = torch.tensor(answer)[:, None]
    return logits[len(prompt) - 1 :].log_softmax(-1).gather(-1, targets)[:, 0]


def score_log_odds(weights: dict[str, Tensor], rows: Sequence[dict[str, Any]] = ROWS) -> float:
    """How much more the right answers are to be expected than the wrong ones, nats."""
    module = model_of(weights)
    total = 0.0
    with torch.no_grad():
        for row in rows:
            for prompt, answer, score in sampled(row):
                logprob = float(answer_logprobs(module, prompt, answer).sum())
                total += logprob if score else -logprob
    return total


def by_hand(
    rows: Sequence[dict[str, Any]], *, epochs: int, rate: float, kl_beta: float
) -> dict[str, Tensor]:
    """GRPO (arXiv:2402.03300, eq. 3 and 4), the mean over all sampled tokens, by plain torch."""
    module: Any = model_of({})
    examples = []
    for row in rows:
        parts = sampled(row)
        scores = torch.tensor([score for _, _, score in parts])
        advantages = (scores - scores.mean()) / (scores.std() + 1e-8)
        examples += [(p, a, adv) for (p, a, _), adv in zip(parts, advantages, strict=True)]
    count = sum(len(answer) for _, answer, _ in examples)
    with torch.no_grad():
        old = [answer_logprobs(module, p, a) for p, a, _ in examples]
    matrices = [p for p in module.parameters() if p.requires_grad]
    adam = torch.optim.AdamW(matrices, lr=rate, betas=(0.9, 0.95), weight_decay=0.0, foreach=False)
    for _ in range(epochs):
        adam.zero_grad()
        gains = []
        for (prompt, answer, advantage), before in zip(examples, old, strict=True):
            difference = answer_logprobs(module, prompt, answer) - before
            ratio, penalty = difference.exp(), (-difference).exp() + difference - 1
            gain = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
            gains.append((gain - kl_beta * penalty).sum())
        (-torch.stack(gains).sum() / count).backward()
        torch.nn.utils.clip_grad_norm_(matrices, 1.0)
        adam.step()
    return {name: value.detach() for name, value in module.state_dict().items()}


@pytest.mark.parametrize("kl_beta", [0.0, 0.5])
def test_a_step_is_grpo_on_the_text(account: Account, kl_beta: float) -> None:
    key = f"full-{int(10 * kl_beta)}"
    loss = {"method": "GRPO", "kl_beta": kl_beta}
    job = account.train(key, epochs=3, loss_config=loss)
    assert (job.state, job.training_config.output_model) == (
        "JOB_STATE_COMPLETED",
        f"accounts/acc/models/{key}",
    )
    base = arithmetic_base().module.state_dict()
    ours, expected = account.weights(key), by_hand(ROWS, epochs=3, rate=1e-3, kl_beta=kl_beta)
    moved = max(float((expected[name] - base[name]).abs().max()) for name in base)
    assert moved > 1e-3
    for name, value in expected.items():
        # Where a gradient is near 0, AdamW's first steps are as large as elsewhere, and rounding
        # decides on their sign.
        assert float((ours[name] - value).abs().mean()) < 0.02 * moved, name
    said = [line for line in account.server.lines if line.startswith(f"job {key}: COMPLETED")]
    assert "3 epochs, loss" in said[0]
    assert said[0].endswith(f"model {key}")


def test_a_model_of_adapters_names_the_root_of_all_steps(account: Account) -> None:
    start: dict[str, Any] = {"base_model": BASE}
    odds = [score_log_odds(arithmetic_base().module.state_dict())]
    for key in ("lora-1", "lora-2", "lora-3"):
        assert account.train(key, lora_rank=8, epochs=2, **start).state == "JOB_STATE_COMPLETED"
        model = account.client.models.get(key)
        assert (model.state, model.kind) == ("READY", "HF_PEFT_ADDON")
        assert (model.peft_details.base_model, model.peft_details.r) == (BASE, 8)
        assert "q_proj" in model.peft_details.target_modules
        odds.append(score_log_odds(account.weights(key)))
        start = {"warm_start_from": f"accounts/acc/models/{key}"}
    assert odds == sorted(odds)
    assert odds[-1] > odds[0] + 1
    changed = {
        name
        for name, value in account.weights("lora-1").items()
        if not torch.equal(value, arithmetic_base().module.state_dict()[name])
    }
    assert changed
    assert all("_proj" in name for name in changed)


def test_the_older_client_s_form_is_taken(account: Account) -> None:
    """No id, no reward weights, machines named: as its protobuf says it in JSON."""
    answer = httpx.post(
        f"{account.server.url}/v1/accounts/acc/rlorTrainerJobs",
        json={
            "dataset": account.dataset(),
            "trainingConfig": {
                "outputModel": "accounts/acc/models/older",
                "baseModel": BASE,
                "learningRate": 1e-4,
                "maxContextLength": 8192,
                "loraRank": 16,
                "epochs": 1,
                "batchSize": 32768,
                "acceleratorType": "NVIDIA_H200_141GB",
                "acceleratorCount": 1,
            },
        },
    ).json()
    key = answer["name"].rpartition("/")[2]
    job = account.wait(key)
    assert job.state == "JOB_STATE_COMPLETED"
    assert account.client.models.get("older").peft_details.r == 16


@pytest.mark.parametrize("method", ["GRPO", "DAPO", "GSPO_TOKEN", "METHOD_UNSPECIFIED"])
def test_every_method_trains(account: Account, method: str) -> None:
    key = f"m-{method.lower().replace('_', '-')}"
    job = account.train(key, loss_config={"method": method}, epochs=2)
    assert job.state == "JOB_STATE_COMPLETED"
    base = score_log_odds(arithmetic_base().module.state_dict())
    assert score_log_odds(account.weights(key)) > base


def test_rewards_are_weighted_sums_of_evals(account: Account) -> None:
    """The other way round: with weight -1 the wrong answers are the better ones."""
    account.train("reversed", reward_weights=["score=-1"])
    base = score_log_odds(arithmetic_base().module.state_dict())
    assert score_log_odds(account.weights("reversed")) < base


def test_batches_bound_their_tokens(account: Account) -> None:
    """With room for one row a batch, an epoch is as many steps of the optimiser as rows."""
    account.train("rowwise", batch_size=1)
    account.train("whole", batch_size=32768)
    base = arithmetic_base().module.state_dict()

    def moved(key: str) -> float:
        weights = account.weights(key)
        return max(float((weights[name] - base[name]).abs().max()) for name in base)

    assert moved("rowwise") > 2 * moved("whole")


def test_equal_scores_teach_nothing_and_that_is_said(account: Account) -> None:
    job = account.train("equal", [sums_row(1, 2, (0, 0, 0))])
    assert job.state == "JOB_STATE_COMPLETED"
    assert job.status.message.startswith("Warning: all scores of every row are equal")
    base = arithmetic_base().module.state_dict()
    assert all(torch.equal(value, base[n]) for n, value in account.weights("equal").items())


@pytest.mark.parametrize(
    ("key", "options", "code", "said"),
    [
        ("explodes", {"learning_rate": 1e30, "epochs": 4}, "INTERNAL", "norm is nan"),
        ("no-eval", {"reward_weights": ["accuracy=1"]}, "INVALID_ARGUMENT", "'accuracy'"),
        ("too-long", {"max_context_length": 3}, "INVALID_ARGUMENT", "too_long"),
    ],
)
def test_what_cannot_be_trained_fails_and_says_why(
    account: Account, key: str, options: dict[str, Any], code: str, said: str
) -> None:
    job = account.train(key, **options)
    assert (job.state, job.status.code) == ("JOB_STATE_FAILED", code)
    assert said in job.status.message
    assert any(f"job {key}: FAILED" in line and said in line for line in account.server.lines)
    with pytest.raises(fireworks.NotFoundError):
        account.client.models.get(key)
    account.client.reinforcement_fine_tuning_steps.resume(key, body={})  # and fails again
    assert account.wait(key).state == "JOB_STATE_FAILED"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"base_model": "accounts/acc/models/no"}, "not found"),
        ({"base_model": BASE, "warm_start_from": BASE}, "one of baseModel and warmStartFrom"),
        ({"warm_start_from": BASE}, "no adapter"),
        ({"loss_config": {"method": "DPO"}}, "lossConfig.method"),
        ({"loss_config": {"kl_beta": -1.0}}, "klBeta"),
        ({"reward_weights": ["score"]}, "rewardWeights"),
        ({"epochs": -1}, "epochs"),
        ({"lora_rank": -1}, "loraRank"),
        ({"output_model": "accounts/acc/models/A_b"}, "outputModel"),
    ],
)
def test_what_contradicts_itself_is_refused(
    account: Account, options: dict[str, Any], said: str
) -> None:
    with pytest.raises((fireworks.BadRequestError, fireworks.NotFoundError), match=said):
        account.start("refused", **options)
    with pytest.raises(fireworks.NotFoundError):
        account.client.reinforcement_fine_tuning_steps.get("refused")


def test_an_adapter_keeps_its_rank_and_a_model_its_name(account: Account) -> None:
    account.train("ranked", lora_rank=4)
    start = {"warm_start_from": "accounts/acc/models/ranked"}
    with pytest.raises(fireworks.BadRequestError, match="has rank 4"):
        account.start("other-rank", lora_rank=8, **start)
    with pytest.raises(fireworks.ConflictError):
        account.start("again", output_model="accounts/acc/models/ranked")
    account.train("same-rank", **start)
    assert account.client.models.get("same-rank").peft_details.r == 4


def test_a_data_set_of_prompts_is_nothing_to_train_on(account: Account) -> None:
    prompts = [{"messages": [{"role": "user", "content": "1+1="}]}]
    with pytest.raises(fireworks.BadRequestError, match="of format CHAT"):
        account.start("prompts", prompts)


def test_a_job_can_be_cancelled_and_begun_again(tmp_path: Path) -> None:
    with fireworks_service(tmp_path) as server:  # no other test waits behind the long job
        account = Account(server)
        steps = account.client.reinforcement_fine_tuning_steps
        job = account.start("long", epochs=100_000)
        account.start("behind")
        assert account.wait("long", "RUNNING").state == "JOB_STATE_RUNNING"
        assert steps.get("behind").state == "JOB_STATE_PENDING"  # one after the other
        with pytest.raises(fireworks.BadRequestError, match="in use by"):
            account.client.datasets.delete(job.dataset.rpartition("/")[2])
        with pytest.raises(fireworks.BadRequestError, match="cannot be resumed"):
            steps.resume("long", body={})
        steps.cancel("long", body={})
        assert steps.get("long").state == "JOB_STATE_CANCELLED"
        assert account.wait("behind").state == "JOB_STATE_COMPLETED"
        with pytest.raises(fireworks.NotFoundError):
            account.client.models.get("long")
        with pytest.raises(fireworks.BadRequestError, match="no more to cancel"):
            steps.cancel("long", body={})
        steps.resume("long", body={})
        assert account.wait("long", "RUNNING").state == "JOB_STATE_RUNNING"
        steps.delete("long")
        assert steps.get("long").state == "JOB_STATE_DELETED"
        account.client.datasets.delete(job.dataset.rpartition("/")[2])


def test_a_model_that_something_needs_is_not_deleted(account: Account) -> None:
    client = account.client
    account.train("needed", lora_rank=4)
    client.deployments.create(deployment_id="dep", base_model=BASE, enable_addons=True)
    on = client.lora.load(deployment="accounts/acc/deployments/dep", model="needed")
    (ref,) = client.models.get("needed").deployed_model_refs
    assert (ref.deployment, ref.state) == ("accounts/acc/deployments/dep", "DEPLOYED")
    with pytest.raises(fireworks.BadRequestError, match="is in use by"):
        client.models.delete("needed")
    with pytest.raises(fireworks.BadRequestError, match="deployed on it"):
        client.deployments.delete("dep")
    client.lora.unload(on.name.rpartition("/")[2])
    client.deployments.delete("dep", hard=True)
    client.models.delete("needed")
    with pytest.raises(fireworks.NotFoundError):
        client.models.get("needed")


def test_adapters_fit_their_deployment(account: Account) -> None:
    client, dep = account.client, "accounts/acc/deployments/plain"
    for key in ("one", "two"):
        account.train(key, lora_rank=4)
    account.train("no-adapter")
    client.deployments.create(deployment_id="plain", base_model=BASE)
    with pytest.raises(fireworks.BadRequestError, match="enableAddons"):
        client.lora.load(deployment=dep, model="accounts/acc/models/one")
    with pytest.raises(fireworks.BadRequestError, match="no adapter"):
        client.lora.load(deployment=dep, model="no-adapter", replace_merged_addon=True)
    client.lora.load(deployment=dep, model="one", replace_merged_addon=True)
    with pytest.raises(fireworks.ConflictError):
        client.lora.load(deployment=dep, model="one", replace_merged_addon=True)
    client.lora.load(deployment=dep, model="two", replace_merged_addon=True)
    filtered = client.lora.list(filter=f'deployment="{dep}"')
    assert [deployed.model for deployed in filtered] == ["accounts/acc/models/two"]
    client.deployments.delete("plain", ignore_checks=True, hard=True)
    assert list(client.lora.list()) == []


def test_a_step_that_dies_begins_again_and_ends_the_same(tmp_path: Path) -> None:
    """Nothing is written at the end of a server, so that this is how a killed one looks."""
    options: dict[str, Any] = {"lora_rank": 4, "epochs": 12}
    with fireworks_service(tmp_path / "undisturbed") as server:
        undisturbed = Account(server)
        undisturbed.train("step", **options)
        expected = undisturbed.weights("step")
    with fireworks_service(tmp_path / "disturbed") as server:
        account = Account(server)
        account.start("step", **options)
        account.wait("step", "RUNNING")
    with fireworks_service(tmp_path / "disturbed") as server:
        account = Account(server)
        assert account.wait("step").state == "JOB_STATE_COMPLETED"
        ended = account.weights("step")
    assert all(torch.equal(ended[name], value) for name, value in expected.items())
