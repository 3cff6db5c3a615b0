r"""The recipes of ResNet-20 at 5 bits, 3 bits and ternary on a pretrained ResNet-56, untouched.

    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python -m train \
        --config configs/cifar10_resnet56.py --workdir runs/resnet56 --config.init=resnet56.npz

One seed each, to see that the recipes were not fitted to one network; `--only '*_slq'` runs one of
them. Two cores of an Intel Xeon train 58 images a second, jax 0.10.2: an hour for 5 bits, two and a
half for 3 bits, five for ternary (`*_mlq`), which has been run on 20,000 of the 50,000 images only
(`*_mlq_20000`), in two hours and a half. What came out: docs/results.md.
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
    full = configs["cifar10_resnet56_mlq"]
    fewer = replace(full, data=replace(full.data, train_limit=20_000))
    return configs | {"cifar10_resnet56_mlq_20000": fewer}
