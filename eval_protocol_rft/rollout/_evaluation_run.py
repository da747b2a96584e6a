"""The runs of an evaluation test: what became of its rows (rolled out, failed, scored, and why
not), which run of its row a call of the processor is, as the seeds of its completions come from
that, and a logger of rows for `@evaluation_test(logger=...)`.

Eval Protocol passes a test whose rows all failed: failed rows go to the evaluator like any other,
and its priority scheduler drops evaluators that raise with the rows they had. So the processor
tells the run that is being watched of its rows, and who watches reads them when the test is over.

Invariant: watching changes nothing, and a row counts as scored only where a valid score of a
rollout that succeeded is on it. What cannot be known is told apart from what was not scored. Two
calls on a row never draw the same completions, unless one is Eval Protocol's retry of the other, or
their caller gave both the same number. What is logged is a copy: the row that the trainer gets is
never changed.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from eval_protocol.dataset_logger import default_logger
from eval_protocol.dataset_logger.dataset_logger import DatasetLogger
from eval_protocol.models import EvaluationRow, Message
from eval_protocol.pytest.types import RolloutProcessorConfig

from eval_protocol_rft._text import text_of, visible
from eval_protocol_rft.record import ARRAY_KEYS, has_record
from eval_protocol_rft.rollout._commit import redact_params
from eval_protocol_rft.sampling import AttemptEvent, RunSummary, log_attempt

if TYPE_CHECKING:
    from eval_protocol_rft.rollout._vocabulary import VocabularyWitness

REASON_LENGTH = 400
"""Characters of a reason that are shown: servers send whole pages."""

_watching: EvaluationRun | None = None


class _Tally:
    """So many, and what was said of the first."""

    def __init__(self) -> None:
        self.count = 0
        self.reason: str | None = None

    def add(self, count: int, reason: object) -> None:
        if count and self.reason is None:
            self.reason = _shown(reason)
        self.count += count

    def line(self, what: str) -> str:
        return f"{self.count:,} {what}, first: {self.reason}"


@dataclass(slots=True)
class Outcome:
    """What a watched run came to."""

    rows: int = 0
    completions: int = 0
    """Those that survived, of all rows that did."""
    scored: int = 0
    """Completions with a score; of rows that were judged as a whole, rows."""
    whole_rows: int = 0
    """Rows whose evaluator judged them as a whole, by their first completion."""
    failed_rows: _Tally = field(default_factory=_Tally)
    failed_completions: _Tally = field(default_factory=_Tally)
    """Of rows that survived."""
    unscored: _Tally = field(default_factory=_Tally)
    unseen: int = 0
    """Rows that survived and hold no word of an evaluator."""
    retries: list[tuple[str, int]] = field(default_factory=list)
    """Causes of failed attempts that were followed by another, most frequent first."""
    tokens: int = 0
    """Of completions, those of turns and of rows that failed later included."""
    doubts: list[str] = field(default_factory=list)
    """Of tokenizers whose texts differ from the server's."""
    drops_rows: bool = False
    """Whether the scheduler drops rows whose evaluator raises, or that it has no evaluator for."""

    @property
    def problem(self) -> str | None:
        """Why the run says nothing, or None where it does say something."""
        if not self.rows:
            return "no row was rolled out: the data set is empty, or the processor was not called"
        if self.failed_rows.count == self.rows:
            return f"no row was rolled out: {self.failed_rows.line(f'of {self.rows:,} failed')}"
        if self.scored or (self.unseen and not self.drops_rows):
            return None
        if self.unscored.count:
            return f"nothing was scored: {self.unscored.line('without a score')}"
        return f"nothing was scored: {self._unseen_line()}"

    def lines(self) -> list[str]:
        """The run for a terminal: one line, and one more for each kind of trouble."""
        counts = [
            f"{self.rows:,} rows",
            f"{self.completions:,} completions",
            f"{self.whole_rows:,} rows judged by their first completion" if self.whole_rows else "",
            f"{self.scored:,} scored",
            f"{sum(count for _, count in self.retries):,} retries",
            f"{self.tokens:,} tokens",
        ]
        lines = [", ".join(filter(None, counts))]
        tallies = (
            (self.failed_rows, "rows failed"),
            (self.failed_completions, "completions failed"),
            (self.unscored, "without a score"),
        )
        lines += [tally.line(what) for tally, what in tallies if tally.count]
        if self.unseen:
            lines.append(self._unseen_line())
        lines += map(visible, self.doubts)
        if self.retries:
            lines.append("retries: " + ", ".join(f"{n:,}x {cause}" for cause, n in self.retries))
        return lines

    def _unseen_line(self) -> str:
        if self.drops_rows:
            return (
                f"{self.unseen:,} rows were not judged: Eval Protocol's priority scheduler drops "
                'rows whose evaluator raises, and has none for mode="all"'
            )
        return f"{self.unseen:,} rows hold no result: none was given, or to copies of them"


