"""The pool: devices, an order that jobs need, a start that is killed, and what is taken for done."""
import contextlib
import dataclasses
import io
import json
import multiprocessing
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from support.processes import Process, family, python
from support.running import in_process, logging_as_before, quiet_about_timm
from support.states import summary

from timm_sam.cli.errors import OptionError
from timm_sam.jobs.job import VALIDATE, Job, is_done, options_of
from timm_sam.jobs.pool import Pool, Worker, environments
from timm_sam.jobs.table import run_missing, run_table
from timm_sam.jobs.worker import run_job
from timm_sam.sweep import __main__ as sweep


def test_each_process_has_a_gpu_of_those_that_we_see_or_a_thread(monkeypatch):
    assert environments(2) == [{'OMP_NUM_THREADS': '1'}] * 2
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 3)
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
    assert environments(2) == [{'CUDA_VISIBLE_DEVICES': '0'}, {'CUDA_VISIBLE_DEVICES': '1'}]
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', 'GPU-a,GPU-b,GPU-c')
    assert [place['CUDA_VISIBLE_DEVICES'] for place in environments(3)] == ['GPU-a', 'GPU-b', 'GPU-c']
    with pytest.raises(OptionError, match='--devices 4: there are 3 GPUs'):
        environments(4)
    with pytest.raises(OptionError, match='--jobs 0 runs nothing'):
        environments(0, '--jobs')


def training(folder, images, *flags, **more):
    argv = ('--device', 'cpu', '--data-dir', str(images), '--num-classes', '4', '--model', 'test_resnet', '--img-size',
            '32', '-b', '8', '-j', '0', '--epochs', '1', '--warmup-epochs', '0', '--lr', '0.05', '--output',
            str(folder.parent), '--experiment', folder.name, *flags)
    return Job(folder.name, 'training', str(folder), argv, **more)


def leave(job, epochs):
    """A run's folder with as many epochs in its table."""
    Path(job.folder).mkdir()
    Path(job.folder, 'args.yaml').write_text(yaml.safe_dump(options_of(job)))
    lines = [f'{epoch},0.5,0.5,{epoch}.0\n' for epoch in range(epochs)]
    Path(job.folder, 'summary.csv').write_text('epoch,train_loss,eval_loss,eval_top1\n' + ''.join(lines))


def test_run_that_ended_before_its_last_checkpoint_is_gone_on_with(tmp_path):
    job = training(tmp_path / 'run', tmp_path, '--epochs', '2', keep=True)
    leave(job, 2)
    assert is_done(job)  # of which somebody has removed the weights
    (tmp_path / 'run' / 'tmp.pth.tar').write_bytes(b'')
    assert not is_done(job)  # killed while it wrote its first checkpoint
    torch.save(dict(epoch=0), tmp_path / 'run' / 'last.pth.tar')
    assert not is_done(job) and is_done(dataclasses.replace(job, keep=False))
    torch.save(dict(epoch=1), tmp_path / 'run' / 'last.pth.tar')
    assert is_done(job)


def test_run_that_diverged_is_done_unless_others_need_its_weights(tmp_path):
    kept = training(tmp_path / 'run', tmp_path, '--epochs', '3', keep=True)
    leave(kept, 1)
    with open(f'{kept.folder}/summary.csv', 'a') as f:
        f.write('1,nan,nan,nan\n')
    assert is_done(dataclasses.replace(kept, keep=False)) and not is_done(kept)
    torch.save(dict(epoch=0), tmp_path / 'run' / 'last.pth.tar')
    assert not is_done(kept)


def test_run_that_diverged_and_left_no_weights_begins_anew_where_they_are_needed(image_folder, tmp_path):
    job = training(tmp_path / 'run', image_folder, '--epochs', '2', '--resume', 'auto', keep=True)
    leave(job, 1)
    with open(f'{job.folder}/summary.csv', 'a') as f:
        f.write('1,nan,nan,nan\n')
    with quiet_about_timm(), logging_as_before():
        assert run_job(job) is None
    assert is_done(job) and len(summary(job.folder)) == 2


def test_unfinished_run_of_other_epochs_is_not_gone_on_with(tmp_path):
    job = training(tmp_path / 'run', tmp_path, '--epochs', '3', keep=True)
    leave(job, 1)
    fewer = training(tmp_path / 'run', tmp_path, '--epochs', '2', keep=True)
    assert not is_done(fewer)  # nothing to go on with
    torch.save(dict(epoch=0), tmp_path / 'run' / 'last.pth.tar')
    assert not is_done(job) and not is_done(dataclasses.replace(fewer, keep=False))
    with pytest.raises(OptionError, match='was begun with epochs 3, not 2: remove it, or name another --out'):
        is_done(fewer)


def test_evaluation_of_fewer_sets_is_not_that_of_all(tmp_path):
    result = tmp_path / 'evaluation.json'
    result.write_text(json.dumps(dict(results=[], protocol=dict(
        datasets=[dict(name='imagenet', folder='/data/val')], checkpoints=[dict(path='last.pth.tar', sha256='0')]))))
    job = Job('x', 'x', str(tmp_path), (), VALIDATE, True, str(result))
    assert is_done(job) and is_done(dataclasses.replace(job, sets=('imagenet',)))
    assert not is_done(dataclasses.replace(job, sets=('imagenet', 'imagenet-r')))


