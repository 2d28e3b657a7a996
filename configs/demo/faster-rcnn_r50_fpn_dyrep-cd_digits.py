"""The detector of the demo, C+D: it starts with the structure of the classifier."""

# -- Set this ------------------------------------------------------------------------------------
# The last checkpoint of demo/resnet50_dyrep_digits.py.
checkpoint = 'work_dirs/resnet50_dyrep_digits/epoch_3.pth'
# ------------------------------------------------------------------------------------------------

_base_ = './faster-rcnn_r50_fpn_dyrep_digits.py'

model = dict(
    backbone=dict(init_cfg=dict(type='dyrep_mm.DyRepPretrained', checkpoint=checkpoint)),
)
