from ._command import VllmOptions as VllmOptions
from ._engine import Engine as Engine
from ._engine import load_engine as load_engine
from ._engine import stop_engines as stop_engines

# For other rooms alone: these may change.
# isort: split
from ._engine import sampler_at as sampler_at
