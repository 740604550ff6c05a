"""train.py --holdout: which images are held out, that nothing is trained on them, and where it cannot be."""
import json
import shlex
import tarfile

import numpy as np
import pytest
from support.held_out import files_of, noting
from support.images import COLORS
from support.multilabel import install, write_labelled_tree
from support.processes import run, torchrun
from support.states import differences
from torch.utils.data import Dataset

from timm_sam.cli.errors import OptionError
from timm_sam.cli.image_folders import open_files
from timm_sam.training import data as data_module
from timm_sam.training.holdout import hold_out, split

pytestmark = pytest.mark.filterwarnings('ignore:unclosed file:ResourceWarning')  # timm leaves it to the collector


def targets_of(counts):
    return [target for target, count in enumerate(counts) for _ in range(count)]


@pytest.mark.parametrize('share, held', [(0.1, [1, 1, 2, 1]), (0.25, [1, 3, 5, 1]), (0.5, [1, 5, 10, 2]),
                                         (0.99, [1, 9, 19, 2])])
def test_each_class_gives_its_share_and_keeps_some(share, held):
    targets = targets_of([2, 10, 20, 3])
    kept, out = split(targets, list(map(str, range(35))), share, 0)
    assert np.bincount([targets[i] for i in out]).tolist() == held
    assert sorted(kept + out) == list(range(35)) and kept == sorted(kept) and out == sorted(out)


def test_choice_depends_on_seed_and_names_only():
    targets, names = targets_of([10, 10]), [f'{i % 10}.png' for i in range(20)]
    first = split(targets, names, 0.3, 0)[1]
    assert split(targets, names, 0.3, 0)[1] == first != split(targets, names, 0.3, 1)[1]
    assert set(first) <= set(split(targets, names, 0.5, 0)[1])  # a smaller share lies within a larger one
    order = np.random.default_rng(0).permutation(20)
    shuffled = split([targets[i] for i in order], [names[i] for i in order], 0.3, 0)[1]
    assert sorted(order[shuffled].tolist()) == first
    # not the same places in each class
    assert [i for i in first if i < 10] != [i - 10 for i in first if i >= 10]


def test_class_with_a_single_image_is_a_mistake():
    with pytest.raises(ValueError, match='class 1 has a single image'):
        split([0, 0, 1], list('abc'), 0.5, 0)


# Data sets by their kinds

@pytest.mark.parametrize('kind', ['folder', 'tar'])
def test_folders_and_tar_files_are_split_alike(image_folder, tmp_path, kind):
    root = str(image_folder)
    if kind == 'tar':
        root = str(tmp_path / 'train.tar')
        with tarfile.open(root, 'w') as tar:
            tar.add(image_folder / 'train', '.')

    def opened():
        return open_files(root, '' if kind == 'tar' else 'train', 'x')
    kept, held = hold_out(opened(), opened(), 0.2, 0)
    assert (len(kept), len(held)) == (32, 8)
    assert not set(files_of(kept)) & set(files_of(held))
    assert sorted(files_of(kept) + files_of(held)) == sorted(opened().filenames())
    assert held.filenames() == files_of(held) and held.filenames(basename=True)[0].endswith('.png')
    folders = [name.split('/')[-2] for name in files_of(held)]
    assert folders == [name for name in sorted(COLORS) for _ in range(2)]
    held.transform = np.asarray
    for i, name in enumerate(files_of(held)):
        index = opened().filenames().index(name)
        assert (held[i][0] == np.asarray(opened()[index][0])).all() and held[i][1] == opened()[index][1]


class Numbers(Dataset):
    """As torchvision's data sets are: targets in a list, a transform."""

    transform = None

    def __init__(self, targets):
        self.targets = targets

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        return self.transform(index), self.targets[index]


def test_data_set_of_torchvision_is_split_with_transforms_of_their_own():
    kept, held = hold_out(Numbers([0, 1] * 10), Numbers([0, 1] * 10), 0.3, 0)
    kept.transform, held.transform = (lambda i: i), (lambda i: -i)
    kept, held = ([part[i] for i in range(len(part))] for part in (kept, held))
    assert sorted(i for i, _ in kept) + sorted(-i for i, _ in held) != list(range(20))
    assert sorted([i for i, _ in kept] + [-i for i, _ in held]) == list(range(20))
    assert sorted(target for _, target in held) == [0] * 3 + [1] * 3


