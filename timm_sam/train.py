#!/usr/bin/env python3
"""Trains an image classifier with timm's command line, and with SAM or SAM-ON if asked to (``--sam-*``).

    torchrun --nproc-per-node 8 train.py -c hparams/... --data-dir /data/imagenet

The run from top to bottom: options, model, data, task, optimizer, SAM, epochs. Without ``--sam-variant`` it is timm's
own training, digit for digit.
"""
import argparse
import importlib
import json
import logging
import math
import os
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import torch
from timm import utils
from timm.models import safe_model_name

from .cli.device import Process, set_up
from .cli.errors import OptionError, one_line, report
from .cli.escape import setup_logging
from .cli.image_folders import NothingReadable
from .cli.models import check_naflex
from .cli.parser import OptionParser, dump_args, program
from .cli.processes import end_failed_rank, leave_process_group
from .cli.rules import apply, device_is_there
from .cli.text import say
from .runs import files, summary, timing
from .training import agreement, averaging, checkpoint, factory, failed, states, workers
from .training.compiling import compile_task
from .training.data import create_data
from .training.diverged import EXIT_DIVERGED, Diverged, Watch
from .training.engine import SAM_COUNTS, SAM_MEASURES, Run, checkpoint_extras, train_one_epoch
from .training.loggers import Loggers, row_of
from .training.losses import create_loss
from .training.model_checks import check_filter, check_single_samples, check_views
from .training.options import build_train_parser, parse_args
from .training.output import Output, check_output, writing
from .training.position import fitted
from .training.preemption import EXIT_PREEMPTED, Preempted, Preemption
from .training.progress import Progress
from .training.resolved import Resolved
from .training.sam_options import create_update
from .training.saver import Saver
from .training.schedule import create_schedule, last_epoch, resume_schedule
from .training.validation import evaluate

_logger = logging.getLogger(__name__)


