from ._html import ReportError as ReportError
from ._page import write_report as write_report
from ._reading import newest_rows_file as newest_rows_file
from ._reading import read_rows as read_rows
from ._terminal import rollout_table as rollout_table
from ._terminal import stats_table as stats_table
from ._training_page import write_training_report as write_training_report

# For other rooms alone: these may change.
# isort: split
from ._reading import is_rollouts as is_rollouts
from ._reading import is_run_folder as is_run_folder
from ._reading import read_run as read_run
from ._terminal import WideTable as WideTable
