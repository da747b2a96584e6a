# For other rooms alone: these may change.
# isort: split
from ._loading import EvaluatorNotFoundError as EvaluatorNotFoundError
from ._loading import LoadedEvaluator as LoadedEvaluator
from ._loading import code_fingerprints as code_fingerprints
from ._loading import load_evaluator as load_evaluator
from ._loading import load_named as load_named
from ._loading import with_arguments as with_arguments
from ._messages import ScoredItem as ScoredItem
from ._messages import ScoringItem as ScoringItem
from ._pool import score_items as score_items
from ._ray import EAGER_SECONDS as EAGER_SECONDS
from ._ray import RAY_ADDRESS as RAY_ADDRESS
from ._ray import Engine as Engine
from ._ray import Node as Node
from ._ray import NodeActor as NodeActor
from ._ray import NodeActors as NodeActors
from ._ray import Work as Work
from ._ray import check_engine as check_engine
from ._ray import score_items_on_ray as score_items_on_ray
