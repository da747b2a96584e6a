from ._app import FireworksService as FireworksService
from ._command import serve_fireworks as serve_fireworks
from ._errors import ServiceError as ServiceError
from ._store import StateError as StateError
from ._weights import BaseModel as BaseModel
