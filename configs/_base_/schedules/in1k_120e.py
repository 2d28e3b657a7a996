# The recipe of Table 3 and of RepVGG-A2 (section 5.1): 120 epochs, batch 256, SGD with momentum 0.9
# and weight decay 1e-4, cosine learning rate from 0.1.
_base_ = [
    'mmpretrain::_base_/schedules/imagenet_bs256_coslr.py',
    'mmpretrain::_base_/default_runtime.py',
]

param_scheduler = dict(T_max=120, end=120)
train_cfg = dict(max_epochs=120)
