from ._calling import EnvironmentFaultError as EnvironmentFaultError
from ._conversation import Conversation as Conversation
from ._environment import Environment as Environment
from ._environment import EpisodeLimits as EpisodeLimits
from ._environment import RetryWithFeedback as RetryWithFeedback
from ._environment import Step as Step
from ._episode_processor import EpisodeRolloutProcessor as EpisodeRolloutProcessor
from ._gymnasium import GymnasiumEnvironment as GymnasiumEnvironment
from ._mcp import McpServers as McpServers
from ._mcp_config import McpServerError as McpServerError
from ._openenv import OpenEnvEnvironment as OpenEnvEnvironment
from ._openenv import OpenEnvError as OpenEnvError
from ._rendering import ConversationError as ConversationError
from ._rendering import HistoryRewrittenError as HistoryRewrittenError
from ._template_report import TemplateReport as TemplateReport
from ._template_report import template_report as template_report
from ._textarena import TextArenaEnvironment as TextArenaEnvironment
from ._tool_loop import ToolLoop as ToolLoop

# For other rooms alone: these may change.
# isort: split
from ._alive import AliveScorer as AliveScorer
from ._alive import alive_score as alive_score
from ._conversation import Segment as Segment
from ._episode import Episode as Episode
from ._episode import Episodes as Episodes
from ._episode import group_seed as group_seed
from ._rendering import Rewrite as Rewrite
from ._template_report import TemplateCase as TemplateCase
from ._tool_loop import with_mcp as with_mcp
from ._turns import OnRewrite as OnRewrite
