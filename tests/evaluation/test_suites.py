"""Evaluation sets in small trees of their published layouts: finding them, and their labels."""
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from support.suites import A_IDS, IDS, NAMES, R_IDS, V2, write_tree
from support.validating import hits

from timm_sam.cli.errors import OptionError
from timm_sam.evaluation.sets.folders import PUBLISHED, find_suites
from timm_sam.evaluation.sets.suites import open_suite, open_suites


@pytest.fixture(scope='session')
def image(tmp_path_factory):
    """One small image; trees are made of links to it."""
    path = tmp_path_factory.mktemp('image') / 'image.png'
    Image.new('RGB', (8, 8), (200, 30, 30)).save(path)
    return path


@pytest.fixture
def tree(tmp_path, image):
    return lambda folder, classes, files=('1.png',): write_tree(tmp_path / folder, image, classes, files)


@pytest.fixture(scope='session')
def published(tmp_path_factory, image):
    """Whole sets, not to be changed: name -> folder of class folders. Those are links to one: few files to remove."""
    top = tmp_path_factory.mktemp('published')
    sets = {'imagenet': ('imagenet/val', IDS), 'imagenetv2': (f'v2/{V2}', map(str, range(1000))),
            'imagenet-r': ('imagenet-r', R_IDS), 'imagenet-a': ('imagenet-a', A_IDS)}
    one = write_tree(top / 'one', image, ['class']) + '/class'
    for folder, classes in sets.values():
        (top / folder).mkdir(parents=True)
        for name in classes:
            os.symlink(one, top / folder / name)
    return {name: str(top / folder) for name, (folder, _) in sets.items()}


def fails(*args, **kwargs):
    with pytest.raises(OptionError) as caught:
        open_suite(*args, **kwargs)
    text = str(caught.value)
    assert '\n' not in text and text.startswith(f'--eval {args[0]}={args[1]}: ')
    return text


def targets(suite):
    """Class folder -> classes of its samples."""
    found = {}
    for path, target in suite.samples:
        found.setdefault(os.path.basename(os.path.dirname(path)), set()).add(target)
    return found


# --- ImageNet, -Sketch ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name,inside,kind', [('imagenet', 'val', 'id'), ('imagenet-sketch', 'sketch', 'ood')])
def test_imagenet_and_sketch(published, tmp_path, name, inside, kind):
    (tmp_path / inside).symlink_to(published['imagenet'])
    root = str(tmp_path / inside)
    for folder in (root, str(tmp_path)):
        suite = open_suite(name, folder, 1000)
        assert (suite.name, suite.root, suite.kind, suite.num_classes) == (name, root, kind, 1000)
        assert suite.space.name == 'imagenet' and suite.space.groups is None
        assert suite.crop_border_pixels == 0 and suite.flags == suite.notes == []
        assert suite.samples == [(f'{root}/{name}/1.png', i) for i, name in enumerate(IDS)]


def test_samples_are_sorted_by_class_and_file(tree):
    root = tree('set', ['c2', 'c10'], ['b.JPEG', 'a.jpg', 'c.PNG', '2.webp', '10.jpeg'])
    order = ['10.jpeg', '2.webp', 'a.jpg', 'b.JPEG', 'c.PNG']
    assert open_suite('set', root, 2).samples == [
        (f'{root}/{name}/{file}', i) for i, name in enumerate(['c2', 'c10']) for file in order]


def test_hidden_files_and_what_is_no_image_are_not_looked_at(tree):
    root = Path(tree('set', 'ab'))
    plain = open_suite('set', str(root), 2)
    (root / 'README.txt').write_text('about')
    (root / '.DS_Store').write_text('')
    (root / '.cache').mkdir()
    (root / 'a' / '.1.png').write_text('')
    (root / 'a' / '.thumbnails').mkdir()
    (root / 'b' / 'list.csv').write_text('')
    suite = open_suite('set', str(root), 2)
    assert suite.notes == ['1 file left out, by their names no images: 1 .csv'] and plain.notes == []
    assert replace(suite, notes=[]) == plain and len(suite.samples) == 2


