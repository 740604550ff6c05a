"""The part of train.py's command line that says what a batch of images is: data set, size, augmentation."""
import argparse

from ..cli.tasks import add_target_format, add_task


def add_dataset(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", nargs="?", metavar="DIR",
                        help="root folder of the dataset, used when --data-dir is not given (deprecated)")
    add = parser.add_argument_group("Dataset").add_argument
    add_task(add)
    add("--data-dir", metavar="DIR",
        help="root folder of the dataset; image folders hold one sub-folder per split, then one per class")
    add("--dataset", metavar="TYPE/NAME", default="",
        help="dataset source: torch/NAME, hfds/NAME, hfids/NAME, tfds/NAME or wds/NAME; empty for image folder or tar")
    add("--train-split", metavar="NAME", default="train",
        help="split to train on; for image folders a sub-folder, train and training stand for each other")
    add("--val-split", metavar="NAME", default="validation",
        help="split to validate on; val, valid, eval and the like match too, an empty string turns validation off")
    add("--holdout", type=float, metavar="SHARE",
        help="validate on this share of the training images, of each class alike, instead of --val-split: to choose "
             "hyperparameters on; None holds nothing out")
    add("--holdout-seed", type=int, metavar="N", default=0,
        help="which images --holdout takes: the same ones for each --seed")
    add("--train-num-samples", type=int, metavar="N",
        help="size of the training split in samples, for streamed datasets (hfids/, tfds/, wds/)")
    add("--val-num-samples", type=int, metavar="N",
        help="size of the validation split in samples, for streamed datasets (hfids/, tfds/, wds/)")
    add("--dataset-download", action="store_true",
        help="let torch/, tfds/ and hfids/ datasets download what is missing")
    add("--class-map", type=str, metavar="FILE", default="",
        help="class to index map: a .txt file with one class name per line, or a .pkl file with a dict")
    add("--input-img-mode", type=str, metavar="MODE",
        help="PIL mode images are converted to; None means RGB for three input channels, L for any other number")
    add("--input-key", type=str, metavar="KEY",
        help="field that holds the image; for wds/ and image folders, file extensions separated by semicolons")
    add("--target-key", type=str, metavar="KEY",
        help="field that holds the label, in datasets with named fields; a/b is field b inside of a; with --task "
             "multilabel also a,b,c: one field per class, positive above 0")
    add_target_format(add)
    add("--dataset-trust-remote-code", action="store_true",
        help="allow Hugging Face datasets to run the loading code of their own repository on this machine")


