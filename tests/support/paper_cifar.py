"""The paper's runs on CIFAR: Tables 1, 3, 5, 7, 10, 11, 12, 17, Figures 3, 4, 8, 10, 11."""
import itertools

from support.settings import OPEN, Row, Setting, rows

CIFAR = dict(OPEN, scale=[0.64, 0.64], ratio=[1, 1], train_interpolation='bicubic', crop_pct=1, epochs=200,
             warmup_epochs=0, cooldown_epochs=0, min_lr=0, weight_decay=5e-4, pretrained=False, img_size=32,
             opt_kwargs={}, wd_params='all',
             norm_params=None, norm_drop=0, sam_filter=None, sam_method=None)
DATA = ('cifar10', 'cifar100')
# of each data set, as in the paper's code
OF_DATA = {'cifar10': dict(num_classes=10, mean=[0.4914, 0.4822, 0.4465], std=[0.2023, 0.1994, 0.2010]),
           'cifar100': dict(num_classes=100, mean=[0.5071, 0.4867, 0.4408], std=[0.2675, 0.2565, 0.2761])}
RESNET = dict(CIFAR, model_kwargs={}, batch_size=128, opt='momentum', momentum=0.9, lr=0.1, aa=None)
VIT = dict(CIFAR, model_kwargs={'img_size': 32, 'patch_size': 4}, batch_size=64, opt='adamw', opt_betas=[0.9, 0.999],
           lr=1e-4, drop_path=0, aa='cifar10')

# Table 7: rho on all parameters and on the normalization layers; of CIFAR-10 RN, CIFAR-100 RN, and CIFAR ViT
TABLE_7 = {
    'sam': ((0.1, 0.1, 0.1), (0.5, 1, 10)),
    'elementwise_l2': ((2, 1, 2.5), (3, 2.5, 10)),
    'elementwise_l2_orig': ((0.5, 1, 2.5), (0.5, 1, 10)),
    'elementwise_linf': ((0.005, 0.01, 0.0025), (0.025, 0.05, 0.1)),
    'layerwise_l2': ((0.025, 0.01, 0.005), (0.25, 0.2, 0.5)),
    'fisher': ((0.1, 0.1, 0.1), (0.5, 1, 10)),  # the second three are a reading of ambiguous cells
}
SELECTIONS = ('all', 'onlynorm')

