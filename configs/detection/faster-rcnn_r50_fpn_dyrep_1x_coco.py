# Faster R-CNN R50-FPN, 1x, on COCO (Table 5), DyRep in stage D: training starts from a plain
# ResNet-50 and its backbone grows from there.
_base_ = './faster-rcnn_r50_fpn_1x_coco.py'

# 12 epochs: one update after each but the last.
default_hooks = dict(dyrep=dict(type='dyrep_mm.DyRepHook', preset='paper', interval=1))
