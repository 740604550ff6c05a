"""torch.compile of a task's models, in the form that SAM's passes need."""
import argparse
import logging

from timm.task import FeatureDistillationTask, TrainingTask

from ..cli.device import Process
from ..cli.errors import OptionError
from ..split import WHOLE_GRAPHS_WORK, compile_split
from .factory import trained
from .sam_options import shares_forward

_logger = logging.getLogger(__name__)

_WITHOUT_CUDA_GRAPHS = {"reduce-overhead": "default", "max-autotune": "max-autotune-no-cudagraphs"}


def compile_task(args: argparse.Namespace, process: Process, task: TrainingTask) -> None:
    """Compiles the task's model: as a whole, or in two parts where the passes of SAM have something to share.

    Raises:
        OptionError: The backend cannot do it.
    """
    mode, sam = args.torchcompile_mode, args.sam_variant is not None
    accumulates = args.sam_m or args.grad_accum_steps > 1
    if sam and args.torchcompile == "cudagraphs" and (accumulates or not WHOLE_GRAPHS_WORK):
        raise OptionError("--torchcompile cudagraphs: with --sam-m, --grad-accum-steps or torch before 2.12, SAM "
                          "cannot use CUDA graphs; use --torchcompile inductor")
    if sam and accumulates and mode in _WITHOUT_CUDA_GRAPHS:
        # the gradients that one chunk leaves lie in memory of its graph, which the next chunk's writes over
        mode = _WITHOUT_CUDA_GRAPHS[mode]
        if process.primary:
            _logger.info(f"--torchcompile-mode {args.torchcompile_mode}: gradients are accumulated under SAM, which "
                         f"CUDA graphs do not allow; compiling with mode {mode}")
    options = dict(backend=args.torchcompile, mode=mode)
    # without a filter the first normalization layer is perturbed, and there is next to nothing below it
    shares = shares_forward(args) and args.sam_filter is not None and args.torchcompile != "cudagraphs"
    if shares or sam and not WHOLE_GRAPHS_WORK:
        compile_split(trained(task), **options)
        if (teacher := getattr(task, "teacher", None)) is not None:
            features = isinstance(task, FeatureDistillationTask)
            teacher.compile(**options, compile_model=not features, compile_features=features)
    else:
        task.compile(**options)
    if task.has_ema():
        task.compile_ema(**options)
    if process.primary:
        parts = "the model in parts" if shares else "the model"
        _logger.info(f"Compiling {parts} with {args.torchcompile}, mode {mode}")
