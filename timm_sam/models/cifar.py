"""The paper's CIFAR networks, for images of 32x32, in timm's registry and made of timm's blocks.

Importing this module registers them; ``timm.create_model("cifar_wrn28_10")`` and ``--model`` find them then. None has
weights of its own: ``pretrained=True`` raises timm's RuntimeError.

Sources: ResNet-56, ResNeXt-29 32x4d and WRN-28-10 as the code of the paper (arXiv:2306.04226) trains them; ResNet-18
and -101 as in kuangliu's pytorch-cifar; VGG and DenseNet-BC, of which the paper gives no more than the names, as in
bearpaw's pytorch-classification.
"""
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import BatchNormAct2d, ClassifierHead, create_classifier
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.models._manipulate import checkpoint_seq
from timm.models.densenet import DenseNet
from timm.models.resnet import BasicBlock, Bottleneck, ResNet, make_blocks
from timm.models.vgg import VGG, cfgs
from torch import Tensor, nn

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)  # of CIFAR-10, as in the paper's code

_conv3x3 = partial(nn.Conv2d, kernel_size=3, padding=1, bias=False)


class PreActBlock(nn.Module):
    """The block of a wide ResNet: normalization and ReLU come before each convolution.

    The shortcut convolution takes the input as it is, as in the paper's code; Zagoruyko & Komodakis, and timm's
    ``PreActBasic``, give it the activated input.

    Args:
        inplanes: Input channels.
        planes: Output channels.
        stride: Of the first convolution and of the shortcut.
        downsample: What timm's ``make_blocks`` puts into the shortcut, a convolution and a normalization layer; only
            the convolution is used. None: the input itself is added.
        drop_path: Applied before the addition, or None.
        device, dtype: Of the parameters.
        kwargs: What ``make_blocks`` gives to blocks of other kinds.
    """

    expansion = 1

    def __init__(self, inplanes: int, planes: int, stride: int = 1, downsample: Any = None,
                 drop_path: nn.Module | None = None, device: Any = None, dtype: Any = None, **kwargs: Any) -> None:
        super().__init__()
        self.bn1 = BatchNormAct2d(inplanes, device=device, dtype=dtype)
        self.conv1 = _conv3x3(inplanes, planes, stride=stride, device=device, dtype=dtype)
        self.bn2 = BatchNormAct2d(planes, device=device, dtype=dtype)
        self.conv2 = _conv3x3(planes, planes, device=device, dtype=dtype)
        self.downsample = None if downsample is None else downsample[0]
        self.drop_path = drop_path

    def forward(self, x: Tensor) -> Tensor:
        """(B, inplanes, H, W) -> (B, planes, H / stride, W / stride)."""
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.conv2(self.bn2(self.conv1(self.bn1(x))))
        if self.drop_path is not None:
            x = self.drop_path(x)
        return x + shortcut


