"""Fireworks in the loop: its training API as a `Trainer`, and its fine-tuning steps as a loop.

    trainer = await connect(base_model=..., deployment=..., temperature=1.0, adam=Adam())
    reports = await iterate(evaluator, rows, client=AsyncFireworks(), run=..., ...)

`trainer` holds `FireworksTrainer`, `losses` which loss the server computes, `hot_load` how new
weights reach a deployment, `connecting` the way in. `iterate` is the loop over the control plane:
`run_state` says where a run is, `control_plane` what is asked of the service, `job_states` what its
answers mean. Extra `fireworks`; losses need torch (extra `local`) too.
"""

from eval_protocol_rft.loop.fireworks.connecting import connect
from eval_protocol_rft.loop.fireworks.hot_load import HotLoad
from eval_protocol_rft.loop.fireworks.iterate import iterate
from eval_protocol_rft.loop.fireworks.job_states import ControlPlaneError, JobFailedError
from eval_protocol_rft.loop.fireworks.run_state import RunStateError, StepReport
from eval_protocol_rft.loop.fireworks.settings import Adam, StepSettings
from eval_protocol_rft.loop.fireworks.trainer import FireworksTrainer

__all__ = [
    "Adam",
    "ControlPlaneError",
    "FireworksTrainer",
    "HotLoad",
    "JobFailedError",
    "RunStateError",
    "StepReport",
    "StepSettings",
    "connect",
    "iterate",
]
