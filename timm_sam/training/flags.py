"""The command line of ``train.py``: every flag of timm's own training script, with the same names and defaults.

One function per group adds its flags to the parser. Help texts leave out the defaults, which ``OptionParser`` prints.
Flags stand on their own here: what they do together (for example that ``--naflex-loader`` excludes
``--train-img-sizes``) is checked by the training script.
"""
import argparse

from ..cli.parser import ParseKwargs
from ..cli.tasks import add_threshold
from . import flags_data, flags_loss


def add_train_flags(parser: argparse.ArgumentParser) -> None:
    """Add all training flags and the positional ``data`` to ``parser``, one titled group after the other.

    Each call makes its own default lists and dicts, so that two parsers never share one.
    """
    flags_data.add_dataset(parser)
    _add_model(parser)
    flags_data.add_input(parser)
    _add_execution(parser)
    _add_device(parser)
    _add_optimizer(parser)
    _add_learning_rate(parser)
    _add_schedule(parser)
    flags_data.add_augmentation(parser)
    flags_data.add_mixing(parser)
    flags_loss.add_loss(parser)
    _add_dropout(parser)
    _add_batchnorm(parser)
    _add_ema(parser)
    _add_misc(parser)
    _add_output(parser)
    flags_data.add_scheduled_sizes(parser)
    flags_data.add_naflex(parser)
    _add_distillation(parser)


