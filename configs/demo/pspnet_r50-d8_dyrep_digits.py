"""The segmentor of the demo with DyRep on its backbone, stage D."""

_base_ = './pspnet_r50-d8_digits.py'

# In iterations, which is what the loop counts: four updates within 160.
default_hooks = dict(dyrep=dict(type='dyrep_mm.DyRepHook', interval=32))
