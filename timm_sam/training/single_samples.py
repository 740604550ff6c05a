"""Training samples one at a time, for methods that ask for the gradients of single ones."""
import argparse
import copy
import functools
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import numpy
import torch
import torch.nn.functional as F
from timm.data.loader import PrefetchLoader, fast_collate
from timm.utils import unwrap_model
from torch import Tensor, nn
from torch.utils.data import IterableDataset, default_collate

from ..cli.device import Process
from ..cli.errors import OptionError
from ..methods.stages import seed_of
from .data import Data


class TrainingSamples:
    """Losses of training samples drawn by the run's seed, as functions: ``samples(n)`` gives n of them on each rank.

    The transform is that of training, the loss the cross entropy with the label. The model is in training mode, with a
    batch of one; where a normalization layer would see a single value per channel, all of it is in evaluation mode.
    Draws are a function of seed, epoch and rank, and use the global generators, which the caller puts back.

    Args:
        args: All options.
        process: This one.
        module: What is trained.
        data: The loaders.
        autocast: Context of a forward pass.
        epoch: From 0.
    """

    def __init__(self, args: argparse.Namespace, process: Process, module: nn.Module, data: Data,
                 autocast: Callable[[], AbstractContextManager], epoch: int) -> None:
        self.args, self.process, self.data = args, process, data
        self.module = unwrap_model(module)  # a batch of one is not worth compiling, nor DDP's state
        self.autocast, self.epoch = autocast, epoch

    def __call__(self, n: int) -> Iterator[Callable[[], Tensor]]:
        """The functions, one after the other.

        Raises:
            OptionError: The data set is a stream, which has no samples by their number.
        """
        dataset = self.data.train.dataset
        if isinstance(dataset, IterableDataset):
            raise OptionError(f"--dataset {self.args.dataset} is a stream, and --sam-method "
                              f"{' '.join(self.args.sam_method)} draws single samples: use a folder")
        seed = seed_of(self.args.seed, self.epoch)
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed)).tolist()
        own = seed_of(seed, self.process.rank)
        random.seed(own)
        numpy.random.seed(own % 2 ** 32)
        torch.manual_seed(own)
        training = self.module.training
        try:
            for k in range(n):
                image, label = self._batch_of_one(dataset[order[(self.process.rank * n + k) % len(order)]])
                yield functools.partial(self.loss, image, label)
        finally:
            self.module.train(training)

    def _batch_of_one(self, sample: tuple) -> tuple[Tensor, Tensor]:
        loader = self.data.train
        if isinstance(loader, PrefetchLoader):  # which normalizes and erases
            one = copy.copy(loader)
            one.loader = [fast_collate([sample])]  # type: ignore[assignment]
            return next(iter(one))
        image, label = default_collate([sample])
        return image.to(self.process.device), label.to(self.process.device)

    def loss(self, image: Tensor, label: Tensor) -> Tensor:
        """The loss of one sample, a batch of one, 0-dim; in evaluation mode where one is too few for a layer."""
        with self.autocast():
            try:
                output = self.module(image)
            except ValueError as e:
                if "more than 1 value per channel" not in str(e):
                    raise
                self.module.eval()
                output = self.module(image)
            return F.cross_entropy(output, label)
