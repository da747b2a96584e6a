from ._evaluator import EvaluatorError as EvaluatorError
from ._scorer import ascore_rows as ascore_rows
from ._scorer import score_each_completion as score_each_completion
from ._scorer import score_rows as score_rows

# For other rooms alone: these may change.
# isort: split
from ._evaluator import ALIVE_KEY as ALIVE_KEY
from ._evaluator import BoundCall as BoundCall
from ._evaluator import Evaluator as Evaluator
from ._evaluator import Mode as Mode
from ._evaluator import adapt as adapt
from ._evaluator import adapter_of as adapter_of
from ._evaluator import function_below as function_below
from ._evaluator import inner_evaluator as inner_evaluator
from ._evaluator import mode_of as mode_of
from ._evaluator import own_kwargs as own_kwargs
from ._evaluator import parameters_of as parameters_of
from ._evaluator import sampled_sets as sampled_sets
from ._evaluator import sets_of as sets_of
from ._results import Place as Place
from ._results import read_result as read_result
from ._results import sort_answers as sort_answers
from ._results import unscored as unscored
from ._reward_functions import columns_needed as columns_needed
from ._reward_functions import may_be_evaluator as may_be_evaluator
from ._scored_rows import ScoringOptions as ScoringOptions
from ._scored_rows import completion_views as completion_views
from ._scored_rows import episode_view as episode_view
from ._scorer import OPTIONS_ATTRIBUTE as OPTIONS_ATTRIBUTE
from ._scorer import several_models_problem as several_models_problem
