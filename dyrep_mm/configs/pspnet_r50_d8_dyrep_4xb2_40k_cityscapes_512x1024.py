"""``segmentation/pspnet_r50-d8_dyrep_4xb2-40k_cityscapes-512x1024.py`` in Python style."""

globals().update(
    __import__('dyrep_mm.configs').configs.load_config(
        'segmentation/pspnet_r50-d8_dyrep_4xb2-40k_cityscapes-512x1024.py'
    )
)