class CifarResNet(ResNet):
    """timm's ResNet behind one 3x3 convolution, without pooling, of three stages or four.

    The last gamma of a block starts at 1, as in the paper's code: timm's 0 would leave it unperturbed where the
    perturbation is scaled by the weight.

    Args:
        block: ``BasicBlock``, ``Bottleneck`` or ``PreActBlock``.
        layers: Blocks of each stage.
        channels: Their widths, before the block's expansion; the last ones of four are the default.
        stem_width: Channels of the stem.
        cardinality, base_width: Of the blocks, as in timm.
        num_classes: Number of outputs; 0: the features.
        in_chans: Channels of the images.
        global_pool: timm's name of the pooling.
        drop_rate: Dropout in front of the classifier.
        drop_path_rate: Stochastic depth of the last block; rises linearly from 0 at the first.
        drop_block_rate: As in timm, of the stages 3 and 4.
        device, dtype: Of the parameters.

    Raises:
        ValueError: ``drop_block_rate`` with pre-activation blocks, which have no place for it.
    """

    def __init__(self, block: Any, layers: Sequence[int], channels: Sequence[int], stem_width: int,
                 cardinality: int = 1, base_width: int = 64, num_classes: int = 10, in_chans: int = 3,
                 global_pool: str = "avg", drop_rate: float = 0.0, drop_path_rate: float = 0.0,
                 drop_block_rate: float = 0.0, device: Any = None, dtype: Any = None) -> None:
        nn.Module.__init__(self)  # ResNet's own builds a stem of 64 channels and 7x7
        where: dict[str, Any] = dict(device=device, dtype=dtype)
        pre_activation = block is PreActBlock
        if pre_activation and drop_block_rate:
            raise ValueError(f"drop_block_rate {drop_block_rate}: pre-activation blocks have no DropBlock")
        self.num_classes, self.in_chans, self.drop_rate = num_classes, in_chans, drop_rate
        self.grad_checkpointing = False
        self.conv1 = _conv3x3(in_chans, stem_width, **where)  # type: ignore[assignment]  # timm has a deep stem, too
        self.bn1 = nn.Identity() if pre_activation else nn.BatchNorm2d(stem_width, **where)
        self.act1 = nn.Identity() if pre_activation else nn.ReLU(inplace=True)
        self.maxpool = nn.Identity()  # type: ignore[assignment]
        stages, info = make_blocks(
            (block,) * len(layers), tuple(channels), tuple(layers), stem_width, cardinality=cardinality,
            base_width=base_width, drop_path_rate=drop_path_rate, drop_block_rate=drop_block_rate,
            norm_layer=nn.BatchNorm2d, **where)
        self.layer1, self.layer2, self.layer3, *fourth = (stage for _, stage in stages)
        # ResNet has four; empty and no Identity, since checkpointing iterates over it
        self.layer4 = fourth[0] if fourth else nn.Sequential()
        self.num_features = info[-1]["num_chs"]
        self.norm = BatchNormAct2d(self.num_features, **where) if pre_activation else nn.Identity()
        stem: dict[str, Any] = dict(num_chs=stem_width, reduction=1, module="conv1" if pre_activation else "act1")
        # make_blocks counts from timm's stem, which divides by 4
        self.feature_info = [stem, *(dict(entry, reduction=entry["reduction"] // 4) for entry in info)]
        self.global_pool, self.fc = create_classifier(self.num_features, num_classes, pool_type=global_pool, **where)
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        self.init_weights(zero_init_last=False)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) -> features (B, num_features, H / 4, W / 4), or / 8 with four stages."""
        x = self.act1(self.bn1(self.conv1(x)))
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq([self.layer1, self.layer2, self.layer3, self.layer4], x, flatten=True)
        else:
            x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.norm(x)

    def forward_intermediates(self, x: Tensor, indices: int | list[int] | None = None, norm: bool = False,
                              stop_early: bool = False, output_fmt: str = "NCHW", intermediates_only: bool = False,
                              ) -> Any:
        """The outputs of stem and stages, as timm's; those of ``features_only=True``.

        Args:
            x: Images (B, C, H, W).
            indices: The last n if int, all if None, else which ones.
            norm: Whether the last stage's output passes the final normalization layer, where there is one.
            stop_early: Whether to end behind the last one wanted.
            output_fmt: NCHW.
            intermediates_only: Whether to leave out the features.

        Returns:
            The features (unless ``intermediates_only``) and a list of tensors (B, C_i, H_i, W_i).
        """
        assert output_fmt == "NCHW", "Output shape must be NCHW."
        stages = len(self.feature_info) - 1
        wanted, last = feature_take_indices(stages + 1, indices)
        x = self.act1(self.bn1(self.conv1(x)))
        found = [x] if 0 in wanted else []
        for i in range(1, (last if stop_early else stages) + 1):
            stage = getattr(self, f"layer{i}")
            x = checkpoint_seq(stage, x) if self.grad_checkpointing else stage(x)
            if i in wanted:
                found.append(self.norm(x) if norm and i == stages else x)
        if intermediates_only:
            return found
        return (self.norm(x) if not stop_early or last == stages else x), found

    def prune_intermediate_layers(self, indices: int | list[int] = 1, prune_norm: bool = False,
                                  prune_head: bool = True) -> list[int]:
        """Takes out what comes behind the last one wanted, as timm's.

        Args:
            indices: The last n if int, else which ones.
            prune_norm: Whether to take out the final normalization layer in any case.
            prune_head: Whether to take out the classifier in any case.

        Returns:
            The numbers of those kept.
        """
        stages = len(self.feature_info) - 1
        wanted, last = feature_take_indices(stages + 1, indices)
        for i in range(last + 1, stages + 1):
            setattr(self, f"layer{i}", nn.Sequential())
        if prune_norm or last < stages:
            self.norm = nn.Identity()
        if last < stages:
            self.num_features = self.feature_info[last]["num_chs"]
        if prune_head or last < stages:
            self.reset_classifier(0, "")
        return wanted


class CifarVGG(VGG):
    """timm's VGG with batch normalization and one linear layer behind it.

    Args:
        cfg: Widths of the convolutions, ``"M"`` for pooling.
        num_classes: Number of outputs; 0: the features.
        global_pool: timm's name of the pooling.
        drop_rate: Dropout in front of the classifier.
        device, dtype: Of the parameters.
        kwargs: Of timm's VGG.
    """

    def __init__(self, cfg: list[Any], num_classes: int = 10, global_pool: str = "avg", drop_rate: float = 0.0,
                 device: Any = None, dtype: Any = None, **kwargs: Any) -> None:
        where: dict[str, Any] = dict(device=device, dtype=dtype)
        # timm's head goes at once: at mlp_ratio 1 its weights would be 119 million
        super().__init__(cfg, num_classes=0, mlp_ratio=1 / 1024, norm_layer=nn.BatchNorm2d, **where, **kwargs)
        self.num_classes, self.drop_rate = num_classes, drop_rate
        self.pre_logits = nn.Identity()  # type: ignore[assignment]  # timm's own pruning does the same
        self.head = ClassifierHead(self.num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate, **where)
        self.head_hidden_size = self.head.num_features
        self._initialize_weights()  # of the new head, too


class CifarDenseNet(DenseNet):
    """timm's DenseNet-BC behind one 3x3 convolution, without normalization or pooling in the stem.

    Args:
        in_chans: Channels of the images.
        device, dtype: Of the parameters.
        kwargs: Of timm's DenseNet.
    """

    def __init__(self, in_chans: int = 3, device: Any = None, dtype: Any = None, **kwargs: Any) -> None:
        super().__init__(in_chans=in_chans, device=device, dtype=dtype, **kwargs)
        info: list[dict[str, Any]] = self.feature_info
        stem = _conv3x3(in_chans, info[0]["num_chs"], device=device, dtype=dtype)
        nn.init.kaiming_normal_(stem.weight)  # as timm's DenseNet
        # the names stay, and with them the numbers of the features
        self.features.conv0, self.features.norm0, self.features.pool0 = stem, nn.Identity(), nn.Identity()
        self.feature_info = [dict(entry, reduction=max(1, entry["reduction"] // 4)) for entry in info]


def _cfg(pool: int, first_conv: str = "conv1", classifier: str = "fc") -> dict[str, Any]:
    return dict(url="", num_classes=10, input_size=(3, 32, 32), pool_size=(pool, pool), crop_pct=1.0,
                interpolation="bicubic", mean=MEAN, std=STD, first_conv=first_conv, classifier=classifier,
                license="apache-2.0")


default_cfgs = generate_default_cfgs({
    "cifar_resnet56": _cfg(8),
    "cifar_resnext29_32x4d": _cfg(8),
    "cifar_wrn28_10": _cfg(8),
    "cifar_resnet18": _cfg(4),
    "cifar_resnet101": _cfg(4),
    "cifar_vgg13_bn": _cfg(1, "features.0", "head.fc"),
    "cifar_vgg16_bn": _cfg(1, "features.0", "head.fc"),
    "cifar_vgg19_bn": _cfg(1, "features.0", "head.fc"),
    "cifar_densenet100": _cfg(8, "features.conv0", "classifier"),
})


def _resnet(variant: str, pretrained: bool, kwargs: dict[str, Any], **structure: Any) -> Any:
    features = dict(out_indices=tuple(range(len(structure["layers"]) + 1)))
    return build_model_with_cfg(CifarResNet, variant, pretrained, feature_cfg=features, **dict(structure, **kwargs))


def _vgg(variant: str, pretrained: bool, kwargs: dict[str, Any]) -> Any:
    features = dict(flatten_sequential=True, out_indices=(0, 1, 2, 3, 4, 5))
    cfg = cfgs[variant.removeprefix("cifar_").removesuffix("_bn")]
    return build_model_with_cfg(CifarVGG, variant, pretrained, model_cfg=cfg, feature_cfg=features, **kwargs)


@register_model
def cifar_resnet56(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """He et al., with a convolution and BatchNorm in the shortcuts of the stages 2 and 3."""
    return _resnet("cifar_resnet56", pretrained, kwargs, block=BasicBlock, layers=(9, 9, 9), channels=(16, 32, 64),
                   stem_width=16)


@register_model
def cifar_resnext29_32x4d(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """Xie et al., 32 groups of 4, 8 and 16 channels."""
    return _resnet("cifar_resnext29_32x4d", pretrained, kwargs, block=Bottleneck, layers=(3, 3, 3),
                   channels=(64, 128, 256), stem_width=64, cardinality=32, base_width=4)


@register_model
def cifar_wrn28_10(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """Zagoruyko & Komodakis, WRN-28-10 without dropout."""
    return _resnet("cifar_wrn28_10", pretrained, kwargs, block=PreActBlock, layers=(4, 4, 4), channels=(160, 320, 640),
                   stem_width=16)


@register_model
def cifar_resnet18(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """He et al.'s ResNet-18 for ImageNet, at full resolution in the first stage."""
    return _resnet("cifar_resnet18", pretrained, kwargs, block=BasicBlock, layers=(2, 2, 2, 2),
                   channels=(64, 128, 256, 512), stem_width=64)


@register_model
def cifar_resnet101(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """He et al.'s ResNet-101 for ImageNet, at full resolution in the first stage."""
    return _resnet("cifar_resnet101", pretrained, kwargs, block=Bottleneck, layers=(3, 4, 23, 3),
                   channels=(64, 128, 256, 512), stem_width=64)


@register_model
def cifar_vgg13_bn(pretrained: bool = False, **kwargs: Any) -> CifarVGG:
    """Simonyan & Zisserman, 10 convolutions and one linear layer."""
    return _vgg("cifar_vgg13_bn", pretrained, kwargs)


@register_model
def cifar_vgg16_bn(pretrained: bool = False, **kwargs: Any) -> CifarVGG:
    """Simonyan & Zisserman, 13 convolutions and one linear layer."""
    return _vgg("cifar_vgg16_bn", pretrained, kwargs)


@register_model
def cifar_vgg19_bn(pretrained: bool = False, **kwargs: Any) -> CifarVGG:
    """Simonyan & Zisserman, 16 convolutions and one linear layer."""
    return _vgg("cifar_vgg19_bn", pretrained, kwargs)


@register_model
def cifar_densenet100(pretrained: bool = False, **kwargs: Any) -> CifarDenseNet:
    """Huang et al., DenseNet-BC of 100 layers and growth rate 12."""
    structure = dict(growth_rate=12, block_config=(16, 16, 16))
    features = dict(flatten_sequential=True, out_indices=(0, 1, 2, 3))
    return build_model_with_cfg(CifarDenseNet, "cifar_densenet100", pretrained, feature_cfg=features,
                                **dict(structure, **kwargs))
