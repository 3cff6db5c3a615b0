"""torchvision's four ImageNet networks, built anew with torch.nn: the oracle of the Linen ones.

Names of modules are torchvision's, so that state_dicts are those of its published weights.
"""

import torch
from torch import nn


def alexnet():
    features = nn.Sequential(
        nn.Conv2d(3, 64, kernel_size=11, stride=4, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(kernel_size=3, stride=2),
        nn.Conv2d(64, 192, kernel_size=5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(kernel_size=3, stride=2),
        nn.Conv2d(192, 384, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.Conv2d(384, 256, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.Conv2d(256, 256, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(kernel_size=3, stride=2),
    )
    classifier = nn.Sequential(
        nn.Dropout(0.5),
        nn.Linear(256 * 6 * 6, 4096),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(4096, 4096),
        nn.ReLU(),
        nn.Linear(4096, 1000),
    )
    return Chain(features=features, avgpool=nn.AdaptiveAvgPool2d((6, 6)), classifier=classifier)


def vgg16():
    layers, channels = [], 3
    for features, count in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(count):
            layers += [nn.Conv2d(channels, features, kernel_size=3, padding=1), nn.ReLU()]
            channels = features
        layers.append(nn.MaxPool2d(kernel_size=2, stride=2))
    classifier = nn.Sequential(
        nn.Linear(512 * 7 * 7, 4096),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(4096, 4096),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(4096, 1000),
    )
    pool = nn.AdaptiveAvgPool2d((7, 7))
    return Chain(features=nn.Sequential(*layers), avgpool=pool, classifier=classifier)


class Chain(nn.Module):
    """Modules one after the other, flattened before the last."""

    def __init__(self, **modules):
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x):
        *front, last = self.children()
        for module in front:
            x = module(x)
        return last(torch.flatten(x, 1))


class BasicConv2d(nn.Module):
    def __init__(self, channels, features, **options):
        super().__init__()
        self.conv = nn.Conv2d(channels, features, bias=False, **options)
        self.bn = nn.BatchNorm2d(features, eps=0.001)

    def forward(self, x):
        return torch.relu(self.bn(self.conv(x)))


class Inception(nn.Module):
    def __init__(self, channels, one, reduce2, three2, reduce3, three3, pooled):
        super().__init__()
        self.branch1 = BasicConv2d(channels, one, kernel_size=1)
        self.branch2 = nn.Sequential(
            BasicConv2d(channels, reduce2, kernel_size=1),
            BasicConv2d(reduce2, three2, kernel_size=3, padding=1),
        )
        self.branch3 = nn.Sequential(
            BasicConv2d(channels, reduce3, kernel_size=1),
            BasicConv2d(reduce3, three3, kernel_size=3, padding=1),
        )
        self.branch4 = nn.Sequential(
            nn.MaxPool2d(kernel_size=3, stride=1, padding=1, ceil_mode=True),
            BasicConv2d(channels, pooled, kernel_size=1),
        )

    def forward(self, x):
        branches = (self.branch1, self.branch2, self.branch3, self.branch4)
        return torch.cat([branch(x) for branch in branches], 1)


class TransformInput(nn.Module):
    """torchvision's `GoogLeNet._transform_input`."""

    def forward(self, x):
        red = x[:, 0:1] * (0.229 / 0.5) + (0.485 - 0.5) / 0.5
        green = x[:, 1:2] * (0.224 / 0.5) + (0.456 - 0.5) / 0.5
        blue = x[:, 2:3] * (0.225 / 0.5) + (0.406 - 0.5) / 0.5
        return torch.cat((red, green, blue), 1)


def googlenet():
    return Chain(
        transform_input=TransformInput(),
        conv1=BasicConv2d(3, 64, kernel_size=7, stride=2, padding=3),
        maxpool1=nn.MaxPool2d(3, stride=2, ceil_mode=True),
        conv2=BasicConv2d(64, 64, kernel_size=1),
        conv3=BasicConv2d(64, 192, kernel_size=3, padding=1),
        maxpool2=nn.MaxPool2d(3, stride=2, ceil_mode=True),
        inception3a=Inception(192, 64, 96, 128, 16, 32, 32),
        inception3b=Inception(256, 128, 128, 192, 32, 96, 64),
        maxpool3=nn.MaxPool2d(3, stride=2, ceil_mode=True),
        inception4a=Inception(480, 192, 96, 208, 16, 48, 64),
        inception4b=Inception(512, 160, 112, 224, 24, 64, 64),
        inception4c=Inception(512, 128, 128, 256, 24, 64, 64),
        inception4d=Inception(512, 112, 144, 288, 32, 64, 64),
        inception4e=Inception(528, 256, 160, 320, 32, 128, 128),
        maxpool4=nn.MaxPool2d(2, stride=2, ceil_mode=True),
        inception5a=Inception(832, 256, 160, 320, 32, 128, 128),
        inception5b=Inception(832, 384, 192, 384, 48, 128, 128),
        avgpool=nn.AdaptiveAvgPool2d((1, 1)),
        fc=nn.Linear(1024, 1000),
    )


class BasicBlock(nn.Module):
    def __init__(self, channels, features, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, features, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(features)
        self.conv2 = nn.Conv2d(features, features, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(features)
        self.downsample = None
        if stride != 1 or channels != features:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels, features, kernel_size=1, stride=stride, bias=False),
                nn.BatchNorm2d(features),
            )

    def forward(self, x):
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(y + (x if self.downsample is None else self.downsample(x)))


def resnet18():
    def stage(channels, features, stride):
        return nn.Sequential(
            BasicBlock(channels, features, stride), BasicBlock(features, features, 1)
        )

    return Chain(
        conv1=nn.Conv2d(3, 64, kernel_size=7, stride=2, padding=3, bias=False),
        bn1=nn.BatchNorm2d(64),
        relu=nn.ReLU(),
        maxpool=nn.MaxPool2d(kernel_size=3, stride=2, padding=1),
        layer1=stage(64, 64, 1),
        layer2=stage(64, 128, 2),
        layer3=stage(128, 256, 2),
        layer4=stage(256, 512, 2),
        avgpool=nn.AdaptiveAvgPool2d((1, 1)),
        fc=nn.Linear(512, 1000),
    )


def randomize(module, seed=0):
    """Give all parameters and statistics random values that keep activations in range."""
    torch.manual_seed(seed)
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight)
            if layer.bias is not None:
                nn.init.normal_(layer.bias, std=0.1)
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias, std=0.1)
            nn.init.normal_(layer.running_mean, std=0.1)
            nn.init.uniform_(layer.running_var, 0.5, 1.5)
    return module


@torch.no_grad()
def scale_logits(module, x):
    """Change the last layer so that logits of images [N, C, H, W] have variance one."""
    last = [layer for layer in module.modules() if isinstance(layer, nn.Linear)][-1]
    scale = module(x).std()
    last.weight /= scale
    last.bias /= scale


@torch.no_grad()
def logits(module, x):
    """Return the logits of images [N, H, W, C], NumPy to NumPy."""
    return module(torch.from_numpy(x.transpose(0, 3, 1, 2).copy())).numpy()