def add_input(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("Input size, normalization and batch size").add_argument
    add("--img-size", type=int, metavar="PIXELS",
        help="side of the square input; models of a fixed size, such as ViTs, are built for it")
    add("--input-size", type=int, nargs=3, metavar=("C", "H", "W"),
        help="channels, height and width of the input, e.g. 3 224 224")
    add("--crop-pct", type=float, metavar="FRACTION",
        help="validation only: share of the resized image's side that the center crop keeps; None takes the model's")
    add("--mean", type=float, nargs="+", metavar="X",
        help="normalization mean on a 0 to 1 scale, one value per channel or one for all; None takes the model's")
    add("--std", type=float, nargs="+", metavar="X",
        help="normalization standard deviation, one value per channel or one for all; None takes the model's")
    add("--interpolation", type=str, metavar="NAME", default="",
        help="validation resize: nearest, bilinear, bicubic, box, hamming or lanczos; empty takes the model's")
    add("-b", "--batch-size", type=int, metavar="N", default=128,
        help="training images per process and per step, before gradient accumulation")
    add("-vb", "--validation-batch-size", type=int, metavar="N",
        help="validation images per process and per step; None uses --batch-size")


def add_augmentation(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("Augmentation").add_argument
    add("--no-aug", action="store_true",
        help="train on plain resized center crops; of all augmentation only Mixup and CutMix still apply")
    add("--train-crop-mode", type=str, metavar="MODE",
        help="rrc: random resized crop; rkrc, rkrr: ratio-keeping resize, then center or random crop; None means rrc")
    add("--scale", type=float, nargs="+", metavar=("MIN", "MAX"), default=[0.08, 1.0],
        help="range of the random crop's area, as fractions of the image's area")
    add("--ratio", type=float, nargs="+", metavar=("MIN", "MAX"), default=[3 / 4, 4 / 3],
        help="range of the random crop's aspect ratio")
    add("--hflip", type=float, metavar="P", default=0.5,
        help="probability of a horizontal flip")
    add("--vflip", type=float, metavar="P", default=0.0,
        help="probability of a vertical flip")
    add("--color-jitter", type=float, metavar="X", default=0.4,
        help="strength of random brightness, contrast and saturation; off under --aa, except for its 3a variants")
    add("--color-jitter-prob", type=float, metavar="P",
        help="probability of the color jitter; None applies it to every image")
    add("--grayscale-prob", type=float, metavar="P",
        help="probability of turning the image gray; None for never")
    add("--gaussian-blur-prob", type=float, metavar="P",
        help="probability of a Gaussian blur (kernel of 23 pixels); None for never")
    add("--aa", type=str, metavar="POLICY",
        help="AutoAugment v0, v0r, original, originalr or 3a (ImageNet) or cifar10 (CIFAR); RandAugment, as "
             "rand-m9-mstd0.5; AugMix, as augmix-m5-w4")
    add("--aug-repeats", type=float, metavar="N", default=0,
        help="differently augmented copies of each image across processes, distributed runs only; 0 for none")
    add("--aug-splits", type=int, metavar="N", default=0,
        help="views of each image in a batch, the first without --aa and color changes: 0 for off, else at least 2")
    add("--reprob", type=float, metavar="P", default=0.0,
        help="probability of random erasing")
    add("--remode", type=str, metavar="MODE", default="pixel",
        help="what erased areas are filled with: const (zero), rand (one random color) or pixel (noise)")
    add("--recount", type=int, metavar="N", default=1,
        help="largest number of areas erased in one image")
    add("--resplit", action="store_true",
        help="no random erasing in the first augmentation split, or in the first half batch without --aug-splits")
    add("--train-interpolation", type=str, metavar="NAME", default="random",
        help="training resize: random (bilinear or bicubic) or a name as for --interpolation; empty: as validation")


def add_mixing(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("Mixup and CutMix").add_argument
    add("--mixup", type=float, metavar="ALPHA", default=0.0,
        help="alpha of Mixup's Beta distribution; 0 turns Mixup off")
    add("--cutmix", type=float, metavar="ALPHA", default=0.0,
        help="alpha of CutMix's Beta distribution; 0 turns CutMix off")
    add("--cutmix-minmax", type=float, nargs="+", metavar=("MIN", "MAX"),
        help="turn CutMix on and draw the box's sides from this range, as fractions of the image's, not from --cutmix")
    add("--mixup-prob", type=float, metavar="P", default=1.0,
        help="share of batches (or pairs, or images: --mixup-mode) that get mixed at all")
    add("--mixup-switch-prob", type=float, metavar="P", default=0.5,
        help="probability of CutMix rather than Mixup, when both are on")
    add("--mixup-mode", type=str, metavar="MODE", default="batch",
        help="draw the mixing per batch, per pair or per elem (image); with the prefetcher also half")
    add("--mixup-off-epoch", type=int, metavar="N", default=0,
        help="stop Mixup and CutMix from this epoch on; 0 keeps them to the end")


def add_scheduled_sizes(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("Training at several image sizes").add_argument
    add("--train-img-sizes", type=int, nargs="+", metavar="PIXELS",
        help="square image sizes, one of which is picked for each batch; None trains at one size")
    add("--train-batch-sizes", type=int, nargs="+", metavar="N",
        help="one batch size per entry of --train-img-sizes, in the same order; None uses --batch-size throughout")
    add("--train-size-probs", type=float, nargs="+", metavar="WEIGHT",
        help="how often each of --train-img-sizes is picked, as weights that need not sum to 1; None: all alike")
    add("--train-size-schedule", type=str, choices=("constant", "progressive"), default="constant",
        help="constant: same odds in every epoch; progressive: from the first size to the last over --epochs")
    add("--train-size-schedule-spread", type=float, metavar="X", default=0.65,
        help="progressive: standard deviation, in positions of the size list, around the current one; 0: nearest only")
    add("--train-size-random-mix", type=float, metavar="FRACTION", default=0.1,
        help="progressive: fraction of batches, 0 to 1, whose size is picked evenly from all sizes")
    add("--train-batches-per-epoch", "--train-steps-per-epoch", type=int, metavar="N",
        help="with --train-img-sizes: batches per epoch, before gradient accumulation; None follows the dataset's size")
    add("--variable-batch-loss-scale", type=str, choices=("none", "sqrt", "linear"), default="none",
        help="with --train-img-sizes: weigh the loss by batch size over average batch size, or by the root of that")


def add_naflex(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("NaFlex: native aspect ratio and variable sequence length").add_argument
    add("--naflex-loader", action="store_true",
        help="feed patch sequences of varying length; needs a NaFlex model")
    add("--naflex-train-seq-lens", type=int, nargs="+", metavar="N", default=[128, 256, 576, 784, 1024],
        help="training sequence lengths in patches; a batch holds up to --batch-size times the longest in tokens")
    add("--naflex-max-seq-len", type=int, metavar="N", default=576,
        help="sequence length in patches for validation")
    add("--naflex-patch-sizes", type=int, nargs="+", metavar="PIXELS",
        help="patch sizes to pick from in training, e.g. 8 12 16 24 32; None uses the model's own")
    add("--naflex-patch-size-probs", type=float, nargs="+", metavar="P",
        help="probability of each of --naflex-patch-sizes; None: all alike")
    add("--naflex-loss-scale", type=str, choices=("none", "sqrt", "linear"), default="linear",
        help="with --naflex-loader: weigh the loss by batch size over --batch-size, or by the root of that")
    add("--naflex-patchify-channels-first", action="store_true",
        help="flatten patches as channel, row, column rather than row, column, channel")
