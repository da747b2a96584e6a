"""One score per completion: `@score_each_completion` and scoring rows again later.

Invariant: unscored (None) differs from scored 0.0, whatever the evaluator did.
"""

from eval_protocol_rft.scoring.decorator import score_each_completion
from eval_protocol_rft.scoring.evaluator import EvaluatorError
from eval_protocol_rft.scoring.offline import RunningLoopError, ascore_rows, score_rows
from eval_protocol_rft.scoring.summary import ScoringOptions

__all__ = [
    "EvaluatorError",
    "RunningLoopError",
    "ScoringOptions",
    "ascore_rows",
    "score_each_completion",
    "score_rows",
]