def test_data_set_without_targets_is_refused():
    class Bare(Numbers):
        def __init__(self):
            pass
    with pytest.raises(OptionError, match='--holdout 0.3: the classes of this data set are not known'):
        hold_out(Bare(), Bare(), 0.3, 0)


# train.py

@pytest.fixture
def parts(monkeypatch):
    """What each run trains and validates on, by file names."""
    seen = []
    monkeypatch.setattr(data_module, 'hold_out', noting(seen.append))
    return seen


def test_run_validates_on_what_it_does_not_train_on_and_goes_on_so(run_train, image_folder, parts, tmp_path):
    (tmp_path / 'data').symlink_to(image_folder / 'train')  # no split to validate on at all
    quoted = "''"
    options = f'--data-dir data --holdout 0.2 --epochs 2 --train-split {quoted}'
    whole = run_train(f'{options} --experiment whole')
    assert whole.code == 0, whole.err[-3000:]
    assert whole.log('--holdout 0.2: 8 of 40 training images are validated on') and len(whole.summary('whole')) == 2
    run_train(f'{options} --experiment parts --stop-epoch 1')
    done = run_train(f'{options} --experiment parts --resume auto')
    assert done.code == 0 and done.summary('parts') == whole.summary('whole')
    assert differences(whole.checkpoint('whole')['state_dict'], done.checkpoint('parts')['state_dict']) == []
    run_train(f'{options} --experiment seeded --seed 7 --sam-variant sam --sam-rho 0.1')
    assert len(parts) == 4 and all(part == parts[0] for part in parts)
    run_train(f'{options} --experiment other --holdout-seed 7')
    assert parts[-1] != parts[0]


@pytest.mark.full
def test_two_ranks_hold_out_the_images_of_one_process_and_count_each_once(run_train, base, parts, tmp_path):
    # hardly any step, so that the same weights are validated; without BatchNorm, whose statistics would differ
    options = '--holdout 0.2 --model test_vit --lr 1e-20 --min-lr 0 --warmup-lr 0 --epochs 1'
    two = run(torchrun('-m', 'support.held_out', *shlex.split(f'{base} {options} --experiment two')), tmp_path)
    one = run_train(f'{options} --experiment one')
    assert two.code == one.code == 0, two.err[-3000:] + one.err[-3000:]
    ranks = [json.loads((tmp_path / f'held-out-{rank}.json').read_text()) for rank in (0, 1)]
    assert ranks[0] == ranks[1] == parts[0] and list(map(len, parts[0])) == [32, 8]
    assert two.log('--holdout 0.2: 8 of 40 training images are validated on')
    ours, theirs = two.summary('two')[0], one.summary('one')[0]
    assert ours['eval_top1'] == theirs['eval_top1']
    assert float(ours['eval_loss']) == pytest.approx(float(theirs['eval_loss']), rel=1e-5)


@pytest.mark.parametrize('options, words', [
    ('--holdout 1', ['--holdout 1']), ('--holdout 0', ['--holdout 0']),
    ('--holdout 0.1 --dataset wds/ --data-dir .', ['--dataset wds/'])])
def test_share_that_cannot_be_is_one_line(run_train, options, words):
    done = run_train(options)
    assert done.code == 2 and all(word in done.last_line for word in words)


def test_single_image_of_a_class_is_one_line(run_train, image_folder, tmp_path):
    for name in COLORS:
        (tmp_path / 'data' / 'train' / name).mkdir(parents=True)
        for i in range(1 if name == 'red' else 4):
            (tmp_path / 'data' / 'train' / name / f'{i}.png').symlink_to(image_folder / 'train' / name / f'{i}.png')
    done = run_train('--data-dir data --holdout 0.25')
    assert done.code == 2 and '--holdout 0.25: class 2 has a single image' in done.last_line


def test_several_classes_per_image_are_refused(run_train, tmp_path, monkeypatch):
    install(monkeypatch.setattr)
    tree = write_labelled_tree(tmp_path / 'tree')
    done = run_train(f'--data-dir {tree} --dataset hfds/tree --task multilabel --num-classes 5 --target-key labels '
                     f'--holdout 0.2')
    assert done.code == 2 and '--holdout 0.2 takes a share of each class' in done.last_line
