"""The paper's runs on ImageNet: Tables 2, 4, 8 and 13."""
import pytest

from support.settings import OPEN, Row, Setting, rows

RATIO = pytest.approx([3 / 4, 4 / 3])
IMAGENET = dict(OPEN, num_classes=1000, img_size=224, input_size=None, scale=[0.08, 1.0], ratio=RATIO, aa=None,
                train_interpolation='random', warmup_lr=1e-4, min_lr=1e-6, warmup_prefix=False, drop_path=0,
                sync_bn=False, opt_kwargs={'filter_bias_and_bn': True}, model_kwargs={})

IMAGENET_SETTINGS = {
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
