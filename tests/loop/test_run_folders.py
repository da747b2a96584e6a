"""Run folders that are damaged, edited evaluators, and runs in which nothing is scored."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from eval_protocol.models import EvaluateResult, EvaluationRow

from eval_protocol_rft import FireworksTrainingRolloutProcessor
from eval_protocol_rft.cli._models import show_result
from eval_protocol_rft.data._progress import reporter
from eval_protocol_rft.local.models import bundled_model_path
from eval_protocol_rft.loop._run_directory import RunFolder, RunFolderError, weights_fingerprint
from eval_protocol_rft.loop._run_options import SetupError
from eval_protocol_rft.loop._setup import LocalParts, with_tokenizer_of
from eval_protocol_rft.loop._train import TrainResult, atrain
from eval_protocol_rft.loop._watch import NothingToTrainOnError
from eval_protocol_rft.scoring.executors._loading import code_fingerprints, load_evaluator
from tests.loop.runs import options, run, sums_file, without_times
from tests.programs import Zygote

ONE = {"steps": 2, "eval_every": 0, "groups_per_step": 2, "keep_checkpoints": 3}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainResult]:
    """A run of three steps, each with a checkpoint."""
    import asyncio

    folder = tmp_path_factory.mktemp("finished") / "run"
    return folder, asyncio.run(run(folder, options(**ONE | {"steps": 3})))


@pytest.fixture
def folder(finished: tuple[Path, TrainResult], tmp_path: Path) -> Path:
    shutil.copytree(finished[0], tmp_path / "run")
    return tmp_path / "run"


def damage_state(checkpoint: Path, text: str | None) -> None:
    path = checkpoint / "state.json"
    path.unlink()
    if text is not None:
        path.write_text(text)


def cut_weights(checkpoint: Path) -> None:
    path = checkpoint / "trainer.pt"
    path.write_bytes(path.read_bytes()[:1000])


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: damage_state(path, None),
        lambda path: damage_state(path, ""),
        lambda path: damage_state(path, '{"version": "three"}'),
        lambda path: damage_state(path, "[" * 100_000),
        cut_weights,
        lambda path: (path / "trainer.pt").write_bytes(b""),
        lambda path: (path / "trainer.pt").write_text("no weights"),
        lambda path: (path / "trainer.pt").unlink(),
    ],
    ids=["no state", "empty", "other", "deep", "cut", "no bytes", "text", "no weights"],
)
async def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    damage: Any, folder: Path, finished: tuple[Path, TrainResult]
) -> None:
    damage(folder / "checkpoints" / "step-000003")
    warned: list[str] = []
    resumed = await run(folder, options(**ONE | {"steps": 3}), warn=warned.append)
    assert any("going on from the one before, step 2" in text for text in warned), warned
    assert without_times(resumed) == without_times(finished[1])
    names = {path.name for path in (folder / "checkpoints").iterdir()}
    assert {"step-000003", "damaged-step-000003"} <= names


async def test_where_all_checkpoints_are_damaged_nothing_is_begun_anew(folder: Path) -> None:
    for path in (folder / "checkpoints").iterdir():
        cut_weights(path)
    before = (folder / "metrics.jsonl").read_bytes()
    with pytest.raises(RunFolderError, match="no checkpoint is left to go on from") as error:
        await run(folder, options(**ONE | {"steps": 3}))
    assert "\n" not in str(error.value)
    assert (folder / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    "line", ["{", "[]", "3", "{}", '{"step": "x", "kind": "step"}', "[" * 100_000]
)
async def test_metrics_that_are_none_are_named(line: str, folder: Path) -> None:
    path = folder / "metrics.jsonl"
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(
        RunFolderError, match=rf"metrics\.jsonl:{len(path.read_text().splitlines())}: "
    ):
        await run(folder, options(**ONE | {"steps": 3}))


async def test_other_names_among_the_checkpoints_are_passed_over(
    folder: Path, finished: tuple[Path, TrainResult]
) -> None:
    (folder / "checkpoints" / "step-last").mkdir()
    (folder / "checkpoints" / "step-000009").write_text("a file")
    resumed = await run(folder, options(**ONE | {"steps": 3}))
    assert without_times(resumed) == without_times(finished[1])


def test_settings_that_are_gone_are_said_and_overwriting_keeps_what_is_not_ours(
    folder: Path,
) -> None:
    settings = (folder / "settings.json").read_text()
    (folder / "settings.json").write_text("{")
    with pytest.raises(RunFolderError, match=r"settings\.json is missing or damaged"):
        RunFolder.check(folder, {}, overwrite=True)
    (folder / "settings.json").write_text(settings)
    (folder / "thesis.tex").write_text("precious")
    outside = folder.parent / "outside"
    outside.mkdir()
    (outside / "kept").write_text("precious")
    shutil.rmtree(folder / "model")
    (folder / "model").symlink_to(outside)
    RunFolder.open(folder, {"groups_per_step": 1}, overwrite=True).close()
    assert sorted(path.name for path in folder.iterdir()) == ["settings.json", "thesis.tex"]
    assert (outside / "kept").read_text() == "precious"


async def test_a_second_run_in_a_folder_is_refused_while_the_first_one_trains(
    folder: Path,
) -> None:
    settings = json.loads((folder / "settings.json").read_text())
    metrics = (folder / "metrics.jsonl").read_text()
    first = RunFolder.open(folder, settings, overwrite=False)
    for more in ({}, {"overwrite": True}):
        with pytest.raises(RunFolderError, match="another process trains there"):
            await run(folder, options(**ONE | {"steps": 3}), **more)
    assert (folder / "metrics.jsonl").read_text() == metrics
    first.close()
    await run(folder, options(**ONE | {"steps": 3}))
    assert not (folder / ".lock").exists()


def test_a_killed_run_that_left_nothing_but_its_lock_is_begun_anew(tmp_path: Path) -> None:
    (tmp_path / ".lock").touch()
    RunFolder.open(tmp_path, {"groups_per_step": 1}, overwrite=False).close()
    assert [path.name for path in tmp_path.iterdir()] == ["settings.json"]


EVALUATOR = """
from eval_protocol.models import EvaluateResult
from own_rewards import reward

