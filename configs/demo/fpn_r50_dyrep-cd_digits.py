"""The detector of the demo, C+D: it starts with the structure of the classifier."""

_base_ = './fpn_r50_dyrep_digits.py'

model = dict(
    backbone=dict(
        init_cfg=dict(
            type='dyrep_mm.DyRepPretrained',
            checkpoint='work_dirs/cls_r50_dyrep_digits/epoch_3.pth',
        ),
    ),
)
