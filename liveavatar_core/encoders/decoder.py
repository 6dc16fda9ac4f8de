"""The decoder of the Wan 2.1 VAE as a stream: diffusers' modules, walked with their feature maps channels last.

Computes what `AutoencoderKLWan.decoder` computes with its feature cache, in fewer passes over memory. Owns the order of
the modules and what a sequence's beginning means; the arithmetic is `maps`'.
"""

import torch.nn.functional as F
from diffusers.models.autoencoders import autoencoder_kl_wan as wan
from torch import Tensor, nn

from liveavatar_core.encoders.maps import PAST, Sum, add_up, causal, double, twice

Past = dict[nn.Module, Tensor]  # the last two frames that each causal convolution has seen


def decode(decoder: wan.WanDecoder3d, z_THWC: Tensor, past: Past) -> Tensor:
    """Latents (T, h, w, 16), one where a sequence begins, -> frames (4 T, H, W, 3), or one.

    `past` is empty where a sequence begins, and is left with all that the next call needs.
    """
    begins = not past
    maps = _causal(decoder.conv_in, Sum(z_THWC), past)[1]
    first, *rest = decoder.mid_block.resnets
    maps = _residual(first, maps, past)
    for attention, resnet in zip(decoder.mid_block.attentions, rest, strict=True):
        maps = _residual(resnet, _attend(attention, maps), past)
    for block in decoder.up_blocks:
        for resnet in block.resnets:
            maps = _residual(resnet, maps, past)
        for upsampler in block.upsamplers or ():
            maps = _upsample(upsampler, maps, past, begins)
    return add_up(*_causal(decoder.conv_out, maps, past, decoder.norm_out)[1].take())


def _causal(
    conv: wan.WanCausalConv3d, maps: Sum, past: Past, norm: wan.WanRMS_norm | None = None, *, keep: bool = False
) -> tuple[Tensor | None, Sum]:
    """(the maps added up if `keep`, what the convolution makes of them, normed before if there is a norm)."""
    gamma = None if norm is None else norm.gamma.flatten()
    total, y = causal(maps, _past_of(conv, maps, past), conv.weight, gamma, keep=keep)
    return total, Sum(y, conv.bias)


def _past_of(conv: wan.WanCausalConv3d, maps: Sum, past: Past) -> Tensor:
    if conv not in past:
        past[conv] = maps.x_THWC.new_zeros((PAST, *maps.shape[1:]))
    return past[conv]


def _residual(block: wan.WanResidualBlock, maps: Sum, past: Past) -> Sum:
    skip, maps = _causal(block.conv1, maps, past, block.norm1, keep=True)
    _, maps = _causal(block.conv2, maps, past, block.norm2)
    if isinstance(block.conv_shortcut, nn.Conv3d):
        skip = F.linear(skip, block.conv_shortcut.weight.flatten(1), block.conv_shortcut.bias)
    maps.skip_THWC = skip
    return maps


def _attend(attention: wan.WanAttentionBlock, maps: Sum) -> Sum:
    x = add_up(*maps.take()).unsqueeze(0).permute(0, 4, 1, 2, 3)
    return Sum(attention(x).permute(0, 2, 3, 4, 1)[0].contiguous())


def _upsample(upsampler: wan.WanResample, maps: Sum, past: Past, begins: bool) -> Sum:
    conv = upsampler.resample[1]
    if upsampler.mode == "upsample3d" and not begins:
        slow = upsampler.time_conv
        maps = Sum(twice(maps, _past_of(slow, maps, past), slow.weight, slow.bias))
    return Sum(double(maps, conv.weight), conv.bias)
