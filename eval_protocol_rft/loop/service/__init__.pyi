from ._errors import ServiceError as ServiceError
from ._store import StateError as StateError
