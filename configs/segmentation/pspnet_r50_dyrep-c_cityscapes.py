# DyRep in stage C (Table 5): a classifier trained with DyRep and fused by tools/fuse.py starts
# the plain model.
_base_ = './pspnet_r50_dbb-c_cityscapes.py'

model = dict(
    backbone=dict(init_cfg=dict(checkpoint='work_dirs/resnet50_dyrep_in1k/fused.pth')),
)
