# ImageNet with the recipe of RepVGG-A2 (section 5.1): 120 epochs, crops and flips alone.
_base_ = [
    'mmpretrain::_base_/datasets/imagenet_bs32.py',
    'mmpretrain::_base_/schedules/imagenet_bs256_coslr.py',
    'mmpretrain::_base_/default_runtime.py',
]

param_scheduler = dict(T_max=120, end=120)
train_cfg = dict(max_epochs=120)
