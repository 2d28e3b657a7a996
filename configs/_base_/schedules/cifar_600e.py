# The recipe of Table 2 (section 5.1): 600 epochs, SGD with momentum 0.9 and weight decay 1e-4,
# cosine learning rate from 0.1. From the authors' files: the rate falls in every iteration, to
# 1e-6; no Nesterov momentum, and norms and biases decay too.
_base_ = [
    'mmpretrain::_base_/schedules/cifar10_bs128.py',
    'mmpretrain::_base_/default_runtime.py',
]

param_scheduler = dict(
    _delete_=True,
    type='CosineAnnealingLR',
    by_epoch=True,
    convert_to_iter_based=True,
    T_max=600,
    eta_min=1e-6,
)
train_cfg = dict(max_epochs=600)
default_hooks = dict(checkpoint=dict(interval=50))
