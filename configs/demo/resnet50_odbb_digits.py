"""Stage C of the demo with RepNAS: a search among the branches of all convs."""

_base_ = './resnet50_digits.py'

# In iterations, of 150 in all: warm-up, 35 of search, and the fixed path.
default_hooks = dict(
    dyrep=dict(type='dyrep_mm.RepNASHook', keep=0.34, warmup=15, fixed=100, by_epoch=False)
)
