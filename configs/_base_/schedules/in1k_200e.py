# The recipe of the larger VGG-style models (section 5.1): 200 epochs; label smoothing is in their
# heads. From the authors' files: a warm-up of 5 epochs from 1e-6.
_base_ = './in1k_120e.py'

param_scheduler = [
    dict(
        type='LinearLR',
        start_factor=1e-5,
        by_epoch=True,
        begin=0,
        end=5,
        convert_to_iter_based=True,
    ),
    dict(
        type='CosineAnnealingLR',
        T_max=195,
        eta_min=1e-7,
        by_epoch=True,
        begin=5,
        end=200,
        convert_to_iter_based=True,
    ),
]
train_cfg = dict(max_epochs=200)
