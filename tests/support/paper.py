"""The tables of the paper (arXiv:2306.04226) as data: what each of its runs was trained with, and what it reached."""
import itertools
from dataclasses import dataclass, field

import pytest

RATIO = pytest.approx([3 / 4, 4 / 3])


@dataclass(frozen=True)
class Row:
    """A run of the paper: what is perturbed how, and its accuracy there; None stands for plain, illegible, none."""

    variant: str | None = None
    params: str | None = None
    rho: float | None = None
    accuracy: str | None = None


@dataclass(frozen=True)
class Setting:
    """The rows of a table that share everything but SAM."""

    tables: tuple[str, ...]
    devices: int
    values: dict
    rows: dict[str, Row]
    own: dict[str, dict] = field(default_factory=dict)  # values of the rows whose names begin so

    def of(self, name: str) -> dict:
        row = self.rows[name]
        values = dict(self.values, sam_variant=row.variant, sam_rho=row.rho)
        values['sam_params'] = row.params or 'onlynorm'
        for start, more in self.own.items():
            if name.startswith(start):
                values.update(more)
        return values


def rows(plain: Row, *sam: Row, plain_name: str = 'sgd', start: str = '') -> dict[str, Row]:
    return {plain_name: plain, **{f'{start}{r.variant}_{r.params}': r for r in sam}}


# what the paper leaves open, or says of all runs
OPEN = dict(grad_accum_steps=1, clip_grad=None, amp=False, model_ema=False, mixup=0, cutmix=0, reprob=0, drop=0,
            color_jitter=0, hflip=0.5, vflip=0, train_crop_mode='rrc', sched='cosine', sched_on_updates=False,
            smoothing=0.1, interpolation='bicubic', sam_eta=None, sam_bn_stats='clean', sam_m=None, sam_sync=False,
            sam_ascent_fraction=1, sam_every=1, sam_start_epoch=0, sam_end_epoch=None, no_aug=False, bce_loss=False,
            lr_noise=None, layer_decay=None, aug_repeats=0, drop_block=None, dataset='')
IMAGENET = dict(OPEN, num_classes=1000, img_size=224, input_size=None, scale=[0.08, 1.0], ratio=RATIO, aa=None,
                train_interpolation='random', warmup_lr=1e-4, min_lr=1e-6, warmup_prefix=False, drop_path=0,
                sync_bn=False, opt_kwargs={'filter_bias_and_bn': True}, model_kwargs={})
CIFAR = dict(OPEN, scale=[0.64, 0.64], ratio=[1, 1], train_interpolation='bicubic', crop_pct=1, epochs=200,
             warmup_epochs=0, cooldown_epochs=0, min_lr=0, weight_decay=5e-4, pretrained=False,
             opt_kwargs={'filter_bias_and_bn': False})

SETTINGS = {
    'imagenet/resnet50': Setting(  # Tables 2 and 8
        ('Table 2', 'Table 8'), devices=8,
        values=dict(IMAGENET, model='resnet50', pretrained=False, batch_size=64, epochs=90, warmup_epochs=3,
                    cooldown_epochs=10, opt='sgd', momentum=0.9, lr=0.2, weight_decay=1e-4, crop_pct=0.95),
        rows=rows(
            Row(accuracy='77.03 +- 0.13'),
            Row('sam', 'all', 0.05, '77.65 +- 0.11'),
            Row('elementwise_l2', 'all', 1, '77.65 +- 0.05'),
            Row('elementwise_l2', 'onlynorm', 1, '77.82 +- 0.14'),
            Row('elementwise_linf', 'all', 0.001, '77.45 +- 0.04'),
            Row('elementwise_linf', 'onlynorm', 0.005, '77.82 +- 0.01'),
            Row('layerwise_l2', 'all', 0.005, '78.14 +- 0.05'),
            Row('layerwise_l2', 'onlynorm', 0.05, '77.87 +- 0.07'))),
    'imagenet/vit_small_patch32_224': Setting(  # Tables 4 and 8
        ('Table 4', 'Table 8'), devices=1,
        values=dict(IMAGENET, model='vit_small_patch32_224', pretrained=False, batch_size=128, epochs=300,
                    warmup_epochs=10, cooldown_epochs=0, lr=1e-3, weight_decay=0.1, crop_pct=0.9),
        rows=rows(Row(accuracy='66.89 +- 0.04'),
                  Row('sam', 'all', 1, '71.47 +- 0.12'),
                  Row('sam', 'onlynorm', 15, '71.37 +- 0.026'), plain_name='adamw', start='adamw_')
        | rows(Row(accuracy='68.20 +- 0.02'),
               Row('sam', 'all', 1, '71.90 +- 0.19'),
               Row('sam', 'onlynorm', 10, '72.64 +- 0.14'), plain_name='lion', start='lion_'),
        own={'adamw': dict(opt='adamw', opt_betas=[0.9, 0.999]), 'lion': dict(opt='lion', opt_betas=[0.9, 0.99])}),
    'imagenet/vit_small_ft': Setting(  # Tables 13 and 8
        ('Table 13', 'Table 8'), devices=7,
        values=dict(IMAGENET, model='vit_small_patch16_224.augreg_in21k', pretrained=True, pretrained_path=None,
                    batch_size=128, epochs=9, warmup_epochs=1, cooldown_epochs=0, opt='sgd', momentum=0.9, lr=0.017,
                    weight_decay=1e-4, crop_pct=0.9),
        rows=rows(
            Row(accuracy='81.62'),
            Row('sam', 'all', 0.01, '81.75'),
            Row('sam', 'onlynorm', 0.1, '81.75'),
            Row('elementwise_l2', 'all', 0.1, '81.73'),
            Row('elementwise_l2', 'onlynorm', 1, '81.75'),
            Row('elementwise_linf', 'all', 1e-4, '81.84'),
            Row('elementwise_linf', 'onlynorm', 1e-2, '81.84'),
            Row('layerwise_l2', 'all', 1e-3, '81.79'),
            Row('layerwise_l2', 'onlynorm', None, '81.75'))),
}

