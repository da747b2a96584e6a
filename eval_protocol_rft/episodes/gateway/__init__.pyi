# For other rooms alone: these may change.
# isort: split
from ._call import CallError as CallError
