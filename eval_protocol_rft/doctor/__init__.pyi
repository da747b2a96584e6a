# For other rooms alone: these may change.
# isort: split
from ._findings import unfit as unfit
from ._probe import Setup as Setup
from ._run import diagnosis_json as diagnosis_json
from ._run import diagnosis_table as diagnosis_table
from ._run import examine as examine
from ._run import summary as summary
