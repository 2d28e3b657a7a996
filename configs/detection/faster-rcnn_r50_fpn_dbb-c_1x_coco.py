# DBB in stage C (Table 5): a classifier trained with DBB starts the plain model.

# -- Set this ------------------------------------------------------------------------------------
# What classification/resnet50_dbb_8xb32-120e_in1k.py leaves, fused by tools/fuse.py.
checkpoint = 'work_dirs/resnet50_dbb_8xb32-120e_in1k/fused.pth'
# ------------------------------------------------------------------------------------------------

_base_ = './faster-rcnn_r50_fpn_1x_coco.py'

model = dict(
    backbone=dict(
        init_cfg=dict(_delete_=True, type='Pretrained', checkpoint=checkpoint, prefix='backbone.'),
    ),
)
