r"""The recipes of ResNet-20 at 5 bits, 3 bits and ternary on a pretrained ResNet-56, untouched.

    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python -m train \
        --config configs/cifar10_resnet56.py --workdir runs/resnet56 --config.init=resnet56.npz

One seed each, to see that the recipes were not fitted to one network; `--only '*_slq'` runs one of
them. From 93.39 % to 93.63 % at 5 bits, an hour on two cores of an Intel Xeon, and to 93.36 % at 3
bits, two and a half, jax 0.10.2; ternary has not been run. What came out: docs/results.md.
"""

from dataclasses import replace
from pathlib import Path

from train.config import Config, load


def get_configs() -> dict[str, Config]:
    """Return the experiments by name."""
    configs = {}
    for recipe in ("slq", "slq3", "mlq"):
        name = f"cifar10_resnet20_{recipe}"
        first = load(Path(__file__).with_name(f"{name}.py"))[f"{name}_seed0"]
        configs[f"cifar10_resnet56_{recipe}"] = replace(first, model="resnet56")
    return configs
