"""Stage C of the demo with DyRep: its checkpoint starts the C+D detector and segmentor."""

_base_ = './resnet50_digits.py'

# In iterations, since 3 epochs of 50 are few: five updates within 150.
default_hooks = dict(dyrep=dict(type='dyrep_mm.DyRepHook', interval=25, by_epoch=False))
