"""Figures 1 to 11: what is drawn of which runs. The paper prints no numbers with them."""
from .cifar import FIVE, RESNETS, SELECTIONS, config
from .exhibits import CIFAR10, CIFAR100, NORMS, PLAIN, REPORT, Config, Data, Entry, Evaluation, Exhibit
from .numbers import radii

MAIN = ("sam", "elementwise_l2", "elementwise_linf", "layerwise_l2")  # of Figures 1 and 2; 6 and 7 have all
ALL = ("sam", "elementwise_l2", "elementwise_l2_orig", "elementwise_linf", "layerwise_l2", "fisher")
_NORMS = Evaluation("norms", "analyze", ("norms",))


def _radii(name: str, title: str, network: str, setting: str, variants: tuple[str, ...]) -> Exhibit:
    """Accuracy over radius, by variant: the grids of Table 7, ``nonorm`` on that of ``all`` and two steps beyond."""
    runs: list[Config] = [config(network, CIFAR100, PLAIN)]
    for variant in variants:
        for selection in (*SELECTIONS, "nonorm"):
            grid = radii(variant, "onlynorm" if selection == "onlynorm" else "all", setting)
            if selection == "nonorm":
                grid = [*grid, *(f"{float(grid[-1]) * factor:g}" for factor in (2, 5))]
            base = config(network, CIFAR100, variant, "onlynorm" if selection == "onlynorm" else "all")
            for rho in grid:
                more = ("--sam-params", selection) if selection == "nonorm" else ()
                runs.append(Config(base.recipe, CIFAR100, variant, (*more, "--sam-rho", rho)))
    return Exhibit(name, title, tuple(Entry((run.name,), run) for run in runs), kind=REPORT,
                   missing=("which radii nonorm was tried with, and which variants are shown, is only drawn",))


def _late(name: str, title: str) -> Exhibit:
    entries = []
    for network in ("wrn28_10", "resnext29_32x4d"):
        runs = [config(network, CIFAR100, "sam", selection) for selection in SELECTIONS]
        runs += [Config(f"cifar/{network}/cifar100_late_blocks/{name}", CIFAR100, "sam")
                 for name in ("block_3", "blocks_2_and_3")]
        entries += [Entry((run.name,), run) for run in [config(network, CIFAR100, PLAIN), *runs]]
    return Exhibit(name, title, tuple(entries), kind=REPORT)


def _listed(name: str, title: str, header: tuple[str, ...], rows: dict[tuple[str, ...], Config],
            *missing: str) -> Exhibit:
    return Exhibit(name, title, tuple(Entry(labels, run) for labels, run in rows.items()), header, missing=missing)


def _masks(dynamic: bool) -> dict[tuple[str, ...], Config]:
    found: dict[tuple[str, ...], Config] = {
        (PLAIN, ""): config("resnet18", CIFAR10, PLAIN), ("sam", "0"): config("resnet18", CIFAR10, "sam", "all"),
        ("sam_on", "99.93"): config("resnet18", CIFAR10, "sam", "onlynorm"),
        ("random", "99.93"): Config("cifar/resnet18/cifar10_masks/random_99.93", CIFAR10, "random")}
    for method in ("ssam_fisher", *(("ssam_dynamic",) if dynamic else ())):
        for sparsity in ("50", "90", "99", "99.93"):
            flags = () if sparsity == "50" else (
                f"--sam-{method.replace('_', '-')}-sparsity", f"{float(sparsity) / 100:g}")
            found[method, sparsity] = Config(f"cifar/resnet18/cifar10_masks/{method}_50", CIFAR10, method, flags)
    return found


def _norms(name: str, title: str, runs: tuple[tuple[str, str], ...], data: Data = CIFAR100) -> Exhibit:
    return Exhibit(name, title, tuple(
        Entry((variant, selection), config(RESNETS["WRN-28"], data, variant, selection), _NORMS)
        for variant, selection in runs), kind=NORMS)


def _ablated(name: str, recipe: str, variant: str) -> Config:
    return Config(f"cifar/wrn28_10/cifar100_{name}/{recipe}", CIFAR100, variant)


_THREE = dict(zip(FIVE[:3], ("sgd", "sam_all", "sam_onlynorm")))
_SPARSITIES = "the sparsities between 50 % and that of SAM-ON are only drawn: 90 and 99 % are a choice"

FIGURES = (
    _radii("figure1", "Accuracy over radius, WRN-28-10 on CIFAR-100", "wrn28_10", "CIFAR-100 RN", MAIN),
    _radii("figure2", "Accuracy over radius, ViT-S on CIFAR-100", "vit_small", "CIFAR ViT", MAIN),
    _late("figure3", "Accuracy over training time: SAM-ON in late blocks, WRN-28-10 and ResNeXt on CIFAR-100"),
    _listed("figure4", "Left: sparse perturbations, ResNet-18 on CIFAR-10", ("method", "sparsity"), _masks(False),
            _SPARSITIES, "right: which batch sizes and m are only drawn; train.py has --batch-size and --sam-m"),
    _norms("figure5", "Parameters of normalization layers, WRN-28-10 on CIFAR-100", FIVE[:3]),
    _radii("figure6", "Accuracy over radius, all variants, WRN-28-10 on CIFAR-100", "wrn28_10", "CIFAR-100 RN", ALL),
    _radii("figure7", "Accuracy over radius, all variants, ViT-S on CIFAR-100", "vit_small", "CIFAR ViT", ALL),
    _listed("figure8", "Sparse perturbations with SSAM-D, ResNet-18 on CIFAR-10", ("method", "sparsity"),
            _masks(True), _SPARSITIES),
    _norms("figure9", "Parameters of all layers by kind, WRN-28-10 on CIFAR-100",
           ((PLAIN, ""), *((variant, selection) for variant in MAIN for selection in SELECTIONS))),
    _listed("figure10", "Normalization fixed at 1 and 0, WRN-28-10 on CIFAR-100", ("normalization", "variant",
                                                                               "selection"), {
        ("trained", "sam", "all"): config("wrn28_10", CIFAR100, "sam", "all"),
        ("fixed", "sam", "all"): _ablated("fixed_norm", "sam_all", "sam")},
        "other radii than that of Table 7 are only drawn"),
    _listed("figure11", "Dropout on normalization layers (left), weight decay (right), WRN-28-10 on CIFAR-100",
            ("setting", "variant", "selection"), {
                **{("as Table 1", *run): config("wrn28_10", CIFAR100, *run) for run in _THREE},
                **{("dropout", *run): _ablated("norm_drop", recipe, run[0])
                   for run, recipe in list(_THREE.items())[:2]},
                **{(f"{decayed} decayed", *run): _ablated("weight_decay", f"{decayed}_{recipe}", run[0])
                   for decayed in ("nonorm", "none") for run, recipe in _THREE.items()}},
            "with which probability is only drawn: here 0.1"),
)
