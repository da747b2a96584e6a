"""Fireworks in the loop: its training API as a `Trainer`, and its fine-tuning steps as a loop.

    trainer = await connect(base_model=..., deployment=..., temperature=1.0, optimizer=Optimizer())
    reports = await iterate(evaluator, rows, client=AsyncFireworks(), run=..., ...)

`_fireworks_trainer` holds `FireworksTrainer` and which loss the server computes, `_hot_load` how
new weights reach a deployment, `_connecting` the way in. `_iterate` is the loop over the control
plane; `_control_plane` says what is asked of the service, `_answers` what its refusals mean. Extra
`fireworks`; losses need torch (extra `local`) too.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