def _add_model(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("Model and checkpoints").add_argument
    add("--model", type=str, metavar="NAME", default="resnet50",
        help="timm architecture to train, with an optional .TAG that names its weights; see timm.list_models()")
    add("--pretrained", action="store_true",
        help="start from the published weights of the model, or from --pretrained-path")
    add("--pretrained-path", type=str, metavar="FILE",
        help="with --pretrained: load this file in place of the published weights, all but its classifier")
    add("--pretrained-cfg-overlay", nargs="*", action=ParseKwargs, metavar="KEY=VALUE", default={},
        help="entries of the model's pretrained configuration to replace, after --pretrained-path, e.g. "
             "custom_load=True for a file in the format of the model's authors")
    add("--initial-checkpoint", type=str, metavar="FILE", default="",
        help="load these weights once the model is built; they have to fit it, and training starts at epoch 0")
    add("--resume", type=str, metavar="FILE", default="",
        help="continue the run saved in this checkpoint: weights, optimizer, AMP loss scaler, EMA and epoch; auto: the "
             "newest checkpoint of --experiment, or a new run where there is none")
    add("--no-resume-opt", action="store_true",
        help="with --resume: start with a fresh optimizer and AMP loss scaler")
    add("--num-classes", type=int, metavar="N",
        help="number of classes the classifier predicts; None keeps the model's own")
    add("--gp", type=str, metavar="POOL",
        help="global pooling before the classifier: avg, max, avgmax, catavgmax, in ViTs token; None keeps the model's")
    add("--in-chans", type=int, metavar="N",
        help="number of image channels; None takes them from --input-size, else 3")
    add("--model-kwargs", nargs="*", action=ParseKwargs, metavar="KEY=VALUE", default={},
        help="further arguments for the model's constructor; values are read as Python literals, else as strings")
    add("--head-init-scale", type=float, metavar="X",
        help="multiply the classifier's initial weight and bias by this factor")
    add("--head-init-bias", type=float, metavar="X",
        help="set every bias of the classifier to this value at the start, e.g. a negative one for --loss bce")


def _add_execution(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("Memory, accumulation and compilation")
    add = group.add_argument
    add("--channels-last", action="store_true",
        help="keep model and images in NHWC memory layout, often faster for convolutions under AMP")
    add("--fuser", type=str, metavar="NAME", default="",
        help="TorchScript fuser: te, old (or legacy), nvfuser (or nvf); empty leaves torch's choice")
    add("--grad-accum-steps", type=int, metavar="N", default=1,
        help="batches whose gradients are averaged into one optimizer update")
    add("--grad-checkpointing", action="store_true",
        help="recompute activations in the backward pass: less memory, more time")
    add("--fast-norm", action="store_true",
        help="run LayerNorm and GroupNorm in the AMP dtype rather than in float32, and use APEX kernels if installed")
    add("--torchcompile-mode", type=str, metavar="MODE",
        help="mode for --torchcompile: default, reduce-overhead, max-autotune or max-autotune-no-cudagraphs")
    compiler = group.add_mutually_exclusive_group()
    compiler.add_argument("--torchscript", action="store_true",
                          help="compile the whole model with torch.jit.script")
    compiler.add_argument("--torchcompile", type=str, nargs="?", const="inductor", metavar="BACKEND",
                          help="compile with torch.compile; without a value the backend is inductor")


def _add_device(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("Device, precision and distributed training").add_argument
    add("--device", type=str, metavar="NAME", default="cuda",
        help="torch device, e.g. cuda, cuda:1 or cpu; distributed runs replace the index by the local rank")
    add("--amp", action="store_true",
        help="automatic mixed precision: float32 weights, forward pass in --amp-dtype")
    add("--amp-dtype", type=str, metavar="DTYPE", default="float16",
        help="dtype for --amp: float16 (with loss scaling on CUDA) or bfloat16")
    add("--model-dtype", type=str, metavar="DTYPE",
        help="dtype of weights and inputs: float32, bfloat16 or float16 (not advised); --amp needs float32 or None")
    add("--no-ddp-bb", action="store_true",
        help="do not let DistributedDataParallel broadcast buffers (such as BatchNorm statistics) at each forward pass")
    add("--synchronize-step", action="store_true",
        help="wait for the CUDA or NPU device after each optimizer update")
    add("--local_rank", type=int, metavar="N", default=0,
        help="accepted for old launchers and ignored: ranks are read from the environment that torchrun or SLURM sets")
    add("--device-modules", type=str, nargs="+", metavar="MODULE",
        help="Python modules to import before the device is set up, for out-of-tree backends")


def _add_optimizer(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("Optimizer").add_argument
    add("--opt", type=str, metavar="NAME", default="sgd",
        help="timm optimizer, e.g. sgd (Nesterov), momentum, adamw or lamb; lookahead_NAME wraps it in Lookahead")
    add("--opt-eps", type=float, metavar="EPS",
        help="epsilon of the optimizers that have one; None keeps the optimizer's own")
    add("--opt-betas", type=float, nargs="+", metavar="BETA",
        help="betas of Adam-like optimizers, mostly two values; None keeps the optimizer's own")
    add("--momentum", type=float, metavar="M", default=0.9,
        help="momentum of the optimizers that have one, such as sgd and rmsprop")
    add("--weight-decay", type=float, metavar="W", default=2e-5,
        help="weight decay; biases, norm scales and what the model exempts get none, unless --wd-params says otherwise")
    add("--clip-grad", type=float, metavar="X",
        help="clip gradients at this norm, value or factor, as --clip-mode says; None does not clip")
    add("--clip-mode", type=str, metavar="MODE", default="norm",
        help="norm: overall L2 norm; value: each element; agc: each unit's norm relative to its weights, head exempt")
    add("--layer-decay", type=float, metavar="X",
        help="learning-rate factor per layer from the head down to the stem, e.g. 0.75; None treats all layers alike")
    add("--layer-decay-min-scale", type=float, metavar="X", default=0,
        help="smallest factor --layer-decay may give to a layer")
    add("--layer-decay-no-opt-scale", type=float, metavar="X",
        help="freeze the layers whose --layer-decay factor falls below this; None freezes no layer")
    add("--opt-kwargs", nargs="*", action=ParseKwargs, metavar="KEY=VALUE", default={},
        help="further arguments for the optimizer's constructor; values are read as Python literals, else as strings")


def _add_learning_rate(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("Learning rate").add_argument
    add("--lr", type=float, metavar="LR",
        help="peak learning rate, taken as it is; wins over --lr-base, which is used when this is None or 0")
    add("--lr-base", type=float, metavar="LR", default=0.1,
        help="learning rate at a global batch of --lr-base-size, scaled to the real one as --lr-base-scale says")
    add("--lr-base-size", type=int, metavar="N", default=256,
        help="global batch size (all processes and accumulation steps) that --lr-base is meant for")
    add("--lr-base-scale", type=str, metavar="RULE", default="",
        help="scaling rule for --lr-base: linear or sqrt; empty: sqrt if --opt contains ada or lamb, else linear")
    add("--lr-noise", type=float, nargs="+", metavar=("START", "END"),
        help="add noise to the learning rate from START to END, or from START on, as fractions of the schedule")
    add("--lr-noise-pct", type=float, metavar="X", default=0.67,
        help="redraw relative noise that is not below this size, as a fraction of the learning rate")
    add("--lr-noise-std", type=float, metavar="X", default=1.0,
        help="standard deviation of the relative noise that --lr-noise turns on")
    add("--lr-decay-fn", type=str, metavar="NAME",
        help="wsd, rsqrt: shape of the final decay: linear, 1-sqrt, cosine, power or exp; None: 1-sqrt for wsd, linear "
             "for rsqrt")
    add("--lr-stable-timescale", type=float, metavar="N",
        help="rsqrt: epochs after which the learning rate has fallen by the root of 2; None: --warmup-epochs")
    add("--warmup-lr", type=float, metavar="LR", default=1e-5,
        help="learning rate at the start of the linear warmup")
    add("--min-lr", type=float, metavar="LR", default=0,
        help="lowest learning rate of the cosine, tanh, poly, wsd, rsqrt and plateau schedules")


def _add_schedule(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("Schedule").add_argument
    add("--sched", type=str, metavar="NAME", default="cosine",
        help="learning-rate schedule: cosine, tanh, poly, step, multistep, wsd, rsqrt, constant, none (no warmup "
             "either), or plateau (deprecated)")
    add("--sched-on-updates", action="store_true",
        help="move the schedule at each optimizer update rather than each epoch (not with plateau)")
    add("--lr-cycle-mul", type=float, metavar="X", default=1.0,
        help="cosine, tanh, poly: each cycle is this many times as long as the one before")
    add("--lr-cycle-decay", type=float, metavar="X", default=0.5,
        help="cosine, tanh, poly: each cycle peaks at this fraction of the one before")
    add("--lr-cycle-limit", type=int, metavar="N", default=1,
        help="cosine, tanh, poly: number of cycles; more than one lengthens the run beyond --epochs")
    add("--lr-k-decay", type=float, metavar="K", default=1.0,
        help="cosine, poly: exponent on training progress; above 1 the learning rate stays high for longer")
    add("--epochs", type=int, metavar="N", default=300,
        help="epochs in the schedule; --cooldown-epochs, --warmup-prefix and more cycles add to them")
    add("--epoch-repeats", type=float, metavar="N", default=0.0,
        help="passes over the data per training epoch, for streamed tfds/ and hfids/ datasets; 0 and 1 mean one")
    add("--start-epoch", type=int, metavar="N",
        help="epoch to start at, counted from 0; wins over the one in the --resume checkpoint; with --resume auto it "
             "is that of a new run")
    add("--stop-epoch", type=int, metavar="N",
        help="stop once N epochs are done, with the schedule of the whole run; None: at its end")
    add("--decay-milestones", type=int, nargs="+", metavar="EPOCH", default=[90, 180, 270],
        help="multistep: epochs, in rising order, at which the learning rate is multiplied by --decay-rate")
    add("--decay-epochs", type=float, metavar="N",
        help="step: epochs between decays; wsd, rsqrt: length of the final decay, below 1 as a share of the schedule; "
             "None: 90, or 0.2 for wsd and rsqrt")
    add("--warmup-epochs", type=int, metavar="N", default=5,
        help="epochs of linear warmup from --warmup-lr; 0 for none")
    add("--warmup-prefix", action="store_true",
        help="put the warmup in front of --epochs, instead of within them")
    add("--cooldown-epochs", type=int, metavar="N", default=0,
        help="cosine, tanh, poly, wsd, rsqrt: epochs at --min-lr after the schedule has ended")
    add("--patience-epochs", type=int, metavar="N", default=10,
        help="plateau: epochs without a better --eval-metric before the learning rate is cut")
    add("--decay-rate", "--dr", type=float, metavar="X", default=0.1,
        help="step, multistep, plateau: factor of each decay; poly: the power")


def _add_dropout(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("Dropout").add_argument
    add("--drop", type=float, metavar="P", default=0.0,
        help="dropout probability before the classifier")
    add("--drop-connect", type=float, metavar="P",
        help="deprecated and without effect, use --drop-path")
    add("--drop-path", type=float, metavar="P",
        help="stochastic depth: probability of skipping a residual branch; None keeps the model's own")
    add("--drop-block", type=float, metavar="P",
        help="DropBlock probability, for models that have it (such as ResNets); None keeps the model's own")


def _add_batchnorm(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("Batch normalization").add_argument
    add("--bn-momentum", type=float, metavar="X",
        help="BatchNorm momentum, for EfficientNet-like models; None keeps the model's own")
    add("--bn-eps", type=float, metavar="X",
        help="BatchNorm epsilon, for EfficientNet-like models; None keeps the model's own")
    add("--sync-bn", action="store_true",
        help="distributed: BatchNorm statistics over all processes, no --dist-bn; not with --split-bn or --torchscript")
    add("--dist-bn", type=str, metavar="HOW", default="reduce",
        help="distributed, running statistics synced each epoch: reduce (average), broadcast (rank 0's) or empty")
    add("--split-bn", action="store_true",
        help="own BatchNorm layers for each augmentation split; needs --aug-splits or --resplit")


def _add_ema(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("Exponential moving average of the weights").add_argument
    add("--model-ema", action="store_true",
        help="keep a moving average of the weights and validate it too; its result ranks the checkpoints")
    add("--model-ema-force-cpu", action="store_true",
        help="keep the moving average on the CPU to save device memory; it is then not validated")
    add("--model-ema-force-fp32", action="store_true",
        help="with --model-dtype bfloat16: keep the moving average in float32, rather than in bfloat16 with stochastic "
             "rounding; of a float16 model it always is")
    add("--model-ema-decay", type=float, metavar="X", default=0.9998,
        help="share of the old average kept at each optimizer update, below 1")
    add("--model-ema-warmup", action="store_true",
        help="raise the decay gradually from 0 to --model-ema-decay")


def _add_misc(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("Seeds, data loading and evaluation")
    add = group.add_argument
    add("--seed", type=int, metavar="N", default=42,
        help="random seed; each process adds its rank")
    add("--worker-seeding", type=str, metavar="MODE", default="all",
        help="what is seeded in loader workers: all, or part to leave NumPy as it is (reproduces some old results)")
    add("-j", "--workers", type=int, metavar="N", default=4,
        help="data loader worker processes per training process")
    persistence = group.add_mutually_exclusive_group()
    persistence.add_argument("--persistent-workers", dest="persistent_workers", action="store_true", default=True,
                             help="keep the loaders' workers alive between epochs")
    persistence.add_argument("--no-persistent-workers", dest="persistent_workers", action="store_false", default=True,
                             help="start the loaders' workers anew in each epoch, as --mixup-off-epoch needs it")
    add("--pin-mem", action="store_true",
        help="let the loader use page-locked memory, which may speed up copies to the device")
    add("--no-prefetcher", action="store_true",
        help="normalize and erase on the CPU and copy batches without overlap, rather than on the device ahead of time")
    add("--use-multi-epochs-loader", action="store_true",
        help="keep loader workers alive between epochs; not with --naflex-loader or --train-img-sizes")
    add("--val-interval", type=int, metavar="N", default=1,
        help="epochs from one validation and checkpoint to the next; the last epoch always has them, and those of "
             "--save-epochs")
    add("--eval-metric", type=str, metavar="NAME",
        help="metric that ranks checkpoints: top1, top5 or loss, with --task multilabel map, micro_f1, macro_f1, "
             "sample_f1 or loss (the loss if there is no validation); None: top1, or map")
    add_threshold(add)
    add("--tta", type=int, metavar="N", default=0,
        help="average the outputs of each N consecutive validation inputs, for loaders that repeat them; 0 for off")


def _add_output(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("Logging and output").add_argument
    add("--output", type=str, metavar="DIR", default="",
        help="folder for the run folders; empty means ./output/train")
    add("--experiment", type=str, metavar="NAME", default="",
        help="name of this run's folder under --output; empty builds one from time, model and image size")
    add("--log-interval", type=int, metavar="N", default=50,
        help="optimizer updates from one training log line to the next")
    add("--recovery-interval", type=int, metavar="N", default=0,
        help="optimizer updates from one recovery checkpoint to the next; 0 writes none")
    add("--checkpoint-hist", type=int, metavar="N", default=10,
        help="keep this many checkpoints, those best by --eval-metric; at least 1")
    add("--save-epochs", type=int, nargs="+", metavar="N",
        help="keep milestone-N.pth.tar of these numbers of epochs done, whatever their metric")
    add("--save-images", action="store_true",
        help="save the current input batch as an image into the run folder at each log line")
    add("--log-wandb", action="store_true",
        help="log metrics to Weights & Biases; needs the wandb package")
    add("--wandb-project", type=str, metavar="NAME",
        help="Weights & Biases project to log to")
    add("--wandb-tags", type=str, nargs="+", metavar="TAG", default=[],
        help="tags of the Weights & Biases run")
    add("--wandb-resume-id", type=str, metavar="ID", default="",
        help="id of the Weights & Biases run to continue; needs --resume")


def _add_distillation(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("Knowledge distillation").add_argument
    add("--kd-model-name", type=str, metavar="NAME",
        help="timm model, with its published weights, that teaches --model; None trains without a teacher")
    add("--kd-distill-type", type=str, choices=("logit", "feature", "token"), default="logit",
        help="what is matched: class logits, pooled features (MSE), or the distillation head of DeiT-like models")
    add("--kd-loss-type", type=str, metavar="NAME", default="kl",
        help="loss of logit distillation; kl (KL divergence) is the only one")
    add("--distill-loss-weight", type=float, metavar="W",
        help="weight of the distillation loss; None: 1 minus --task-loss-weight, or 1 if that is None too")
    add("--task-loss-weight", type=float, metavar="W",
        help="weight of the classification loss; None means 1")
    add("--kd-temperature", type=float, metavar="T", default=4.0,
        help="softmax temperature of logit and soft token distillation, usually 1 to 4")
    add("--kd-student-feature-dim", type=int, metavar="N",
        help="feature distillation: width of the student's features; None reads it from the model")
    add("--kd-teacher-feature-dim", type=int, metavar="N",
        help="feature distillation: width of the teacher's features; None reads it from the model")
    add("--kd-token-distill-type", type=str, choices=("soft", "hard"), default="soft",
        help="token distillation: soft matches the teacher's probabilities, hard its most likely class")