def test_a_missing_or_empty_folder(tmp_path):
    folder = str(tmp_path / 'imagenet-a')
    assert 'no such folder' in fails('imagenet-a', folder, 1000)
    os.mkdir(folder)
    assert 'no class folders' in fails('imagenet-a', folder, 1000)
    Path(folder, 'ILSVRC2012_val_00000001.JPEG').write_text('')
    assert 'no class folders' in fails('imagenet-a', folder, 1000, allow_partial=True)


@pytest.mark.parametrize('name', PUBLISHED)
def test_a_published_set_needs_a_thousand_outputs(tree, name):
    text = fails(name, tree(name, IDS[:3]), 10)
    assert f'{name} needs a model with 1000 outputs, this one has 10' in text


@pytest.mark.parametrize('name,what', [('imagenet', 'ImageNet'), ('imagenetv2', 'ImageNetV2'),
                                       ('imagenet-sketch', 'ImageNet')])
def test_missing_classes_and_allow_partial(tree, name, what):
    present = {7: IDS[7], 8: IDS[8], 900: IDS[900]}
    root = tree('val', present.values())
    text = fails(name, root, 1000)
    assert f'997 of 1000 classes of {what} have no folder or no images in {root}: ' in text
    assert f': {IDS[0]}, {IDS[1]}, {IDS[2]}, {IDS[3]}, ...; complete the set, or add --allow-partial' in text
    suite = open_suite(name, root, 1000, allow_partial=True)
    assert suite.flags == ['partial: 3 of 1000 classes'] and suite.num_classes == 1000
    assert targets(suite) == {name: {i} for i, name in present.items()}


def test_a_class_folder_without_images_is_a_missing_class(tree):
    root = Path(tree('imagenet-a', A_IDS))
    (root / A_IDS[7] / '1.png').rename(root / A_IDS[7] / 'image.txt')
    assert f'1 of 200 classes of ImageNet-A have no folder or no images in {root}: {A_IDS[7]};' in fails(
        'imagenet-a', str(root), 1000)
    suite = open_suite('imagenet-a', str(root), 1000, allow_partial=True)
    assert suite.flags == ['partial: 199 of 200 classes'] and len(suite.samples) == 199


def test_only_empty_class_folders(tree):
    assert 'no images' in fails('imagenet-a', tree('imagenet-a', A_IDS[:2], []), 1000, allow_partial=True)


@pytest.mark.parametrize('allow_partial', [False, True])
def test_a_class_folder_of_no_label_space(tree, allow_partial):
    root = tree('val', [*IDS[:3], 'n00000000', 'more'])
    text = fails('imagenet', root, 1000, allow_partial=allow_partial)
    assert '2 of 5 class folders' in text and 'are not classes of ImageNet: more, n00000000;' in text


def test_a_folder_in_a_class_folder(tree):
    root = tree('imagenet-r', [R_IDS[0], f'{R_IDS[0]}/images'])
    assert "holds a folder, 'images'" in fails('imagenet-r', root, 1000)


def test_images_beside_the_class_folders(tree):
    """As for training: left out in silence, they would make it another set."""
    root = Path(tree('set', 'ab'))
    for name in ('2.PNG', '1.jpeg', '.3.png', 'list.txt'):
        (root / name).write_text('')
    assert '2 images beside its class folders (1.jpeg, 2.PNG), which are of no class' in fails('set', str(root), 2)


# --- ImageNet-R, -A ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name,ids', [('imagenet-r', R_IDS), ('imagenet-a', A_IDS)])
def test_imagenet_r_and_a_number_their_own_200_classes(published, name, ids):
    for folder in (published[name], os.path.dirname(published[name])):
        suite = open_suite(name, folder, 1000)
        assert suite.kind == 'ood' and suite.num_classes == 200 and suite.space.name == f'{name} (200 classes)'
        assert targets(suite) == {folder: {i} for i, folder in enumerate(ids)}
        assert all(IDS[suite.space.groups[target][0]] == folder for folder, (target,) in targets(suite).items())


