"""The segmentor of the demo, C+D: it starts with the structure of the classifier."""

# -- Set this ------------------------------------------------------------------------------------
# The last checkpoint of demo/resnet50_dyrep_digits.py.
checkpoint = 'work_dirs/resnet50_dyrep_digits/epoch_3.pth'
# ------------------------------------------------------------------------------------------------

_base_ = './pspnet_r50-d8_dyrep_digits.py'

model = dict(
    backbone=dict(init_cfg=dict(type='dyrep_mm.DyRepPretrained', checkpoint=checkpoint)),
)
