"""The ImageNet networks of the SLQ and MLQ papers, in Flax Linen: `train.models` builds them.

Each is torchvision's in every detail, so that its published weights give the same logits. Images
are expected as torchvision's weights do, normalized by ImageNet's mean and standard deviation
(0.485, 0.456, 0.406) and (0.229, 0.224, 0.225).

Dropout takes a key: `rngs={"dropout": key}` with `train=True`. The features that a network gives
away are those before it is dropped from.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from train.layers import (
    HE_NORMAL,
    BasicBlock,
    adaptive_mean,
    batch_norm,
    check_size,
    conv,
    feature,
    flatten,
    max_pool,
    max_pool_2x2,
    relu,
)

# Names that a published state_dict has beyond the network's: heads for training alone.
AUXILIARY = {"googlenet": r"aux[12]\.(conv\.(conv|bn)|fc[12])\.\w+"}
# What is deeper than all the rest, as PyTorch's names do not tell when sorted.
HEADS = {
    "alexnet": "classifier_.*",
    "vgg16": "classifier_.*",
    "googlenet": "fc/.*",
    "resnet18": "fc/.*",
}


def _dense(features: int, name: str) -> nn.Dense:
    return nn.Dense(features, kernel_init=HE_NORMAL, name=name)


class AlexNet(nn.Module):
    """AlexNet of one column (Krizhevsky 2014), 61,100,840 parameters for 1000 classes.

    Attributes:
      num_classes: Number of logits.
    """

    num_classes: int = 1000

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Map images [N, H, W, C], H and W at least 63, to logits float32 [N, num_classes]."""
        check_size("alexnet", x, 63)
        drop = functools.partial(nn.Dropout, 0.5, deterministic=not train)
        biased = functools.partial(conv, use_bias=True)
        x = relu(biased(64, 11, "features_0", stride=4, padding=2)(x))
        x = feature(self, max_pool(x, 3, 2))
        x = relu(biased(192, 5, "features_3", padding=2)(x))
        x = feature(self, max_pool(x, 3, 2))
        x = feature(self, relu(biased(384, 3, "features_6", padding=1)(x)))
        x = feature(self, relu(biased(256, 3, "features_8", padding=1)(x)))
        x = relu(biased(256, 3, "features_10", padding=1)(x))
        x = feature(self, max_pool(x, 3, 2))
        x = flatten(adaptive_mean(x, 6))
        x = feature(self, relu(_dense(4096, "classifier_1")(drop()(x))))
        x = feature(self, relu(_dense(4096, "classifier_4")(drop()(x))))
        return _dense(self.num_classes, "classifier_6")(x).astype(jnp.float32)


# Stages of 3x3 convolutions: channels, and the places of the layers in PyTorch's `features`.
_VGG16 = (
    (64, (0, 2)),
    (128, (5, 7)),
    (256, (10, 12, 14)),
    (512, (17, 19, 21)),
    (512, (24, 26, 28)),
)


class VGG16(nn.Module):
    """VGG-16 without batch normalization (Simonyan & Zisserman, ICLR 2015, configuration D).

    138,357,544 parameters for 1000 classes.

    Attributes:
      num_classes: Number of logits.
    """

    num_classes: int = 1000

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Map images [N, H, W, C], H and W at least 32, to logits float32 [N, num_classes]."""
        check_size("vgg16", x, 32)
        drop = functools.partial(nn.Dropout, 0.5, deterministic=not train)
        for features, places in _VGG16:
            for place in places:
                x = conv(features, 3, f"features_{place}", padding=1, use_bias=True)(x)
                x = relu(x)
                x = feature(self, max_pool_2x2(x) if place == places[-1] else x)
        x = flatten(adaptive_mean(x, 7))
        x = drop()(feature(self, relu(_dense(4096, "classifier_0")(x))))
        x = drop()(feature(self, relu(_dense(4096, "classifier_3")(x))))
        return _dense(self.num_classes, "classifier_6")(x).astype(jnp.float32)


class BasicConv(nn.Module):
    """A convolution with batch normalization (epsilon 1e-3) and ReLU.

    Attributes:
      features: Output channels.
      window: Rows and columns of the kernel.
      stride: From one window to the next.
      padding: Rows and columns of zeros around the image.
      bn_momentum: Decay of the running statistics.
    """

    features: int
    window: int
    stride: int = 1
    padding: int = 0
    bn_momentum: float = 0.9

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Map [N, H, W, C] to [N, H', W', features]."""
        x = conv(self.features, self.window, "conv", stride=self.stride, padding=self.padding)(x)
        norm = batch_norm("bn", train=train, momentum=self.bn_momentum, epsilon=1e-3)
        return relu(norm(x))


