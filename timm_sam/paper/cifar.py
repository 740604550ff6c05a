"""Tables 1, 3, 5, 6, 10, 11, 12, 14, 17, 18 and 19: CIFAR."""
from collections.abc import Iterator

from ..perturbation import VARIANTS
from .exhibits import ACCURACY, CIFAR10, CIFAR100, PLAIN, Config, Data, Entry, Evaluation, Exhibit

RESNETS = {"RN-56": "resnet56", "RNxT": "resnext29_32x4d", "WRN-28": "wrn28_10"}
OTHERS = {"VGG-13": "vgg13_bn", "VGG-16": "vgg16_bn", "VGG-19": "vgg19_bn", "DenseNet-100": "densenet100"}
VITS = {"ViT-T": "vit_tiny", "ViT-S": "vit_small"}
DATA = {"CIFAR-10": CIFAR10, "CIFAR-100": CIFAR100}
SELECTIONS = ("all", "onlynorm")
AA = ("--aa", "cifar10")
# training images have black pixels around them, of which a random crop is taken: without one the whole of such an image
# would be shrunk to what the network takes
_UNPADDED = ("--crop-border-pixels", "4")
# the columns of Tables 6, 14, 18 and 19
FIVE = ((PLAIN, ""), *((variant, selection) for variant in ("sam", "elementwise_linf") for selection in SELECTIONS))


def config(network: str, data: Data, variant: str, selection: str = "", flags: tuple[str, ...] = ()) -> Config:
    """The run of a recipe of a network."""
    plain = "adamw" if network.startswith("vit") else "sgd"
    recipe = plain if variant == PLAIN else f"{variant}_{selection}"
    return Config(f"cifar/{network}/{data.folder}/{recipe}", data, variant, flags)


def rows() -> Iterator[tuple[str, str]]:
    """Variant and selection of every column pair: plain training first."""
    yield PLAIN, ""
    for variant in VARIANTS:
        for selection in SELECTIONS:
            yield variant, selection


def resnets(name: str, data: Data, title: str) -> Exhibit:
    """Tables 1 and 10."""
    return Exhibit(name, title, tuple(
        Entry((augmentation, variant, model, selection), config(network, data, variant, selection, flags))
        for augmentation, flags in (("basic", ()), ("basic+AA", AA))
        for variant, selection in rows() for model, network in RESNETS.items()))


def both(networks: dict[str, str], data_first: bool) -> tuple[Entry, ...]:
    """The entries of Tables 3 and 11."""
    return tuple(
        Entry((label, variant, model, selection) if data_first else (variant, label, model, selection),
              config(network, data, variant, selection))
        for label, data in DATA.items() for variant, selection in rows() for model, network in networks.items())


def sharpness(name: str, *flags: str, passes: int) -> Evaluation:
    """Of 2048 training images."""
    return Evaluation(name, "analyze", ("sharpness",), (*_UNPADDED, *flags), 2048 * passes)


def measured(name: str, title: str, models: dict[str, list[str]], evaluation: dict[str, Evaluation],
             more: tuple[Entry, ...] = (), missing: tuple[str, ...] = ()) -> Exhibit:
    """Tables 6, 18 and 19: accuracy and measures of the five networks."""
    entries = []
    for model, measures in models.items():
        for measure in [ACCURACY, *measures]:
            for variant, selection in FIVE:
                run = config(RESNETS[model], CIFAR100, variant, selection)
                labels = (*((model,) if len(models) > 1 else ()), measure, variant, selection)
                entries.append(Entry(labels, run) if measure == ACCURACY else
                               Entry(labels, run, evaluation[model], ("", measure)))
    return Exhibit(name, title, (*entries, *more), missing=missing)


def masked(name: str, title: str, methods: dict[tuple[str, str], str]) -> Exhibit:
    """Tables 5 and 12."""
    folder = {"sam": "cifar100/sam_all", "sam_on": "cifar100/sam_onlynorm"}
    return Exhibit(name, title, tuple(
        Entry(labels, Config(f"cifar/wrn28_10/{folder.get(labels[0], f'cifar100_masks/{recipe}')}", CIFAR100,
                             labels[0])) for labels, recipe in methods.items()))


_TABLE_5 = {("sam", "0"): "", ("sam_on", "99.95"): "", ("random", "99.95"): "random_99.95",
            ("ssam_fisher", "50"): "ssam_fisher_50", ("ssam_fisher", "99.95"): "ssam_fisher_99.95"}
