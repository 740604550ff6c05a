"""Label spaces: hits counted by hand, parity with timm's accuracy, ObjectNet's mapping files."""
import json
import pickle
import re

import pytest
import torch
from support.validating import hits
from timm.data import ImageNetInfo
from timm.utils import accuracy

from timm_sam.cli.errors import OptionError
from timm_sam.evaluation.sets.label_spaces import (
    LabelSpace,
    imagenet_a_space,
    imagenet_r_space,
    imagenet_space,
    imagenet_wordnet_ids,
    objectnet_labels,
    subset_space,
)

# --- hits -------------------------------------------------------------------------------------------------------------

# Eight outputs; class 0 owns outputs 2, 3 and 7, class 1 owns output 5, class 2 owns 0 and 4; 1 and 6 are no class's.
GROUPS = ((2, 3, 7), (5,), (0, 4))


def logits_of(*orders, outputs=8):
    """One row per order, in which the outputs named first rank first, the others behind them."""
    rows = torch.full((len(orders), outputs), -100.0)
    for row, order in zip(rows, orders):
        for place, output in enumerate(order):
            row[output] = -float(place)
    return rows


def test_groups_take_their_best_logit():
    logits = torch.tensor([[1.0, 9, 2, 5, 3, 4, 8, -1], [0, 9, -7, -6, -1, -2, 8, -5]])
    assert LabelSpace('g', GROUPS).reduce(logits).tolist() == [[5, 4, 3], [-5, -2, 0]]


def test_right_by_hand_in_both_spaces():
    space = LabelSpace('g', GROUPS)
    logits = logits_of(
        (1, 7, 5, 0),        # best class 0, best output none of a class
        (3, 5, 0),           # both are class 0
        (1, 6, 5, 2),        # best class 1, first output of a class ranks third
        (0, 2, 3, 7, 5),     # class 2 before class 0 before class 1, which ranks fifth of all
        (6, 1, 2, 3, 7, 0),  # class 2 ranks sixth of all, second of the three
    )
    targets = torch.tensor([0, 0, 1, 1, 2])
    official, plain = hits(space, logits, targets, topk=(1, 2, 5)), space.right_of_all(logits, targets)
    assert official.tolist() == [
        [True, True, True, False, False], [True, True, True, False, True], [True] * 5]
    assert plain.tolist() == [False, True, False, False, False]
    assert space.differs and space.num_classes(8) == 3


def test_two_hundred_classes_masked_and_1000_way():
    """Classes of ImageNet-R are the outputs 1, 2, 4, 6, ...: output 0 wins over all, and counts in one space only."""
    space = imagenet_r_space()
    assert [group[0] for group in space.groups[:4]] == [1, 2, 4, 6]
    logits = logits_of((0, 2), (2, 0), (0, 3, 5, 7, 10, 4), (0, 1, 6), outputs=1000)
    targets = torch.tensor([1, 1, 2, 3])
    assert hits(space, logits, targets).tolist() == [[True, True, True, False], [True, True, True, True]]
    assert space.right_of_all(logits, targets).tolist() == [False, True, False, False]


def test_an_output_of_no_class_is_never_right():
    space = subset_space('two', [3, 5])
    for target in (-1, 0, 1, 2):
        assert not space.right_of_all(logits_of((1, 6, 0, 2, 4)), torch.tensor([target])).any()


@pytest.mark.parametrize('outputs', [1, 2, 5, 10, 1000])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_without_groups_hits_are_timms_accuracy_ties_included(outputs, dtype):
    generator = torch.Generator().manual_seed(outputs)
    logits = torch.randint(0, 3, (64, outputs), generator=generator).to(dtype)  # full of ties
    targets = torch.randint(0, outputs, (64,), generator=generator)
    space = LabelSpace('plain')
    plain = space.right_of_all(logits, targets)
    assert not space.differs and space.num_classes(outputs) == outputs
    assert space.reduce(logits) is logits
    assert plain.float().sum() * 100. / len(targets) == accuracy(logits, targets, topk=(1, 5))[0]


