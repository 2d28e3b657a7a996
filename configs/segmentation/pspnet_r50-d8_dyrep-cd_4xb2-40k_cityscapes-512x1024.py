# DyRep in stages C and D (Table 5): the classifier's checkpoint starts the backbone with its
# structure, which goes on evolving.

# -- Set this ------------------------------------------------------------------------------------
# The last checkpoint of classification/resnet50_dyrep_8xb32-120e_in1k.py, not fused.
checkpoint = 'work_dirs/resnet50_dyrep_8xb32-120e_in1k/epoch_120.pth'
# ------------------------------------------------------------------------------------------------

_base_ = './pspnet_r50-d8_dyrep-c_4xb2-40k_cityscapes-512x1024.py'

model = dict(
    backbone=dict(init_cfg=dict(type='dyrep_mm.DyRepPretrained', checkpoint=checkpoint)),
)

default_hooks = dict(dyrep=dict(type='dyrep_mm.DyRepHook', preset='paper', interval=3500))