def test_what_is_trained_anew_is_measured_anew(tmp_path, monkeypatch):
    train = training(tmp_path / 'run', tmp_path, keep=True)
    leave(train, 1)
    job = Job('x', 'x', train.folder, (), VALIDATE, True, f'{train.folder}/evaluation.json', train)
    Path(job.result).write_text('of these weights')
    given = []
    monkeypatch.setattr('timm_sam.jobs.table.Pool', lambda places: contextlib.nullcontext(
        SimpleNamespace(run=lambda jobs: given.extend(jobs))))
    run_missing([job, train], [{}])
    assert not given and Path(job.result).exists()
    Path(train.folder, 'tmp.pth.tar').write_bytes(b'')
    run_missing([job, train], [{}])
    assert given == [job, train] and not Path(job.result).exists()


def test_worker_that_has_ended_between_two_jobs_is_replaced():
    pool, began = Pool.__new__(Pool), []

    def start(environment):
        ours, theirs = multiprocessing.Pipe()
        began.append(theirs)
        return Worker(SimpleNamespace(join=lambda: None), ours, environment)

    pool.start = start
    pool.workers = [start({})]
    began[0].close()
    pool.send(pool.workers[0], Job('x', 'x', 'x', ()))
    assert len(began) == 2 and began[1].recv().name == pool.workers[0].job.name == 'x'
    began[1].close()
    pool.workers[0].connection.close()


def test_folder_that_cannot_be_emptied_fails_its_run_only(tmp_path, monkeypatch):
    def refuse(folder):
        raise OSError(39, 'Directory not empty')
    monkeypatch.setattr('shutil.rmtree', refuse)
    assert run_job(training(tmp_path, tmp_path)) == f'{tmp_path} cannot be written (Directory not empty)'


def test_stdout_that_nobody_reads_is_one_line(tmp_path, capsys, monkeypatch):
    class Gone(io.StringIO):
        def flush(self):
            raise BrokenPipeError(32, 'Broken pipe')
    monkeypatch.setattr(sys, 'stdout', Gone())
    assert run_table('sweep', list, str(tmp_path), 1, lambda: 0) == 2
    err = capsys.readouterr().err
    assert 'stdout cannot be written (Broken pipe)' in err and err.count('\n') == 1


@pytest.mark.full
def test_evaluation_waits_for_its_training_and_fails_with_it(image_folder, tmp_path, capfd):
    def evaluation(train):
        result = f'{train.folder}/evaluation.json'
        return Job(f'{train.name} evaluated', 'evaluation', train.folder, (
            '--checkpoint', f'{train.folder}/last.pth.tar', '--eval', f'colors={image_folder}/validation', '--device',
            'cpu', '--workers', '0', '--results-file', result), VALIDATE, True, result, train)

    good = training(tmp_path / 'good', image_folder, keep=True)
    bad = training(tmp_path / 'bad', image_folder, '--lr', '-1', keep=True)
    jobs = [evaluation(good), evaluation(bad), bad, good]
    place = environments(1)
    failed = run_missing(jobs, place)
    said = capfd.readouterr().out.splitlines()
    assert [name for name, _ in failed] == ['bad', 'bad evaluated'], said
    assert failed[1] == ('bad evaluated', 'needs bad')
    order = [line.split('] ')[1].split(':')[0] for line in said if line.startswith('[')]
    assert order == ['bad', 'bad evaluated', 'good', 'good evaluated']
    assert [is_done(job) for job in jobs] == [True, False, False, True]
    # without --keep a run leaves no checkpoint
    assert not run_missing([training(tmp_path / 'slim', image_folder)], place)
    assert sorted(path.name for path in (tmp_path / 'slim').iterdir()) == [
        'args.yaml', 'log.txt', 'summary.csv', 'timing.csv']
    with pytest.raises(OptionError, match='was run with lr 0.05, not 0.1: remove it, or name another --out'):
        is_done(training(tmp_path / 'slim', image_folder, '--lr', '0.1'))


@pytest.mark.slow
def test_killed_start_leaves_no_process_and_is_gone_on_with(image_folder, tmp_path):
    line = (f'--out out --devices 2 --grid lr=0.01,0.02,0.03,0.04 --device cpu --data-dir {image_folder} --num-classes '
            f'4 --model test_resnet --img-size 32 -b 8 -j 0 --epochs 20 --warmup-epochs 0').split()
    with Process(python('-m', 'timm_sam.sweep', *line), tmp_path) as first:
        first.wait_for('[1/4]')
        workers = family(first.pid)[1:]
        assert len(workers) >= 3
        done = in_process(sweep.main, line, tmp_path)
        assert done.code == 2 and 'is in use by another process' in done.err and done.err.count('\n') == 1
        first.signal(signal.SIGKILL)
        first.wait()
    end = time.monotonic() + 30
    while any(Path(f'/proc/{pid}').exists() for pid in workers):
        assert time.monotonic() < end
        time.sleep(0.1)
    done = in_process(sweep.main, line, tmp_path)
    assert done.code == 0, done.err
    assert done.out.split(',')[0] == '4 runs' and not done.out.startswith('4 runs, 0 ')
    assert '4 runs: 4 finished.' in done.out
