# ImageNet with AutoAugment, as the larger VGG-style models train (section 5.1). The authors' files
# have RandAugment and random erasing instead: randaug.py.
_base_ = 'mmpretrain::_base_/datasets/imagenet_bs64_autoaug.py'

train_dataloader = dict(batch_size=32)
