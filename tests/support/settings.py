"""A run of the paper and the setting it shares with others, as data; what the paper leaves open in all of them."""
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Row:
    """A run of the paper: what is perturbed how, and its accuracy there; None stands for plain, illegible, none."""

    variant: str | None = None
    params: str | None = None
    rho: float | None = None
    accuracy: str | None = None
    with_aa: str | None = None  # the accuracy with --aa cifar10, where the table has both


@dataclass(frozen=True)
class Setting:
    """The rows of a table that share everything but SAM."""

    tables: tuple[str, ...]
    devices: int
    values: dict
    rows: dict[str, Row]
    own: dict[str, dict] = field(default_factory=dict)  # values of the rows whose names begin so

    def of(self, name: str) -> dict:
        row = self.rows[name]
        values = dict(self.values, sam_variant=row.variant, sam_rho=row.rho)
        values['sam_params'] = row.params or 'onlynorm'
        for start, more in self.own.items():
            if name.startswith(start):
                values.update(more)
        return values


def rows(plain: Row, *sam: Row, plain_name: str = 'sgd', start: str = '') -> dict[str, Row]:
    return {plain_name: plain, **{f'{start}{r.variant}_{r.params}': r for r in sam}}


# what the paper leaves open, or says of all runs
OPEN = dict(grad_accum_steps=1, clip_grad=None, amp=False, model_ema=False, mixup=0, cutmix=0, reprob=0, drop=0,
            color_jitter=0, hflip=0.5, vflip=0, train_crop_mode='rrc', sched='cosine', sched_on_updates=False,
            smoothing=0.1, interpolation='bicubic', sam_eta=None, sam_bn_stats='clean', sam_m=None, sam_sync=False,
            sam_ascent_fraction=1, sam_every=1, sam_start_epoch=0, sam_end_epoch=None, no_aug=False, bce_loss=False,
            lr_noise=None, layer_decay=None, aug_repeats=0, drop_block=None, dataset='')
