"""Runs packed into one file and unpacked: each is what it was, and none counts that did not."""
import yaml
from support.reports import age, write_run

from timm_sam.paper import archive
from timm_sam.report.runs import FINISHED, MIXED, STOPPED, find_runs, read_run


def unpacked(tmp_path):
    """Name of a run -> the run, after a way through a file."""
    packed = archive.pack(str(tmp_path / 'runs'), str(tmp_path / 'runs.csv'))
    assert archive.unpack(str(tmp_path / 'runs.csv'), str(tmp_path / 'again')) == packed
    return {path.rpartition('/')[2]: read_run(path, 0) for path in find_runs([str(tmp_path / 'again')])}


def test_run_that_went_on_with_other_options_is_not_averaged_afterwards_either(tmp_path):
    write_run(tmp_path / 'runs' / 'whole')
    mixed = write_run(tmp_path / 'runs' / 'mixed', seed=1)
    text = yaml.safe_dump({**yaml.safe_load((mixed / 'args.yaml').read_text()), 'lr': 0.5, 'data_dir': '/disk/digits'})
    (mixed / 'args-before-epoch-2.yaml').write_text(text)
    age(mixed)
    runs = unpacked(tmp_path)
    assert runs['whole'].status == FINISHED
    assert runs['mixed'].status == MIXED and 'args-before-epoch-2.yaml' in runs['mixed'].reason
    earlier = yaml.safe_load((tmp_path / 'again' / 'mixed' / 'args-before-epoch-2.yaml').read_text())
    assert (earlier['lr'], earlier['data_dir'], runs['mixed'].args['lr']) == (0.5, 'digits', 0.1)
    assert '/disk' not in (tmp_path / 'runs.csv').read_text()


def test_run_before_its_first_epoch_is_there_afterwards(tmp_path):
    (write_run(tmp_path / 'runs' / 'begun', ()) / 'summary.csv').unlink()
    assert unpacked(tmp_path)['begun'].status == STOPPED


def test_folder_of_timms_script_is_kept_by_its_name(tmp_path):
    folder = write_run(tmp_path / 'runs' / 'timm')
    given = yaml.safe_load((folder / 'args.yaml').read_text())
    (folder / 'args.yaml').write_text(yaml.safe_dump({**given, 'data': '/disk/cifar10', 'data_dir': None}))
    assert unpacked(tmp_path)['timm'].args['data_dir'] == 'cifar10'
