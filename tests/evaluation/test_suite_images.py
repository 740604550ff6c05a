"""Images of evaluation sets through timm's loader, unreadable ones among them, and class-balanced subsets."""
import os
import pickle
import re
import warnings
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_loader

from timm_sam.cli.errors import OptionError
from timm_sam.evaluation.sets.images import SuiteDataset, UnreadableImage, class_balanced_subset
from timm_sam.evaluation.sets.label_spaces import LabelSpace
from timm_sam.evaluation.sets.suites import Suite, open_suite


def suite_of(samples, root='/set', **kwargs):
    classes = 1 + max(target for _, target in samples)
    return Suite('set', root, samples, LabelSpace('training'), 'id', classes, **kwargs)


# --- images -----------------------------------------------------------------------------------------------------------

def odd_images(folder):
    """Images of every mode that published sets have, each with a red of (200, 30, 30) or its grey; their sizes differ.

    Returns:
        File name -> the color expected in mode RGB.
    """
    red, grey = (200, 30, 30), (81, 81, 81)
    Image.new('RGB', (9, 8), red).save(folder / 'rgb.png')
    Image.new('L', (8, 11), 81).save(folder / 'grey.png')
    Image.new('RGB', (8, 8), red).convert('CMYK').save(folder / 'cmyk.jpg', quality=100)
    Image.new('RGBA', (8, 8), (*red, 0)).save(folder / 'rgba.png')
    Image.new('RGB', (8, 8), red).save(folder / 'webp.webp', lossless=True)
    palette = Image.new('P', (8, 8), 1)
    palette.putpalette([0, 0, 0, *red])
    palette.save(folder / 'palette.png')
    palette.save(folder / 'transparent.png', transparency=b'\x00\x80')
    return {'rgb.png': red, 'grey.png': grey, 'cmyk.jpg': red, 'rgba.png': red, 'webp.webp': red,
            'palette.png': red, 'transparent.png': red}


@pytest.fixture
def folder(tmp_path):
    """The folder of a set's only class."""
    path = tmp_path / 'set' / 'red'
    path.mkdir(parents=True)
    return path


def one_class(folder):
    return open_suite('odd', str(folder.parent), 1)


def loader_of(dataset, workers=0, prefetcher=False, **kwargs):
    return create_loader(
        dataset, input_size=(3, 8, 8), batch_size=4, num_workers=workers, use_prefetcher=prefetcher,
        device=torch.device('cpu'), mean=(0, 0, 0), std=(1, 1, 1), persistent_workers=False, **kwargs)


def error_of(loader):
    """What the loader raises; without its traceback, which would keep the worker processes for the collector."""
    try:
        list(loader)
    except UnreadableImage as error:
        return error.with_traceback(None)
    pytest.fail('no image was unreadable')


def test_images_of_every_mode(folder):
    colors = odd_images(folder)
    suite = one_class(folder)
    dataset = SuiteDataset(suite, 'RGB')
    assert len(dataset) == len(colors)
    for (path, _), (image, target) in zip(suite.samples, dataset):
        assert image.mode == 'RGB' and target == 0
        assert np.abs(np.array(image).astype(int) - colors[os.path.basename(path)]).max() <= 3, path
    assert {image.mode for image, _ in SuiteDataset(suite, 'L')} == {'L'}
    assert {image.mode for image, _ in SuiteDataset(suite, None)} == {'RGB', 'L', 'CMYK', 'RGBA', 'P'}


def test_indices_keep_their_order_and_the_dataset_pickles(folder):
    odd_images(folder)
    paths = sorted(map(str, folder.iterdir()))[-4:]
    suite = suite_of([(path, target) for path, target in zip(paths, (0, 0, 1, 1))])
    dataset = pickle.loads(pickle.dumps(SuiteDataset(suite, 'RGB', [3, 0])))
    assert dataset.samples == [suite.samples[3], suite.samples[0]] and [t for _, t in dataset] == [1, 0]
    dataset.transform = lambda image: image.size
    assert dataset[0] == ((8, 8), 1) and len(dataset) == 2


