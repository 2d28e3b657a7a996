# DyRep in stage D: the plain classifier starts the backbone, which grows from there.
_base_ = './frcnn-r18_bccd.py'

default_hooks = dict(
    dyrep=dict(
        type='dyrep_mm.DyRepHook',
        interval=52,  # iterations: 11 updates
        metric='gain',
    ),
)
