"""Real trainers of TRL take one step on converted files; what they compute their loss of is held
against the tokens that were sampled."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from eval_protocol_rft import data
from eval_protocol_rft.local.models import bundled_model_path
from eval_protocol_rft.training import ExportError
from eval_protocol_rft.training.export.trl import use_sampled_tokens
from tests.convert_rows import completion, loaded, rollouts

FOLDER = str(bundled_model_path("arithmetic"))
BATCH = 4


@pytest.fixture(scope="module")
def scored(tmp_path_factory: Any) -> Path:
    """Sums, answered by the bundled model; the reward is how near an answer comes."""
    folder = tmp_path_factory.mktemp("scored")
    problems = [f'{{"prompt": "{a}+{a + 7}=", "ground_truth": {2 * a + 7}}}' for a in range(11, 23)]
    (folder / "problems.jsonl").write_text("\n".join(problems))
    (folder / "near.py").write_text(
        "def near(row):\n"
        "    return 1 / (1 + abs(int(row.messages[-1].content) - int(row.ground_truth)))\n"
    )
    params = {"model": "local/arithmetic", "n": 8, "max_tokens": 4, "seed": 5}
    data.generate(folder / "problems.jsonl", folder / "rollouts.parquet", params, progress=False)
    data.score(folder / "rollouts.parquet", f"{folder}/near.py::near", workers=1, progress=False)
    return folder / "rollouts.parquet"


@pytest.fixture
def trl(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    import torch

    trl = pytest.importorskip("trl", reason="needs trl>=1.0")
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield trl
    torch.set_num_threads(threads)


def one_step(trl: Any, name: str, source: Path, folder: Path, *, exact: bool = False) -> Any:
    """The rows of the data set, and what the loss of one step was computed of."""
    import datasets
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    kind = name.lower()
    data.convert(source, folder / "train.parquet", to_format=kind, progress=False)
    rows = datasets.load_dataset(
        "parquet",
        data_files=str(folder / "train.parquet"),
        cache_dir=str(folder / "cache"),
        split="train",
    )
    seen: list[dict[str, Any]] = []

    class Watched(getattr(trl, f"{name}Trainer")):  # type: ignore[misc]
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **named: Any) -> Any:
            seen.append({k: v.tolist() for k, v in inputs.items() if hasattr(v, "tolist")})
            return super().compute_loss(model, inputs, *args, **named)

    model: Any = FOLDER
    if name == "Reward":
        model = AutoModelForSequenceClassification.from_pretrained(FOLDER, num_labels=1)
    trainer = Watched(
        model=model,
        args=getattr(trl, f"{name}Config")(
            output_dir=str(folder / "out"), max_steps=1, per_device_train_batch_size=BATCH,
            report_to=[], use_cpu=True, bf16=False, save_strategy="no", disable_tqdm=True,
        ),
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(FOLDER),
    )  # fmt: skip
    if exact:
        use_sampled_tokens(trainer, rows)
    result = trainer.train()
    assert result.global_step == 1
    assert result.training_loss > 0
    return rows, seen[0]


def without_padding(batch: dict[str, Any], name: str = "input_ids") -> list[list[int]]:
    masks = batch[name.replace("input_ids", "attention_mask")]
    return [
        [token for token, there in zip(ids, mask, strict=True) if there]
        for ids, mask in zip(batch[name], masks, strict=True)
    ]


@pytest.mark.trl
def test_sft_trains_on_the_tokens_that_were_sampled(trl: Any, scored: Path, tmp_path: Path) -> None:
    rows, batch = one_step(trl, "SFT", scored, tmp_path)
    sampled = {
        tuple(ids): [t if m else -100 for t, m in zip(ids, mask, strict=True)]
        for ids, mask in zip(rows["input_ids"], rows["completion_mask"], strict=True)
    }
    assert len(batch["input_ids"]) == BATCH
    for ids, labels in zip(without_padding(batch), batch["labels"], strict=True):
        assert labels[: len(ids)] == sampled[tuple(ids)]
        assert set(labels[len(ids) :]) <= {-100}


@pytest.mark.trl
def test_a_reward_model_scores_the_tokens_that_were_sampled(
    trl: Any, scored: Path, tmp_path: Path
) -> None:
    rows, batch = one_step(trl, "Reward", scored, tmp_path)
    ids = without_padding(batch)
    pairs = list(zip(ids[:BATCH], ids[BATCH:], strict=True))
    assert len(pairs) == BATCH
    sampled = list(zip(rows["chosen_ids"], rows["rejected_ids"], strict=True))
    assert all(pair in sampled for pair in pairs)
    assert "margin" not in batch


@pytest.mark.trl
@pytest.mark.parametrize("exact", [True, False])
def test_dpo_trains_on_the_tokens_that_were_sampled_where_it_is_told_to(
    trl: Any, scored: Path, tmp_path: Path, exact: bool
) -> None:
    rows, batch = one_step(trl, "DPO", scored, tmp_path, exact=exact)
    ids = without_padding(batch)
    pairs = list(zip(ids[:BATCH], ids[BATCH:], strict=True))
    sampled = [
        (prompt + chosen, prompt + rejected)
        for prompt, chosen, rejected in zip(
            rows["prompt_ids"], rows["chosen_ids"], rows["rejected_ids"], strict=True
        )
    ]
    assert len(pairs) == BATCH
    if exact:
        assert all(pair in sampled for pair in pairs)
    else:  # the chat template ends a turn with a line that no model samples
        ended = [([*chosen, 198], [*rejected, 198]) for chosen, rejected in sampled]
        assert all(pair in ended for pair in pairs)


@pytest.mark.trl
@pytest.mark.parametrize("exact", [True, False])
def test_kto_trains_on_the_tokens_that_were_sampled_where_it_is_told_to(
    trl: Any, scored: Path, tmp_path: Path, exact: bool
) -> None:
    rows, batch = one_step(trl, "KTO", scored, tmp_path, exact=exact)
    more = [] if exact else [198]
    answers = list(zip(rows["prompt_ids"], rows["completion_ids"], rows["label"], strict=True))
    sampled = [(prompt + answer + more, label) for prompt, answer, label in answers]
    found = list(zip(without_padding(batch), batch["label"], strict=True))
    assert len(found) == BATCH
    assert all(pair in sampled for pair in found)
    mismatched = [p + other + more for p, _, _ in answers for _, other, _ in answers]
    assert all(ids in mismatched for ids in without_padding(batch, "KL_input_ids"))


class Prepared:
    """What a trainer made of a data set."""

    def __init__(self, *columns: str) -> None:
        self.train_dataset = self
        self.column_names = columns


def test_a_trainer_that_would_not_read_sampled_tokens_is_refused(tmp_path: Path) -> None:
    pair = ("prompt_ids", "chosen_ids", "rejected_ids")
    with pytest.raises(ExportError, match="data set has no column chosen_ids, rejected_ids"):
        use_sampled_tokens(Prepared(*pair), Prepared("prompt", "prompt_ids"))
    with pytest.raises(ExportError, match="Prepared made no rejected_ids of its data set"):
        use_sampled_tokens(Prepared(*pair[:2]), Prepared(*pair))
    with pytest.raises(ExportError, match="has ref_chosen_logps of the tokens that it made"):
        use_sampled_tokens(Prepared(*pair, "ref_chosen_logps"), Prepared(*pair))
    source = rollouts(tmp_path / "a.parquet", completion(0, 0, 1.0), completion(0, 1, 0.0))
    data.convert(source, tmp_path / "b.parquet", to_format="dpo", progress=False)
    assert set(pair) <= set(loaded(tmp_path / "b.parquet")[0])
