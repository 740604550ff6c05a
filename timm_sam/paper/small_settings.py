"""Small networks, sets and radii, for machines without a GPU."""

# Training images, and the share of them that is filed under a wrong digit: such that plain training is far from what
# the model can reach. Names of folders, so that the report's titles say it.
DATA = {"resnet10t": (300, 0.4), "vit_tiny": (400, 0.2)}

# Radii by model, variant and selection, sought with single runs on a split of the training images (`python -m
# timm_sam.digits DIR --tune`): a factor of 2 to 4 apart, below where training collapses (resnet10t does with sam on
# normalization layers at 2, elementwise_l2 at 3 and 4). Not every cell was tried: the others follow by the ratios in
# the paper's Table 7. One bound is not free of the validation images: that sam on all parameters collapses at 0.5 was
# seen there.
RADII: dict[str, dict[tuple[str, str], tuple[float, float, float]]] = {
    "resnet10t": {
        ("sam", "all"): (0.03, 0.1, 0.3),
        ("sam", "onlynorm"): (0.25, 0.5, 1),
        ("sam", "nonorm"): (0.03, 0.1, 0.3),
        ("elementwise_l2", "all"): (0.1, 0.3, 1),
        ("elementwise_l2", "onlynorm"): (0.2, 0.6, 2),
        ("elementwise_l2", "nonorm"): (0.1, 0.3, 1),
        ("elementwise_l2_orig", "all"): (0.1, 0.3, 1),
        ("elementwise_l2_orig", "onlynorm"): (0.2, 0.6, 2),
        ("elementwise_linf", "all"): (0.0003, 0.001, 0.003),
        ("elementwise_linf", "onlynorm"): (0.003, 0.01, 0.03),
        ("layerwise_l2", "all"): (0.002, 0.006, 0.02),
        ("layerwise_l2", "onlynorm"): (0.02, 0.06, 0.2),
        ("fisher", "all"): (0.03, 0.1, 0.3),
        ("fisher", "onlynorm"): (0.25, 0.5, 1),
    },
    "vit_tiny": {
        ("sam", "all"): (0.003, 0.01, 0.03),
        ("sam", "onlynorm"): (0.03, 0.1, 0.3),
        ("sam", "nonorm"): (0.003, 0.01, 0.03),
        ("elementwise_l2", "all"): (0.05, 0.2, 0.6),
        ("elementwise_l2", "onlynorm"): (0.1, 0.3, 1),
        ("elementwise_l2", "nonorm"): (0.05, 0.2, 0.6),
        ("elementwise_l2_orig", "all"): (0.05, 0.2, 0.6),
        ("elementwise_l2_orig", "onlynorm"): (0.1, 0.3, 1),
        ("elementwise_linf", "all"): (0.0001, 0.0003, 0.001),
        ("elementwise_linf", "onlynorm"): (0.002, 0.006, 0.02),
        ("layerwise_l2", "all"): (0.0003, 0.001, 0.003),
        ("layerwise_l2", "onlynorm"): (0.01, 0.03, 0.1),
        ("fisher", "all"): (0.003, 0.01, 0.03),
        ("fisher", "onlynorm"): (0.03, 0.1, 0.3),
    },
}
