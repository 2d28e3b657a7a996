# DyRep in stage D: the plain classifier starts the backbone, which grows from there.
_base_ = './pspnet-r18_camvid.py'

default_hooks = dict(
    dyrep=dict(
        type='dyrep_mm.DyRepHook',
        interval=92,  # iterations, two epochs
        # Growing ends at 5/6 of the training: 10 updates.
        end=920,
        metric='gain',
    ),
)
