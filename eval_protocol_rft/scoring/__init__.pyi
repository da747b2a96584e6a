from ._evaluator import EvaluatorError as EvaluatorError
from ._offline import ascore_rows as ascore_rows
from ._offline import score_rows as score_rows
from ._scorer import score_each_completion as score_each_completion

# For other rooms alone: these may change.
# isort: split
from ._evaluation_test import adapt as adapt
from ._evaluation_test import adapter_of as adapter_of
from ._evaluation_test import function_below as function_below
from ._evaluation_test import parameters_of as parameters_of
from ._evaluation_test import sampled_sets as sampled_sets
from ._evaluation_test import sets_of as sets_of
from ._evaluator import BoundCall as BoundCall
from ._evaluator import Evaluator as Evaluator
from ._offline import Mode as Mode
from ._offline import inner_evaluator as inner_evaluator
from ._offline import mode_of as mode_of
from ._offline import own_kwargs as own_kwargs
from ._results import Place as Place
from ._results import read_result as read_result
from ._results import sort_answers as sort_answers
from ._results import unscored as unscored
from ._scorer import OPTIONS_ATTRIBUTE as OPTIONS_ATTRIBUTE
from ._scorer import several_models_problem as several_models_problem
from ._summary import ScoringOptions as ScoringOptions
from ._views import completion_views as completion_views
