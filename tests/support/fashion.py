"""Files of the format of Fashion-MNIST, made up: image i is of grey level i and class i % 10."""
import gzip

import numpy as np


def write_files(folder, train, test):
    folder.mkdir()
    for name, count in (('train', train), ('t10k', test)):
        grey = np.arange(count, dtype=np.uint8)
        images = np.broadcast_to(grey[:, None, None], (count, 28, 28))
        for kind, magic, sizes, values in (('images-idx3', 2051, (count, 28, 28), images),
                                           ('labels-idx1', 2049, (count,), grey % 10)):
            with gzip.open(folder / f'{name}-{kind}-ubyte.gz', 'wb') as f:
                f.write(np.array([magic, *sizes], '>i4').tobytes() + values.tobytes())
    return folder
