# DyRep in stage C (Table 5): a classifier trained with DyRep starts the plain model.

# -- Set this ------------------------------------------------------------------------------------
# What classification/resnet50_dyrep_8xb32-120e_in1k.py leaves, fused by tools/fuse.py.
checkpoint = 'work_dirs/resnet50_dyrep_8xb32-120e_in1k/fused.pth'
# ------------------------------------------------------------------------------------------------

_base_ = './faster-rcnn_r50_fpn_dbb-c_1x_coco.py'

model = dict(backbone=dict(init_cfg=dict(checkpoint=checkpoint)))
