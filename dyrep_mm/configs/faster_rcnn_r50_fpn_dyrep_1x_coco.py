"""``detection/faster-rcnn_r50_fpn_dyrep_1x_coco.py`` in Python style."""

globals().update(
    __import__('dyrep_mm.configs').configs.load_config(
        'detection/faster-rcnn_r50_fpn_dyrep_1x_coco.py'
    )
)
