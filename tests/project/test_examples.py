"""What lies in examples/: CIFAR as folders, and the Slurm script with stand-ins for Slurm's commands."""
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.images import write_image_folder
from support.places import ROOT
from support.processes import Process, family

from timm_sam import train
from timm_sam.training.options import parse_args

EXAMPLES = ROOT / 'examples'
sys.path.insert(0, str(EXAMPLES))
import cifar_folders  # noqa: E402

SCRIPT = EXAMPLES / 'slurm_imagenet.sh'


# ---- CIFAR

class FakeCIFAR:
    """Four images of two classes; refuses to be had from a folder named 'nowhere'."""

    classes = ['frog', 'ship']

    def __init__(self, root, train, download):
        assert download
        if root.name == 'nowhere':
            raise RuntimeError('no network')
        generator = np.random.default_rng(int(train))
        self.images = [Image.fromarray(generator.integers(0, 256, (32, 32, 3)).astype(np.uint8)) for _ in range(4)]

    def __iter__(self):
        return iter(zip(self.images, [0, 1, 1, 0]))


@pytest.fixture
def fake_cifar(monkeypatch):
    monkeypatch.setattr(cifar_folders, 'CIFAR10', FakeCIFAR)


def test_cifar_folders_pad_training_images_only(fake_cifar, tmp_path, capsys):
    assert cifar_folders.main(['cifar10', str(tmp_path / 'out')]) == 0
    assert capsys.readouterr().out == f'Wrote {tmp_path}/out\n'
    files = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob('*.png')}
    names = ('frog/00000', 'ship/00001', 'ship/00002', 'frog/00003')
    assert files == {f'out/{split}/{name}.png' for split in ('train', 'validation') for name in names}
    for split, pad in (('train', 4), ('validation', 0)):
        for name, expected in zip(names, FakeCIFAR(tmp_path, split == 'train', True).images):
            found = np.asarray(Image.open(tmp_path / 'out' / split / f'{name}.png'))
            assert (found == np.pad(expected, ((pad, pad), (pad, pad), (0, 0)))).all()


def test_cifar_folders_end_in_one_line_and_leave_nothing(fake_cifar, tmp_path, capsys):
    for arguments, text in ((['--source', str(tmp_path / 'nowhere')], 'no network; check the network'),
                            ([], 'exists: name another folder')):
        with pytest.raises(SystemExit) as e:
            cifar_folders.main(['cifar10', str(tmp_path / 'out'), *arguments])
        assert e.value.code == 2
        line, = capsys.readouterr().err.splitlines()
        assert text in line
        assert not (tmp_path / 'out' / 'train').exists()
        (tmp_path / 'out').mkdir(exist_ok=True)


# ---- Slurm

def test_script_is_bash_and_asks_slurm_for_what_it_needs():
    subprocess.run(['bash', '-n', SCRIPT], check=True)
    text = SCRIPT.read_text()
    inner = re.search(r"on_each_node='\n(.*?)\n'\n", text, re.DOTALL).group(1)
    subprocess.run(['bash', '-n', '-c', inner], check=True)
    options = dict(line.split(' ', 1)[1].lstrip('-').partition('=')[::2] for line in re.findall('#SBATCH .*', text))
    assert options['signal'] == 'USR1@300'  # to the processes of the step, not to the batch shell (that would be B:)
    assert options['open-mode'] == 'append'
    assert options['ntasks-per-node'] == '1'
    assert 'requeue' in options


def test_scripts_command_is_one_of_train_py(tmp_path):
    joined = re.sub(r'\s*\\\n\s*', ' ', SCRIPT.read_text())
    command, = re.findall(r'^ *(torchrun .*train\.py .*) &$', joined, re.MULTILINE)
    values = {'$RECIPE': str(ROOT / 'hparams/imagenet/resnet50/layerwise_l2_onlynorm.yaml'), '$DATA_DIR': str(tmp_path),
              '$EXPERIMENT': 'sam_on-17'}
    words = [values.get(word, word) for word in shlex.split(command)]
    arguments = words[words.index('train.py') + 1:]
    assert arguments[-1] == '$@'
    args = parse_args(train.build_parser(), [*arguments[:-1], '--device', 'cpu'])
    assert (args.resume, args.experiment, args.sam_variant) == ('auto', 'sam_on-17', 'layerwise_l2')