def right(row):
    return EvaluateResult(score=reward(row.messages[-1].content, row.ground_truth))
"""
REWARD = "def reward(said, truth):\n    return float(str(said).strip() == truth)\n"


async def test_an_edited_evaluator_is_another_run(tmp_path: Path, monkeypatch: Any) -> None:
    """Also where the edit is in a file that it imports; comments are nobody's objective."""
    monkeypatch.syspath_prepend(str(tmp_path))
    test, helper = tmp_path / "own_evaluator.py", tmp_path / "own_rewards.py"

    def loaded() -> Any:
        for name in ("own_evaluator", "own_rewards"):
            sys.modules.pop(name, None)
        return load_evaluator(f"{test}::right").function

    async def trained() -> TrainResult:
        return await atrain(
            loaded(),
            tmp_path / "run",
            options=options(**ONE | {"steps": 1}),
            completion_params={"model": "local/arithmetic", "max_tokens": 8},
            data=[sums_file(tmp_path / "sums.jsonl")],
            held_out=0,
            progress=False,
        )

    test.write_text(EVALUATOR)
    helper.write_text(REWARD)
    done = await trained()
    test.write_text("# a comment\n" + EVALUATOR)
    assert (await trained()).lines == done.lines
    helper.write_text(REWARD.replace("==", "!="))
    with pytest.raises(RunFolderError, match=r"evaluator_code: .*own_rewards\.py"):
        await trained()
    helper.write_text(REWARD)
    test.write_text(EVALUATOR.replace("score=", "score=1 - "))
    with pytest.raises(RunFolderError, match=r"evaluator_code: .*own_evaluator\.py"):
        await trained()
    assert set(code_fingerprints(loaded())) == {"own_evaluator.py", "own_rewards.py"}


async def test_edited_rows_are_another_run(tmp_path: Path) -> None:
    """The same ids with other ground truth."""
    data = tmp_path / "sums.jsonl"

    async def trained(truth: str) -> TrainResult:
        lines = [
            {
                "row_id": str(i),
                "messages": [{"role": "user", "content": f"{i}+1="}],
                "ground_truth": truth,
            }
            for i in range(10, 16)
        ]
        data.write_text("".join(json.dumps(line) + "\n" for line in lines))

        def judge(row: EvaluationRow) -> EvaluateResult:
            return EvaluateResult(score=float(len(str(row.messages[-1].content)) % 2))

        return await atrain(
            judge,
            tmp_path / "run",
            options=options(**ONE | {"steps": 1}),
            completion_params={"model": "local/arithmetic", "max_tokens": 8},
            data=[str(data)],
            held_out=0,
            progress=False,
        )

    await trained("1")
    with pytest.raises(RunFolderError, match="rows: "):
        await trained("2")


def test_every_byte_of_the_first_weights_counts(tmp_path: Path) -> None:
    shutil.copytree(bundled_model_path("arithmetic"), tmp_path / "model")
    before = weights_fingerprint("m", tmp_path / "model")
    assert before == weights_fingerprint(f"local/{tmp_path / 'model'}", None)
    assert before == weights_fingerprint("local/arithmetic", None)
    path = tmp_path / "model" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert weights_fingerprint("m", tmp_path / "model") != before
    assert weights_fingerprint("accounts/x/models/y", None) is None


def never(row: EvaluationRow) -> EvaluateResult:
    if not any(message.role == "assistant" for message in row.messages):
        raise LookupError("no answer")
    return EvaluateResult(score=0.0, is_score_valid=False, reason="the judge is away")


async def unscored(tmp_path: Path, **changes: Any) -> TrainResult:
    return await atrain(
        never,
        tmp_path / "run",
        options=options(**ONE | {"steps": 1} | changes),
        completion_params={"model": "local/arithmetic", "max_tokens": 8},
        data=[sums_file(tmp_path / "sums.jsonl")],
        held_out=4,
        progress=False,
        warn=print,
    )


