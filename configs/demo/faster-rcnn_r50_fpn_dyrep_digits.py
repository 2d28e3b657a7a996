"""The detector of the demo with DyRep on its backbone, stage D."""

_base_ = './faster-rcnn_r50_fpn_digits.py'

default_hooks = dict(
    dyrep=dict(
        type='dyrep_mm.DyRepHook',
        interval=32,  # iterations, which is what the loop counts: four updates within 160
        metric='snip',  # the default cancels in front of BN that trains
        # Thousands of iterations move scales by hundredths, which is what the default waits for.
        prune_threshold=5e-5,
    ),
)
