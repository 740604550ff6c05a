"""Which folder of images is meant: by --data-dir, by timm's older form without a flag, or by a YAML file."""
import shlex

import pytest

from timm_sam import train
from timm_sam.training.options import parse_args


def test_deprecated_positional_folder_stands_in_for_data_dir(tmp_path):
    args = parse_args(train.build_parser(), [str(tmp_path), '--device', 'cpu'])
    assert args.data_dir == str(tmp_path)


@pytest.mark.parametrize('stray', ['--amp bfloat16', '--model-ema 0.999', '--img-size 64 64', '--sam-sync true'])
def test_value_of_no_flag_beside_data_dir_is_refused(stray, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_args(train.build_parser(), shlex.split(
            f'--data-dir {tmp_path} --device cpu --sam-variant sam --sam-rho 1 {stray}'))
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.startswith('train.py: error: ') and message.count('\n') == 1
    assert f"'{stray.split()[-1]}' belongs to no flag" in message and f'--data-dir {tmp_path} is another' in message


def test_positional_folder_wins_over_that_of_a_file(tmp_path):
    (tmp_path / 'other').mkdir()

    def folder(content, *argv):
        (tmp_path / 'c.yaml').write_text(content)
        argv = [arg if arg.startswith('-') else str(tmp_path / arg) for arg in argv]
        return parse_args(train.build_parser(), [*argv, '-c', str(tmp_path / 'c.yaml'), '--device=cpu']).data_dir

    here, other = str(tmp_path), str(tmp_path / 'other')
    assert folder(f'data_dir: {here}', 'other') == other
    assert folder(f'data: {here}\ndata_dir: {here}', 'other') == other  # as args.yaml of such a run has it
    assert folder(f'data: {here}\ndata_dir: {here}', '--data-dir', 'other') == other
    assert folder(f'data: {here}\ndata_dir: {other}') == other
    assert folder(f'data: {here}') == folder('', '.') == here
    assert folder('', 'other', '--data-dir', 'other') == other