STAND_INS = {
    'srun': 'while [[ $1 == --* ]]; do shift; done\n'
            'echo $$ > "$STEP"\n'
            'export SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NTASKS=1\n'
            'exec "$@"\n',
    'scontrol': 'if [ "$1" = show ]; then echo localhost; else echo "$*" >> "$REQUEUED"; fi\n',
    # looks more often than the script asks it to, which only costs time here
    'torchrun': f'for i in "$@"; do [ "$i" = 10 ] && i=3; a+=("$i"); done\n'
                f'exec {sys.executable} -m torch.distributed.run "${{a[@]}}"\n',
}
RECIPE = '''
model: test_resnet
num_classes: 4
img_size: 32
device: cpu
batch_size: 4
workers: 1
epochs: 4
warmup_epochs: 0
lr: 0.05
log_interval: 1
checkpoint_hist: 1
sam_variant: sam
sam_rho: 0.5
'''


class Job:
    """A job of a Slurm that knows one node: its script, and signals to all processes of its step."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name, body in STAND_INS.items():
            (folder / 'bin').mkdir(exist_ok=True)
            (folder / 'bin' / name).write_text(f'#!/bin/bash\n{body}')
            (folder / 'bin' / name).chmod(0o755)
        (folder / 'recipe.yaml').write_text(RECIPE)
        write_image_folder(folder / 'images', splits={'train': 100, 'validation': 2})
        self.requeued, self.step = folder / 'requeued', folder / 'step'
        self.environment = dict(
            PATH=f'{folder}/bin:{os.environ["PATH"]}', STEP=str(self.step), REQUEUED=str(self.requeued),
            DATA_DIR=str(folder / 'images'), SLURM_JOB_NAME='sam_on', SLURM_JOB_ID='17', SLURM_JOB_NODELIST='n1',
            SLURM_JOB_NUM_NODES='1', SLURM_GPUS_ON_NODE='2')

    def start(self) -> Process:
        return Process(['bash', SCRIPT, self.folder / 'recipe.yaml', '--output', self.folder / 'out'], ROOT,
                       **self.environment)

    def signal_step(self) -> int:
        """Signals every process of the step, as Slurm does, the deepest first; returns how many there were."""
        step = family(int(self.step.read_text()))
        for process in reversed(step):
            os.kill(process, signal.SIGUSR1)
        return len(step)


@pytest.mark.slow
def test_job_at_its_time_limit_writes_a_checkpoint_goes_back_into_the_queue_and_continues(tmp_path):
    job = Job(tmp_path)
    with job.start() as process:
        process.wait_for('Train: 1 [   3/')
        assert job.signal_step() >= 6  # the node's shell, torchrun, two ranks with one loader worker each
        done = process.wait()
    assert done.code == 75, done.err[-3000:]
    assert job.requeued.read_text() == 'requeue 17\n'
    assert 'is killed by signal' not in done.err
    recovery, = (tmp_path / 'out/sam_on-17').glob('recovery-1-*.pth.tar')
    with job.start() as process:  # what Slurm does then
        done = process.wait()
    assert done.code == 0, done.err[-3000:]
    assert recovery.name in done.err
    assert 'Train: 0 [' not in done.err
    assert 'Train: 3 [' in done.err
    assert job.requeued.read_text() == 'requeue 17\n'  # not once more


def test_job_that_fails_does_not_go_back_into_the_queue(tmp_path):
    job = Job(tmp_path)
    (tmp_path / 'bin' / 'torchrun').write_text('#!/bin/bash\nexit 2\n')
    with job.start() as process:
        assert process.wait().code == 2
    assert not job.requeued.exists()
