# For other rooms alone: these may change.
# isort: split
from ._examination import examine as examine
from ._findings import diagnosis_json as diagnosis_json
from ._findings import diagnosis_table as diagnosis_table
from ._findings import summary as summary
from ._findings import unfit as unfit
from ._probe import Setup as Setup
