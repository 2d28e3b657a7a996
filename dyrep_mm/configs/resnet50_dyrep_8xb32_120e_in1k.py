"""``classification/resnet50_dyrep_8xb32-120e_in1k.py`` in Python style."""

globals().update(
    __import__('dyrep_mm.configs').configs.load_config(
        'classification/resnet50_dyrep_8xb32-120e_in1k.py'
    )
)