@pytest.mark.parametrize('allow_partial', [False, True])
def test_one_set_given_as_another(published, allow_partial):
    for name, other in [('imagenet-a', 'imagenet-r'), ('imagenet-r', 'imagenet-a'), ('imagenet-r', 'imagenetv2'),
                        ('imagenet-a', 'imagenet'), ('imagenet', 'imagenetv2')]:
        text = fails(name, published[other], 1000, allow_partial=allow_partial)
        assert f'check that this is {name}, and' in text
    assert '/mappings/' in fails('objectnet', published['imagenet'], 1000, allow_partial=allow_partial)
    if not allow_partial:
        assert '800 of 1000 classes of ImageNet have no folder' in fails('imagenet', published['imagenet-r'], 1000)
        assert '800 of 1000 classes of ImageNetV2 have no' in fails('imagenetv2', published['imagenet-a'], 1000)


# --- ImageNetV2 -------------------------------------------------------------------------------------------------------


def test_imagenetv2_labels_are_the_folders_numbers(published):
    root = published['imagenetv2']
    for folder in (root, os.path.dirname(root)):
        suite = open_suite('imagenetv2', folder, 1000)
        assert suite.samples == [(f'{root}/{i}/1.png', i) for i in range(1000)]
        assert suite.flags == [] and suite.kind == 'id' and not suite.space.differs


@pytest.mark.parametrize('ids', [IDS, [str(i) for i in range(1000)]], ids=['wordnet', 'numbers'])
def test_a_missing_class_of_imagenetv2_shifts_no_label(tree, ids):
    """Folder "10" sorts before "2", and where classes are missing no rank is a label."""
    present = {i: ids[i] for i in (0, 2, 10, 101, 999)}
    root = tree(V2, present.values())
    assert f'995 of 1000 classes of ImageNetV2 have no folder or no images in {root}: {ids[1]}, {ids[3]}, ' in fails(
        'imagenetv2', root, 1000)
    suite = open_suite('imagenetv2', root, 1000, allow_partial=True)
    assert suite.flags == ['partial: 5 of 1000 classes']
    assert suite.samples == [(f'{root}/{name}/1.png', i) for i, name in present.items()]


def test_imagenetv2_numbers_and_wordnet_ids_together(tree):
    text = fails('imagenetv2', tree(V2, ['1', '2', '10', '100', '3', IDS[998]]), 1000, allow_partial=True)
    assert f'by number (1, 10, 100, 2, ...) and by WordNet id ({IDS[998]}) together' in text


def test_imagenetv2_numbers_that_are_no_class(tree):
    text = fails('imagenetv2', tree(V2, ['5', '1000', '-1', '²']), 1000, allow_partial=True)
    assert 'are not classes of ImageNetV2: -1, 1000, ²;' in text


# --- ObjectNet --------------------------------------------------------------------------------------------------------

OVERLAP = {'pen': [0, 5, 9], 'tie': [900, 2], 'air_mug': [3]}  # folder -> lines
OTHERS = ['squeegee', 'band_aid']


@pytest.fixture
def objectnet(tree, tmp_path):
    images = tree('objectnet-1.0/images', [*OVERLAP, *OTHERS], ['a.png', 'b.png'])
    mappings = tmp_path / 'objectnet-1.0' / 'mappings'
    mappings.mkdir()
    label = {folder: folder.replace('_', ' ').capitalize() for folder in [*OVERLAP, *OTHERS]}
    (mappings / 'folder_to_objectnet_label.json').write_text(json.dumps(label))
    (mappings / 'objectnet_to_imagenet_1k.json').write_text(json.dumps(
        {label[folder]: '; '.join(NAMES[line] for line in lines) for folder, lines in OVERLAP.items()}))
    (mappings / 'imagenet_to_label_2012_v2').write_text('\n'.join(NAMES) + '\n')
    (mappings / 'pytorch_to_imagenet_2012_id.json').write_text(json.dumps(
        {str((line + 300) % 1000): line for line in range(1000)}))
    return Path(images)


def test_objectnet_groups_and_what_is_left_out(objectnet, tmp_path):
    for folder in (objectnet, objectnet.parent, tmp_path):
        suite = open_suite('objectnet', str(folder), 1000)
        assert suite.root == str(objectnet) and suite.crop_border_pixels == 2 and suite.kind == 'ood'
        assert targets(suite) == {'air_mug': {0}, 'pen': {1}, 'tie': {2}} and len(suite.samples) == 6
        assert suite.num_classes == 3 and suite.space.groups == ((303,), (300, 305, 309), (200, 302))
        assert suite.flags == [] and suite.notes == ['4 images of classes outside ImageNet left out']


