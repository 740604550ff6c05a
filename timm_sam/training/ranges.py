"""The range of each number that train.py takes, but for SAM's: those have theirs where they are read or used."""
from ..cli.ranges import (
    ANY,
    BELOW_ONE,
    BETWEEN,
    COUNT,
    NOT_NEGATIVE,
    PIXELS,
    POSITIVE,
    PROBABILITY,
    SEED,
    WORKERS,
    Range,
)

_DATA = {
    "train_num_samples": COUNT,
    "val_num_samples": COUNT,
    "holdout": BETWEEN,
    "holdout_seed": SEED,
    "img_size": PIXELS,
    "input_size": PIXELS,
    "crop_pct": POSITIVE,
    "mean": ANY,
    "std": POSITIVE,
    "batch_size": COUNT,
    "validation_batch_size": COUNT,
    "scale": POSITIVE,
    "ratio": POSITIVE,
    "hflip": PROBABILITY,
    "vflip": PROBABILITY,
    "color_jitter": NOT_NEGATIVE,
    "color_jitter_prob": PROBABILITY,
    "grayscale_prob": PROBABILITY,
    "gaussian_blur_prob": PROBABILITY,
    "aug_repeats": Range(0, 1000),
    "aug_splits": Range(0, 1000),
    "reprob": PROBABILITY,
    "recount": Range(1, 1000),
    "mixup": Range(0, 10 ** 6),  # beyond that NumPy's Beta distribution gives NaN, and long before it is constant
    "cutmix": Range(0, 10 ** 6),
    "cutmix_minmax": PROBABILITY,
    "mixup_prob": PROBABILITY,
    "mixup_switch_prob": PROBABILITY,
    "mixup_off_epoch": NOT_NEGATIVE,
    "train_img_sizes": PIXELS,
    "train_batch_sizes": COUNT,
    "train_size_probs": NOT_NEGATIVE,
    "train_size_schedule_spread": NOT_NEGATIVE,
    "train_size_random_mix": PROBABILITY,
    "train_batches_per_epoch": COUNT,
    "naflex_train_seq_lens": COUNT,
    "naflex_max_seq_len": COUNT,
    "naflex_patch_sizes": PIXELS,
    "naflex_patch_size_probs": NOT_NEGATIVE,
}

_MODEL = {
    "num_classes": COUNT,
    "in_chans": COUNT,
    "head_init_scale": ANY,
    "head_init_bias": ANY,
    "drop": PROBABILITY,
    "norm_drop": BELOW_ONE,  # at 1 nothing is left
    "drop_connect": PROBABILITY,
    "drop_path": PROBABILITY,
    "drop_block": PROBABILITY,
    "bn_momentum": PROBABILITY,
    "bn_eps": POSITIVE,
    "model_ema_decay": BELOW_ONE,
    "distill_loss_weight": NOT_NEGATIVE,
    "task_loss_weight": NOT_NEGATIVE,
    "kd_temperature": POSITIVE,
    "kd_student_feature_dim": COUNT,
    "kd_teacher_feature_dim": COUNT,
}

_OPTIMIZER = {
    "opt_eps": NOT_NEGATIVE,
    "opt_betas": BELOW_ONE,
    "momentum": BELOW_ONE,
    "weight_decay": NOT_NEGATIVE,
    "clip_grad": POSITIVE,  # at 0 nothing is learned, without a word
    "layer_decay": POSITIVE,
    "layer_decay_min_scale": NOT_NEGATIVE,
    "layer_decay_no_opt_scale": NOT_NEGATIVE,
    "grad_accum_steps": NOT_NEGATIVE,  # 0 is 1, as in timm
}

_SCHEDULE = {
    "lr": NOT_NEGATIVE,  # 0 means --lr-base
    "lr_base": NOT_NEGATIVE,
    "lr_base_size": COUNT,
    "lr_noise": NOT_NEGATIVE,
    "lr_noise_pct": POSITIVE,
    "lr_noise_std": NOT_NEGATIVE,
    "lr_stable_timescale": POSITIVE,
    "warmup_lr": NOT_NEGATIVE,
    "min_lr": NOT_NEGATIVE,
    "lr_cycle_mul": POSITIVE,
    "lr_cycle_decay": NOT_NEGATIVE,
    "lr_cycle_limit": NOT_NEGATIVE,
    "lr_k_decay": POSITIVE,
    "epochs": COUNT,
    "epoch_repeats": NOT_NEGATIVE,
    "start_epoch": NOT_NEGATIVE,
    "stop_epoch": COUNT,
    "decay_milestones": COUNT,
    "decay_epochs": POSITIVE,
    "warmup_epochs": NOT_NEGATIVE,
    "cooldown_epochs": NOT_NEGATIVE,
    "patience_epochs": NOT_NEGATIVE,
    "decay_rate": POSITIVE,
}

_LOSS = {
    "smoothing": BELOW_ONE,
    "bce_target_thresh": ANY,
    "loss_weight_power": ANY,
    "loss_weight_beta": BETWEEN,
    "loss_weight_max": POSITIVE,
    "asl_gamma_pos": NOT_NEGATIVE,
    "asl_gamma_neg": NOT_NEGATIVE,
    "asl_clip": BELOW_ONE,
    "poly_epsilon": ANY,
    "poly_gamma": NOT_NEGATIVE,
    "poly_alpha": PROBABILITY,
    "twoway_tp": POSITIVE,
    "twoway_tn": POSITIVE,
    "db_neg_scale": POSITIVE,
    "db_init_bias": NOT_NEGATIVE,
    "db_focal_gamma": NOT_NEGATIVE,
    "bce_pos_weight": POSITIVE,
    "multilabel_threshold": BETWEEN,
}

_RUN = {
    "seed": SEED,
    "workers": WORKERS,
    "val_interval": COUNT,
    "tta": NOT_NEGATIVE,
    "log_interval": COUNT,
    "recovery_interval": NOT_NEGATIVE,
    "checkpoint_hist": COUNT,
    "save_epochs": COUNT,
}

RANGES = {**_DATA, **_MODEL, **_OPTIMIZER, **_SCHEDULE, **_LOSS, **_RUN}
# accepted for launchers of old, which pass -1 too, and ignored
WITHOUT_RANGE = ("local_rank",)
