from ._corrections import Combined as Combined
from ._corrections import Correction as Correction
from ._corrections import IcePop as IcePop
from ._corrections import Rejection as Rejection
from ._corrections import SequenceTIS as SequenceTIS
from ._corrections import TokenTIS as TokenTIS
from ._corrections import parse_correction as parse_correction
from ._forward import TokenLogprobs as TokenLogprobs
from ._forward import token_logprobs as token_logprobs
from ._objective import POLICY_LOSSES as POLICY_LOSSES
from ._objective import Objective as Objective
from ._objective import make_loss as make_loss
from ._policy import CISPO as CISPO
from ._policy import DAPO as DAPO
from ._policy import DPPOKL as DPPOKL
from ._policy import DPPOTV as DPPOTV
from ._policy import DRO as DRO
from ._policy import GMPO as GMPO
from ._policy import GSPO as GSPO
from ._policy import PPO as PPO
from ._policy import SAPO as SAPO
from ._policy import ClipCov as ClipCov
from ._policy import ImportanceSampling as ImportanceSampling
from ._policy import KLCov as KLCov
from ._policy import PolicyLoss as PolicyLoss
from ._policy import Reinforce as Reinforce
from ._policy import TokenLoss as TokenLoss
from ._tensors import LossError as LossError

# For other rooms alone: these may change.
# isort: split
from ._forward import bundled as bundled
from ._forward import can_share_prompts as can_share_prompts
from ._objective import check_same_targets as check_same_targets
from ._tensors import PolicyTensors as PolicyTensors
