# DyRep in stages C and D: the classifier starts the backbone with its structure, which goes on
# evolving.

# -- Set this ------------------------------------------------------------------------------------
# The last checkpoint of study/resnet18_dyrep_cifar10.py; STAGE_C is the folder of its study.
checkpoint = '{{$STAGE_C:work_dirs/stage-c}}/resnet18_dyrep_cifar10/seed-0/epoch_3.pth'
# ------------------------------------------------------------------------------------------------

_base_ = './frcnn-r18_dyrep-d_bccd.py'

model = dict(
    backbone=dict(init_cfg=dict(type='dyrep_mm.DyRepPretrained', checkpoint=checkpoint)),
)
