from ._dry_run import dry_run as dry_run
from ._measured import Measured as Measured
from ._measured import PlanError as PlanError
from ._measured import measure_groups as measure_groups
from ._measured import measure_run as measure_run
from ._plan import Plan as Plan
from ._plan import Rates as Rates
from ._plan import RunSize as RunSize
from ._plan import plan as plan
from ._rollout_fn import make_group_rollout_fn as make_group_rollout_fn
from ._rollout_fn import make_rollout_fn as make_rollout_fn
from ._rollout_fn import recipe_params as recipe_params
from ._rollouts import RowRunner as RowRunner
from ._run_options import LoopOptions as LoopOptions
from ._run_options import LoraSettings as LoraSettings
from ._run_options import Optimizer as Optimizer
from ._run_options import SetupError as SetupError
from ._setup import LocalParts as LocalParts
from ._train import TrainResult as TrainResult
from ._train import train as train
from ._trainer import NamedLoss as NamedLoss
from ._trainer import TrainerError as TrainerError
from ._watch import NothingToTrainOnError as NothingToTrainOnError
from ._watch import TrainingStoppedError as TrainingStoppedError

# For other rooms alone: these may change.
# isort: split
from ._run_options import MODEL as MODEL
from ._run_options import RUN as RUN
from ._setup import MakeParts as MakeParts
from ._train import atrain as atrain