async def test_an_evaluation_without_a_score_ends_the_run_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(
        NothingToTrainOnError, match=r"nothing of 4 held-out rows could be scored.*judge is away"
    ):
        await unscored(tmp_path)


@pytest.mark.parametrize("staleness", [0, 1])
@pytest.mark.parametrize(
    ("judge", "said"),
    [
        (never, r"all 4 groups: none gave a scored completion; .*the judge is away"),
        (lambda row: EvaluateResult(score=0.5), r"all 4 groups: .* same reward \(the last 0\.5\)"),
    ],
    ids=["unscored", "all the same"],
)
async def test_data_that_ends_before_a_step_was_taken_is_an_error(
    judge: Any, said: str, staleness: int, tmp_path: Path
) -> None:
    with pytest.raises(NothingToTrainOnError, match=said):
        await atrain(
            judge,
            tmp_path / "run",
            options=options(
                steps=None, epochs=1.0, groups_per_step=2, eval_every=0, max_staleness=staleness
            ),
            completion_params={"model": "local/arithmetic", "max_tokens": 8},
            data=[sums_file(tmp_path / "sums.jsonl", [(a, 11) for a in range(10, 14)])],
            held_out=0,
            progress=False,
            warn=print,
        )


async def test_or_is_warned_of_and_stands_in_the_metrics(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(NothingToTrainOnError, match=r"gave no scored completion.*judge is away"):
        await unscored(tmp_path, on_unscored="warn")
    assert "step 0: nothing of 4 held-out rows could be scored" in capsys.readouterr().out
    [line] = RunFolder(tmp_path / "run").lines()
    assert (line["kind"], line["rows"], line["unscored"]) == ("eval", 4, 12)
    show_result(TrainResult(tmp_path / "run", [line]))
    assert "held out: nothing was scored" in capsys.readouterr().out


def test_a_log_without_a_terminal_has_progress(capsys: pytest.CaptureFixture[str]) -> None:
    with reporter("train", 9, show=True, every=0.0) as shown:
        shown.update(1, detail="reward 0.5")
    with reporter("train", 9, show=True, every=1e9) as shown:
        shown.update(2, detail="reward 0.6")
        shown.update(3, detail="held out: greedy 0.7", now=True)
    assert capsys.readouterr().err.splitlines() == [
        "train: 1/9  reward 0.5",
        "train: 3/9  held out: greedy 0.7",
    ]


def test_the_command_says_how_it_goes_and_ends_in_one_line(tmp_path: Path, zygote: Zygote) -> None:
    data = sums_file(tmp_path / "sums.jsonl", [(a, 11) for a in range(10, 22)])
    command = [
        *("train", "examples/arithmetic/test_arithmetic.py::test_arithmetic"),
        *("--model", "local/arithmetic"),
        *("--data", data, "--held-out", "2", "--steps", "1", "--groups-per-step", "2"),
        *("--eval-completions", "1", "-o", str(tmp_path / "run")),
    ]
    done = zygote.run(*command)
    assert done.returncode == 0, done.stderr
    assert "train: 0/1  held out: " in done.stderr
    assert "train: 1/1  held out: " in done.stderr
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        (path / "state.json").unlink()
    broken = zygote.run(*command)
    assert broken.returncode == 1
    last = broken.stderr.strip().splitlines()[-1]
    assert last.startswith("ep-rft: ")
    assert "state.json cannot be read" in last
    assert "Traceback" not in broken.stderr


def test_wrong_words_are_refused() -> None:
    with pytest.raises(ValueError, match="on_unscored"):
        options(on_unscored="ignore")
    assert issubclass(SetupError, ValueError)


async def test_a_folder_of_weights_that_is_not_there_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match=r"nowhere: no folder of weights is there"):
        await atrain(
            never,
            tmp_path / "run",
            options=options(**ONE),
            completion_params={"model": "m", "api_base": "http://127.0.0.1:9/v1"},
            parts=LocalParts(weights=tmp_path / "nowhere"),
            data=[sums_file(tmp_path / "sums.jsonl")],
            progress=False,
        )


def test_the_tokenizer_beside_the_weights_is_used_where_none_is_named(tmp_path: Path) -> None:
    weights = str(bundled_model_path("arithmetic"))
    params = {"model": "m", "api_base": "http://127.0.0.1:9/v1"}
    plain = FireworksTrainingRolloutProcessor()
    assert with_tokenizer_of(weights, params, plain)["tokenizer"] == weights
    named = params | {"tokenizer": "mine"}
    assert with_tokenizer_of(weights, named, plain) == named
    own = FireworksTrainingRolloutProcessor(tokenizer="mine")
    assert with_tokenizer_of(weights, params, own) == params
    (tmp_path / "config.json").write_text("{}")
    assert with_tokenizer_of(tmp_path, params, plain) == params
