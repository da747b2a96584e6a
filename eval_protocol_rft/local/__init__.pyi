from ._placement import Placement as Placement
from ._sampler import LocalSampler as LocalSampler
from ._tokenizer import TokenizerError as TokenizerError
from ._tokenizer import load_tokenizer as load_tokenizer

# For other rooms alone: these may change.
# isort: split
from ._cache import spare_threads as spare_threads
from ._memory import Memory as Memory
from ._memory import by_depth as by_depth
from ._memory import estimate as estimate
from ._memory import free_memory as free_memory
from ._memory import is_small as is_small
from ._memory import peak_bytes as peak_bytes
from ._memory import require_fit as require_fit
from ._memory import sampling_memory as sampling_memory
from ._memory import tensor_bytes as tensor_bytes
from ._memory import unloaded_model as unloaded_model
from ._placement import config_and_place as config_and_place
from ._placement import load_model as load_model
from ._placement import no_loading_bar as no_loading_bar
from ._placement import placement_of as placement_of
from ._placement import with_float32_head as with_float32_head
from ._sampler import DEFAULT_MAX_BATCH_TOKENS as DEFAULT_MAX_BATCH_TOKENS
from ._sampler import load_local_sampler as load_local_sampler
from ._tokenizer import LoadedTokenizer as LoadedTokenizer
from ._tokenizer import chat_template_text as chat_template_text
from ._tokenizer import unknown_marks as unknown_marks
from .models import local_model_folder as local_model_folder
