r"""The rows of the paper's ImageNet tables: four networks, SLQ and MLQ, INQ and Q-CNN beside them.

    python -m train --config configs/imagenet.py --only 'resnet18_*' --workdir runs/imagenet \
        --config.init=resnet18.npz --config.data.dir=DIR --config.data.workers=16

From torchvision's published weights (`docs/imagenet.md` says how to prepare the data). Rates and
rounds of SLQ are those of the paper's released solver for AlexNet (18 epochs a round at 1e-4, a
tenth of it in the end; here on a cosine); fewer epochs serve, `--config.retrain.epochs=2`. INQ's
shares are its authors'. None of these has been run on ImageNet by us; the slow tests of
`tests/test_imagenet_configs.py` run two steps of every stage on a small archive.
"""

from train.config import Config, Data, Fit, Mesh, vary

NETWORKS = {"alexnet": 5e-4, "vgg16": 5e-4, "googlenet": 1e-4, "resnet18": 1e-4}  # weight decay
_INQ_SHARES = {
    5: (0.5, 0.75, 0.875, 1.0),
    2: (0.2, 0.4, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.975, 1.0),
}


def get_configs() -> dict[str, Config]:
    """Return the experiments by name: network and method."""
    configs = {}
    for network, weight_decay in NETWORKS.items():
        base = Config(
            data=Data(name="imagenet2012", workers=8),
            model=network,
            fit=Fit(epochs=(0,)),
            retrain=Fit(learning_rate=1e-4, weight_decay=weight_decay),
            mesh=Mesh(devices=0),
            batch_size=256,
        )
        rows = {
            "slq5": {"method": "slq", "bits": 5},
            "mlq": {"method": "mlq", "bits": 2, "groups": 4, "order": "boundaries_together"},
            "inq5": {"method": "inq", "bits": 5, "shares": _INQ_SHARES[5]},
            "inq2": {"method": "inq", "bits": 2, "shares": _INQ_SHARES[2]},
        }
        for row, quantize in rows.items():
            epochs = {"slq5": 18, "mlq": 18, "inq5": 8, "inq2": 8}[row]
            retrain = {"epochs": (epochs,)}
            configs[f"{network}_{row}"] = vary(base, quantize=quantize, retrain=retrain)
        qcnn = {"method": "qcnn", "words": 128, "length": 4, "calibration_images": 500}
        configs[f"{network}_qcnn"] = vary(base, quantize=qcnn, mesh={"devices": 1})
    return configs
