# Faster R-CNN R50-FPN, 1x, on COCO, ODBB in stage D: RepNAS searches the branches of the ResNet-50.
_base_ = ['./faster-rcnn_r50_fpn_1x_coco.py', '../_base_/methods/odbb.py']

# 12 epochs. The weights are trained already, so branches start small.
default_hooks = dict(dyrep=dict(_base_.pop('dyrep'), warmup=1, fixed=8, init_scale=0.01))
