"""Stage C of the demo with DyRep: its checkpoint starts the C+D detector and segmentor."""

_base_ = './cls_r50_digits.py'

# In iterations, since 3 epochs of 50 are few: five updates within 150.
custom_hooks = [dict(type='dyrep_mm.DyRepHook', interval=25, by_epoch=False)]
