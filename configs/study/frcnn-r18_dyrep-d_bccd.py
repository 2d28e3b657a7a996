# DyRep in stage D: the plain classifier starts the backbone, which grows from there.
_base_ = './frcnn-r18_bccd.py'

default_hooks = dict(
    dyrep=dict(
        type='dyrep_mm.DyRepHook',
        interval=26,  # iterations, an epoch
        # Growing ends at 5/6 of the training: 10 updates.
        end=260,
        metric='gain',
    ),
)