class EvaluationRun:
    """Rows of a test as the processor starts them."""

    def __init__(self) -> None:
        self._rollouts: dict[int, tuple[EvaluationRow, list[str]]] = {}
        """By the row's identity, as Eval Protocol rolls a row out again as the object it is: the
        row, and why its rollout failed (empty while it runs and where it succeeded)."""
        self._attempts = RunSummary()
        self._witnesses: dict[int, VocabularyWitness] = {}
        """By identity: rows share them."""

    def compared(self, witness: VocabularyWitness) -> None:
        """The server's texts are looked at by `witness`."""
        self._witnesses[id(witness)] = witness

    def attempted(self, event: AttemptEvent) -> None:
        """An attempt of a completion ended."""
        self._attempts.add(event)

    def started(self, row: EvaluationRow, task: asyncio.Task[Any]) -> None:
        """A rollout of `row` runs as `task`."""
        errors: list[str] = []
        self._rollouts[id(row)] = row, errors

        def ended(task: asyncio.Task[Any]) -> None:
            # The text alone: an exception would keep the frames it went through alive.
            if task.cancelled():
                errors.append("cancelled")
            elif error := task.exception():
                errors.append(text_of(error) or type(error).__name__)

        task.add_done_callback(ended)

    def outcome(self) -> Outcome:
        """What the rows that were started are worth, now that the test is over."""
        outcome = Outcome(
            retries=self._attempts.retries.most_common(),
            tokens=self._attempts.tokens,
            doubts=[w.doubt for w in self._witnesses.values() if w.doubt is not None],
            drops_rows=os.environ.get("EP_USE_PRIORITY_SCHEDULER") == "1",
        )
        for row, errors in self._rollouts.values():
            _count(outcome, row, errors)
        return outcome


def _count(outcome: Outcome, row: EvaluationRow, errors: list[str]) -> None:
    outcome.rows += 1
    if errors:
        outcome.failed_rows.add(1, errors[0])
        return
    extra = row.execution_metadata.extra or {}
    outcome.completions += len(extra.get("completion_ids") or ())
    failures = extra.get("failures") or ()
    if failures:
        outcome.failed_completions.add(len(failures), failures[0].get("message"))
    rewards, result = extra.get("rewards"), row.evaluation_result
    if rewards is not None:
        scored = sum(reward is not None for reward in rewards)
        outcome.scored += scored
        for reward, score in zip(rewards, extra.get("completion_results") or (), strict=False):
            if reward is None:
                outcome.unscored.add(1, score.get("error"))
    elif result is None:
        outcome.unseen += 1
    else:
        outcome.whole_rows += 1
        outcome.scored += result.is_score_valid
        if not result.is_score_valid:
            outcome.unscored.add(1, result.reason or "the evaluator marked the score as invalid")


def _shown(reason: object) -> str:
    """One line that no terminal takes for a command, not too long."""
    line = visible(text_of(reason))
    return line if len(line) <= REASON_LENGTH else f"{line[:REASON_LENGTH]}..."


def watched() -> EvaluationRun | None:
    """The run that is being watched, if one is."""
    return _watching


def observe_attempt(event: AttemptEvent) -> None:
    """Log an attempt, and count it where a run is being watched. An `Observer`."""
    log_attempt(event)
    if _watching is not None:
        _watching.attempted(event)


@contextmanager
def watch() -> Iterator[EvaluationRun]:
    """Watch the rollouts of this process; one test runs at a time."""
    global _watching  # noqa: PLW0603 - a test's loop, threads and tasks share no context
    before, _watching = _watching, EvaluationRun()
    try:
        yield _watching
    finally:
        _watching = before


