from .attention import AttentionRollout as AttentionRollout, TransformerRelevance as TransformerRelevance
from .cam import PytorchGradCAM as PytorchGradCAM
from .captum import Captum as Captum
from .grad_cam import (
    CAM as CAM,
    GradCAM as GradCAM,
    GradCAMPlusPlus as GradCAMPlusPlus,
    HiResCAM as HiResCAM,
    LayerCAM as LayerCAM,
    XGradCAM as XGradCAM,
)
from .gradient import Gradient as Gradient, GradientTimesInput as GradientTimesInput
from .layer_attention import LayerAttention as LayerAttention
from .zennit import Zennit as Zennit
