from ._html import ReportError as ReportError
from ._page import write_report as write_report
from ._rows import newest_rows_file as newest_rows_file
from ._rows import read_rows as read_rows
from ._terminal import rollout_table as rollout_table
from ._terminal import stats_table as stats_table
from ._training_page import write_training_report as write_training_report

# For other rooms alone: these may change.
# isort: split
from ._rows import is_rollouts as is_rollouts
from ._terminal import WideTable as WideTable
from ._training_page import is_run_folder as is_run_folder