# Tables 1 and 10, by data set: ResNet-56, ResNeXt, WRN-28, each all and ON (SGD: one); without and with AutoAugment
NETWORKS_1 = ('resnet56', 'resnext29_32x4d', 'wrn28_10')
TABLE_1 = {
    'cifar10': ('''
    sgd                 94.28+-0.2 95.37+-0.1 96.20+-0.1
    sam                 94.94+-0.1 95.18+-0.1 96.35+-0.2 96.48+-0.1 97.08+-0.1 97.10+-0.0
    elementwise_l2      94.96+-0.1 94.94+-0.2 96.41+-0.1 96.53+-0.1 96.98+-0.2 97.06+-0.0
    elementwise_l2_orig 95.14+-0.1 95.21+-0.1 96.40+-0.1 96.41+-0.1 97.10+-0.1 97.07+-0.1
    elementwise_linf    94.93+-0.1 94.96+-0.0 96.06+-0.2 96.22+-0.1 96.95+-0.2 97.00+-0.1
    fisher              95.01+-0.1 95.03+-0.1 96.31+-0.0 96.55+-0.0 96.95+-0.0 97.13+-0.1
    layerwise_l2        94.95+-0.2 95.07+-0.1 96.07+-0.3 96.46+-0.1 97.02+-0.0 96.96+-0.1
''', '''
    sgd                 94.70+-0.1 96.19+-0.2 97.01+-0.0
    sam                 95.25+-0.1 95.40+-0.1 96.98+-0.1 97.22+-0.3 97.57+-0.1 97.58+-0.0
    elementwise_l2      95.12+-0.0 94.82+-0.2 97.01+-0.0 97.21+-0.1 97.61+-0.0 97.69+-0.0
    elementwise_l2_orig 95.39+-0.1 95.60+-0.1 97.24+-0.0 97.33+-0.1 97.60+-0.0 97.56+-0.0
    elementwise_linf    95.12+-0.1 95.48+-0.3 96.70+-0.2 96.91+-0.2 97.52+-0.1 97.62+-0.1
    fisher              95.19+-0.0 95.38+-0.1 96.77+-0.0 97.24+-0.1 97.53+-0.0 97.65+-0.1
    layerwise_l2        95.43+-0.3 95.28+-0.1 96.80+-0.1 96.88+-0.1 97.60+-0.0 97.48+-0.1
'''),
    'cifar100': ('''
    sgd                 72.82+-0.3 80.16+-0.3 80.71+-0.2
    sam                 75.07+-0.6 75.58+-0.4 81.79+-0.4 82.22+-0.2 83.11+-0.3 84.19+-0.2
    elementwise_l2      75.05+-0.1 76.25+-0.0 81.26+-0.2 82.30+-0.3 82.38+-0.2 83.67+-0.3
    elementwise_l2_orig 75.54+-0.7 76.07+-0.2 82.15+-0.3 81.90+-0.4 83.67+-0.1 83.53+-0.2
    elementwise_linf    75.36+-0.1 76.10+-0.2 81.02+-0.6 82.38+-0.3 83.25+-0.2 84.14+-0.2
    fisher              75.01+-0.4 75.65+-0.1 81.55+-0.2 82.21+-0.2 83.37+-0.1 84.01+-0.1
    layerwise_l2        74.63+-0.1 76.03+-0.3 81.66+-0.2 82.52+-0.2 83.23+-0.2 84.05+-0.2
''', '''
    sgd                 75.26+-0.2 80.31+-0.3 83.62+-0.1
    sam                 76.33+-0.3 76.02+-0.3 82.33+-0.5 83.19+-0.2 85.30+-0.1 85.42+-0.1
    elementwise_l2      76.51+-0.1 76.04+-0.3 82.00+-0.3 83.20+-0.1 84.80+-0.3 85.43+-0.3
    elementwise_l2_orig 76.49+-0.2 76.58+-0.4 82.78+-0.1 82.87+-0.3 85.25+-0.4 85.41+-0.1
    elementwise_linf    74.89+-0.4 76.19+-0.4 82.33+-0.1 83.11+-0.2 85.28+-0.1 85.46+-0.1
    fisher              76.67+-0.1 76.25+-0.2 82.56+-0.3 83.28+-0.4 85.09+-0.3 85.35+-0.1
    layerwise_l2        76.23+-0.5 76.93+-0.4 82.61+-0.3 83.32+-0.2 85.32+-0.3 85.95+-0.1
'''),
}
# Table 11: VGG-13, VGG-16, VGG-19, DenseNet-100, likewise
NETWORKS_11 = ('vgg13_bn', 'vgg16_bn', 'vgg19_bn', 'densenet100')
TABLE_11 = {
    'cifar10': '''
    sgd                 94.29+-0.0 93.85+-0.3 93.82+-0.0 94.51+-0.1
    sam                 94.88+-0.1 95.19+-0.2 94.96+-0.0 95.02+-0.1 94.58+-0.1 94.81+-0.2 95.84+-0.2 95.89+-0.0
    elementwise_l2      94.97+-0.1 95.08+-0.0 95.01+-0.1 95.02+-0.1 94.68+-0.0 94.99+-0.1 95.76+-0.2 95.86+-0.2
    elementwise_l2_orig 94.95+-0.0 95.13+-0.1 94.87+-0.1 95.12+-0.1 94.66+-0.1 94.87+-0.2 95.92+-0.3 95.85+-0.1
    elementwise_linf    94.96+-0.1 95.06+-0.0 94.74+-0.2 94.91+-0.0 94.68+-0.1 94.73+-0.1 95.56+-0.2 95.91+-0.1
    fisher              95.07+-0.0 95.17+-0.0 94.77+-0.0 95.10+-0.2 94.55+-0.0 94.91+-0.1 95.65+-0.1 96.00+-0.1
    layerwise_l2        94.78+-0.1 95.09+-0.1 94.54+-0.1 95.08+-0.1 66.21+-48.7 94.96+-0.1 95.48+-0.2 95.82+-0.1
''',
    'cifar100': '''
    sgd                 75.44+-0.2 74.43+-0.4 73.40+-0.2 77.00+-0.2
    sam                 76.74+-0.2 77.57+-0.1 75.81+-0.2 76.86+-0.1 74.08+-0.6 75.60+-0.1 79.42+-0.6 79.90+-0.3
    elementwise_l2      76.65+-0.1 77.49+-0.1 75.95+-0.2 76.45+-0.2 74.72+-0.2 75.12+-0.1 78.90+-0.2 79.83+-0.3
    elementwise_l2_orig 77.27+-0.2 77.37+-0.2 76.65+-0.1 76.66+-0.3 75.00+-0.5 75.44+-0.2 79.94+-0.4 80.14+-0.1
    elementwise_linf    76.82+-0.3 77.62+-0.2 75.43+-0.4 76.68+-0.1 72.74+-0.2 74.50+-0.4 79.47+-0.3 79.64+-0.2
    fisher              76.76+-0.2 77.68+-0.4 75.85+-0.2 76.99+-0.1 74.03+-0.2 74.96+-0.3 79.68+-0.2 80.38+-0.3
    layerwise_l2        76.76+-0.2 77.91+-0.2 75.99+-0.2 77.12+-0.2 74.65+-0.5 75.28+-0.2 78.25+-0.2 79.86+-0.3
''',
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
TABLE_3_ADAMW = ('89.19 +- 0.2', '90.34 +- 0.0', '63.79 +- 0.0', '64.37 +- 0.2')

NO_NUMBER = 'drawn in Figure 4 (left), without a number'


def accuracies(table, network, networks):
    """Accuracy of each run of a network: {(variant or 'sgd', selection or None): '94.28 +- 0.2'}."""
    found = {}
    for line in table.strip().splitlines():
        words = line.split()
        name, cells = words[0], [cell.replace('+-', ' +- ') for cell in words[1:]]
        if name == 'sgd':
            found['sgd', None] = cells[networks.index(network)]
        else:
            for i, selection in enumerate(SELECTIONS):
                found[name, selection] = cells[2 * networks.index(network) + i]
    return found


def sam_rows(column, basic=None, with_aa=None):
    """The rows of Table 7's variants with the radii of one of its columns."""
    basic, with_aa = basic or {}, with_aa or {}
    return [Row(v, p, TABLE_7[v][i][column], basic.get((v, p)), with_aa.get((v, p)))
            for v in TABLE_7 for i, p in enumerate(SELECTIONS)]


CIFAR_SETTINGS = {}
for (d, data), (m, vit) in itertools.product(enumerate(DATA), enumerate(('vit_tiny', 'vit_small'))):
    accuracy = {(v, p): TABLE_3[v][4 * d + 2 * m + i] for v in TABLE_7 for i, p in enumerate(SELECTIONS)}
    CIFAR_SETTINGS[f'cifar/{vit}/{data}'] = Setting(
        ('Table 3',), devices=1, values=dict(VIT, model=f'{vit}_patch16_224', **OF_DATA[data]),
        rows=rows(Row(accuracy=TABLE_3_ADAMW[2 * d + m]), *sam_rows(2, accuracy), plain_name='adamw'))
for d, data in enumerate(DATA):
    table = ('Table 10', 'Table 1')[d]
    for network in NETWORKS_1:
        basic, with_aa = (accuracies(part, network, NETWORKS_1) for part in TABLE_1[data])
        CIFAR_SETTINGS[f'cifar/{network}/{data}'] = Setting(
            (table,), devices=1, values=dict(RESNET, model=f'cifar_{network}', **OF_DATA[data]),
            rows=rows(Row(accuracy=basic['sgd', None], with_aa=with_aa['sgd', None]), *sam_rows(d, basic, with_aa)))
    for network in NETWORKS_11:
        basic = accuracies(TABLE_11[data], network, NETWORKS_11)
        CIFAR_SETTINGS[f'cifar/{network}/{data}'] = Setting(
            ('Table 11',), devices=1, values=dict(RESNET, model=f'cifar_{network}', **OF_DATA[data]),
            rows=rows(Row(accuracy=basic['sgd', None]), *sam_rows(d, basic)))
    drawn = {('sam', p): NO_NUMBER for p in SELECTIONS} if data == 'cifar10' else {}
    CIFAR_SETTINGS[f'cifar/resnet18/{data}'] = Setting(
        (table,), devices=1, values=dict(RESNET, model='cifar_resnet18', **OF_DATA[data]),
        rows=rows(Row(), *sam_rows(d, drawn)))

# Figure 3: only the last stages' normalization layers; with the radius of SAM-ON, which the figure does not name
for network in ('wrn28_10', 'resnext29_32x4d'):
    CIFAR_SETTINGS[f'cifar/{network}/cifar100_late_blocks'] = Setting(
        ('Figure 3',), devices=1, values=CIFAR_SETTINGS[f'cifar/{network}/cifar100'].values,
        rows={name: Row('sam', 'onlynorm', 1, 'drawn in Figure 3, without a number')
              for name in ('block_3', 'blocks_2_and_3')},
        own={'block_3': dict(sam_filter='layer3'), 'blocks_2_and_3': dict(sam_filter='layer2|layer3')})
# Tables 5 and 12, Figures 4 (left) and 8: masks; 16 samples are the method's authors' on CIFAR
FISHER_MASK = dict(sam_method=['ssam_fisher'], sam_ssam_fisher_samples=16)
CIFAR_SETTINGS['cifar/wrn28_10/cifar100_masks'] = Setting(
    ('Table 12',), devices=1, values=CIFAR_SETTINGS['cifar/wrn28_10/cifar100'].values,
    rows={'random_99.95': Row('sam', 'all', 0.1, '80.97 +- 0.2'),
          'ssam_fisher_50': Row('sam', 'all', 0.2, '83.94 +- 0.1'),
          'ssam_fisher_99.95': Row('sam', 'all', 0.2, '83.14 +- 0.1'),
          'ssam_dynamic_50': Row('sam', 'all', 0.2, '83.53 +- 0.1'),
          'ssam_dynamic_99.95': Row('sam', 'all', 0.2, '81.01 +- 0.1')},
    own={'random': dict(sam_method=['random_mask'], sam_random_mask_sparsity=0.9995, sam_random_mask_every=None),
         'ssam_fisher': dict(FISHER_MASK, sam_ssam_fisher_sparsity=0.5),
         'ssam_fisher_99': dict(sam_ssam_fisher_sparsity=0.9995),
         'ssam_dynamic': dict(sam_method=['ssam_dynamic'], sam_ssam_dynamic_sparsity=0.5),
         'ssam_dynamic_99': dict(sam_ssam_dynamic_sparsity=0.9995)})
CIFAR_SETTINGS['cifar/resnet18/cifar10_masks'] = Setting(
    ('Figure 8',), devices=1, values=CIFAR_SETTINGS['cifar/resnet18/cifar10'].values,
    rows={'random_99.93': Row('sam', 'all', 0.1, 'drawn in Figure 8, without a number'),
          'ssam_fisher_50': Row('sam', 'all', 0.1, 'drawn in Figure 8, without a number'),
          'ssam_dynamic_50': Row('sam', 'all', 0.1, 'drawn in Figure 8, without a number')},
    own={'random': dict(sam_method=['random_mask'], sam_random_mask_sparsity=0.9993, sam_random_mask_every=None),
         'ssam_fisher': dict(FISHER_MASK, sam_ssam_fisher_sparsity=0.5),
         'ssam_dynamic': dict(sam_method=['ssam_dynamic'], sam_ssam_dynamic_sparsity=0.5)})
# Figure 11 (right): weight decay of all but normalization layers, and none; of all parameters it is Table 1's
RUNS = {'sgd': (), 'sam_all': ('sam', 'all', 0.1), 'sam_onlynorm': ('sam', 'onlynorm', 1)}
CIFAR_SETTINGS['cifar/wrn28_10/cifar100_weight_decay'] = Setting(
    ('Figure 11',), devices=1, values=CIFAR_SETTINGS['cifar/wrn28_10/cifar100'].values,
    rows={f'{kind}_{name}': Row(*run, accuracy='drawn in Figure 11 (right), without a number')
          for kind in ('nonorm', 'none') for name, run in RUNS.items()},
    own={kind: dict(wd_params=kind) for kind in ('nonorm', 'none')})
# Figure 11 (left): dropout behind normalization layers, of a probability that the paper does not name
CIFAR_SETTINGS['cifar/wrn28_10/cifar100_norm_drop'] = Setting(
    ('Figure 11',), devices=1, values=dict(CIFAR_SETTINGS['cifar/wrn28_10/cifar100'].values, norm_drop=0.1),
    rows={name: Row(*RUNS[name], accuracy='drawn in Figure 11 (left), without a number')
          for name in ('sgd', 'sam_all')})
# Figure 10: gamma 1 and beta 0, not trained
CIFAR_SETTINGS['cifar/wrn28_10/cifar100_fixed_norm'] = Setting(
    ('Figure 10',), devices=1, values=dict(CIFAR_SETTINGS['cifar/wrn28_10/cifar100'].values, norm_params='fixed'),
    rows={'sam_all': Row(*RUNS['sam_all'], accuracy='drawn in Figure 10, without a number')})
# Table 17: nothing but normalization layers is trained; SGD, and SAM with two radii
TABLE_17 = {'resnet101': ('78.75', '78.63', '79.27'), 'wrn28_10': ('63.49', '64.48', '62.70')}
for network, found in TABLE_17.items():
    CIFAR_SETTINGS[f'cifar/{network}/cifar10_only_norm'] = Setting(
        ('Table 17',), devices=1,
        values=dict(RESNET, model=f'cifar_{network}', **OF_DATA['cifar10']) | dict(norm_params='only'),
        rows={'sgd': Row(accuracy=found[0]), 'sam_0.01': Row('sam', 'all', 0.01, found[1]),
              'sam_0.05': Row('sam', 'all', 0.05, found[2])})
