"""The networks of the experiments, in Flax Linen.

Every network is called as `module.apply(variables, x, train=False)` with `x` float [N, H, W, C],
normalized, and returns logits float32 [N, num_classes]. With `train=True` batch normalization uses
the batch's statistics, and `mutable=["batch_stats"]` returns the running ones.

Modules carry the names of the public PyTorch code, so that checkpoints map one to one
(`train.pretrained`). The natural sort of the kernels' paths (digits compared as numbers) is the
order of depth, but for the networks for which `depth_rules` says what is deeper. Networks with
dropout take a key for it: `rngs={"dropout": key}`, with `train=True` only.

With `mutable=["intermediates"]` a network also returns its features: what its residual or inception
blocks, or else its layers before the last one, put out, from front to back.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxquant import LayerRule
from train.imagenet_models import AUXILIARY, HEADS, VGG16, AlexNet, GoogLeNet, ResNet18
from train.layers import (
    HE_NORMAL,
    BasicBlock,
    batch_norm,
    check_size,
    conv,
    feature,
    flatten,
    max_pool_2x2,
    relu,
)


class CifarResNet(nn.Module):
    """The ResNet for CIFAR-10 of He et al. (CVPR 2016, section 4.2), 6 * blocks + 2 layers deep.

    Shortcuts are of option A (no parameters): 269,722 parameters at 20 layers, 853,018 at 56, for
    10 classes.

    Attributes:
      blocks: Residual blocks in each of the three stages of 16, 32 and 64 channels.
      num_classes: Number of logits.
      bn_momentum: Decay of the running statistics.
    """

    blocks: int
    num_classes: int
    bn_momentum: float = 0.9

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Map images [N, H, W, C] to logits float32 [N, num_classes]."""
        norm = batch_norm("bn1", train=train, momentum=self.bn_momentum)
        x = relu(norm(conv(16, 3, "conv1", padding=1)(x)))
        for stage, features in enumerate((16, 32, 64), start=1):
            for block in range(self.blocks):
                stride = 2 if stage > 1 and block == 0 else 1
                name = f"layer{stage}_{block}"
                x = BasicBlock(features, stride, self.bn_momentum, name=name)(x, train)
                x = feature(self, x)
        x = jnp.mean(x, axis=(1, 2))
        x = nn.Dense(self.num_classes, kernel_init=HE_NORMAL, name="linear")(x)
        return x.astype(jnp.float32)


class SmallCNN(nn.Module):
    """Three 3x3 convolutions and a linear layer, 24,058 parameters: for 8x8 digits and 28x28 MNIST.

    Attributes:
      num_classes: Number of logits.
      bn_momentum: Decay of the running statistics.
    """

    num_classes: int
    bn_momentum: float = 0.9

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Map images [N, H, W, C], H and W at least 4, to logits float32 [N, num_classes]."""
        check_size("small_cnn", x, 4)
        norm = functools.partial(batch_norm, train=train, momentum=self.bn_momentum)
        x = feature(self, max_pool_2x2(relu(norm("bn1")(conv(16, 3, "conv1", padding=1)(x)))))
        x = feature(self, relu(norm("bn2")(conv(32, 3, "conv2", stride=2, padding=1)(x))))
        x = feature(self, relu(norm("bn3")(conv(64, 3, "conv3", padding=1)(x))))
        x = jnp.mean(x, axis=(1, 2))
        x = nn.Dense(self.num_classes, kernel_init=HE_NORMAL, name="linear")(x)
        return x.astype(jnp.float32)


class LeNet5(nn.Module):
    """LeNet-5 as in Caffe's examples, the variant of compression papers, 431,080 parameters.

    20 5x5 filters, pool, 50 5x5 filters, pool, 500 units with ReLU, logits; biases everywhere, no
    batch normalization (so there is no `batch_stats` collection). Between convolution and pooling
    there is no ReLU, as in Caffe. The features are flattened in PyTorch's order (channel, row,
    column), so that `fc1/kernel` is PyTorch's weight transposed.

    Attributes:
      num_classes: Number of logits.
    """

    num_classes: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Map images [N, H, W, C], H and W at least 16, to logits float32 [N, num_classes]."""
        del train  # Nothing differs between training and evaluation.
        check_size("lenet5", x, 16)
        for layer, features in enumerate((20, 50), start=1):
            x = conv(features, 5, f"conv{layer}", use_bias=True)(x)
            x = feature(self, max_pool_2x2(x))
        x = nn.Dense(500, kernel_init=HE_NORMAL, name="fc1")(flatten(x))
        x = feature(self, relu(x))
        x = nn.Dense(self.num_classes, kernel_init=HE_NORMAL, name="fc2")(x)
        return x.astype(jnp.float32)


_RESNET_BLOCKS = {"resnet20": 3, "resnet32": 5, "resnet44": 7, "resnet56": 9}
_PLAIN = {"lenet5": LeNet5, "alexnet": AlexNet, "vgg16": VGG16}
_NORMALIZED = {"small_cnn": SmallCNN, "googlenet": GoogLeNet, "resnet18": ResNet18}
NAMES = (*_RESNET_BLOCKS, *_NORMALIZED, *_PLAIN)


def build(name: str, *, num_classes: int, bn_momentum: float = 0.9) -> nn.Module:
    """Return the network called `name`, not yet initialized.

    Args:
      name: One of `NAMES`.
      num_classes: Number of logits, at least 1.
      bn_momentum: Decay of batch normalization's running statistics, in [0, 1]; 0.9 is PyTorch's
        momentum of 0.1. A network without batch normalization ignores it.

    Returns:
      A Linen module, see the top of this file.

    Raises:
      ValueError: If the name is unknown, or a number is out of range.
    """
    if num_classes < 1:
        raise ValueError(f"num_classes: expected at least 1, got {num_classes}")
    if not 0.0 <= bn_momentum <= 1.0:
        raise ValueError(f"bn_momentum: expected a number in [0, 1], got {bn_momentum}")
    if name in _RESNET_BLOCKS:
        return CifarResNet(_RESNET_BLOCKS[name], num_classes, bn_momentum)
    if name in _NORMALIZED:
        return _NORMALIZED[name](num_classes, bn_momentum)
    if name in _PLAIN:
        return _PLAIN[name](num_classes)
    raise ValueError(f"model: expected one of {', '.join(NAMES)}, got {name!r}")


def depth_rules(name: str) -> tuple[LayerRule, ...] | None:
    """Return rules by which all kernels of a network are quantized, in its order of depth.

    Args:
      name: One of `NAMES`.

    Returns:
      Rules for `jaxquant.select`, `slq` and `mlq`; None, their default, where the kernels' names
      sort by depth. Rules of your own for one of the other networks need the same `depth`.
    """
    if name not in HEADS:
        return None
    return LayerRule(HEADS[name], depth=1), LayerRule(".*")


def unused_tensors(name: str) -> str | None:
    """Return a regular expression of what a published state_dict has beyond a network's tensors.

    Args:
      name: One of `NAMES`.

    Returns:
      A pattern for `train.pretrained.load`: GoogLeNet's auxiliary heads. None for other networks.
    """
    return AUXILIARY.get(name)
