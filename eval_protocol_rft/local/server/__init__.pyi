# For other rooms alone: these may change.
# isort: split
from ._access import Access as Access
from ._access import is_loopback as is_loopback
from ._serving import ServeError as ServeError
from ._serving import serve_local as serve_local