def build_parser() -> OptionParser:
    """The parser of this script: timm's flags, ``-c`` and the group ``SAM``."""
    return build_train_parser(program("timm_sam.train", "train.py"))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs training.

    Returns:
        The exit code: 0; 1 where loss or weights stopped being finite; 2 for a mistake in the options; 75 when SIGTERM
        stopped the run.
    """
    parser = build_parser()
    args = parse_args(parser, argv)
    setup_logging()
    code = 0
    try:
        check_output(args)
        train(args)
    except OptionError as e:
        report(parser.prog, e)
        end_failed_rank(2)
        return 2
    except Preempted:
        _logger.warning("Stopped by SIGTERM with a checkpoint written; go on with --resume auto.")
        code = EXIT_PREEMPTED
    except Diverged as e:
        if e.primary:
            report(parser.prog, e)
        code = EXIT_DIVERGED
    except BaseException:
        end_failed_rank(1)
        raise
    leave_process_group()
    return code


def train(args: argparse.Namespace) -> None:
    """Builds everything that ``args`` asks for and trains.

    Args:
        args: The checked options.

    Raises:
        OptionError: Something that only shows when it is built does not fit.
        Preempted: SIGTERM came, and a checkpoint is written.
        Diverged: Loss or weights are not finite any more.
    """
    process = prepare_process(args)
    agreement.check_options(args, process)
    with Output(args, process) as output:
        try:
            train_in(args, process, output)
        except RuntimeError as e:
            if (mistake := failed.short_of_memory(args, process.device, e)) is not None:
                raise mistake from e
            raise


def train_in(args: argparse.Namespace, process: Process, output: Output) -> None:
    """As :func:`train`, in the run's folder."""
    primary = process.primary
    resume = output.resolve_resume()
    model_dtype, autocast, scaler = factory.precision(args, process.device)

    # model
    model = factory.build_model(args, process)
    check_naflex(args, args.model, model)
    check_filter(args.sam_filter, (name for name, _ in model.named_parameters()))
    num_classes = factory.num_outputs(args, model)
    data_config = factory.data_config(args, process, model)
    check_single_samples(args, model, data_config)
    patch_size = factory.patch_size(model) if args.naflex_loader else None
    model = factory.place_model(args, process, model, model_dtype)

    # data
    data = create_data(args, process, data_config, num_classes, patch_size, model_dtype)
    check_views(args, data.eval)
    workers.shield(data.train)
    workers.shield(data.eval)
    data.train, tracked = workers.track(data.train)
    updates_per_epoch = data.updates_per_epoch(args.grad_accum_steps)
    resolved = Resolved(process, resume, num_classes, factory.learning_rate(args, process, data))

    # task and optimizer; the order of resume, EMA, compile and DDP matters: each sees the module of the one before
    task = factory.create_task(args, process, model, create_loss(args), model_dtype)
    if args.kd_model_name is not None:
        teacher: Any = task.teacher
        check_naflex(args, args.kd_model_name, teacher.model, "--kd-model-name")
    optimizer = factory.create_optimizer(args, process, factory.trained(task), resolved.lr)
    start_epoch = None
    if resume:
        keep_optimizer = not args.no_resume_opt
        start_epoch = checkpoint.resume(
            resume, task, optimizer if keep_optimizer else None, scaler if keep_optimizer else None, primary)
    if args.model_ema:
        averaging.setup_ema(args, task, model_dtype)
        if resume:
            checkpoint.resume_ema(resume, task)
    if args.torchcompile:
        compile_task(args, process, task)
    eval_model = factory.evaluated(task)
    if process.distributed:
        task.prepare_distributed(device_ids=None if process.device.type == "cpu" else [process.device],
                                 broadcast_buffers=not args.no_ddp_bb)

    # schedule, SAM
    saved = checkpoint.metadata(resume)
    place = saved.get("position")
    # a job script says both, every time it is started: what it goes on with knows better where that was
    found_by_auto = args.resume == "auto" and start_epoch is not None
    if args.start_epoch is not None and not found_by_auto:
        start_epoch, place = args.start_epoch, None
    elif place is not None:
        place = fitted(process, place, len(data.train), args.grad_accum_steps)
        start_epoch = place["epoch"]
    start_epoch = start_epoch or 0
    eval_metric = args.eval_metric if data.eval is not None else "loss"
    scheduler, num_epochs = create_schedule(args, optimizer, updates_per_epoch, eval_metric == "loss")
    end_epoch = last_epoch(args, num_epochs)
    first_update = place["update"] if place else start_epoch * updates_per_epoch
    resume_schedule(saved, scheduler, start_epoch, first_update, args.sched_on_updates)
    total_updates = num_epochs * updates_per_epoch
    update = create_update(args, process, optimizer, factory.trained(task), resolved.lr, total_updates, num_epochs)
    if resume:
        checkpoint.resume_methods(saved, update, primary)

    output_dir, saver, loggers = None, None, None
    if primary:
        output_dir, saver = output.create(
            default_name(args, data_config), resume, start_epoch, lambda folder: Saver(
                resolved.namespace(args), task, optimizer, scaler, folder, eval_metric == "loss"), dump_args(args))
        loggers = Loggers(args, resolved, output_dir, start_epoch)
        stepped = "epoch" if scheduler is None or scheduler.t_in_epochs else "update"
        _logger.info(
            f"Training for {num_epochs} epochs of {updates_per_epoch} updates, from epoch {start_epoch}"
            f"{f' until {end_epoch} are done' if end_epoch < num_epochs else ''}; learning rate set every {stepped}. "
            f"Writing to {output_dir}")
    with Preemption(process) as preemption:
        perturbed = args.sam_variant is not None
        run = Run(
            args=args, process=process, task=task, data=data, optimizer=optimizer, update=update,
            measures=SAM_MEASURES if perturbed else (), counts=SAM_COUNTS if perturbed else (), scaler=scaler,
            autocast=autocast, model_dtype=model_dtype, scheduler=scheduler, preemption=preemption,
            progress=Progress(process, updates_per_epoch, first_update, total_updates),
            watch=Watch(args, process, factory.trained(task), scaler), tracked=tracked, output_dir=output_dir,
            saver=saver, loggers=loggers)
        if resume:
            random_states = place["started_from"] if place else saved.get("random_state")
            states.restore(process, random_states, tracked, data.loaders)
            states.restore_buffers(process, saved.get("buffers"), run.modules)
            averaging.restore_rounding(task, saved.get("ema_rounding"))
        unfinished = True
        try:
            fit(run, eval_model, eval_metric, start_epoch, end_epoch, place)
            unfinished = False
        except NothingReadable as e:
            kept = "what was saved is kept, go on with --resume auto" if saver is None else saver.kept
            raise OptionError(f"{e}; {kept}") from e
        except (AssertionError, LookupError, RuntimeError, ValueError) as e:
            if (mistake := failed.explained(args, task, model, data_config, e)) is not None:
                raise mistake from e
            raise
        finally:
            workers.dismiss(data.loaders)
            if loggers is not None:
                loggers.close(unfinished)


def prepare_process(args: argparse.Namespace) -> Process:
    """Sets up device, process group and seeds of this rank."""
    for module in args.device_modules or ():
        try:
            importlib.import_module(module)
        except Exception as e:  # of a backend whose driver is missing, say
            raise OptionError(f"--device-modules {module} cannot be imported: {one_line(e)}; install it, or mend the "
                              f"name") from e
    if args.device_modules:
        apply(args, device_is_there)  # it may be theirs
    process = set_up(args.device, fuser=args.fuser, fast_norm=args.fast_norm)
    if process.primary:
        _logger.info(f"{process.world_size} process(es), one device each, this one on {process.device}; weights in "
                     f"{args.model_dtype or 'float32'}{f', autocast to {args.amp_dtype}' if args.amp else ''}.")
    utils.random_seed(args.seed, process.rank)
    return process


