"""Networks for experiments: Modules on one example, called as `network(t, x, args, *, key=None)`, that return an array like x."""

from .dit import DiT as DiT
from .embedding import Conditioning as Conditioning, FourierTime as FourierTime, LabelEmbedding as LabelEmbedding
from .mlp import TimeMLP as TimeMLP
from .unet import UNet as UNet
