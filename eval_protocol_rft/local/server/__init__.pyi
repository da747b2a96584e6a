# For other rooms alone: these may change.
# isort: split
from ._access import Access as Access
from ._access import is_loopback as is_loopback
from ._app import EXCEPTION_HANDLERS as EXCEPTION_HANDLERS
from ._app import CompletionEndpoints as CompletionEndpoints
from ._app import ModelLookup as ModelLookup
from ._protocol import ApiError as ApiError
from ._protocol import CompletionRequest as CompletionRequest
from ._protocol import parse_request as parse_request
from ._protocol import read_json_body as read_json_body
from ._protocol import read_object as read_object
from ._reply_bodies import Sampled as Sampled
from ._reply_bodies import choice_body as choice_body
from ._reply_bodies import model_of_token as model_of_token
from ._reply_bodies import usage as usage
from ._serving import AccessMiddleware as AccessMiddleware
from ._serving import ServeError as ServeError
from ._serving import Server as Server
from ._serving import claim_port as claim_port
from ._serving import serve_local as serve_local
from ._serving import server_url as server_url
from ._work import ServedModel as ServedModel
from ._work import check_length as check_length
