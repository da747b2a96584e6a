"""vLLM, started by this process for one model and stopped with it: `vllm/<folder or hub id>`.
Extra: `vllm`.

`_command` says how it is started, `_engine` starts, waits and stops, `_beside` is what of it runs
outside of this process.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