def test_objectnet_hits_by_hand(objectnet):
    """The images' classes are 0, 0, 1, 1, 2, 2; 304 is an output of "crane", of no class."""
    suite = open_suite('objectnet', str(objectnet), 1000)
    best = [[303], [304, 303], [309, 305, 300], [303, 305], [304, 305, 200], [1, 2, 3, 4, 5, 302]]
    logits = torch.full((6, 1000), -100.0)
    for row, outputs in zip(logits, best):
        row[outputs] = torch.arange(9.0, 9 - len(outputs), -1)
    targets = torch.tensor([target for _, target in suite.samples])
    official, plain = hits(suite.space, logits, targets), suite.space.right_of_all(logits, targets)
    assert official.tolist() == [[True, True, True, False, False, True], [True] * 6]
    assert plain.tolist() == [True, False, True, False, False, False]


def test_objectnet_with_an_unknown_folder_or_without_a_class(objectnet):
    for file in (objectnet / 'tie').iterdir():
        file.unlink()
    (objectnet / 'squeegee' / 'a.png').unlink()
    assert '1 of 3 classes of ObjectNet have no folder or no images' in fails('objectnet', str(objectnet), 1000)
    (objectnet / 'tie').rmdir()
    suite = open_suite('objectnet', str(objectnet), 1000, allow_partial=True)
    assert suite.flags == ['partial: 2 of 3 classes'] and targets(suite) == {'air_mug': {0}, 'pen': {1}}
    assert suite.notes == ['3 images of classes outside ImageNet left out']
    (objectnet / 'ties').mkdir()
    assert 'are not classes of ObjectNet: ties;' in fails('objectnet', str(objectnet), 1000, allow_partial=True)


def test_objectnet_without_mappings(objectnet):
    (objectnet.parent / 'mappings').rename(objectnet.parent / 'maps')
    assert f'{objectnet.parent}/mappings/imagenet_to_label_2012_v2: No such file' in fails(
        'objectnet', str(objectnet), 1000)


# --- other sets -------------------------------------------------------------------------------------------------------

def test_class_folders_in_timms_order(tree):
    suite = open_suite('blur', tree('blur', ['c10', 'c9', 'C1']), 3)
    assert targets(suite) == {'C1': {0}, 'c9': {1}, 'c10': {2}}
    assert suite.kind == 'ood' and suite.num_classes == 3 and suite.space.name == 'training (3 classes)'


@pytest.mark.parametrize('folders', [['a', 'b'], ['a', 'b', 'c', 'd']])
def test_other_numbers_of_class_folders_than_outputs(tree, folders):
    text = fails('blur', tree('blur', folders), 3, allow_partial=True)
    assert f'{len(folders)} class folders (a, b' in text and '3 outputs' in text and '--class-map' in text


def test_the_training_label_space_numbers_class_folders(tree):
    classes = {'a': 2, 'b': 0, 'c': 1}
    assert targets(open_suite('blur', tree('all', 'abc'), 3, classes)) == {'a': {2}, 'b': {0}, 'c': {1}}
    partial = tree('partial', 'ac')
    assert '1 of 3 classes of the class map have no folder or no images' in fails('blur', partial, 3, classes)
    suite = open_suite('blur', partial, 3, classes, allow_partial=True)
    assert targets(suite) == {'a': {2}, 'c': {1}} and suite.flags == ['partial: 2 of 3 classes']
    assert 'are not classes of the class map: d;' in fails('blur', tree('more', 'abcd'), 3, classes)
    # a model with outputs that no class uses
    assert open_suite('blur', str(Path(partial).parent / 'all'), 5, classes).flags == []
    assert "gives 'a' number 2, the model has 2 outputs" in fails('blur', partial, 2, classes)


def test_wordnet_ids_are_imagenets_for_a_thousand_outputs_and_no_others(tree):
    root = tree('fog', IDS[500:505])
    assert '995 of 1000 classes of ImageNet have no folder' in fails('fog', root, 1000)
    suite = open_suite('fog', root, 1000, allow_partial=True)
    assert targets(suite) == {IDS[i]: {i} for i in range(500, 505)} and suite.kind == 'ood'
    assert suite.num_classes == 1000
    assert targets(open_suite('fog', root, 5)) == {name: {i} for i, name in enumerate(IDS[500:505])}


