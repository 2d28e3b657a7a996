# The plain row of Table 5: the config of the library as it is.
_base_ = 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'