@pytest.mark.parametrize('workers', [0, 1])
@pytest.mark.parametrize('prefetcher', [False, True])
def test_through_timms_loader_images_of_every_mode_and_then_a_truncated_one(folder, workers, prefetcher):
    odd_images(folder)
    loader = loader_of(SuiteDataset(one_class(folder)), workers, prefetcher)
    assert [len(targets) for _, targets in loader] == [4, 3]

    whole = (folder / 'rgb.png').read_bytes()
    (folder / 'rgb.png').write_bytes(whole[:len(whole) // 2])
    suite = one_class(folder)
    error = error_of(loader_of(SuiteDataset(suite), workers, prefetcher))
    text = str(error)
    assert isinstance(error, OptionError) and '\n' not in text
    assert text.startswith(f'--eval odd={suite.root}: cannot read the image {folder}/rgb.png (')
    assert text.endswith('; restore the file') and 'Traceback' not in text



@pytest.mark.parametrize('prefetcher', [False, True])
def test_the_border_of_objectnets_images_is_cut_off_by_timm(folder, prefetcher):
    image = Image.new('RGB', (24, 20), (255, 0, 0))
    image.paste((0, 0, 255), (1, 1, 23, 19))
    image.save(folder / 'image.png')
    dataset = SuiteDataset(suite_of([(str(folder / 'image.png'), 0)], crop_border_pixels=2))

    def reds(**kwargs):
        loader = loader_of(dataset, prefetcher=prefetcher, crop_pct=1.0, crop_mode='squash', **kwargs)
        return float(next(iter(loader))[0][0, 0].max())
    assert reds() > 0 and reds(crop_border_pixels=2) == 0


@pytest.mark.parametrize('damage', ['empty', 'text', 'half a jpeg', 'half a png', 'dangling link', 'bad checksum'])
@pytest.mark.parametrize('mode', ['RGB', None])
def test_unreadable_images_are_never_passed_over(folder, damage, mode):
    path = folder / 'image.png'
    if damage == 'dangling link':
        path.symlink_to(folder / 'nowhere.png')
    elif damage in ('empty', 'text'):
        path.write_text('' if damage == 'empty' else 'Not found')
    else:
        noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
        noise.save(path, 'JPEG' if 'jpeg' in damage else 'PNG')
        data = bytearray(path.read_bytes())
        if damage == 'bad checksum':
            data[-30] ^= 255
        path.write_bytes(data if damage == 'bad checksum' else data[:len(data) // 2])
    with pytest.raises(UnreadableImage, match='cannot read the image') as caught:
        SuiteDataset(one_class(folder), mode)[0]
    assert str(caught.value).count(str(path)) == 1


def test_warnings_of_pil_do_not_hide_a_bomb(folder, monkeypatch):
    Image.new('RGB', (20, 20)).save(folder / 'large.png')
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 300)
    with warnings.catch_warnings():
        warnings.simplefilter('default')
        with pytest.warns(Image.DecompressionBombWarning):
            SuiteDataset(one_class(folder))[0]


# --- subsets ----------------------------------------------------------------------------------------------------------

@pytest.fixture
def uneven():
    """Classes a to e with 10 images each, f with 2."""
    files = [(f'/set/{name}/{i}.png', target) for target, name in enumerate('abcdef') for i in range(10)]
    return suite_of(files[:52])


def counts(suite, indices):
    return Counter(suite.samples[i][1] for i in indices)


def test_subsets_are_class_balanced(uneven):
    for n in range(1, 53):
        indices = class_balanced_subset(uneven, n, seed=3)
        assert indices == sorted(set(indices)) and len(indices) == n
        number = counts(uneven, indices)
        whole = [number[c] for c in range(5)]
        assert max(whole) - min(whole) <= 1
        assert number[5] == 2 or n < 18 and max(whole) - number[5] <= 1
        if n > 1:
            assert set(class_balanced_subset(uneven, n - 1, seed=3)) < set(indices)


def test_subsets_depend_on_the_seed_alone(uneven):
    chosen = class_balanced_subset(uneven, 14, seed=0)
    assert chosen == [3, 6, 7, 13, 18, 19, 20, 22, 32, 39, 40, 48, 50, 51]
    assert class_balanced_subset(uneven, 14, seed=0) == chosen
    moved = suite_of([(path.replace('/set/', '/moved/name of '), target) for path, target in uneven.samples], '/moved')
    assert class_balanced_subset(moved, 14, seed=0) == chosen
    others = [class_balanced_subset(uneven, 14, seed=seed) for seed in range(1, 9)]
    assert all(other != chosen for other in others)
    # which classes have one more than the others, and which images are taken, varies too
    assert len({tuple(sorted(counts(uneven, other).items())) for other in others}) > 1


@pytest.mark.parametrize('n', [0, -1, 53])
def test_subsets_of_impossible_sizes(uneven, n):
    with pytest.raises(OptionError, match=re.escape(f'--attack-num-samples {n}: set has 52 images; use 1 to 52')):
        class_balanced_subset(uneven, n, seed=0)
