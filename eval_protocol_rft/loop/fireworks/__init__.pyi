from ._answers import ControlPlaneError as ControlPlaneError
from ._connecting import FireworksParts as FireworksParts
from ._connecting import connect as connect
from ._control_plane import JobFailedError as JobFailedError
from ._control_plane import StepSettings as StepSettings
from ._fireworks_trainer import FireworksTrainer as FireworksTrainer
from ._iterate import StepReport as StepReport
from ._iterate import iterate as iterate

# For other rooms alone: these may change.
# isort: split
from ._hot_load import HotLoad as HotLoad
