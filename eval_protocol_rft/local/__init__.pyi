from ._placement import Placement as Placement
from ._sampler import LocalSampler as LocalSampler
from ._tokenizer import TokenizerError as TokenizerError
from ._tokenizer import load_tokenizer as load_tokenizer

# For other rooms alone: these may change.
# isort: split
from ._cache import spare_threads as spare_threads
from ._placement import load_model as load_model
from ._placement import no_loading_bar as no_loading_bar
from ._placement import placement_of as placement_of
from ._placement import with_float32_head as with_float32_head
from ._sampler import load_local_sampler as load_local_sampler
from ._tokenizer import LoadedTokenizer as LoadedTokenizer
from ._tokenizer import chat_template_text as chat_template_text
from ._tokenizer import unknown_marks as unknown_marks
from .models import local_model_folder as local_model_folder
