"""What the networks of `train.models` are made of, with PyTorch's arithmetic: x is [N, H, W, C]."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

HE_NORMAL = nn.initializers.he_normal()
BN_EPSILON = 1e-5


def conv(
    features: int,
    window: int,
    name: str,
    *,
    stride: int = 1,
    padding: int = 0,
    use_bias: bool = False,
) -> nn.Conv:
    """Return a convolution by square windows, zeros around the image."""
    # Explicit padding: "SAME" pads a stride of 2 on the far side only, PyTorch's padding=1 on both.
    return nn.Conv(
        features,
        (window, window),
        strides=stride,
        padding=((padding, padding), (padding, padding)),
        use_bias=use_bias,
        kernel_init=HE_NORMAL,
        name=name,
    )


def batch_norm(
    name: str, *, train: bool, momentum: float, epsilon: float = BN_EPSILON
) -> nn.BatchNorm:
    """Return a batch normalization, by the batch's statistics when training."""
    return nn.BatchNorm(
        use_running_average=not train, momentum=momentum, epsilon=epsilon, name=name
    )


@jax.custom_vjp
def _materialize(x: jax.Array) -> jax.Array:
    """Return a non-negative array as it is, computed once and kept."""
    # Either branch is the identity, which XLA cannot know: so it cannot fuse across. (It drops
    # `lax.optimization_barrier` on CPU before it fuses.)
    return jax.lax.cond(x[(0,) * x.ndim] >= 0, lambda x: x, lambda x: jnp.abs(x), x)


_materialize.defvjp(lambda x: (_materialize(x), None), lambda _, gradient: (gradient,))


def relu(x: jax.Array) -> jax.Array:
    """ReLU. XLA on CPU would compute a chain of residual blocks anew for each of its readers."""
    x = nn.relu(x)
    return _materialize(x) if jax.default_backend() == "cpu" else x


def feature(module: nn.Module, x: jax.Array) -> jax.Array:
    """Return `x`, which the network also gives away as a feature, see `train.models`."""
    module.sow("intermediates", "features", x)
    return x


def max_pool_2x2(x: jax.Array) -> jax.Array:
    """Maximum over 2x2 windows; an odd last row or column is dropped."""
    # As a reduction over axes: the gradient of nn.max_pool is slow on CPU.
    n, height, width, channels = x.shape
    x = x[:, : height // 2 * 2, : width // 2 * 2]
    return x.reshape(n, height // 2, 2, width // 2, 2, channels).max(axis=(2, 4))


def max_pool(
    x: jax.Array, window: int, stride: int, *, padding: int = 0, ceil_mode: bool = False
) -> jax.Array:
    """Maximum over square windows that may overlap, as `torch.nn.MaxPool2d`.

    Args:
      x: [N, H, W, C].
      window: Rows and columns of a window.
      stride: From one window to the next.
      padding: Rows and columns around the image that no maximum comes from.
      ceil_mode: Whether a last window may reach beyond the padding, if it starts before it.

    Returns:
      [N, H', W', C], the dtype of `x`.
    """
    pads = [_pool_padding(size, window, stride, padding, ceil_mode) for size in x.shape[1:3]]
    return jax.lax.reduce_window(
        x,
        -jnp.inf,
        jax.lax.max,
        window_dimensions=(1, window, window, 1),
        window_strides=(1, stride, stride, 1),
        padding=((0, 0), *pads, (0, 0)),
    )


def _pool_padding(
    size: int, window: int, stride: int, padding: int, ceil_mode: bool
) -> tuple[int, int]:
    room = size + 2 * padding - window
    last = (-(-room // stride) if ceil_mode else room // stride) * stride
    if last >= size + padding:
        last -= stride
    return padding, max(0, last + window - size - padding)


def adaptive_mean(x: jax.Array, size: int) -> jax.Array:
    """Mean over size x size windows of about equal size, as `torch.nn.AdaptiveAvgPool2d`.

    Window i takes rows floor(i H / size) to ceil((i + 1) H / size), likewise columns: windows
    overlap, or repeat rows, where size does not divide H. At H = W = size it is the identity.

    Args:
      x: [N, H, W, C].
      size: Rows and columns of the result, at least 1.

    Returns:
      [N, size, size, C], the dtype of `x`.
    """
    for axis in (1, 2):
        n = x.shape[axis]
        if n == size:
            continue
        bounds = [(i * n // size, -(-(i + 1) * n // size)) for i in range(size)]
        means = [jax.lax.slice_in_dim(x, a, b, axis=axis).mean(axis) for a, b in bounds]
        x = jnp.stack(means, axis)
    return x


def flatten(x: jax.Array) -> jax.Array:
    """Return [N, C * H * W] of [N, H, W, C]: in PyTorch's order, channel, row, column."""
    return x.transpose(0, 3, 1, 2).reshape(x.shape[0], -1)


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
      projection: Whether a connection between different shapes is a 1x1 convolution with batch
        normalization (option B of He et al. 2016), or else `shortcut_a`.
    """

    features: int
    stride: int = 1
    bn_momentum: float = 0.9
    projection: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Map [N, H, W, C] to [N, ceil(H / stride), ceil(W / stride), features]."""
        norm = functools.partial(batch_norm, train=train, momentum=self.bn_momentum)
        y = conv(self.features, 3, "conv1", stride=self.stride, padding=1)(x)
        y = relu(norm("bn1")(y))
        y = norm("bn2")(conv(self.features, 3, "conv2", padding=1)(y))
        if self.stride != 1 or x.shape[-1] != self.features:
            if self.projection:
                x = conv(self.features, 1, "downsample_0", stride=self.stride)(x)
                x = norm("downsample_1")(x)
            else:
                x = shortcut_a(x, self.features)
        return relu(x + y)


def check_size(name: str, x: jax.Array, least: int) -> None:
    """Raise a ValueError for what are no images [N, H, W, C], or too small for a network."""
    if x.ndim != 4 or min(x.shape[1:3]) < least:
        raise ValueError(
            f"{name}: expected images [N, H, W, C] of at least {least}x{least}, got shape {x.shape}"
        )
