"""The flags of validate.py: timm's with timm's defaults, and those of suites and attacks, group by group."""
import argparse
import math

from ..cli import tasks
from ..cli.parser import ParseKwargs
from .attack.attack import STEPS, TARGETS
from .attack.ball import NORMS, Radius
from .attack.robustness import APGD, MOST, VERSIONS
from .outputs import KINDS
from .sets.folders import PUBLISHED
from .tables import FORMATS


def add_dataset(parser: argparse.ArgumentParser) -> None:
    """Which images and labels: timm's group, and the positional folder."""
    parser.add_argument("data", nargs="?", metavar="DIR",
                        help="root folder of the data set, used when --data-dir is not given (deprecated)")
    add = parser.add_argument_group("Dataset").add_argument
    tasks.add_task(add)
    tasks.add_threshold(add)
    add("--data-dir", metavar="DIR", help="root folder of the data set, above the split's folder or the classes")
    add("--dataset", metavar="TYPE/NAME", default="",
        help="source of the data: torch/NAME, hfds/NAME, hfids/NAME, tfds/NAME or wds/NAME; empty for folder or tar")
    add("--split", metavar="NAME", default="validation",
        help="split to evaluate; val, valid, eval and the like match too")
    add("--num-samples", type=int, metavar="N", help="size of the split in samples, for streamed data sets")
    add("--dataset-download", action="store_true", help="let torch/ and tfds/ data sets download what is missing")
    add("--class-map", type=str, metavar="FILE", default="",
        help="class names to indices: a text file with one name per line; for folders whose rank is not their label")
    add("--input-key", type=str, metavar="KEY",
        help="field that holds the image, or file extensions joined by semicolons")
    add("--input-img-mode", type=str, metavar="MODE",
        help="PIL mode of the images; none: RGB for three channels, else L")
    add("--target-key", type=str, metavar="KEY",
        help="field that holds the label, a/b for b inside of a; with --task multilabel also a,b,c: one per class")
    tasks.add_target_format(add)
    add("--dataset-trust-remote-code", action="store_true",
        help="allow a Hugging Face data set to run its repository's code on this machine")
    add("--real-labels", type=str, metavar="FILE", default="",
        help="JSON list of the reassessed labels of ImageNet's validation images: accuracy by those; in suites for "
             "--eval imagenet-real=DIR")
    add("--valid-labels", type=str, metavar="FILE", default="",
        help="text file with the indices of the outputs that count, one per line, in the order of the labels")


def add_model(parser: argparse.ArgumentParser) -> None:
    """Which model, and with which weights."""
    add = parser.add_argument_group("Model").add_argument
    add("--model", "-m", metavar="NAME", default="dpn92",
        help="model, or without a checkpoint: all, a wildcard, or a file with one name per line")
    add("--pretrained", action="store_true", help="load timm's weights")
    add("--num-classes", type=int, metavar="N", help="number of outputs; none: the model's own")
    add("--gp", type=str, metavar="POOL",
        help="global pooling: fast, avg, max, avgmax or avgmaxc; none: the model's own")
    add("--checkpoint", nargs="+", type=str, metavar="PATH", default="",
        help="weights: a file, several (evaluated one by one, with mean and standard deviation), or a folder of them; "
             "in suites those of a folder count as one checkpoint each, copies once")
    add("--use-ema", action="store_true",
        help="take the averaged weights of a checkpoint; without any: an error in suites, else the plain ones")
    add("--reparam", action="store_true", help="merge the model's branches, where it can be done")
    add("--model-kwargs", nargs="*", default={}, action=ParseKwargs, metavar="KEY=VALUE",
        help="further arguments of the model's constructor")


def add_input(parser: argparse.ArgumentParser) -> None:
    """How images are preprocessed, where it is not the model's own way."""
    add = parser.add_argument_group("Input").add_argument
    add("--img-size", type=int, metavar="N", help="height and width of the images; none: the model's own")
    add("--in-chans", type=int, metavar="N", help="channels of the images; none: 3")
    add("--input-size", nargs=3, type=int, metavar="N", help="channels, height and width of the images")
    add("--use-train-size", action="store_true", help="take the size of training where the model has another for tests")
    add("--crop-pct", type=float, metavar="SHARE", help="share of the image that the centre crop keeps")
    add("--crop-mode", type=str, metavar="MODE", help="squash, border or center; none: the model's own")
    add("--crop-border-pixels", type=int, metavar="N", help="pixels to cut from each side before resizing")
    add("--mean", type=float, nargs="+", metavar="MEAN", help="mean that is subtracted, per channel or for all")
    add("--std", type=float, nargs="+", metavar="STD", help="standard deviation to divide by, per channel or for all")
    add("--interpolation", type=str, metavar="NAME", default="", help="of resizing; empty: the model's own")
    add("--tf-preprocessing", action="store_true", help="TensorFlow's preprocessing (needs tensorflow)")
    add("--test-pool", action="store_true", help="pool over larger images than those of training, where it can be done")
    add("--naflex-loader", action="store_true", help="keep the aspect ratio (needs a NaFlex model)")
    add("--naflex-max-seq-len", type=int, default=576, metavar="N",
        help="patches per image at most, for --naflex-loader")