RUN_KEYWORD = "rft_run"
"""In `RolloutProcessorConfig.kwargs`: the number of the run, of callers that number their own."""
RETRY_KEYWORD = "start_server"
"""There too, and False: so Eval Protocol marks a retry."""


class RunNames:
    """Names the run of a row that a call is: successive calls on a row draw anew.

    Eval Protocol's retry of a rollout is the run that it was, and so is a run that its caller
    numbers (`RUN_KEYWORD`). All others are counted per row of an experiment, in order of call.
    Outside of Eval Protocol's tests rows may get a new experiment id each time they are made, or
    all have one; there the row alone counts, and one without an id by its messages.
    """

    def __init__(self) -> None:
        self._calls: Counter[tuple[Any, ...]] = Counter()
        self._rollouts: dict[str, int | str] = {}
        """Rollout id -> the run it was named, for retries."""

    def of(
        self, row: EvaluationRow, messages: Sequence[Message], config: RolloutProcessorConfig
    ) -> int | str:
        keywords = config.kwargs or {}
        if RUN_KEYWORD in keywords:
            run: int | str = keywords[RUN_KEYWORD]
            return run
        metadata = row.execution_metadata
        rollout = metadata.rollout_id or ""
        if keywords.get(RETRY_KEYWORD) is False and rollout in self._rollouts:
            return self._rollouts[rollout]
        index = (metadata.extra or {}).get("run_index")
        index = index if isinstance(index, int) else None
        experiment = metadata.experiment_id if row.eval_metadata is not None else None
        row_key = row.input_metadata.row_id or _digest(messages)
        # With another seed a call draws otherwise anyway, and repeats what that seed once drew.
        seed = (config.completion_params or {}).get("seed")
        key = (experiment, row_key, index, repr(seed))
        call, self._calls[key] = self._calls[key], self._calls[key] + 1
        # The priority scheduler numbers runs, but not the rows that are alike within one.
        run = call if index is None else f"{index}.{call}" if call else index
        self._rollouts[rollout] = run
        return run

    def forget_rollouts(self) -> None:
        """No rollout so far is tried again."""
        self._rollouts.clear()


def _digest(messages: Sequence[Message]) -> str:
    dumps = [message.model_dump_json(exclude_none=True) for message in messages]
    return hashlib.sha256("\0".join(dumps).encode(errors="surrogatepass")).hexdigest()


class SlimLogger(DatasetLogger):
    """Logs rows through another logger, without what makes them large or secret.

    Everything of a row is kept except the token arrays of its rollout record, which become
    `extra["token_counts"]`, and credentials in the completion parameters.
    """

    def __init__(self, *, logger: DatasetLogger | None = None) -> None:
        """
        Args:
            logger: where slim rows go; Eval Protocol's default logger (its SQLite database)
                unless given.
        """
        self._logger = default_logger if logger is None else logger

    def log(self, row: EvaluationRow) -> None:
        """Log a slim copy of `row`."""
        self._logger.log(slim_copy(row))

    def read(self, row_id: str | None = None) -> list[EvaluationRow]:
        """Rows as they were logged, slim; `row_id` selects by whatever id the wrapped logger goes
        by (the rollout id, in Eval Protocol's database)."""
        return list(self._logger.read(row_id))


def slim_copy(row: EvaluationRow) -> EvaluationRow:
    """A copy of `row` without token arrays and credentials; what is not cut is shared."""
    execution = row.execution_metadata
    metadata = row.input_metadata
    return row.model_copy(
        update={
            "execution_metadata": execution.model_copy(update={"extra": _slim(execution.extra)}),
            "input_metadata": metadata.model_copy(
                update={"completion_params": redact_params(metadata.completion_params)}
            ),
        }
    )


def _slim(extra: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if extra is None:
        return None
    slim = {key: value for key, value in extra.items() if key not in ARRAY_KEYS}
    if isinstance(extra.get("sampling"), Mapping):
        slim["sampling"] = redact_params(extra["sampling"])
    if has_record(extra) and "completion_ids" in extra:
        slim["token_counts"] = {
            "prompt": len(extra["prompt_ids"]),
            "completions": [len(ids) for ids in extra["completion_ids"]],
        }
    return slim
