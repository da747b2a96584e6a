# For other rooms alone: these may change.
# isort: split
from ._serving import ServeError as ServeError
from ._serving import serve_local as serve_local
