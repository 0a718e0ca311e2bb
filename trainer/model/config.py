from mige_rt.config import PRESETS as PRESETS
from mige_rt.config import DiTConfig as DiTConfig
from mige_rt.config import ModelConfig as ModelConfig
from mige_rt.config import Prediction as Prediction
from mige_rt.config import QFormerConfig as QFormerConfig
from mige_rt.config import TextConfig as TextConfig
from mige_rt.config import VAEConfig as VAEConfig
from mige_rt.config import VisionConfig as VisionConfig
