"""What a policy acts in, turn by turn: environments, tools, and episodes in them.

Invariant: an environment sees messages and answers with messages; it never touches tokens. Whatever
it does (raise, hang, answer nonsense) costs its own episode and no other.
"""

from eval_protocol_rft.environments.environment import Environment, EnvironmentFaultError, Step
from eval_protocol_rft.environments.feedback import RetryWithFeedback
from eval_protocol_rft.environments.limits import EpisodeLimits
from eval_protocol_rft.environments.tools import ToolLoop

__all__ = [
    "Environment",
    "EnvironmentFaultError",
    "EpisodeLimits",
    "RetryWithFeedback",
    "Step",
    "ToolLoop",
]