# Table 7: rho on all parameters and on the normalization layers; of CIFAR-10 RN, CIFAR-100 RN, and CIFAR ViT
TABLE_7 = {
    'sam': ((0.1, 0.1, 0.1), (0.5, 1, 10)),
    'elementwise_l2': ((2, 1, 2.5), (3, 2.5, 10)),
    'elementwise_l2_orig': ((0.5, 1, 2.5), (0.5, 1, 10)),
    'elementwise_linf': ((0.005, 0.01, 0.0025), (0.025, 0.05, 0.1)),
    'layerwise_l2': ((0.025, 0.01, 0.005), (0.25, 0.2, 0.5)),
    'fisher': ((0.1, 0.1, 0.1), (0.5, 1, 1)),  # 0.5 is one reading of an ambiguous cell
}
# Table 3: ViT-T and ViT-S on CIFAR-10, then on CIFAR-100; each all and ON
TABLE_3 = {
    'sam': ('88.92 +- 0.0', '92.22 +- 0.1', '90.81 +- 0.2', '92.71 +- 0.0',
            '64.70 +- 0.4', '69.84 +- 0.2', '66.58 +- 0.3', '69.13 +- 0.3'),
    'elementwise_l2': ('90.02 +- 0.2', '92.52 +- 0.3', '92.40 +- 0.4', '93.97 +- 0.2',
                       '65.74 +- 0.6', '71.09 +- 0.1', '66.98 +- 0.0', '70.31 +- 0.2'),
    'elementwise_l2_orig': ('90.22 +- 0.2', '92.68 +- 0.2', '92.05 +- 0.3', '94.01 +- 0.5',
                            '65.81 +- 0.6', '71.25 +- 0.3', '67.23 +- 0.2', '70.42 +- 0.5'),
    'elementwise_linf': ('89.82 +- 0.3', '92.66 +- 0.2', '90.76 +- 0.6', '93.68 +- 0.2',
                         '65.11 +- 0.3', '68.11 +- 0.7', '66.55 +- 0.1', '69.19 +- 0.1'),
    'fisher': ('89.08 +- 0.1', '92.03 +- 0.2', '91.13 +- 0.2', '92.49 +- 0.1',
               '64.70 +- 0.4', '69.55 +- 0.8', '66.59 +- 0.5', '69.30 +- 0.4'),
    'layerwise_l2': ('89.51 +- 0.4', '93.08 +- 0.2', '91.21 +- 0.1', '94.02 +- 0.1',
                     '65.30 +- 0.6', '69.66 +- 0.1', '67.39 +- 0.4', '70.04 +- 0.2'),
}
NO_NUMBER = 'drawn in Figure 4 (left), without a number'
TABLE_3_ADAMW = ('89.19 +- 0.2', '90.34 +- 0.0', '63.79 +- 0.0', '64.37 +- 0.2')

for (d, data), (m, vit) in itertools.product(enumerate(('cifar10', 'cifar100')), enumerate(('vit_tiny', 'vit_small'))):
    SETTINGS[f'cifar/{vit}/{data}'] = Setting(
        ('Table 3',), devices=1,
        values=dict(CIFAR, model=f'{vit}_patch16_224', model_kwargs={'img_size': 32, 'patch_size': 4}, img_size=32,
                    num_classes=(10, 100)[d], batch_size=64, opt='adamw', opt_betas=[0.9, 0.999], lr=1e-4, drop_path=0,
                    aa='original'),
        rows=rows(Row(accuracy=TABLE_3_ADAMW[2 * d + m]),
                  *(Row(v, p, TABLE_7[v][i][2], TABLE_3[v][4 * d + 2 * m + i])
                    for v in TABLE_7 for i, p in enumerate(('all', 'onlynorm'))), plain_name='adamw'))
for d, data in enumerate(('cifar10', 'cifar100')):
    SETTINGS[f'cifar/resnet18/{data}'] = Setting(
        (('Table 10', 'Table 1')[d],), devices=1,
        values=dict(CIFAR, model='resnet18', model_kwargs={}, img_size=128, num_classes=(10, 100)[d], batch_size=128,
                    opt='momentum', momentum=0.9, lr=0.1, aa=None),
        rows=rows(Row(), *(Row(v, p, TABLE_7[v][i][d], NO_NUMBER if (v, data) == ('sam', 'cifar10') else None)
                           for v in TABLE_7 for i, p in enumerate(('all', 'onlynorm')))))

PAPER = [(f, n) for f, setting in SETTINGS.items() for n in setting.rows]
ILLEGIBLE = [(f, n) for f, n in PAPER if SETTINGS[f].rows[n].variant and SETTINGS[f].rows[n].rho is None]
