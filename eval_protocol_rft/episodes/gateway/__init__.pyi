from ._agent_processor import AgentRolloutProcessor as AgentRolloutProcessor
from ._agents import Command as Command
from ._call import CallError as CallError
from ._server import Gateway as Gateway
from ._session import Session as Session
from ._settings import SessionLimits as SessionLimits
from ._settings import SessionSettings as SessionSettings
from ._trajectory import SessionRecord as SessionRecord

# For other rooms alone: these may change.
# isort: split
from ._call import ModelCall as ModelCall
from ._call import ReplyChoice as ReplyChoice
from ._chat_api import assistant_message as assistant_message
from ._chat_api import deltas as deltas
from ._chat_api import read_call as read_call
from ._settings import PINNABLE as PINNABLE
from ._settings import settings_of as settings_of
from ._standalone import GatewayError as GatewayError
from ._standalone import serve_gateway as serve_gateway
from ._tree import CallTree as CallTree