_TABLE_12 = {**_TABLE_5, ("ssam_dynamic", "50"): "ssam_dynamic_50", ("ssam_dynamic", "99.95"): "ssam_dynamic_99.95"}
_WORST = {"WRN-28": [f"worst-linf {rho}" for rho in ("0.003", "0.005", "0.007")],
          "RNxT": [f"worst-linf {rho}" for rho in ("0.001", "0.003", "0.005")]}
_STEP = [f"step-linf {rho}" for rho in ("0.007", "0.01", "0.03")]
_TABLE_6 = sharpness("sharpness", passes=1 + 3 * 20 + 3)  # the command's own measures
_TABLE_18 = {"WRN-28": _TABLE_6, "RNxT": sharpness(
    "sharpness_smaller", "--measure", "worst-linf=0.001,0.003,0.005", passes=1 + 3 * 20)}
_RANK = Evaluation("rank", "analyze", ("rank",), (*_UNPADDED, "--layers", "layer2"), 10_240)
_MEASURES_19 = ("average-l2-raw=0.005", "average-l2=0.1", "average-linf-raw=0.01", "average-linf=0.2",
                "worst-l2-raw=0.05", "worst-l2=0.25", "worst-linf-raw=1e-5", "worst-linf=0.004")
_TABLE_19 = sharpness("sharpness_logits", "--no-logit-norm", "--measure", *_MEASURES_19, passes=1 + 4 * 20 + 4 * 20)
_RADII_14 = ("l2 0.1", "l2 0.2", "linf 1/255", "linf 2/255")
_ATTACK = Evaluation("attack", "validate", (), (
    "--attack", "l2=0.1,0.2", "linf=1/255,2/255", "--attack-num-samples", "10000"), 10_000 * 4 * 1000)

TABLES = (
    resnets("table1", CIFAR100, "ResNet-like networks on CIFAR-100, accuracy in %"),
    Exhibit("table3", "Vision Transformers on CIFAR, accuracy in %", both(VITS, False)),
    masked("table5", "Sparse perturbations, WRN-28-10 on CIFAR-100, accuracy in %", _TABLE_5),
    measured("table6", "Sharpness and feature rank, WRN-28-10 on CIFAR-100", {"WRN-28": _WORST["WRN-28"] + _STEP},
             {"WRN-28": _TABLE_6}, tuple(
                 Entry(("feature rank", variant, selection), config("wrn28_10", CIFAR100, variant, selection), _RANK,
                       ("", "rank_released layer2 0.99")) for variant, selection in FIVE),
             ("of which layer and how many images the paper's rank is: here the second of three stages, 10,240 images "
              "and the centring of the published code",
              "by which search the paper has the rows of one step: here it is of length rho, in the published code of "
              "0.75 rho (analyze sharpness --protocol released)")),
    resnets("table10", CIFAR10, "ResNet-like networks on CIFAR-10, accuracy in %"),
    Exhibit("table11", "VGG and DenseNet on CIFAR, accuracy in %", both(OTHERS, True)),
    masked("table12", "Sparse perturbations with SSAM-D, WRN-28-10 on CIFAR-100, accuracy in %", _TABLE_12),
    Exhibit("table14", "Adversarial robustness, WRN-28-10 on CIFAR-100, accuracy in %", tuple(
        Entry((measure, variant, selection), config("wrn28_10", CIFAR100, variant, selection), _ATTACK, ("", measure))
        for measure in (*_RADII_14, "clean") for variant, selection in FIVE)),
    Exhibit("table17", "Training only BatchNorm, CIFAR-10, accuracy in %", tuple(
        Entry((model, rho), Config(f"cifar/{network}/cifar10_only_norm/{f'sam_{rho}' if rho else 'sgd'}", CIFAR10,
                                   "sam" if rho else PLAIN))
        for model, network in (("ResNet-101", "resnet101"), ("WRN-28", "wrn28_10")) for rho in ("", "0.01", "0.05"))),
    measured("table18", "Sharpness of two networks on CIFAR-100", _WORST, _TABLE_18),
    measured("table19", "Further measures of sharpness, logits as they are, WRN-28-10 on CIFAR-100",
             {"WRN-28": [text.replace("=", " ").replace("1e-5", "1e-05") for text in _MEASURES_19]},
             {"WRN-28": _TABLE_19},
             missing=("by which search the paper has the rows of worst-l2: here by APGD, and the published code has "
                      "another direction and projection (analyze sharpness --protocol released)",)),
)
