"""Tables 2, 4, 13 and 15: ImageNet. And what nothing is run for."""
from .exhibits import IMAGENET, PLAIN, TEXT, Config, Entry, Evaluation, Exhibit

SELECTIONS = ("all", "onlynorm")
_RESNET50 = [(PLAIN, ""), ("sam", "all"), *((variant, selection) for variant in (
    "elementwise_l2", "elementwise_linf", "layerwise_l2") for selection in SELECTIONS)]
_FINE_TUNED = [(PLAIN, ""), *((variant, selection) for variant in (
    "sam", "elementwise_l2", "layerwise_l2", "elementwise_linf") for selection in SELECTIONS)]
_VIT = [(optimizer, selection) for optimizer in ("AdamW", "Lion") for selection in ("", *SELECTIONS)]
_SETS = ("imagenet", "imagenetv2", "imagenet-r", "imagenet-a", "imagenet-sketch", "objectnet")
# one evaluation for both tables: images are attacked once
_ROBUST = Evaluation("evaluation", "validate", (), (
    "--attack", "l2=0.25,0.5,1", "linf=0.25/255,0.5/255,1/255"), 5000 * 6 * 1000, _SETS)
_RADII = {name: [f"{name} {radius}" for radius in radii] for name, radii in (
    ("l2", ("0.25", "0.5", "1")), ("linf", ("0.25/255", "0.5/255", "1/255")))}


def _several(folder: str, variant: str, selection: str, m: int, devices: int) -> Config:
    """A run that the paper did on several devices with m images each, on one."""
    if variant == PLAIN:
        device = ("--batch-size", str(m), "--grad-accum-steps", str(devices))
    else:
        device = ("--batch-size", str(m * devices), "--sam-m", str(m))
    recipe = "sgd" if variant == PLAIN else f"{variant}_{selection}"
    lost = folder == "vit_small_ft" and (variant, selection) == ("layerwise_l2", "onlynorm")
    return Config(f"imagenet/{folder}/{recipe}", IMAGENET, variant, (), device,
                  "its rho is not legible in Table 8: give --sam-rho RHO with --only layerwise_l2" if lost else "")


def _vit(optimizer: str, selection: str) -> Config:
    name = optimizer.lower() + (f"_sam_{selection}" if selection else "")
    return Config(f"imagenet/vit_small_patch32_224/{name}", IMAGENET, f"{optimizer.lower()}{'_sam' * bool(selection)}")


def _robust(rows: tuple[tuple[str, tuple[str, str]], ...]) -> tuple[Entry, ...]:
    return tuple(Entry((label, optimizer, selection), _vit(optimizer, selection), _ROBUST, measure)
                 for label, measure in rows for optimizer, selection in _VIT)


TABLES = (
    Exhibit("table2", "ResNet-50 on ImageNet, top-1 in %", (
        *(Entry((variant, selection), _several("resnet50", variant, selection, 64, 8))
          for variant, selection in _RESNET50[:2]),
        Entry(("esam", "all"), None), Entry(("gsam", "all"), None),
        *(Entry((variant, selection), _several("resnet50", variant, selection, 64, 8))
          for variant, selection in _RESNET50[2:])),
        missing=("ESAM and GSAM: the paper quotes their own papers",)),
    Exhibit("table4", "ViT-S/32 on ImageNet and beyond, top-1 in %", _robust((
        *((name, (name, "top1")) for name in _SETS),
        *((radius, ("", radius)) for radius in (*_RADII["l2"][:2], *_RADII["linf"][:2]))))),
    Exhibit("table13", "ViT-S fine-tuned on ImageNet, top-1 in %", tuple(
        Entry((variant, selection), _several("vit_small_ft", variant, selection, 128, 7))
        for variant, selection in _FINE_TUNED)),
    Exhibit("table15", "Adversarial robustness, ViT-S/32 on ImageNet, top-1 in %", _robust((
        *((radius, ("", radius)) for radius in (*_RADII["l2"], *_RADII["linf"])), ("clean", ("imagenet", "top1"))))),
)
TEXTS = (
    Exhibit("table7", "Radii on CIFAR: settings, which the recipes have", kind=TEXT),
    Exhibit("table8", "Radii on ImageNet: settings, which the recipes have", kind=TEXT),
    Exhibit("table9", "The variants: definitions, see docs/methods.md", kind=TEXT,
            missing=("formulas, which are no numbers",)),
    Exhibit("table16", "Machine translation, BLEU", tuple(
        Entry((selection,), None) for selection in ("", *SELECTIONS)),
        missing=("translation, no images: examples/translation has it in small, `make translation-table`",)),
)
