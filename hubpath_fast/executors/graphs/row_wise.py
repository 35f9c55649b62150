"""Which modules treat each row alone in training, by what their code is known to do.

Only the code that was read counts: a class is looked up as it is, so that a subclass, whose forward
may be another, has to say so itself by ``row_wise = True``.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from .masked import is_maskable

# Of torch.nn. Modules that take other modules are nothing but those.
ROW_WISE = frozenset({
    nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict, nn.Identity,
    # Products.
    nn.Linear, nn.Bilinear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d,
    nn.ConvTranspose3d, nn.RNNCell, nn.LSTMCell, nn.GRUCell,
    NonDynamicallyQuantizableLinear,
    # Transformer layers call nn.MultiheadAttention, which is looked at by itself.
    nn.Transformer, nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.TransformerDecoder,
    nn.TransformerDecoderLayer,
    # Norms over what belongs to a row.
    nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.LocalResponseNorm,
    # Activations.
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU,
    nn.Mish, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Hardshrink, nn.Softshrink, nn.Softplus,
    nn.Softsign, nn.Sigmoid, nn.LogSigmoid, nn.Tanh, nn.Tanhshrink, nn.Threshold,
    # Pooling.
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d,
    nn.LPPool1d, nn.LPPool2d, nn.LPPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d,
    nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
    nn.FractionalMaxPool2d, nn.FractionalMaxPool3d, nn.MaxUnpool1d, nn.MaxUnpool2d, nn.MaxUnpool3d,
    # Dropout: each row has numbers of its own.
    nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout,
    # Places.
    nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d,
    nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d, nn.ReplicationPad1d,
    nn.ReplicationPad2d, nn.ReplicationPad3d, nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d,
    nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d, nn.PixelShuffle,
    nn.PixelUnshuffle, nn.ChannelShuffle, nn.Fold, nn.Unfold,
})  # fmt: skip


def _over_own_dim(layer: nn.Module) -> bool:
    """Dimension 0 is the rows; of the negative ones only the last is never that."""
    return isinstance(layer.dim, int) and (layer.dim > 0 or layer.dim == -1)


def _rows_first(layer: nn.Module) -> bool:
    return layer.batch_first


# Those that do with some arguments.
ROW_WISE_IF: dict[type[nn.Module], Callable[[nn.Module], bool]] = {
    nn.Flatten: lambda layer: layer.start_dim > 0,
    nn.Unflatten: _over_own_dim,
    nn.Softmax: _over_own_dim,
    nn.Softmin: _over_own_dim,
    nn.LogSoftmax: _over_own_dim,
    nn.GLU: _over_own_dim,
    nn.MultiheadAttention: _rows_first,
    nn.RNN: _rows_first,
    nn.LSTM: _rows_first,
    nn.GRU: _rows_first,
    # The one writes to its weights, the other weighs gradients by how often a row's index occurs.
    nn.Embedding: lambda layer: layer.max_norm is None and not layer.scale_grad_by_freq,
    # Its running statistics are means over the rows.
    **dict.fromkeys(
        (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
        lambda layer: layer.running_mean is None or not layer.training,
    ),
}

# Packages of networks for images: what they are made of treats rows alone, but for what follows.
PACKAGES = ("timm.layers.", "timm.models.", "torchvision.models.", "torchvision.ops.")


def _not_training(layer: nn.Module) -> bool:
    return not layer.training


# Classes and packages of those that do not, unless so; found by reading timm 1.0.31 and torchvision
# 0.29, and by running a network of each of their files with and without padding.
EXCEPT: dict[str, Callable[[nn.Module], bool]] = {
    # Statistics of the batch.
    "timm.layers.evo_norm.EvoNorm2dB0": _not_training,
    "timm.layers.evo_norm.EvoNorm2dB1": _not_training,
    "timm.layers.evo_norm.EvoNorm2dB2": _not_training,
    "timm.layers.inplace_abn.InplaceAbn": _not_training,
    "timm.models.csatv2.Dct2dStats": lambda layer: False,
    # The scale that makes up for what was dropped is one for all rows.
    "timm.layers.drop.DropBlock2d": lambda layer: not (layer.training and layer.drop_prob),
    "torchvision.ops.drop_block.DropBlock2d": lambda layer: not (layer.training and layer.p),
    "torchvision.ops.drop_block.DropBlock3d": lambda layer: not (layer.training and layer.p),
    # BatchNorm over the positions of all rows, as if they were rows.
    "timm.models.levit.LinearNorm": _not_training,
    # Windows as if they were rows, with BatchNorm in them.
    "timm.models.efficientvit_msra.LocalWindowAttention": _not_training,
    # Lists of images, pairs of images.
    "torchvision.models.detection.": lambda layer: False,
    "torchvision.models.optical_flow.": lambda layer: False,
}


def treats_rows_alone(module: nn.Module) -> bool:
    """Whether its own forward does, in the mode that it is in, within ``masked``; its parts are
    asked by themselves."""
    kind = type(module)
    if "forward" in vars(module) and not _chose_its_own(module):
        return False
    if isinstance(module, _BatchNorm):
        return is_maskable(module)
    if kind in ROW_WISE:
        return True
    if kind in ROW_WISE_IF:
        return ROW_WISE_IF[kind](module)
    if kind.__module__.startswith(PACKAGES):
        name = f"{kind.__module__}.{kind.__qualname__}"
        return all(holds(module) for start, holds in EXCEPT.items() if name.startswith(start))
    return vars(kind).get("row_wise") is True


def _chose_its_own(module: nn.Module) -> bool:
    """Whether its ``forward`` is another method of its own class, as it was written."""
    forward = vars(module)["forward"]
    method = getattr(forward, "__func__", None)
    return getattr(forward, "__self__", None) is module and method in vars(type(module)).values()
