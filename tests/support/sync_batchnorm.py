"""The five kernels of torch's SyncBatchNorm, which torch has for accelerators only, in terms of other operations.

With them torch's own module, its autograd function and its collectives run on the CPU.
"""
from contextlib import contextmanager
from unittest.mock import patch

import torch


@contextmanager
def synchronized_on_cpu():
    """The kernels are there inside, and SyncBatchNorm takes the CPU for an accelerator."""
    with torch.library._scoped_library('aten', 'IMPL') as library:
        for kernel in (batch_norm_stats, batch_norm_gather_stats_with_counts, batch_norm_elemt,
                       batch_norm_backward_reduce, batch_norm_backward_elemt):
            library.impl(kernel.__name__, kernel, 'CPU')
        with patch.object(torch._C, '_get_privateuse1_backend_name', lambda: 'cpu'):
            yield


def _per_channel(values, like):
    return values.view(1, -1, *[1] * (like.dim() - 2))


def _sum(x):
    return x.sum([d for d in range(x.dim()) if d != 1])


def batch_norm_stats(input, eps):
    count = input.numel() // input.size(1)
    mean = _sum(input) / count
    var = _sum((input - _per_channel(mean, input)).square()) / count
    return mean, (var + eps).rsqrt()


def batch_norm_gather_stats_with_counts(input, mean, invstd, running_mean, running_var, momentum, eps, counts):
    count, parts = counts.sum(), counts[:, None]
    total = (mean * parts).sum(0) / count
    var = ((invstd ** -2 - eps + (mean - total).square()) * parts).sum(0) / count
    running_mean.lerp_(total, momentum)
    running_var.lerp_(var * count / (count - 1), momentum)
    return total, (var + eps).rsqrt()


def batch_norm_elemt(input, weight, bias, mean, invstd, eps):
    return (input - _per_channel(mean, input)) * _per_channel(invstd * weight, input) + _per_channel(bias, input)


def batch_norm_backward_reduce(grad_out, input, mean, invstd, weight, input_g, weight_g, bias_g):
    sum_dy, sum_dy_xmu = _sum(grad_out), _sum(grad_out * (input - _per_channel(mean, input)))
    return sum_dy, sum_dy_xmu, sum_dy_xmu * invstd, sum_dy.clone()


def batch_norm_backward_elemt(grad_out, input, mean, invstd, weight, sum_dy, sum_dy_xmu, count):
    total = count.sum()
    slope = _per_channel(invstd.square() * sum_dy_xmu / total, input)
    centered = grad_out - _per_channel(sum_dy / total, input) - (input - _per_channel(mean, input)) * slope
    return centered * _per_channel(invstd * weight, input)
