"""The networks of the experiments, in Flax Linen.

Every network is called as `module.apply(variables, x, train=False)` with `x` float [N, H, W, C],
normalized, and returns logits float32 [N, num_classes]. With `train=True` batch normalization uses
the batch's statistics, and `mutable=["batch_stats"]` returns the running ones.

Modules carry the names of the public PyTorch code, so that checkpoints map one to one
(`train.pretrained`) and the natural sort of the kernels' paths (digits compared as numbers) is the
order of depth.

With `mutable=["intermediates"]` a network also returns its features: what its residual blocks, or
its layers before the last one, put out, from front to back.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

_HE_NORMAL = nn.initializers.he_normal()
BN_EPSILON = 1e-5


def _conv3x3(features: int, name: str, *, stride: int = 1) -> nn.Conv:
    # Explicit padding: "SAME" pads a stride of 2 on the far side only, PyTorch's padding=1 on both.
    return nn.Conv(
        features,
        (3, 3),
        strides=stride,
        padding=((1, 1), (1, 1)),
        use_bias=False,
        kernel_init=_HE_NORMAL,
        name=name,
    )


@jax.custom_vjp
def _materialize(x: jax.Array) -> jax.Array:
    """Return a non-negative array as it is, computed once and kept."""
    # Either branch is the identity, which XLA cannot know: so it cannot fuse across. (It drops
    # `lax.optimization_barrier` on CPU before it fuses.)
    return jax.lax.cond(x[(0,) * x.ndim] >= 0, lambda x: x, lambda x: jnp.abs(x), x)


_materialize.defvjp(lambda x: (_materialize(x), None), lambda _, gradient: (gradient,))


def _relu(x: jax.Array) -> jax.Array:
    """ReLU. XLA on CPU would compute a chain of residual blocks anew for each of its readers."""
    x = nn.relu(x)
    return _materialize(x) if jax.default_backend() == "cpu" else x


def _feature(module: nn.Module, x: jax.Array) -> jax.Array:
    module.sow("intermediates", "features", x)
    return x


def _batch_norm(name: str, *, train: bool, momentum: float) -> nn.BatchNorm:
    return nn.BatchNorm(
        use_running_average=not train, momentum=momentum, epsilon=BN_EPSILON, name=name
    )


def _max_pool(x: jax.Array) -> jax.Array:
    """Maximum over 2x2 windows; an odd last row or column is dropped."""
    # As a reduction over axes: the gradient of nn.max_pool is slow on CPU.
    n, height, width, channels = x.shape
    x = x[:, : height // 2 * 2, : width // 2 * 2]
    return x.reshape(n, height // 2, 2, width // 2, 2, channels).max(axis=(2, 4))


def shortcut_a(x: jax.Array, features: int) -> jax.Array:
    """Subsample by 2 and pad channels with zeros, half on each side (He et al. 2016, option A).

    Args:
      x: [N, H, W, C].
      features: Channels of the result, at least C; of an odd difference the extra one comes last.

    Returns:
      [N, ceil(H / 2), ceil(W / 2), features], the dtype of `x`; it has no parameters.
    """
    extra = features - x.shape[-1]
    before = extra // 2
    return jnp.pad(x[:, ::2, ::2, :], ((0, 0), (0, 0), (0, 0), (before, extra - before)))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch normalization and a residual connection.

    Attributes:
      features: Output channels.
      stride: 1, or 2 to halve the image.
      bn_momentum: Decay of the running statistics.
    """

    features: int
    stride: int = 1
    bn_momentum: float = 0.9

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Map [N, H, W, C] to [N, H / stride, W / stride, features]."""
        norm = functools.partial(_batch_norm, train=train, momentum=self.bn_momentum)
        y = _relu(norm("bn1")(_conv3x3(self.features, "conv1", stride=self.stride)(x)))
        y = norm("bn2")(_conv3x3(self.features, "conv2")(y))
        if self.stride != 1 or x.shape[-1] != self.features:
            x = shortcut_a(x, self.features)
        return _relu(x + y)


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
        norm = _batch_norm("bn1", train=train, momentum=self.bn_momentum)
        x = _relu(norm(_conv3x3(16, "conv1")(x)))
        for stage, features in enumerate((16, 32, 64), start=1):
            for block in range(self.blocks):
                stride = 2 if stage > 1 and block == 0 else 1
                name = f"layer{stage}_{block}"
                x = BasicBlock(features, stride, self.bn_momentum, name=name)(x, train)
                x = _feature(self, x)
        x = jnp.mean(x, axis=(1, 2))
        x = nn.Dense(self.num_classes, kernel_init=_HE_NORMAL, name="linear")(x)
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
        _check_size("small_cnn", x, 4)
        norm = functools.partial(_batch_norm, train=train, momentum=self.bn_momentum)
        x = _feature(self, _max_pool(_relu(norm("bn1")(_conv3x3(16, "conv1")(x)))))
        x = _feature(self, _relu(norm("bn2")(_conv3x3(32, "conv2", stride=2)(x))))
        x = _feature(self, _relu(norm("bn3")(_conv3x3(64, "conv3")(x))))
        x = jnp.mean(x, axis=(1, 2))
        x = nn.Dense(self.num_classes, kernel_init=_HE_NORMAL, name="linear")(x)
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
        _check_size("lenet5", x, 16)
        for layer, features in enumerate((20, 50), start=1):
            x = nn.Conv(
                features, (5, 5), padding="VALID", kernel_init=_HE_NORMAL, name=f"conv{layer}"
            )(x)
            x = _feature(self, _max_pool(x))
        x = x.transpose(0, 3, 1, 2).reshape(x.shape[0], -1)
        x = _feature(self, _relu(nn.Dense(500, kernel_init=_HE_NORMAL, name="fc1")(x)))
        x = nn.Dense(self.num_classes, kernel_init=_HE_NORMAL, name="fc2")(x)
        return x.astype(jnp.float32)


def _check_size(name: str, x: jax.Array, least: int) -> None:
    if x.ndim != 4 or min(x.shape[1:3]) < least:
        raise ValueError(
            f"{name}: expected images [N, H, W, C] of at least {least}x{least}, got shape {x.shape}"
        )


_RESNET_BLOCKS = {"resnet20": 3, "resnet32": 5, "resnet44": 7, "resnet56": 9}
NAMES = (*_RESNET_BLOCKS, "small_cnn", "lenet5")


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
    if name == "small_cnn":
        return SmallCNN(num_classes, bn_momentum)
    if name == "lenet5":
        return LeNet5(num_classes)
    raise ValueError(f"model: expected one of {', '.join(NAMES)}, got {name!r}")