def test_single_output_groups_mask_the_logits():
    space = imagenet_a_space()
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(0, 50, (128, 1000), generator=generator).float()
    columns = [group[0] for group in space.groups]
    assert torch.equal(space.reduce(logits), logits[:, columns])


def test_gradients_reach_the_best_output_of_each_group_also_after_inference_mode():
    space = LabelSpace('g', GROUPS)
    logits = torch.tensor([[1.0, 9, 5, 5, 3, 4, 8, -1]])
    with torch.inference_mode():
        space.reduce(logits)
    logits.requires_grad_()
    (space.reduce(logits) * torch.tensor([2.0, 3.0, 7.0])).sum().backward()
    assert logits.grad.tolist() in (  # outputs 2 and 3 tie: either, but one
        [[0, 0, 2, 0, 7, 3, 0, 0]], [[0, 0, 0, 2, 7, 3, 0, 0]])


def test_tables_are_made_once_and_stay_at_home(monkeypatch):
    made, tensor = [], torch.tensor
    monkeypatch.setattr(torch, 'tensor', lambda *args, **kwargs: made.append(args) or tensor(*args, **kwargs))
    space = LabelSpace('g', GROUPS)
    logits, targets = logits_of((1,)), tensor([0])
    made.clear()

    def use(space):
        return space.reduce(logits), space.right_of_all(logits, targets)

    use(space)
    assert len(made) == 2
    use(space)
    assert len(made) == 2
    copy = pickle.loads(pickle.dumps(space))
    assert copy == space and pickle.dumps(space) == pickle.dumps(LabelSpace('g', GROUPS))
    for ours, theirs in zip(use(space), use(copy)):
        assert torch.equal(ours, theirs)
    assert len(made) == 4


def test_a_model_with_too_few_outputs():
    with pytest.raises(ValueError, match='needs 8 outputs, not 7'):
        LabelSpace('g', GROUPS).reduce(torch.zeros(1, 7))


@pytest.mark.parametrize('groups', [(), ((),), ((1,), ()), ((1,), (1,)), ((1, 1),), ((-1,),)])
def test_groups_that_are_no_label_space(groups):
    with pytest.raises(ValueError, match='disjoint'):
        LabelSpace('bad', groups)


# --- ImageNet and its subsets -----------------------------------------------------------------------------------------

def test_imagenet_and_its_subsets():
    ids = imagenet_wordnet_ids()
    assert len(ids) == 1000 and ids == tuple(sorted(ids)) and ids[0] == 'n01440764'
    assert imagenet_space() == LabelSpace('imagenet')
    for variant, space in {'r': imagenet_r_space(), 'a': imagenet_a_space()}.items():
        assert space.name == f'imagenet-{variant} (200 classes)' and len(space.groups) == 200
        assert space.groups == tuple(sorted(space.groups))
    info = ImageNetInfo()
    names = [info.index_to_description(group[0]) for group in imagenet_a_space().groups]
    assert names[0].startswith('stingray')
    assert imagenet_r_space().groups != imagenet_a_space().groups


# --- ObjectNet's mappings ---------------------------------------------------------------------------------------------

# Names as in ILSVRC2012's order, which is not that of model outputs: line n is output (n + 3) % 10.
NAMES = ['crane', 'ballpoint, pen', 'crane', 'quill, quill pen', 'fountain pen', 'banana', 'teapot', 'mug', 'kit fox',
         'desk']
ORDER = {str((line + 3) % 10): line for line in range(10)}
FOLDERS = {'pen': 'Pen', 'banana': 'Banana', 'band_aid': 'Band Aid', 'coffee_mug': 'Mug', 'squeegee': 'Squeegee'}
LABELS = {'Pen': 'ballpoint, pen; quill, quill pen; fountain pen', 'Mug': 'mug', 'Banana': 'banana'}
FILES = {
    'folder_to_objectnet_label.json': FOLDERS,
    'objectnet_to_imagenet_1k.json': LABELS,
    'imagenet_to_label_2012_v2': NAMES,
    'pytorch_to_imagenet_2012_id.json': ORDER,
}


