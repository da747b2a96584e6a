# For other rooms alone: these may change.
# isort: split
from ._run import ServeError as ServeError
from ._run import serve_local as serve_local
