# Faster R-CNN R50-FPN, 1x, on COCO (Table 5), DyRep in stage D.
_base_ = './detection/faster-rcnn_r50_fpn_dyrep_1x_coco.py'