def test_which_sets_are_in_distribution(tree, published):
    folder = tree('set', 'ab')
    kinds = {name: open_suite(name, folder, 2).kind for name in ('validation', 'Val', 'test', 'blur', 'imagenet-p')}
    assert kinds == {'validation': 'id', 'Val': 'id', 'test': 'id', 'blur': 'ood', 'imagenet-p': 'ood'}
    assert [s.kind for s in open_suites({'mine': folder, 'blur': folder}, 2)] == ['id', 'ood']
    assert [s.kind for s in open_suites({'mine': folder, 'val': folder}, 2)] == ['ood', 'id']
    assert [s.kind for s in open_suites({'imagenet-r': published['imagenet-r']}, 1000)] == ['ood']


def test_sets_that_only_the_order_of_folders_numbers_have_the_same_folders(tree):
    mine, same, other = tree('mine', 'abc'), tree('same', 'abc'), tree('other', 'abd')
    assert [targets(s) for s in open_suites({'mine': mine, 'same': same}, 3)] == [{'a': {0}, 'b': {1}, 'c': {2}}] * 2
    for allow_partial in (False, True):
        with pytest.raises(OptionError) as caught:
            open_suites({'mine': mine, 'other': other}, 3, allow_partial=allow_partial)
        text = str(caught.value)
        assert text.startswith(f'--eval other={other}: class folders (d) that mine={mine} lacks')
        assert '--class-map' in text and '\n' not in text
    numbers = {'a': 0, 'b': 1, 'c': 2, 'd': 2}
    both = open_suites({'mine': mine, 'other': other}, 3, numbers)
    assert targets(both[1]) == {'a': {0}, 'b': {1}, 'd': {2}}


@pytest.mark.parametrize('order', [('mine', 'few'), ('few', 'mine')])
def test_partial_set_takes_its_classes_from_a_complete_one(tree, order):
    folders = {'mine': tree('mine', ['c1', 'c2', 'c10']), 'few': tree('few', ['c10', 'c2'])}
    folders = {name: folders[name] for name in order}
    with pytest.raises(OptionError, match='--eval few=.*2 class folders'):
        open_suites(folders, 3)
    found = {suite.name: suite for suite in open_suites(folders, 3, allow_partial=True)}
    assert targets(found['few']) == {'c2': {1}, 'c10': {2}} and found['few'].flags == ['partial: 2 of 3 classes']
    assert found['mine'].flags == [] and found['mine'].space == found['few'].space
    with pytest.raises(OptionError, match='--eval few=.*2 class folders'):
        open_suites({'few': folders['few']}, 3, allow_partial=True)


def test_partial_set_with_a_class_of_its_own_is_refused(tree):
    folders = {'mine': tree('mine', 'abc'), 'few': tree('few', 'ax'), 'published': tree('more', 'abcx')}
    with pytest.raises(OptionError, match=r'--eval few=.*class folders \(x\) that mine=.* lacks'):
        open_suites(folders, 3, allow_partial=True)
    with pytest.raises(OptionError, match='--eval published=.*4 class folders'):
        open_suites({name: folders[name] for name in ('mine', 'published')}, 3)


def test_find_suites(tmp_path):
    for folder in ('ILSVRC2012/val', V2, 'imagenetv2', 'sketch', 'objectnet-1.0'):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / 'imagenet-a').write_text('')
    found, missing = find_suites(str(tmp_path))
    assert found == {'imagenet': f'{tmp_path}/ILSVRC2012/val', 'imagenetv2': f'{tmp_path}/{V2}',
                     'imagenet-sketch': f'{tmp_path}/sketch', 'objectnet': f'{tmp_path}/objectnet-1.0'}
    assert list(found) == ['imagenet', 'imagenetv2', 'imagenet-sketch', 'objectnet']
    assert missing == ['imagenet-r', 'imagenet-a', 'imagenet-c']
    with pytest.raises(OptionError, match='--eval-root .*nowhere: no such folder'):
        find_suites(str(tmp_path / 'nowhere'))
