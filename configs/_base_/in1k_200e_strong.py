# ImageNet with the recipe of the larger VGG-style models (section 5.1): 200 epochs, AutoAugment;
# label smoothing is in their heads. Batch 256 and cosine from 0.1 as RepVGG, which it follows.
_base_ = [
    'mmpretrain::_base_/datasets/imagenet_bs64_autoaug.py',
    'mmpretrain::_base_/schedules/imagenet_bs256_coslr.py',
    'mmpretrain::_base_/default_runtime.py',
]

train_dataloader = dict(batch_size=32)
param_scheduler = dict(T_max=200, end=200)
train_cfg = dict(max_epochs=200)
