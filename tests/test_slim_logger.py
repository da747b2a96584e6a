import json

import pytest
from eval_protocol.dataset_logger import default_logger
from eval_protocol.models import EvaluationRow

from eval_protocol_rft.record import ARRAY_KEYS
from eval_protocol_rft.rollout._evaluation_run import SlimLogger
from tests.scored_rows import Rows, answered, asked, give, rewards, said


class Kept(Rows):
    """A logger that remembers what it was asked to read."""

    def read(self, row_id=None):
        self.asked_for = row_id
        return list(self.by_rollout.values())


@pytest.fixture
def kept():
    return Kept()


def logged(kept, row) -> EvaluationRow:
    SlimLogger(logger=kept).log(row)
    (copy,) = kept.read()
    return copy


def test_token_arrays_become_counts_and_the_rest_of_the_record_stays(kept):
    row = answered("a", "b", tokens=50)
    row.execution_metadata.extra["run_index"] = 2
    before = dict(row.execution_metadata.extra)
    extra = logged(kept, row).execution_metadata.extra
    assert extra.pop("token_counts") == {"prompt": 3, "completions": [50, 50]}
    assert extra == {key: value for key, value in before.items() if key not in ARRAY_KEYS}


def test_what_is_logged_no_longer_grows_with_the_number_of_tokens(kept):
    small = len(logged(kept, answered("a", tokens=10)).model_dump_json())
    kept.by_rollout.clear()
    large = len(logged(kept, answered("a", tokens=10_000)).model_dump_json())
    assert abs(large - small) < 50


def test_messages_and_results_are_logged_as_they_are(kept):
    row = give(answered("a", "b"), 0.5, reason="half")
    row.ground_truth = "a"
    copy = logged(kept, row)
    assert copy.messages == row.messages
    assert copy.evaluation_result == row.evaluation_result
    assert copy.ground_truth == "a"
    assert copy.execution_metadata.rollout_id == row.execution_metadata.rollout_id


def test_credentials_in_completion_params_and_record_are_not_logged(kept):
    row = answered("a")
    row.input_metadata.completion_params = {
        "model": "m",
        "api_key": "hush",
        "extra_headers": {"Authorization": "Bearer hush", "X-Trace": "7"},
    }
    row.execution_metadata.extra["sampling"]["other"] = {"auth": "hush", "seed": 1}
    copy = logged(kept, row)
    assert "hush" not in copy.model_dump_json()
    assert copy.input_metadata.completion_params == {"model": "m"}
    assert copy.execution_metadata.extra["sampling"]["other"] == {"seed": 1}


def test_the_row_itself_is_never_changed(kept):
    row = answered("a", "b")
    row.input_metadata.completion_params = {"api_key": "hush", "headers": {"cookie": "hush"}}
    row.execution_metadata.extra["sampling"]["other"] = {"api_key": "hush"}
    before = row.model_dump_json()
    params, extra = row.input_metadata.completion_params, row.execution_metadata.extra
    logged(kept, row)
    assert row.model_dump_json() == before
    assert row.input_metadata.completion_params is params
    assert row.execution_metadata.extra is extra


@pytest.mark.parametrize("extra", [None, {}, {"run_index": 0}, {"completion_ids": [1, 2]}])
def test_rows_without_a_record_are_logged_too(kept, extra):
    row = asked()
    row.execution_metadata.extra = extra
    copy = logged(kept, row)
    assert "token_counts" not in (copy.execution_metadata.extra or {})
    assert said(copy) == "1+1?"


def test_a_logged_row_can_be_read_scored_again_and_logged_again(kept):
    from eval_protocol_rft.scoring._scorer import score_rows

    def judge(row: EvaluationRow) -> EvaluationRow:
        return give(row, float(said(row) == "a"))

    logger = SlimLogger(logger=kept)
    logger.log(answered("a", "b"))
    (row,) = [EvaluationRow(**json.loads(r.model_dump_json())) for r in logger.read()]
    score_rows([row], judge)
    logger.log(row)
    (again,) = logger.read()
    assert rewards(again) == [1.0, 0.0]
    assert again.execution_metadata.extra["token_counts"] == {"prompt": 3, "completions": [2, 2]}


def test_reading_is_the_wrapped_logger_s(kept):
    kept.log(asked())
    assert SlimLogger(logger=kept).read("r7") == list(kept.by_rollout.values())
    assert kept.asked_for == "r7"


def test_by_itself_it_logs_to_eval_protocol_s_default_logger():
    assert SlimLogger()._logger is default_logger
