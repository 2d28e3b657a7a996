_base_ = './resnet50_in1k.py'

# DyRep with the 4 operations of DBB (A.1, Table 8).
custom_hooks = [
    dict(
        type='dyrep_mm.DyRepHook',
        interval=5,  # t (section 5.1)
        branches=['kxk', '1x1', '1x1-kxk', '1x1-avg'],
    ),
]
