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
import os
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import torch
from timm import utils
from timm.data import resolve_data_config
from timm.layers import set_fast_norm
from timm.models import safe_model_name

from .cli.errors import OptionError, report
from .cli.parser import OptionParser, dump_args
from .cli.processes import end_failed_rank, leave_process_group, rendezvous_url
from .runs import timing
from .training import checkpoint, factory, sam_options, states, workers
from .training.data import create_data
from .training.engine import Run, evaluate, train_one_epoch
from .training.options import build_train_parser, parse_args
from .training.preemption import EXIT_PREEMPTED, Preempted, Preemption

try:
    import wandb
except ImportError:
    wandb = None

_logger = logging.getLogger("train")


def build_parser() -> OptionParser:
    """The parser of this script: timm's flags, ``-c`` and the group ``SAM``."""
    return build_train_parser("train.py")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs training; returns the exit code: 0, 2 for a mistake in the options, 75 when SIGTERM stopped the run."""
    parser = build_parser()
    args = parse_args(parser, argv)
    utils.setup_default_logging()
    code = 0
    try:
        checkpoint.check_output(args)
        train(args, dump_args(args))
    except OptionError as e:
        report(parser.prog, e)
        end_failed_rank(2)
        return 2
    except Preempted:
        _logger.warning("Stopped by SIGTERM with a checkpoint written; go on with --resume auto.")
        code = EXIT_PREEMPTED
    except BaseException:
        end_failed_rank(1)
        raise
    leave_process_group()
    return code


def train(args: argparse.Namespace, args_text: str) -> None:
    """Builds everything that ``args`` asks for and trains.

    Args:
        args: The checked options; resolved values (learning rate, classes, ranks) are written back into it.
        args_text: The options as they were given, for ``args.yaml``.

    Raises:
        OptionError: Something that only shows when it is built does not fit.
        Preempted: SIGTERM came, and a checkpoint is written.
    """
    device = prepare_process(args)
    checkpoint.resolve_auto(args)
    primary = utils.is_primary(args)
    model_dtype, autocast, scaler = factory.precision(args, device)

    # model
    model = factory.build_model(args)
    data_config = resolve_data_config(vars(args), model=model, verbose=primary)
    patch_size = model.get_patch_size() if args.naflex_loader and hasattr(model, "get_patch_size") else None
    model = factory.place_model(args, model, device, model_dtype)

    # data
    data = create_data(args, data_config, patch_size, device, model_dtype)
    workers.shield(data.train)
    workers.shield(data.eval)
    data.train, tracked = workers.track(data.train)
    factory.resolve_lr(args, data)

    # task and optimizer; the order of resume, EMA, compile and DDP matters: each sees the module of the one before
    task = factory.create_task(args, model, factory.create_loss(args), device, model_dtype)
    optimizer = factory.create_optimizer(args, task.get_trainable_module())
    start_epoch = None
    if args.resume:
        keep_optimizer = not args.no_resume_opt
        start_epoch = checkpoint.resume(
            args.resume, task, optimizer if keep_optimizer else None, scaler if keep_optimizer else None, primary)
    if args.model_ema:
        task.setup_ema(decay=args.model_ema_decay, use_warmup=args.model_ema_warmup,
                       device="cpu" if args.model_ema_force_cpu else None)
        if args.resume:
            checkpoint.resume_ema(args.resume, task)
    if args.torchcompile:
        factory.compile_task(args, task)
    eval_model = task.get_eval_model()
    if args.distributed:
        task.prepare_distributed(device_ids=None if device.type == "cpu" else [device],
                                 broadcast_buffers=not args.no_ddp_bb)

    # SAM, schedule
    sam = sam_options.create_sam(args, optimizer, task.get_trainable_module())
    run = Run(args=args, task=task, data=data, optimizer=optimizer, sam=sam, scaler=scaler, autocast=autocast,
              device=device, model_dtype=model_dtype, tracked=tracked)
    eval_metric = args.eval_metric if data.eval is not None else "loss"
    decreasing = eval_metric == "loss"
    saved = checkpoint.metadata(args.resume)
    run.position = saved.get("position")
    if args.start_epoch is not None:
        start_epoch, run.position = args.start_epoch, None
    elif run.position is not None:
        start_epoch = run.position["epoch"]
    start_epoch = start_epoch or 0
    run.scheduler, num_epochs = factory.create_schedule(args, optimizer, run.updates_per_epoch, decreasing)
    run.first_update = run.position["update"] if run.position else start_epoch * run.updates_per_epoch
    checkpoint.resume_schedule(saved, run.scheduler, start_epoch, run.first_update, args.sched_on_updates)
    run.total_updates = num_epochs * run.updates_per_epoch

    if primary:
        run.output_dir, run.saver = checkpoint.create_output(
            args, default_name(args, data_config), task, optimizer, scaler, lambda: run.scheduler,
            lambda: run.extras, decreasing, start_epoch, args_text)
        start_wandb(args, os.path.basename(run.output_dir))
        stepped = "epoch" if run.scheduler is None or run.scheduler.t_in_epochs else "update"
        _logger.info(
            f"Training for {num_epochs} epochs of {run.updates_per_epoch} updates, from epoch {start_epoch}; learning "
            f"rate set every {stepped}. Writing to {run.output_dir}")
    if args.resume:
        states = run.position["started_from"] if run.position else saved.get("random_state")
        states.restore(args, states, run.tracked, [data.train, data.eval])
        states.restore_buffers(args, saved.get("buffers"), run.modules)
    try:
        fit(run, eval_model, eval_metric, start_epoch, num_epochs)
    finally:
        workers.dismiss([data.train, data.eval])


def prepare_process(args: argparse.Namespace) -> torch.device:
    """Sets up device, process group and seeds of this rank."""
    for module in args.device_modules or ():
        try:
            importlib.import_module(module)
        except ImportError as e:
            raise OptionError(f"--device-modules {module} cannot be imported: {e}; install it") from e
    if torch.cuda.is_available():
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    args.prefetcher = not args.no_prefetcher
    args.dist_url = rendezvous_url()
    device = utils.init_distributed_device(args)
    if utils.is_primary(args):
        _logger.info(f"{args.world_size} process(es), one device each, this one on {args.device}; weights in "
                     f"{args.model_dtype or 'float32'}{f', autocast to {args.amp_dtype}' if args.amp else ''}.")
    utils.random_seed(args.seed, args.rank)
    if args.fuser:
        utils.set_jit_fuser(args.fuser)
    if args.fast_norm:
        set_fast_norm()
    return device


def default_name(args: argparse.Namespace, data_config: dict[str, Any]) -> str:
    """Name of the output folder without ``--experiment``: time, model, image size."""
    now = datetime.now().strftime("%Y%m%d-%H%M%S")
    return f"{now}-{safe_model_name(args.model)}-{data_config['input_size'][-1]}"


def start_wandb(args: argparse.Namespace, name: str) -> None:
    """Starts or resumes the wandb run, if it is asked for."""
    if not args.log_wandb:
        return
    if wandb is None:
        _logger.warning("--log-wandb: wandb is not installed, nothing is logged there; pip install wandb")
        return
    wandb.init(project=args.wandb_project, name=name, config=vars(args), tags=args.wandb_tags,
               resume="must" if args.wandb_resume_id else None, id=args.wandb_resume_id or None)


def fit(run: Run, eval_model: torch.nn.Module, eval_metric: str, start_epoch: int, num_epochs: int) -> None:
    """The epochs: train, evaluate, summarise, save; then the results on stdout, as timm prints them."""
    args, task = run.args, run.task
    primary = utils.is_primary(args)
    share_bn = args.distributed and args.dist_bn in ("broadcast", "reduce")
    best_metric, best_epoch = None, None
    results = []
    preemption = run.preemption = Preemption(args, run.device)
    try:
        for epoch in range(start_epoch, num_epochs):
            whole_epoch, began = run.position is None, time.perf_counter()
            train_metrics = train_one_epoch(run, epoch)
            if run.output_dir:  # of the primary rank only
                seconds = time.perf_counter() - began if whole_epoch else float("nan")
                timing.record(run.output_dir, epoch, seconds, args.world_size, run.device)
            if share_bn:
                utils.distribute_bn(task.get_trainable_module(), args.world_size, args.dist_bn == "reduce")
            if (epoch + 1) % args.val_interval != 0 and epoch + 1 != num_epochs:
                if run.scheduler is not None:
                    run.scheduler.step(epoch + 1, metric=None)
                continue

            eval_metrics = None
            if run.data.eval is not None:
                eval_metrics = evaluate(run, eval_model)
                ema = task.get_trainable_module(ema=True)
                if ema is not None and not args.model_ema_force_cpu:
                    if share_bn:
                        utils.distribute_bn(ema, args.world_size, args.dist_bn == "reduce")
                    eval_metrics = evaluate(run, task.get_eval_model(ema=True), " (EMA)")
            metric = (eval_metrics or train_metrics)[eval_metric]

            run.extras = dict(
                random_state=states.of_all_ranks(args, states.local_states(run.device, run.tracked)),
                buffers=states.buffers_of_all_ranks(args, run.modules))
            if primary:
                rates = [group["lr"] for group in run.optimizer.param_groups]
                utils.update_summary(
                    epoch, train_metrics, eval_metrics, filename=os.path.join(run.output_dir or "", "summary.csv"),
                    lr=sum(rates) / len(rates), log_wandb=args.log_wandb and wandb is not None)
                best_metric, best_epoch = run.saver.save_checkpoint(epoch, metric=metric)
                results.append({"epoch": epoch, "train": train_metrics})
                if eval_metrics is not None:
                    results[-1]["validation"] = eval_metrics
            if run.scheduler is not None:
                run.scheduler.step(epoch + 1, metric)
            if epoch + 1 < num_epochs and preemption.should_stop((epoch + 1) * run.updates_per_epoch):
                preemption.together()
                raise Preempted
    except KeyboardInterrupt:
        _logger.warning("Interrupted.")
    finally:
        preemption.close()

    if primary:
        worst_first = sorted(results, key=lambda r: r.get("validation", r["train"]).get(eval_metric, 0),
                             reverse=eval_metric == "loss")
        print(f"--result\n{json.dumps(worst_first[-10:], indent=4)}", flush=True)
    if primary and best_metric is not None:
        for name in ("args.yaml", "summary.csv", timing.FILE, "last.pth.tar", "model_best.pth.tar"):
            _logger.info(f"Wrote {os.path.join(run.output_dir or '', name)}")
        _logger.info(f"*** Best metric: {eval_metric} {best_metric} (epoch {best_epoch})")


if __name__ == "__main__":
    sys.exit(main())