def default_name(args: argparse.Namespace, data_config: dict[str, Any]) -> str:
    """Name of the output folder without ``--experiment``: time, model, image size."""
    now = datetime.now().strftime("%Y%m%d-%H%M%S")
    return f"{now}-{safe_model_name(args.model)}-{data_config['input_size'][-1]}"


def fit(run: Run, eval_model: torch.nn.Module, eval_metric: str, start_epoch: int, num_epochs: int,
        place: dict[str, Any] | None = None) -> None:
    """The epochs: train, evaluate, summarise, save; then the results on stdout, as timm prints them.

    Args:
        run: The run.
        eval_model: Images (or NaFlex batches) -> logits.
        eval_metric: What ranks checkpoints.
        start_epoch: The first epoch.
        num_epochs: The number of epochs in all, up to ``--stop-epoch``.
        place: Where inside the first epoch it goes on.
    """
    args, task, process = run.args, run.task, run.process
    primary = process.primary
    share_bn = process.distributed and not args.sync_bn and args.dist_bn in ("broadcast", "reduce")
    best_metric, best_epoch = None, None
    results: list[dict[str, Any]] = []
    try:
        for epoch in range(start_epoch, num_epochs):
            began = time.perf_counter()
            train_metrics = train_one_epoch(run, epoch, place)
            if run.output_dir:  # of the primary rank only
                seconds = time.perf_counter() - began if place is None else float("nan")
                with writing(run.output_dir):
                    timing.record(run.output_dir, epoch, seconds, process.world_size, process.device)
            place = None
            if share_bn:
                utils.distribute_bn(task.get_trainable_module(), process.world_size, args.dist_bn == "reduce")
            milestone = epoch + 1 in (args.save_epochs or ())
            if (epoch + 1) % args.val_interval != 0 and epoch + 1 != num_epochs and not milestone:
                if run.scheduler is not None:
                    run.scheduler.step(epoch + 1, metric=None)
                continue

            eval_metrics = None
            if run.data.eval is not None:
                eval_metrics = evaluate(run, eval_model)
                ema = task.get_trainable_module(ema=True)
                if ema is not None and not args.model_ema_force_cpu:
                    if share_bn:
                        utils.distribute_bn(ema, process.world_size, args.dist_bn == "reduce")
                    eval_metrics = evaluate(run, factory.evaluated(task, ema=True), " (EMA)")
            metric = (eval_metrics or train_metrics)[eval_metric]

            extras = checkpoint_extras(
                run, random_state=states.of_all_ranks(
                    process, states.local_states(process.device, run.tracked, run.data.loaders)))
            if run.saver is not None:
                rates = [group["lr"] for group in run.optimizer.param_groups]
                lr = sum(rates) / len(rates)
                row = row_of(epoch, train_metrics, eval_metrics, lr)
                with writing(run.output_dir or ""):
                    summary.add(os.path.join(run.output_dir or "", files.SUMMARY), row)
                if run.loggers is not None:
                    run.loggers.log(row)
                best_metric, best_epoch = run.saver.save(epoch, metric, extras)
                if milestone:
                    run.saver.save_milestone(epoch + 1)
                results.append({"epoch": epoch, "train": train_metrics})
                if eval_metrics is not None:
                    results[-1]["validation"] = eval_metrics
            if run.scheduler is not None:
                run.scheduler.step(epoch + 1, metric)
            if epoch + 1 < num_epochs and run.preemption.should_stop((epoch + 1) * run.updates_per_epoch):
                run.preemption.together()
                raise Preempted
    except KeyboardInterrupt:
        _logger.warning("Interrupted.")
    except Diverged:
        if run.output_dir:  # for the report; a run that goes on from before takes the row out
            with writing(run.output_dir):
                summary.add(os.path.join(run.output_dir, files.SUMMARY),
                            row_of(epoch, {"loss": math.nan}, None, math.nan))
        raise

    if primary:
        worst_first = sorted(results, key=lambda r: r.get("validation", r["train"]).get(eval_metric, 0),
                             reverse=eval_metric == "loss")
        say(f"--result\n{json.dumps(worst_first[-10:], indent=4)}")
    if primary and best_metric is not None:
        for name in (files.ARGS, files.SUMMARY, timing.FILE, files.LAST, files.BEST):
            path = os.path.join(run.output_dir or "", name)
            if os.path.isfile(path):
                _logger.info(f"Wrote {path}")
        _logger.info(f"*** Best metric: {eval_metric} {best_metric} (epoch {best_epoch})")


if __name__ == "__main__":
    sys.exit(main())