class Inception(nn.Module):
    """Four branches side by side, their channels one after the other.

    Branch 3 has a 3x3 kernel where the paper has 5x5, as in torchvision and its weights.

    Attributes:
      widths: Channels of the 1x1 branch; of the reduction and the convolution of branches 2 and 3;
        and of the branch that pools.
      bn_momentum: Decay of the running statistics.
    """

    widths: tuple[int, int, int, int, int, int]
    bn_momentum: float = 0.9

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Map [N, H, W, C] to [N, H, W, sum of the branches' channels]."""
        one, reduce2, three2, reduce3, three3, pooled = self.widths

        def basic(x: jax.Array, features: int, window: int, name: str) -> jax.Array:
            block = BasicConv(features, window, 1, window // 2, self.bn_momentum, name=name)
            return block(x, train)

        branches = [
            basic(x, one, 1, "branch1"),
            basic(basic(x, reduce2, 1, "branch2_0"), three2, 3, "branch2_1"),
            basic(basic(x, reduce3, 1, "branch3_0"), three3, 3, "branch3_1"),
            basic(max_pool(x, 3, 1, padding=1), pooled, 1, "branch4_1"),
        ]
        return jnp.concatenate(branches, axis=-1)


_INCEPTIONS = {
    "3a": (64, 96, 128, 16, 32, 32),
    "3b": (128, 128, 192, 32, 96, 64),
    "4a": (192, 96, 208, 16, 48, 64),
    "4b": (160, 112, 224, 24, 64, 64),
    "4c": (128, 128, 256, 24, 64, 64),
    "4d": (112, 144, 288, 32, 64, 64),
    "4e": (256, 160, 320, 32, 128, 128),
    "5a": (256, 160, 320, 32, 128, 128),
    "5b": (384, 192, 384, 48, 128, 128),
}


def _to_unit_range(x: jax.Array) -> jax.Array:
    """Return images normalized by ImageNet's mean and deviation as (pixel - 0.5) / 0.5."""
    mean = jnp.array((0.485, 0.456, 0.406), jnp.float32)
    std = jnp.array((0.229, 0.224, 0.225), jnp.float32)
    return x * (std / 0.5) + (mean - 0.5) / 0.5


class GoogLeNet(nn.Module):
    """GoogLeNet (Szegedy et al., CVPR 2015) with batch normalization, 6,624,904 parameters.

    That is for 1000 classes, without the auxiliary heads. The published weights were trained on
    pixels on [-1, 1]: the network converts to these itself, as torchvision's `transform_input`.

    Attributes:
      num_classes: Number of logits.
      bn_momentum: Decay of the running statistics.
    """

    num_classes: int = 1000
    bn_momentum: float = 0.9

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Map images [N, H, W, 3], H and W at least 15, to logits float32 [N, num_classes]."""
        check_size("googlenet", x, 15)
        if x.shape[-1] != 3:
            raise ValueError(f"googlenet: expected images of 3 channels, got shape {x.shape}")
        basic = functools.partial(BasicConv, bn_momentum=self.bn_momentum)
        x = basic(64, 7, stride=2, padding=3, name="conv1")(_to_unit_range(x), train)
        x = max_pool(x, 3, 2, ceil_mode=True)
        x = basic(64, 1, name="conv2")(x, train)
        x = basic(192, 3, padding=1, name="conv3")(x, train)
        x = max_pool(x, 3, 2, ceil_mode=True)
        for place, widths in _INCEPTIONS.items():
            if place in ("4a", "5a"):
                x = max_pool(x, 3 if place == "4a" else 2, 2, ceil_mode=True)
            block = Inception(widths, self.bn_momentum, name=f"inception{place}")
            x = feature(self, block(x, train))
        x = nn.Dropout(0.2, deterministic=not train)(jnp.mean(x, axis=(1, 2)))
        return _dense(self.num_classes, "fc")(x).astype(jnp.float32)


class ResNet18(nn.Module):
    """The ResNet of 18 layers for ImageNet (He et al., CVPR 2016), 11,689,512 parameters.

    That is for 1000 classes. Shortcuts between different shapes are of option B.

    Attributes:
      num_classes: Number of logits.
      bn_momentum: Decay of the running statistics.
    """

    num_classes: int = 1000
    bn_momentum: float = 0.9

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Map images [N, H, W, C] to logits float32 [N, num_classes]."""
        check_size("resnet18", x, 1)
        norm = batch_norm("bn1", train=train, momentum=self.bn_momentum)
        x = relu(norm(conv(64, 7, "conv1", stride=2, padding=3)(x)))
        x = max_pool(x, 3, 2, padding=1)
        for stage, features in enumerate((64, 128, 256, 512), start=1):
            for block in range(2):
                stride = 2 if stage > 1 and block == 0 else 1
                name = f"layer{stage}_{block}"
                residual = BasicBlock(features, stride, self.bn_momentum, True, name=name)
                x = feature(self, residual(x, train))
        return _dense(self.num_classes, "fc")(jnp.mean(x, axis=(1, 2))).astype(jnp.float32)