def add_execution(parser: argparse.ArgumentParser) -> None:
    """Device, batches, precision, seed, compilation."""
    group = parser.add_argument_group("Execution")
    add = group.add_argument
    add("-j", "--workers", type=int, default=4, metavar="N", help="processes that load images")
    add("-b", "--batch-size", type=int, default=256, metavar="N", help="images per batch and process")
    add("--log-freq", type=int, default=10, metavar="N", help="batches between two log lines")
    add("--num-gpu", type=int, default=1, metavar="N", help="devices that share each batch (DataParallel)")
    add("--no-prefetcher", action="store_true", help="normalize on the CPU")
    add("--pin-mem", action="store_true", help="pin the memory of the batches")
    add("--channels-last", action="store_true", help="channels-last memory layout")
    add("--device", type=str, default="cuda", help="device: cuda, cuda:1, cpu, mps, ...")
    add("--amp", action="store_true", help="mixed precision")
    add("--amp-dtype", type=str, default="float16", metavar="TYPE",
        help="lower precision of --amp: float16 or bfloat16")
    add("--model-dtype", type=str, metavar="TYPE", help="type of the weights, without --amp; none: float32")
    add("--fuser", type=str, default="", metavar="NAME", help="fuser of torchscript: te, old or nvfuser")
    add("--fast-norm", action="store_true", help="normalization layers in low precision under --amp")
    add("--retry", action="store_true", help="with too large a batch try smaller ones")
    add("--seed", type=int, default=42, metavar="S", help="of all random choices: subsets and the starts of attacks")
    add("--torchcompile-mode", type=str, metavar="MODE", help="mode of torch.compile")
    one_of = parser.add_mutually_exclusive_group()
    one_of.add_argument("--torchscript", action="store_true", help="script the model")
    one_of.add_argument("--torchcompile", nargs="?", type=str, const="inductor", metavar="BACKEND",
                        help="compile the model, with inductor unless another backend is named")
    one_of.add_argument("--aot-autograd", action="store_true", help="fuse the model by AOT autograd")


def add_results(parser: argparse.ArgumentParser) -> None:
    """Where results go."""
    add = parser.add_argument_group("Results").add_argument
    add("--results-file", type=str, metavar="FILE", default="",
        help="file for the results; of suites by its extension: .json, .csv, .md, or all three without one")
    add("--results-format", type=str, default="csv", metavar="FORMAT",
        help=f"what is written to --results-file: {', '.join(FORMATS)} (md for suites only)")
    add("--metrics-avg", choices=("micro", "macro", "weighted"), type=str,
        help="also precision, recall and F1 score, averaged over classes in this way (needs scikit-learn)")
    add("--overwrite", action="store_true", help="replace the results of an earlier evaluation")
    add("--allow-nonfinite", action="store_true",
        help="exit code 0 although outputs were NaN or infinite; their accuracy is marked and left out of means anyway")


def add_suites(parser: argparse.ArgumentParser) -> None:
    """Several data sets at once."""
    add = parser.add_argument_group("Suites").add_argument
    add("--eval", nargs="+", default=[], metavar="NAME=DIR",
        help=f"data sets: {', '.join(PUBLISHED)} in their label spaces; any other name: class folders of training")
    add("--eval-root", metavar="DIR",
        help="folder with published data sets under their own names: all that are found")
    add("--calibration", action="store_true",
        help="also calibration errors (15 bins of equal width, and of equal mass), negative log likelihood and Brier "
             "score of each data set")
    add("--quantize-weights", nargs="+", type=int, metavar="BITS",
        help="also accuracy with weights rounded to so many bits, such as 8 4, symmetric and per output channel, and "
             "the drop")
    add("--save-outputs", choices=KINDS,
        help="keep what is said of each image, with its name, in a folder beside --results-file: the predicted class, "
             "or also all logits as float16; the report compares by them")
    add("--allow-partial", action="store_true",
        help="evaluate sets that lack classes, and mark them, instead of failing")
    add("--skip-existing", action="store_true",
        help="go on with what --results-file has of an evaluation that was interrupted, or had fewer sets")


def add_attack(parser: argparse.ArgumentParser) -> None:
    """Robust accuracy."""
    add = parser.add_argument_group("Attack").add_argument
    add("--attack", nargs="+", default=[], metavar="NORM=RADIUS,...", type=_radii,
        help="robust accuracy under APGD-CE and APGD-T: l2=0.25,0.5 linf=0.25/255,0.5/255 (images in [0, 1])")
    add("--attack-version", choices=VERSIONS, default=APGD,
        help="apgd: our own APGD-CE and APGD-T; standard: all four attacks of AutoAttack, by the package pyautoattack")
    add("--attack-set", metavar="NAME", help="data set that is attacked; none: the first in-distribution set")
    add("--attack-num-samples", type=int, metavar="N",
        help=f"images that are attacked, class-balanced; none: all, at most {MOST}")
    add("--attack-steps", type=int, default=STEPS, metavar="N", help="iterations of each attack")
    add("--attack-targets", type=int, default=TARGETS, metavar="N", help="target classes of APGD-T")


def _radii(text: str) -> list[Radius]:
    norm, _, values = text.partition("=")
    if norm not in NORMS or not values:
        raise argparse.ArgumentTypeError(f"must be l2=RADIUS,... or linf=RADIUS,..., got {text!r}")
    radii = []
    for value in values.split(","):
        try:
            numbers = [float(part) for part in value.split("/")]
            radius = numbers[0] / numbers[1] if len(numbers) == 2 else numbers[0]
        except (ValueError, ZeroDivisionError):
            numbers, radius = [], math.nan
        if len(numbers) > 2 or not (math.isfinite(radius) and radius > 0):
            raise argparse.ArgumentTypeError(f"radius {value!r} of {text!r} is not a number > 0 such as 0.5 or 0.5/255")
        if norm == "linf" and radius > 1:
            raise argparse.ArgumentTypeError(f"radius {value!r} of {text!r} reaches all images: they are in [0, 1]; "
                                             f"write 8/255 for 8 of 255 steps")
        radii.append(Radius(norm, radius, value))
    return radii
