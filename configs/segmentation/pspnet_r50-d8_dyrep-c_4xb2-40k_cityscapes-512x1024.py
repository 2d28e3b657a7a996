# DyRep in stage C (Table 5): a classifier trained with DyRep starts the plain model.

# -- Set this ------------------------------------------------------------------------------------
# What classification/resnet50_dyrep_8xb32-120e_in1k.py leaves, fused by tools/fuse.py.
checkpoint = 'work_dirs/resnet50_dyrep_8xb32-120e_in1k/fused.pth'
# ------------------------------------------------------------------------------------------------

_base_ = './pspnet_r50-d8_dbb-c_4xb2-40k_cityscapes-512x1024.py'

model = dict(backbone=dict(init_cfg=dict(checkpoint=checkpoint)))