def write_mappings(folder, **changed):
    """The four files as published, or with other contents (None: without the file)."""
    folder.mkdir()
    for file, content in {**FILES, **changed}.items():
        if content is not None:
            text = content if isinstance(content, str) else (
                '\n'.join(content) + '\n' if isinstance(content, list) else json.dumps(content, indent=2))
            (folder / file).write_text(text)
    return str(folder)


def test_objectnet_groups_from_the_mapping_files(tmp_path):
    labels = objectnet_labels(write_mappings(tmp_path / 'mappings'), outputs=10)
    assert labels.folders == ('banana', 'coffee_mug', 'pen')
    assert labels.space.name == 'objectnet (3 groups)'
    # lines 5; 7; 1, 3 and 4, shifted by three
    assert labels.space.groups == ((8,), (0,), (4, 6, 7))
    assert labels.others == {'band_aid', 'squeegee'}


def test_the_name_that_stands_twice_does_not_shift_the_others_and_windows_line_ends_do_no_harm(tmp_path):
    plain = objectnet_labels(write_mappings(tmp_path / 'a'), outputs=10)
    names = '\r\n'.join([*NAMES[:-1], 'crane']) + '\r\n\r\n'
    assert objectnet_labels(write_mappings(tmp_path / 'b', imagenet_to_label_2012_v2=names), outputs=10) == plain


@pytest.mark.parametrize('file,content,message', [
    *[(file, None, 'No such file') for file in FILES],
    ('folder_to_objectnet_label.json', '{"pen": ', 'not JSON'),
    ('folder_to_objectnet_label.json', ['pen'], 'not JSON'),
    ('folder_to_objectnet_label.json', '["pen"]', 'a JSON list'),
    ('folder_to_objectnet_label.json', {**FOLDERS, 'pen': 3}, "'pen' is 3"),
    ('folder_to_objectnet_label.json', {**FOLDERS, 'pencil': 'Pen'}, "'pen' and 'pencil' have one label"),
    ('folder_to_objectnet_label.json', {'pen': 'Pen'}, "label 'Mug' has no folder"),
    ('objectnet_to_imagenet_1k.json', {}, 'no label'),
    ('objectnet_to_imagenet_1k.json', {**LABELS, 'Mug': ['mug']}, "'Mug' is"),
    ('objectnet_to_imagenet_1k.json', {**LABELS, 'Mug': 'beer mug'}, "'beer mug' is not in imagenet_to_label_2012_v2"),
    ('objectnet_to_imagenet_1k.json', {**LABELS, 'Mug': 'crane'}, "'crane' stands on 2 lines"),
    ('objectnet_to_imagenet_1k.json', {**LABELS, 'Mug': 'mug; banana'}, "'banana' belongs to 'Mug' and 'Banana'"),
    ('imagenet_to_label_2012_v2', NAMES[:-1], '9 names instead of 10'),
    ('imagenet_to_label_2012_v2', [*NAMES[:4], '', *NAMES[5:]], '9 names instead of 10'),
    ('pytorch_to_imagenet_2012_id.json', {**ORDER, '0': 1}, 'one-to-one'),
    ('pytorch_to_imagenet_2012_id.json', {**ORDER, '10': 10}, 'one-to-one'),
    ('pytorch_to_imagenet_2012_id.json', {**ORDER, '0': 'mug'}, 'invalid literal'),
    ('pytorch_to_imagenet_2012_id.json', {**ORDER, '0': None}, 'NoneType'),
])
def test_malformed_mappings_name_the_file(tmp_path, file, content, message):
    mappings = write_mappings(tmp_path / 'mappings', **{file: content})
    with pytest.raises(OptionError, match=re.escape(message)) as caught:
        objectnet_labels(mappings, '--eval objectnet=DIR', outputs=10)
    text = str(caught.value)
    at_fault = 'objectnet_to_imagenet_1k.json' if 'has no folder' in message else file
    assert text.startswith(f'--eval objectnet=DIR: {mappings}/{at_fault}: ') and '\n' not in text
    assert text.endswith('restore the mappings folder from the published objectnet-1.0')
