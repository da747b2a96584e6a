"""What rollouts and training look like to a person: terminal tables and self-contained pages."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
