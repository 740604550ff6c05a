"""Images of 16 bits, and what cannot be read."""
import io

import numpy as np
import pytest
from PIL import Image, UnidentifiedImageError
from timm.data import ImageDataset

from timm_sam.cli.image_files import eight_bits, readable
from timm_sam.cli.image_folders import open_files

DEEP = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)  # one of each 8-bit value
SHALLOW = np.arange(256, dtype=np.uint8).reshape(16, 16)


def written(values, kind, **options):
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, kind, **options)
    buffer.seek(0)
    return buffer


@pytest.mark.parametrize('kind', ['PNG', 'TIFF'])
def test_sixteen_bits_become_eight(kind):
    image = Image.open(written(DEEP, kind))
    assert image.mode == 'I;16'
    assert (np.asarray(image.convert('L')) == 255).mean() > 0.99  # what Pillow makes of them
    assert np.array_equal(np.asarray(eight_bits(image)), SHALLOW)
    for mode in ('L', 'RGB'):
        with readable(written(DEEP, kind), mode) as file:
            found = np.asarray(Image.open(file).convert(mode))
        assert np.array_equal(found if mode == 'L' else found[..., 2], SHALLOW)


def test_sixteen_bits_are_rounded():
    values = np.array([[0, 128, 129, 65406, 65407, 65535]], dtype=np.uint16)
    assert np.asarray(eight_bits(Image.open(written(values, 'PNG')))).tolist() == [[0, 0, 1, 254, 255, 255]]


def test_big_endian_tiff():
    values = DEEP.astype('>u2')
    image = Image.frombytes('I;16B', (16, 16), values.tobytes())
    assert np.array_equal(np.asarray(eight_bits(image)), SHALLOW)


@pytest.mark.parametrize('kind, values', [('TIFF', np.int32), ('TIFF', np.float32)], ids=['int', 'float'])
def test_numbers_of_no_known_range_are_refused(kind, values):
    with pytest.raises(ValueError, match='32-bit numbers of no known range'):
        eight_bits(Image.open(written(DEEP.astype(values), kind)))
    with pytest.raises(OSError, match='32-bit numbers of no known range'):
        readable(written(DEEP.astype(values), kind), 'RGB')
    readable(written(DEEP.astype(values), kind), 'F')  # asked for


@pytest.mark.parametrize('mode', ['1', 'L', 'RGB', 'RGBA', 'P', 'CMYK'])
def test_image_of_eight_bits_is_the_file_itself(mode):
    buffer = io.BytesIO()
    Image.new(mode, (8, 8)).save(buffer, 'TIFF')
    buffer.seek(0)
    assert readable(buffer, 'RGB') is buffer and buffer.tell() == 0


def test_what_is_no_image_raises_what_timm_passes_over(monkeypatch):
    file = io.BytesIO(b'no image')
    with pytest.raises(UnidentifiedImageError):
        readable(file, 'RGB')
    assert file.closed
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 100)
    bomb = written(DEEP[:16, :16], 'PNG')
    with pytest.raises(OSError, match='decompression bomb'):
        readable(bomb, 'RGB')


@pytest.mark.filterwarnings('ignore:unclosed file:ResourceWarning')  # timm leaves it open
def test_data_set_gives_sixteen_bit_images_as_they_look(tmp_path):
    (tmp_path / 'cat').mkdir()
    Image.fromarray(DEEP).save(tmp_path / 'cat' / '1.png')
    assert (np.asarray(ImageDataset(str(tmp_path))[0][0]) == 255).mean() > 0.99
    assert np.array_equal(np.asarray(open_files(str(tmp_path), 'train', 'x')[0][0])[..., 0], SHALLOW)
